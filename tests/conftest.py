import logging
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def warnings_seen_every_time():
    """transformers keeps its log from pytest, and warns of each thing once: undone, so that tests see every warning."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()
    root = logging.getLogger("transformers")
    propagate, root.propagate = root.propagate, True
    yield
    root.propagate = propagate


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of the official implementation, see tests/golden/README.md."""
    return Path(__file__).parent / "golden"

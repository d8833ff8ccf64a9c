from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of the official implementation, see tests/golden/README.md."""
    return Path(__file__).parent / "golden"

import logging
from pathlib import Path

import pytest
from hub_server import HubServer


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


@pytest.fixture
def hub():
    """An empty loopback Hub; processes talk to it by `hub.run` or with `hub.environment`, this one by `hub_here`."""
    with HubServer() as server:
        yield server


@pytest.fixture
def hub_here(hub, monkeypatch, tmp_path):
    """The Hub of `huggingface_hub` in this process, with a token that may write and without waiting between tries."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + _URL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


_URL = "/{repo_id}/resolve/{revision}/{filename}"

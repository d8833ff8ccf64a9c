import gc
import logging
from pathlib import Path

import pytest
from hub_server import HubServer


# What `make test-fast` leaves out: files whose tests train, compile, or start processes of their own, the longest first. Single tests
# of other files are marked where they are.
SLOW = [
    "model/test_backends.py",
    "model/test_triton.py",
    "hub/test_end_to_end.py",
    "model/test_framework.py",
    "test_bench_against.py",
    "cli/test_start_up.py",
    "model/test_mixed_precision.py",
    "hub/test_model_card.py",
    "hub/test_hub_cards.py",
    "hub/test_publish.py",
    "test_benchmark.py",
    "cli/test_commands.py",
    "hub/test_checks.py",
    "test_package.py",
    "training/test_resume.py",
    "analysis/test_report.py",
    "hub/test_hostile_records.py",
    "model/test_remote.py",
    "training/test_ranks.py",
    "model/test_generation.py",
    "training/test_run.py",
    "model/test_extremes.py",
    "training/test_sweep.py",
    "training/test_processes.py",
    "hub/test_spaces.py",
    "test_metrics.py",
    "hub/test_push_to_hub.py",
    "tasks/test_own_task.py",
    "test_notebooks.py",
    "training/test_arguments.py",
    "training/test_text_runs.py",
    "model/test_text.py",
    "test_readme.py",
    "model/test_functions_cpu.py",
    "model/test_mutations.py",
    "training/test_sharding.py",
    "analysis/test_combinations.py",
    "training/test_trainer.py",
    "training/test_optimizers.py",
    "training/test_weights.py",
    "demo/test_puzzles.py",
    "test_bench_products.py",
    "demo/test_browser.py",
]


def pytest_collection_modifyitems(items):
    order = {Path(__file__).parent / name: place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path in order:
            item.add_marker(pytest.mark.slow)
    # Files that run side by side then end at about the same time, and few compile the same kernel at once.
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="module", autouse=True)
def modules_set_aside():
    """
    Every training ends with a collection of garbage, which takes long where many modules are loaded. What is loaded before a file's
    tests is set aside here, since the tests train some hundred times.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # otherwise, some libraries report leaks at the end of the process


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

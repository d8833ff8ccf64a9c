"""Finished runs for tests of cards and publishing."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.cli import main
from hf_hyla.hub.dataset_card import write_dataset_card
from hf_hyla.runs import RunRecord
from hf_hyla.tasks import get_task
from hf_hyla.tasks.data import write_data


PROJECT = Path(__file__).parents[2]
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
TRAINER = {
    "max_steps": 6, "learning_rate": 1e-2, "warmup_steps": 1, "weight_decay": 0.1, "train_batch_size": 4,
    "eval_steps": 3, "save_steps": 3, "logging_steps": 2, "eval_samples": 16, "disable_tqdm": True,
}  # fmt: skip
TASKS = {"logic": {"name": "logic", "num_examples": 4}, "sraven": {"name": "sraven", "num_features": 2}}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Trains a tiny model, by `trained(task, **changes of the trainer)`, as if the checkout had no changes."""

    def run(task: str, **changes) -> Path:
        folder = tmp_path_factory.mktemp(task)
        sections = {"task": TASKS[task], "model": SMALL, "trainer": TRAINER | changes}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(sections))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_hyla.runs.environment._git_commit", lambda: "0" * 40)
            papers = type(get_task(task)).num_samples.fget
            short = property(lambda self: dict.fromkeys(self.splits, 64) | {"train": papers(self)["train"]})
            patch.setattr(type(get_task(task)), "num_samples", short)
            assert main(["train", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
        return folder / "run"

    return run


@pytest.fixture(scope="session")
def logic_run(trained) -> Path:
    return trained("logic")


@pytest.fixture(scope="session")
def other_seed(trained) -> Path:
    return trained("logic", seed=1)


@pytest.fixture(scope="session")
def sraven_run(trained) -> Path:
    return trained("sraven")


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> Path:
    """The committed record of the demo, beside a model of its size that was never trained."""
    run = tmp_path_factory.mktemp("demo") / "run"
    record = RunRecord.load(PROJECT / "recipes" / "results" / "logic-demo" / "0.json")
    record.digests = None  # those of the run's own files, which are not in the checkout
    task = get_task(**record.recipe["task"])
    HylaForSequenceClassification(HylaConfig(**task.model_defaults | record.recipe["model"])).save_pretrained(run)
    record.save(run)
    (run / "resolved_recipe.yaml").write_text(yaml.safe_dump(record.recipe))
    return run


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A folder of `hyla data`, and a file of somebody's in it."""
    folder = tmp_path / "data"
    task = get_task("sraven", num_features=2)
    write_data(task, ["train", "ood"], 10, folder)
    write_dataset_card(task, folder)
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def copied(tmp_path):
    """A copy of a run that a test may spoil, by `copied(run)`; `changes` are written into its run.json."""

    def copy(run: Path, **changes) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(run, folder)
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | changes, indent=2) + "\n")
        return folder

    return copy

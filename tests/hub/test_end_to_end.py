"""
Train, publish, load in new processes with and without the package, fine-tune, publish again; over the loopback Hub.

Nothing is shared between the processes but the server, each has a cache of its own.
"""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_server import HubServer

from hf_hyla import HylaForSequenceClassification
from hf_hyla.hub.publish import publish
from hf_hyla.hub.repository import plan
from hf_hyla.runs import Run
from hf_hyla.tasks import get_task
from hf_hyla.training import load_recipe
from hf_hyla.training.weights import initial_model


FINETUNE = Path(__file__).parents[2] / "recipes" / "sraven" / "finetune.py"
LOGIC, SRAVEN, DATA = "org/hyla-logic", "org/hyla-sraven", "org/sraven-num_features-2"
PUZZLE = [[[0, 1], [1, 1], [2, 1]], [[3, 5], [4, 5], [5, 5]], [[1, 0], [2, 0], None]]
TABLE = [[0.1, 0.9, 0.3, 0.4, 0.7], [0.2, 0.8, 0.5, 0.4, 0.2], [0.6, 0.1, 0.3, 0.9, 0.5], [0.5, 0.5, 0.2, 0.1, None]]
# As the fixtures train: on short splits, and as if the checkout had no changes.
PRELUDE = """
    import json, runpy, sys, torch
    import hf_hyla.runs.environment
    from pathlib import Path
    from transformers import AutoModelForSequenceClassification, pipeline
    from hf_hyla.cli import main
    from hf_hyla.tasks import TASKS
    hf_hyla.runs.environment._git_commit = lambda: "0" * 40
    for task in TASKS.values():
        task.num_samples = property(lambda self: dict.fromkeys(self.splits, 64))
    """
WITHOUT_PACKAGE = """
    import sys
    sys.modules["hf_hyla"] = None  # any import of the package fails
    import json, torch
    from pathlib import Path
    from transformers import AutoModelForSequenceClassification, pipeline
    """
# What both kinds of process do: ask the published models.
ASKED = f"""
    asked = json.loads(Path("asked.json").read_text())
    ids, values = torch.tensor(asked["ids"]), torch.tensor(asked["values"])

    def answers(**how):
        logic = AutoModelForSequenceClassification.from_pretrained("{LOGIC}", **how).eval()
        sraven = AutoModelForSequenceClassification.from_pretrained("{SRAVEN}", **how).eval()
        solve, fill = (pipeline("symbolic-reasoning", model=name, **how) for name in ("{SRAVEN}", "{LOGIC}"))
        return {{
            "module": type(logic).__module__.partition(".")[0],
            "sraven": sraven(input_ids=ids).logits.tolist(),
            "logic": logic(input_values=values).logits.tolist(),
            "solved": solve({PUZZLE}),
            "filled": fill({TABLE}),
        }}
    """


@pytest.fixture(scope="module")
def asked(logic_run, sraven_run) -> dict:
    """Inputs, and what the trained models say of them in this process."""
    ids = torch.randint(0, 9, (3, 18), generator=torch.Generator().manual_seed(0))
    values = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    logic, sraven = (HylaForSequenceClassification.from_pretrained(run).eval() for run in (logic_run, sraven_run))
    with torch.no_grad():
        return {
            "ids": ids.tolist(),
            "values": values.tolist(),
            "sraven": sraven(input_ids=ids).logits.tolist(),
            "logic": logic(input_values=values).logits.tolist(),
        }


@pytest.fixture(scope="module")
def published(logic_run, sraven_run, tmp_path_factory):
    """A Hub on which the command has published two models and a dataset; the first commit of each is theirs."""
    command = f"""
    data = ["--task.num_features", "2", "--split", "train", "ood", "--num-examples", "10", "--output", "data"]
    assert main(["data", "sraven", *data]) == 0
    assert main(["publish", {str(logic_run)!r}, "--repo-id", "{LOGIC}"]) == 0
    assert main(["publish", {str(sraven_run)!r}, "--repo-id", "{SRAVEN}", "--dataset", "data"]) == 0
    """
    with HubServer() as hub:
        hub.run(PRELUDE + command, tmp_path_factory.mktemp("publisher"), hub.token)
        assert set(hub.repos) == {("model", LOGIC), ("model", SRAVEN), ("dataset", DATA)}
        yield hub


@pytest.fixture
def home(tmp_path, asked) -> Path:
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    return tmp_path


def test_a_new_process_loads_models_pipeline_and_dataset_by_their_names(published, home, asked):
    printed = published.run(
        PRELUDE
        + ASKED
        + """
    from datasets import load_dataset
    puzzles = load_dataset("org/sraven-num_features-2", split="ood")
    print(json.dumps([answers(), puzzles["panels"][:], puzzles["answer"][:]]))
    """,
        home,
    )
    answers, panels, last = json.loads(printed)
    assert answers["module"] == "hf_hyla"
    assert (answers["sraven"], answers["logic"]) == (asked["sraven"], asked["logic"])
    drawn = get_task("sraven", num_features=2).samples("ood", range(10))
    assert last == drawn["labels"].tolist()
    assert np.array_equal(np.reshape(panels, (10, 16)), drawn["input_ids"][:, :16])


def test_a_process_without_the_package_gets_the_same_outputs_by_the_repositorys_code(
    published, home, asked, logic_run, sraven_run
):
    printed = published.run(WITHOUT_PACKAGE + ASKED + "\n    print(json.dumps(answers(trust_remote_code=True)))", home)
    answers = json.loads(printed)
    assert answers["module"] == "transformers_modules"
    assert (answers["sraven"], answers["logic"]) == (asked["sraven"], asked["logic"])
    assert len(answers["solved"]["answer"]) == 2 and isinstance(answers["filled"]["answer"], float)


def test_a_published_checkpoint_is_fine_tuned_by_a_recipe_and_published_with_its_revision_pinned(
    published, home, asked, sraven_run
):
    repo = published.repo(LOGIC)
    first = repo.head
    (home / "tune.yaml").write_text(
        f"""
task: {{name: logic, num_examples: 4}}
model: {{model_name_or_path: {LOGIC}}}
trainer: {{max_steps: 6, learning_rate: 0.05, warmup_steps: 1, weight_decay: 0.1, train_batch_size: 4,
          eval_samples: 16, disable_tqdm: true}}
"""
    )
    printed = published.run(
        PRELUDE
        + f"""
    assert main(["train", "tune.yaml", "--output", "tuned"]) == 0
    assert main(["publish", "tuned", "--repo-id", "{LOGIC}"]) == 0
    asked = json.loads(Path("asked.json").read_text())

    def logits(**how):
        model = AutoModelForSequenceClassification.from_pretrained("{LOGIC}", **how).eval()
        return model(input_values=torch.tensor(asked["values"])).logits.tolist()

    assert main(["train", "tune.yaml", "--output", "other", "--model.revision", "no-such"]) == 2
    assert main(["train", "tune.yaml", "--output", "other", "--model.attention_type", "softmax"]) == 2
    assert not Path("other").exists()
    print(json.dumps([logits(revision="{first}"), logits()]))

    sys.argv = ["finetune.py", "{SRAVEN}", "five", "org/five", "trainer.max_steps=4", "trainer.warmup_steps=1",
                "trainer.learning_rate=0.1", "trainer.eval_samples=16", "trainer.disable_tqdm=true"]
    runpy.run_path({str(FINETUNE)!r}, run_name="__main__")
    assert main(["publish", "five", "--repo-id", "org/five"]) == 0
    sys.argv[1:4] = [{str(sraven_run)!r}, "five-local"]
    runpy.run_path({str(FINETUNE)!r}, run_name="__main__")
    """,
        home,
        published.token,
    )
    pinned, latest = next(json.loads(line) for line in printed.splitlines() if line.startswith("[["))
    assert pinned == asked["logic"] != latest
    record = json.loads((home / "tuned" / "run.json").read_text())
    assert record["recipe"]["model"] == {"model_name_or_path": LOGIC, "revision": first}
    assert len(repo.commits) == 3 and repo.files(first)["model.safetensors"] != repo.files()["model.safetensors"]
    assert "`hyla publish five --repo-id org/five` would send:" in printed
    assert re.search(r"^ood +accuracy +[0-9.]+ +[0-9.]+\n(.*\n)*.* {2}model.safetensors$", printed, re.MULTILINE)
    assert f"commit `{published.repo(SRAVEN).head}`" in published.repo("org/five").files()["README.md"].decode()
    assert printed.count("before") == 2 and (home / "five-local" / "run.json").exists()
    assert f"base_model: {LOGIC}" in repo.files()["README.md"].decode()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}"], "Usage: python recipes/sraven/finetune.py MODEL OUTPUT"),
        (["{run}", "{home}/five", "org/five"], "which nobody else has: publish that model first"),
        (["{run}", "{home}/five", "five"], "A repository is named ORG/NAME, got 'five'"),
        (["{run}", "{run}"], "holds a run of another recipe"),
        (["{home}/nowhere", "{home}/five"], "cannot be loaded"),
    ],
)
def test_the_fine_tuning_script_reports_errors_in_a_sentence_before_it_trains(
    sraven_run, tmp_path, monkeypatch, words, message
):
    monkeypatch.setattr("hf_hyla.hub.publish.environment", lambda: {"git_commit": "0" * 40})
    monkeypatch.setattr("hf_hyla.training.run.HylaTrainer", lambda **_: pytest.fail("it trains"))
    monkeypatch.setattr("sys.argv", ["finetune.py", *(word.format(run=sraven_run, home=tmp_path) for word in words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FINETUNE), run_name="__main__")
    assert message in ended.value.code and "\n" not in ended.value.code
    assert not (tmp_path / "five").exists()


@pytest.fixture(scope="module")
def planned(logic_run):
    [repository] = plan(Run.load(logic_run), LOGIC)
    return repository


@pytest.mark.parametrize("fault", [429, 500, 503, "cut"])
def test_a_recipe_is_refused_while_its_checkpoint_cannot_be_reached(planned, hub_here, tmp_path, fault):
    publish([planned])
    sections = {
        "task": {"name": "logic", "num_examples": 4},
        "model": {"model_name_or_path": LOGIC},
        "trainer": {"max_steps": 4, "learning_rate": 0.1, "warmup_steps": 1, "weight_decay": 0.1},
    }
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(sections))
    hub_here.fail(f"/{LOGIC}/resolve", with_=fault, times=50)
    with pytest.raises(ValueError, match="model_name_or_path: org/hyla-logic cannot be loaded") as refused:
        load_recipe(tmp_path / "tune.yaml")
    assert "\n" not in str(refused.value)
    hub_here.heal()
    recipe = load_recipe(tmp_path / "tune.yaml")
    hub_here.fail("model.safetensors", with_=fault, times=50)
    with pytest.raises((ValueError, OSError)):
        initial_model(recipe.settings["model"], recipe.config)
    hub_here.heal()
    assert recipe.settings["model"]["revision"] == hub_here.repo(LOGIC).head
    assert (
        initial_model(recipe.settings["model"], recipe.config).num_parameters()
        == HylaForSequenceClassification(recipe.config).num_parameters()
    )


@pytest.mark.parametrize("request_", ["preupload", "PUT /storage", "objects/batch"])
@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "slow"])
def test_a_temporary_fault_is_retried_and_the_run_is_published_completely(planned, hub_here, request_, fault):
    hub_here.slow_seconds = 0.1
    hub_here.fail(request_, with_=fault, times=2)
    publish([planned])
    files = hub_here.repo(LOGIC).files()
    expected = {name: c.read_bytes() if isinstance(c, Path) else c for name, c in planned.files.items()}
    assert {name: files[name] for name in expected} == expected
    assert len(hub_here.repo(LOGIC).commits) == 2
    assert sum(request_ in request for request in hub_here.requests) >= (1 if fault == "slow" else 3)

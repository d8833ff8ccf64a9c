"""Tests of a user's own task in a separate file: training, scores, probes, data and cards. Its code runs only on request."""

import json
import re
import sys

import datasets
import numpy as np
import pytest

from hf_hyla.cli import main
from hf_hyla.runs import Run, RunRecord
from hf_hyla.runs.compare import compare
from hf_hyla.tasks import Task, get_task
from hf_hyla.training import HylaTrainer


# What somebody writes who uses this package.
MODULE = '''
"""Sums of two numbers modulo num_values, of which some are held out."""

import dataclasses
from functools import cached_property

import datasets
import numpy as np

from hf_hyla.tasks import Task
from hf_hyla.tasks.sampling import below


@dataclasses.dataclass
class SumTask(Task):
    name = "sums"
    model_columns = ("input_ids", "labels")
    metric_names = ("accuracy",)

    num_values: int = 5
    held_out: float = 0.2

    @property
    def num_samples(self):
        return {"train": 512, "test": 300, "ood": 300}

    @property
    def model_interface(self):
        return {"vocab_size": 2 * self.num_values + 1, "answer_token_id": 2 * self.num_values, "num_answers": 1,
                "num_labels": self.num_values}

    @property
    def model_defaults(self):
        return self.model_interface | {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16,
                                       "num_attention_heads": 2, "relative_attention_num_buckets": 3}

    @cached_property
    def split_combinations(self):
        numbers = np.arange(self.num_values)
        pairs = np.stack(np.meshgrid(numbers, self.num_values + numbers, indexing="ij"), axis=-1).reshape(-1, 2)
        train, held_out = self.hold_out(pairs, self.held_out)
        return {"train": train, "test": train, "ood": held_out}

    def draw(self, split, indices):
        pairs = self.split_combinations[split]
        parts = pairs[below(self.random_words(split, indices, 1)[:, 0], len(pairs))]
        question = np.full((len(parts), 1), 2 * self.num_values)
        labels = parts.sum(axis=1) % self.num_values
        return {"input_ids": np.concatenate([parts, question], axis=1), "labels": labels, "parts": parts}

    def metrics(self, logits, labels, inputs):
        return {"accuracy": float((logits.argmax(axis=-1) == labels).mean())}

    def text_features(self):
        return datasets.Features({name: datasets.Value("string") for name in ("prompt", "answer_text")})

    def text_columns(self, split, indices, samples):
        prompts = [f"{a} + {b} = " for a, b in (samples["parts"] - [0, self.num_values]).tolist()]
        answers = [str(label) for label in samples["labels"].tolist()]
        return {"prompt": np.array(prompts, dtype=object), "answer_text": np.array(answers, dtype=object)}


@dataclasses.dataclass
class WeightedSumTask(SumTask):
    """Sums whose errors are weighted by a second column of labels."""

    model_columns = ("input_ids", "labels", "weights")
    label_columns = ("labels", "weights")
    metric_names = ("error",)
    greater_is_better = False

    def draw(self, split, indices):
        samples = super().draw(split, indices)
        return samples | {"weights": 1.0 + samples["parts"][:, 0]}

    def metrics(self, logits, labels, inputs):
        labels, weights = labels
        return {"error": float(((logits.argmax(axis=-1) != labels) * weights).mean())}
'''
RECIPE = """
task: {name: my_sums:SumTask, num_values: 4}
model: {}
trainer: {max_steps: 150, learning_rate: 1.0e-2, warmup_steps: 5, weight_decay: 0.0, train_batch_size: 32,
          eval_steps: 150, save_steps: 150, logging_steps: 50, eval_samples: 64, disable_tqdm: true}
"""
RECORDED = {"name": "my_sums:SumTask", "num_values": 4, "held_out": 0.2, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which somebody works, on the path as PYTHONPATH=. puts it there."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_sums.py").write_text(MODULE)
    (folder / "sums.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr("hf_hyla.runs.environment._git_commit", lambda: "0" * 40)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder
    sys.modules.pop("my_sums", None)


@pytest.fixture(scope="module")
def run(folder):
    assert main(["train", str(folder / "sums.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_a_users_task_without_held_out_combinations_trains_and_its_card_speaks_of_none(folder, tmp_path, monkeypatch):
    (tmp_path / "plain_sums.py").write_text(
        MODULE.replace(
            '    name = "sums"\n', '    name = "sums"\n    splits = {"train": "for training", "test": "new samples"}\n'
        )
        .replace(
            '    metric_names = ("accuracy",)\n', '    metric_names = ("accuracy",)\n    headline_split = "test"\n', 1
        )
        .replace(', "ood": 300}', "}")
        .replace(', "ood": held_out}', "}")
    )
    monkeypatch.syspath_prepend(tmp_path)
    few = [word for key in ("max_steps", "eval_steps", "save_steps") for word in (f"--trainer.{key}", "20")]
    command = ["train", str(folder / "sums.yaml"), "--task.name", "plain_sums:SumTask", *few]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    card_of = ["--import", "plain_sums", "card", str(tmp_path / "run"), "--output", str(tmp_path / "card")]
    assert main(card_of) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "The question is the first sample of `test`." in card and "# The first sample of test: new samples." in card
    assert "It was trained for this one task, in exactly this size." in card
    assert "combination" not in card and "documents" not in card and "ood" not in card
    data = ["data", "plain_sums:SumTask", "--num-examples", "20", "--output", str(tmp_path / "data")]
    assert main(data) == 0
    card = (tmp_path / "data" / "README.md").read_text()
    assert "ood" not in card and "- arxiv:" not in card and "compositional" not in card


@pytest.fixture
def new_process(monkeypatch):
    """As if nothing had imported the module yet."""
    monkeypatch.delitem(sys.modules, "my_sums", raising=False)


def test_a_users_task_trains_and_its_record_names_it(run):
    record = RunRecord.load(run)
    assert record.recipe["task"] == RECORDED
    assert set(record.metrics) == {"test", "ood"} and record.metrics["test"]["accuracy"] > 0.9
    assert record.data_fingerprint == get_task(**RECORDED).fingerprint()
    [compared] = compare([record])
    assert compared.metric == "ood/accuracy" and compared.paper is None


def test_a_users_task_is_evaluated_as_a_whole_and_by_combination(run, capsys):
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    [score] = re.findall(r"test/accuracy: (\S+)", capsys.readouterr().out)
    assert float(score) == pytest.approx(RunRecord.load(run).metrics["test"]["accuracy"], abs=1e-4)
    assert main(["evaluate", str(run), "--split", "ood", "--by-combination", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["combinations"]
    assert {tuple(one["parts"]) for one in found} == set(get_task(**RECORDED).combinations("ood"))


def test_a_task_with_several_columns_of_labels_and_an_error_to_be_small(folder, capsys):
    command = [
        "train",
        str(folder / "sums.yaml"),
        "--task.name",
        "my_sums:WeightedSumTask",
        "--trainer.max_steps",
        "12",
    ]
    output = folder / "weighted"
    assert main([*command, "--output", str(output)]) == 0
    scores = RunRecord.load(output).metrics["ood"]
    assert set(scores) == {"loss", "error", "num_samples"}
    capsys.readouterr()
    assert main(["evaluate", str(output), "--split", "ood", "--by-combination", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["combinations"]
    errors = [one["scores"]["error"] for one in found]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) > 1  # the worst first
    mean = sum(one["num_samples"] * error for one, error in zip(found, errors, strict=True)) / 300
    assert mean == pytest.approx(scores["error"], abs=1e-6)


def test_a_users_task_is_probed_and_gets_a_card_and_a_complete_repository(run, capsys):
    assert main(["probe", str(run), "--train-samples", "300", "--num-samples", "300", "--split", "test"]) == 0
    report = json.loads((run / "probe" / "probe.json").read_text())
    assert report["task"] == RECORDED
    assert {result["subject"] for result in report["probes"]} == {"part", "target"}
    assert main(["publish", str(run), "--repo-id", "org/sums-model", "--output", str(run.parent / "hub")]) == 0
    card = (run.parent / "hub" / "sums-model" / "README.md").read_text()
    assert "trained on **sums**." in card and "](probe/probes.png)" in card and "modeling_hyla.py" not in card
    results, _, rest = card.partition("## Use")
    assert "paper" not in results and "paper's" not in rest
    assert (
        "| accuracy | runs | training samples | `test` | `ood` |\n| --- | --- | --- | --- | --- |\n| **HYLA" in results
    )
    [code, shown] = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)\n```", card, flags=re.DOTALL).groups()
    sample = get_task(**RECORDED).dataset("ood")[0]
    assert f"input_ids = torch.tensor([{sample['input_ids'].tolist()}])" in code
    assert shown.endswith(f"right is {sample['labels']}") and shown.startswith("logits [")
    assert "- org/sums-num_values-4" in card  # its dataset, which names what is not the default
    assert (run.parent / "hub" / "sums-model" / "modeling_hyla.py").exists()
    for words, message in ((["--metric"], "leave out --metric"), (["--space"], "leave out --space")):
        assert main(["publish", str(run), "--repo-id", "org/x", "--dry-run", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_users_task_has_its_data_written_with_a_card_and_read_back(folder):
    command = ["data", "my_sums:SumTask", "--task.num_values", "4", "--num-examples", "40", "--output", "{}"]
    assert main([word.format(folder / "data") for word in command]) == 0
    loaded = datasets.load_dataset(str(folder / "data"), split="ood")
    drawn = get_task(**RECORDED).samples("ood", np.arange(40))
    assert set(loaded.column_names) == set(drawn)
    assert all(np.array_equal(np.array(loaded[name]), column) for name, column in drawn.items())
    card = (folder / "data" / "README.md").read_text()
    assert "hyla data my_sums:SumTask --split ood --num-examples 40 --task.num_values 4" in card
    assert "{{" not in card and "Attention as a Hypernetwork](" not in card


def test_a_users_task_is_written_as_text(folder):
    command = ["data", "my_sums:SumTask", "--format", "text", "--split", "test", "--num-examples", "20", "--output"]
    assert main([*command, str(folder / "text")]) == 0
    for row in datasets.load_dataset(str(folder / "text"), split="test"):
        a, b = row["prompt"].removesuffix(" = ").split(" + ")
        assert int(row["answer_text"]) == (int(a) + int(b)) % 5 == row["labels"]
    assert "{{" not in (folder / "text" / "README.md").read_text()


@pytest.mark.parametrize("command", ["evaluate", "probe", "card", "compare"])
def test_a_record_never_makes_a_users_code_run(run, new_process, capsys, command):
    assert main([command, str(run)]) == 2
    error = capsys.readouterr().err
    assert "a name in a file is not enough to run it" in error and "hyla --import my_sums" in error
    assert "my_sums" not in sys.modules


def test_a_users_task_runs_where_the_user_names_it(run, new_process, monkeypatch, tmp_path, capsys):
    sample = ["--split", "test", "--num-samples", "10"]
    assert main(["evaluate", str(run), "--task", "my_sums:SumTask", *sample]) == 0
    monkeypatch.delitem(sys.modules, "my_sums")
    assert main(["--import", "my_sums", "evaluate", str(run), *sample]) == 0
    monkeypatch.delitem(sys.modules, "my_sums")
    assert main(["--import", "my_sums", "card", str(run), "--output", str(tmp_path)]) == 0
    assert isinstance(Run.load(run).task, Task)
    assert main(["--import", "no_such_module", "compare", str(run)]) == 2
    assert "PYTHONPATH=." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Task", "no_such_module cannot be imported (ModuleNotFoundError"),
        ("my_sums:Missing", "is not a task: expected a subclass of hf_hyla.tasks.Task"),
        ("my_sums:below", "is not a task"),
        ("my_sums:Task", "is incomplete: it lacks draw, metrics, model_defaults"),
        ("os:system", "is not a task"),
        ("my_sums", "There is no task 'my_sums': expected one of logic, sraven, text, or module:Class"),
        ("half:Taken", "needs a name in lower case and without spaces"),
        ("plain:SumTask", "is not a dataclass: put @dataclasses.dataclass before the class"),
        ("unscored:SumTask", "is incomplete: it lacks metric_names"),
        ("unread:SumTask", "is incomplete: it lacks model_columns"),
        ("unsplit:SumTask", "must include train and its headline_split, which is other"),
    ],
)
def test_a_name_that_is_not_a_task_is_refused_with_a_sentence(folder, tmp_path, monkeypatch, capsys, name, message):
    for module, changed in {
        "half": MODULE.replace("SumTask", "Taken").replace('"sums"', '"logic"'),
        "plain": MODULE.replace("@dataclasses.dataclass\n", ""),
        "unscored": MODULE.replace('    metric_names = ("accuracy",)\n', ""),
        "unread": MODULE.replace('    model_columns = ("input_ids", "labels")\n', ""),
        "unsplit": MODULE.replace('"sums"\n', '"sums"\n    headline_split = "other"\n'),
    }.items():
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(changed)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", str(folder / "sums.yaml"), "--task.name", name, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "right", "wrong", "message"),
    [
        (
            "misnamed",
            '{"accuracy": float',
            '{"acc": float',
            "metrics of the task sums include acc, which its metric_names lack",
        ),
        (
            "short",
            "logits, labels, inputs):\n        return",
            "logits, labels):\n        return",
            "split test (TypeError: ",
        ),
        ("beyond", "% self.num_values", "% self.num_values + 3", "split test (IndexError: "),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_before_its_training(
    folder, tmp_path, monkeypatch, capsys, module, right, wrong, message
):
    assert right in MODULE
    (tmp_path / f"{module}.py").write_text(MODULE.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(HylaTrainer, "training_step", lambda *_, **__: pytest.fail("it trains"))
    few = [word for key in ("max_steps", "eval_steps", "save_steps") for word in (f"--trainer.{key}", "20")]
    command = ["train", str(folder / "sums.yaml"), "--task.name", f"{module}:SumTask", *few]
    assert main([*command, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error

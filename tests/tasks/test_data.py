"""Tests of folders of Parquet files: their content, their readers, and that training from one is the same run."""

import json
import re
import shlex
import shutil
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import DatasetCard

from hf_hyla.cli import main
from hf_hyla.hub.dataset_card import write_dataset_card
from hf_hyla.runs import RunRecord
from hf_hyla.tasks import get_task
from hf_hyla.tasks.data import FolderDataset, Manifest, write_data
from hf_hyla.training import load_recipe, train


PROJECT = Path(__file__).parents[2]
VARIANTS = [
    *(("sraven", {"num_features": features}) for features in (2, 3, 5, 8)),
    ("sraven", {"num_values": 3}),
    ("sraven", {"num_values": 300}),
    ("sraven", {"permute": False, "held_out": 0.1}),
    ("sraven", {"unambiguous": True, "held_out": 0.9}),
    ("logic", {"num_variables": 3, "num_terms": 2, "num_examples": 2}),
    ("logic", {"num_variables": 4, "num_terms": 2, "num_examples": 33, "held_out": 0.7}),
    ("logic", {"num_variables": 5, "num_terms": 3}),
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def sraven(tmp_path_factory):
    """A folder that the command filled in two steps."""
    folder = tmp_path_factory.mktemp("data") / "sraven"
    assert main(["data", "sraven", "--split", "ood", "--num-examples", "300", "--output", str(folder)]) == 0
    assert main(["data", "sraven", "--split", "train", "test", "--num-examples", "200", "--output", str(folder)]) == 0
    return folder


def test_the_snippets_of_the_card_read_the_folder_and_make_it_again(sraven, tmp_path, monkeypatch):
    card = (sraven / "README.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names = {}
    exec(code.replace("path/to/this/folder", str(sraven)), names)
    assert len(names["dataset"]) == 300
    [commands] = re.findall(r"```bash\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in commands.strip().splitlines():
        assert main(shlex.split(line)[1:]) == 0
    for name in ("README.md", "task.json"):
        assert (tmp_path / "folder" / name).read_bytes() == (sraven / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "settings"), [("sraven", {"num_features": 2, "num_values": 5}), ("logic", {"num_examples": 4})]
)
def test_the_snippet_of_the_card_trains_by_a_plain_trainer_on_what_the_task_draws(
    name, settings, tmp_path, monkeypatch
):
    task, folder = get_task(name, **settings), tmp_path / "data"
    write_data(task, ["train", "ood"], 50, folder)
    write_dataset_card(task, folder)
    _, code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    assert names["task"] == task and names["model"].config.num_labels == task.model_defaults["num_labels"]
    drawn = task.samples("train", np.arange(50))
    assert set(names["dataset"].column_names) == set(task.model_columns)
    for column in task.model_columns:
        assert np.array_equal(names["dataset"][column][:], drawn[column])
    by_from_table = names["rows"].map(task.from_table, batched=True, remove_columns=names["rows"].column_names)
    assert all(np.array_equal(by_from_table[column][:], drawn[column]) for column in drawn)
    of_lists = task.from_table(names["rows"].with_format(None)[:])
    assert all(np.allclose(of_lists[column], drawn[column]) for column in drawn)
    state = names["trainer"].state
    assert state.global_step == 10 and state.log_history[-1]["train_loss"] > 0


def test_load_dataset_reads_what_the_task_draws_with_named_and_typed_columns(sraven):
    loaded = datasets.load_dataset(str(sraven))
    task = get_task("sraven")
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 200, "test": 200, "ood": 300}
    assert loaded["ood"].features == task.features()
    assert loaded["ood"].features["rules"].feature.names[7] == "distribute three"
    for split, rows in loaded.items():
        drawn = task.samples(split, np.arange(len(rows)))
        official, strict = task.ambiguous(drawn["input_ids"], drawn["labels"])
        assert np.array_equal(np.array(rows["panels"]).reshape(len(rows), 32), drawn["input_ids"][:, :32])
        assert np.array_equal(rows["answer"], drawn["labels"])
        assert np.array_equal(rows["rules"], drawn["rules"])
        assert np.array_equal(rows["permutations"], drawn["permutations"])
        assert rows["ambiguous_official"] == official.tolist() and rows["ambiguous_strict"] == strict.tolist()


def test_the_card_states_splits_examples_rates_ceiling_and_fingerprint(sraven):
    card, task = DatasetCard.load(sraven / "README.md"), get_task("sraven")
    assert card.data.license == "apache-2.0" and card.data.task_categories == ["other"]
    assert card.data.configs[0]["data_files"][2] == {"split": "ood", "path": "data/ood-*.parquet"}
    assert [split["num_examples"] for split in card.data.dataset_info["splits"]] == [200, 200, 300]
    assert task.fingerprint() in card.text
    assert task.show(task.dataset("ood")[0]) in card.text
    share = np.mean(datasets.load_dataset(str(sraven), split="ood")["ambiguous_strict"])
    assert f"| {share:.4f} |" in card.text
    record = json.loads((PROJECT / "recipes/results/sraven-ideal-observer.json").read_text())
    for split in ("test", "ood"):
        scores = record["splits"][split]
        assert f"| `{split}` | {scores['accuracy']:.4f} ± {scores['standard_error']:.4f} |" in card.text
    assert "{{" not in card.text and "{%" not in card.text


def test_a_card_quotes_a_ceiling_only_for_its_own_settings(tmp_path):
    write_data(get_task("sraven", num_features=3), ["ood"], 10, tmp_path / "data")
    write_dataset_card(get_task("sraven", num_features=3), tmp_path / "data")
    text = (tmp_path / "data" / "README.md").read_text()
    assert "has not been recorded for these settings" in text and "±" not in text
    assert "--split ood --num-examples 10 --task.num_features 3 --output folder" in text


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_every_variant_is_written_and_read_back_bit_for_bit(name, settings, tmp_path):
    task = get_task(name, **settings)
    write_data(task, ["ood"], 70, tmp_path / "data")
    assert len(datasets.load_dataset(str(tmp_path / "data"), split="ood")) == 70
    read = FolderDataset(tmp_path / "data", task, "ood", 70)
    drawn = task.dataset("ood", 70)
    order = np.random.default_rng(0).permutation(70).tolist()
    ours, theirs = read.__getitems__(order).columns, drawn.__getitems__(order).columns
    assert list(ours) == list(theirs)
    for column in ours:
        assert ours[column].dtype == theirs[column].dtype and np.array_equal(ours[column], theirs[column])
    assert set(read[3]) == set(drawn[3])


def test_a_split_may_have_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_hyla.tasks.data._EXAMPLES_PER_FILE", 100)
    monkeypatch.setattr("hf_hyla.tasks.data._EXAMPLES_AT_ONCE", 40)
    task = get_task("logic", num_examples=3)
    write_data(task, ["train"], 250, tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data" / "data").iterdir()) == [
        f"train-0000{number}-of-00003.parquet" for number in range(3)
    ]
    read = FolderDataset(tmp_path / "data", task, "train", 250)
    expected = task.samples("train", np.arange(250))["input_values"]
    assert np.array_equal(read.__getitems__(list(range(250))).columns["input_values"], expected)


def test_fifty_thousand_examples_are_written_in_a_second(tmp_path):
    # On a quiet machine; a fifth of that is asked for here.
    started = time.process_time()
    write_data(get_task("sraven"), ["train"], 50_000, tmp_path / "data")
    assert 50_000 / (time.process_time() - started) > 10_000


def recipe_in(folder, **task):
    sections = {
        "task": {"name": "sraven", "num_features": 2, **task},
        "model": {"attention_type": "hyla", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16},
        "trainer": {
            "max_steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "train_batch_size": 4,
            "eval_steps": 3, "save_steps": 6, "logging_steps": 2, "eval_samples": 16, "disable_tqdm": True,
        },
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sections))
    return load_recipe(folder / "tiny.yaml")


@pytest.fixture
def short_splits(monkeypatch):
    task = get_task("sraven")
    monkeypatch.setattr(type(task), "num_samples", property(lambda self: dict.fromkeys(self.splits, 64)))


def test_training_from_a_folder_is_the_same_run(tmp_path, short_splits):
    task = get_task("sraven", num_features=2)
    write_data(task, ["train"], 30, tmp_path / "data")
    drawn = train(recipe_in(tmp_path / "drawn"), tmp_path / "drawn" / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as torch's, of memory that it may not write
        batch = task.collate(FolderDataset(tmp_path / "data", task, "train", 24).__getitems__([3, 4]))
    assert torch.equal(batch["labels"], task.collate(task.dataset("train").__getitems__([3, 4]))["labels"])
    read = train(recipe_in(tmp_path / "read", data=str(tmp_path / "data")), tmp_path / "read" / "run")

    def curve(record):
        return [{name: value for name, value in entry.items() if name != "seconds"} for entry in record.curve]

    assert len(drawn.curve) == 7 and curve(read) == curve(drawn) and read.metrics == drawn.metrics
    assert read.recipe == drawn.recipe and read.data_fingerprint == drawn.data_fingerprint == task.fingerprint()
    assert set(read.metrics["ood"]) >= {"accuracy", "feature_accuracy", "accuracy_unique"}
    assert str(tmp_path) not in (tmp_path / "read" / "run" / "run.json").read_text()


def test_records_without_a_fingerprint_still_load(tmp_path):
    for path in (PROJECT / "recipes" / "results").glob("*/[0-9]*.json"):
        shutil.copy(path, tmp_path / "run.json")
        record = json.loads(path.read_text())
        assert RunRecord.load(tmp_path).data_fingerprint == record.get("data_fingerprint")


def test_data_of_another_task_are_refused(tmp_path):
    task, folder = get_task("sraven", num_features=2), tmp_path / "data"
    write_data(task, ["train"], 30, folder)
    for changes, message in (
        ({"seed": 1}, "a task whose seed is 0, but 1 was requested"),
        ({"num_features": 3}, "a task whose num_features is 2, but 3 was requested"),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe_in(tmp_path / "r", data=str(folder), **changes), tmp_path / "run")
    with pytest.raises(ValueError, match="holds no data of a task"):
        train(recipe_in(tmp_path / "r", data=str(tmp_path)), tmp_path / "run")
    with pytest.raises(ValueError, match=r"task\.data must be null or str, got 3"):
        recipe_in(tmp_path / "r", data=3)
    with pytest.raises(ValueError, match="holds 30 examples of train, but 31 are needed"):
        FolderDataset(folder, task, "train", 31)
    with pytest.raises(ValueError, match="holds 0 examples of ood"):
        FolderDataset(folder, task, "ood", 1)

    manifest = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(manifest | {"data_fingerprint": "sha256:0"}))
    with pytest.raises(ValueError, match="was written by another version of the generators"):
        FolderDataset(folder, task, "train", 30)
    (folder / "task.json").write_text(json.dumps(manifest))
    write_data(get_task("sraven", num_features=2, seed=1), ["train"], 30, tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "data", folder / "data", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"do not match its task\.json"):
        FolderDataset(folder, task, "train", 30)
    next((folder / "data").iterdir()).write_bytes(b"not Parquet")
    with pytest.raises(ValueError, match="cannot be read"):
        FolderDataset(folder, task, "train", 30)
    assert not (tmp_path / "run").exists()  # each was refused before anything started


def test_writing_resumes_after_an_interruption(tmp_path, monkeypatch):
    task, folder = get_task("logic", num_examples=3), tmp_path / "data"
    monkeypatch.setattr("hf_hyla.tasks.data._EXAMPLES_AT_ONCE", 5)

    def interrupted(table):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(task, "to_table", lambda samples: next(tables)(samples))
        tables = iter([task.__class__.to_table.__get__(task)] * 3 + [interrupted])  # amid the second split
        write_data(task, ["test", "ood"], 10, folder)
    assert list(Manifest.load(folder).splits) == ["test"]
    (folder / "task.json.tmp").write_text("{")
    written = (folder / "data" / "test-00000-of-00001.parquet").stat().st_mtime_ns
    assert list(write_data(task, ["test", "ood"], 10, folder).splits) == ["test", "ood"]
    assert (folder / "data" / "test-00000-of-00001.parquet").stat().st_mtime_ns == written
    assert len(FolderDataset(folder, task, "ood", 10)) == 10

    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(b"")  # what is no longer whole is written again
    write_data(task, ["test", "ood"], 10, folder)
    assert len(FolderDataset(folder, task, "test", 10)) == 10


def test_data_are_never_written_over_other_files(tmp_path):
    task = get_task("logic", num_examples=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no data of a task"):
        write_data(task, ["ood"], 10, tmp_path / "mine")
    write_data(task, ["ood"], 10, tmp_path / "data")
    with pytest.raises(FileExistsError, match="already holds the split ood with 10 examples"):
        write_data(task, ["test", "ood"], 20, tmp_path / "data")
    with pytest.raises(ValueError, match="use another folder"):
        write_data(get_task("logic"), ["test"], 10, tmp_path / "data")
    with pytest.raises(ValueError, match="no split 'all'"):
        write_data(task, ["test", "all"], 10, tmp_path / "data")
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        write_data(task, ["test"], 0, tmp_path / "data")
    assert list(Manifest.load(tmp_path / "data").splits) == ["ood"]
    assert [path.name for path in (tmp_path / "data" / "data").iterdir()] == ["ood-00000-of-00001.parquet"]


def test_files_of_a_split_that_are_gone_are_named(tmp_path):
    task = get_task("logic", num_examples=4)
    write_data(task, ["test"], 20, tmp_path / "data")
    for file in (tmp_path / "data/data").glob("test-*.parquet"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"lacks the files of test that its task\.json names: write them again by `hyla data`"
    ):
        FolderDataset(tmp_path / "data", task, "test", 20)

"""Tests of the checks before publishing, which refuse with a sentence before the first request."""

import bz2
import gzip
import json
import lzma
import pickle
import shutil
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_hyla.cli import main
from hf_hyla.hub.cards import dataset_repo
from hf_hyla.hub.model_card import card_files
from hf_hyla.hub.repository import plan
from hf_hyla.runs import Run
from hf_hyla.tasks import get_task


REPO = "org/hyla-logic"
# The dataset of the fixtures' SRAVEN run.
SRAVEN_DATA = "org/sraven-num_features-2"


def spoil_weights(run):
    tensors = load_file(run / "model.safetensors")
    max(tensors.values(), key=torch.numel).view(-1)[-1] = torch.inf  # one element of many
    save_file(tensors, run / "model.safetensors", {"format": "pt"})


def add_weights(run):
    tensors = load_file(run / "model.safetensors") | {"model.extra": torch.zeros(2)}
    save_file(tensors, run / "model.safetensors", {"format": "pt"})


def spoil_config(**changes):
    def spoil(run):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | changes))

    return spoil


def write(name, content):
    return lambda run: (run / name).write_bytes(content)


def append(name, text):
    def spoil(run):
        with (run / name).open("ab") as file:
            file.write(text)

    return spoil


TOKEN = b"hf_" + b"Secret" * 6
SPOILT = [
    (spoil_weights, "holds NaN or infinite numbers"),
    (add_weights, "the weights are not those of config.json, model.extra is in one of the two only"),
    (spoil_config(value_depth=2), "the weights are not those of config.json"),
    (spoil_config(format_version=0), "was saved in format 0, but the code of this package"),
    (
        lambda run: (run / "config.json").write_text('{"model_type": "hyla", "value_depth": 7}'),
        "not the config of a model",
    ),
    (append("training_args.bin", b"x"), "training_args.bin is a pickle"),
    (append("notes.md", b""), None),
    (lambda run: (run / "notes.md").write_bytes(b"\x80\x04\x95x"), "notes.md is a pickle"),
    (lambda run: (run / "model.safetensors").write_bytes(b"PK\x03\x04x"), "model.safetensors is a pickle"),
    (lambda run: (run / "model.safetensors").write_bytes(b"x" * 99), "is damaged"),
    (lambda run: (run / "model.safetensors").unlink(), "holds no model"),
    (lambda run: (run / "run.json").unlink(), "holds no finished run"),
    (lambda run: (run / "resolved_recipe.yaml").unlink(), "lacks resolved_recipe.yaml"),
    (append("resolved_recipe.yaml", b"\nexpect: {}\n"), "was changed after the run"),
    (append("modeling_hyla.py", b"\n# " + TOKEN), "modeling_hyla.py holds what looks like a Hugging Face token"),
    (append("layers_hyla.py", b"\n# AKIA" + b"ABCD" * 4), "looks like an AWS key"),
    (append("layers_hyla.py", b"\n-----BEGIN RSA PRIVATE KEY-----"), "looks like a private key"),
    (write("config.json", b"{"), "config.json cannot be read as json"),
    (write("resolved_recipe.yaml", b"task: ["), "resolved_recipe.yaml cannot be read as yaml"),
    (write("run.json", b"[1]"), "is not a run record"),
]
WEIGHTS = {"weights": [0.5] * 9}
PICKLES = {
    **{f"a{protocol}.dat": pickle.dumps(WEIGHTS, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
    "x_hyla.py": pickle.dumps(WEIGHTS, 0),
    **{f"{module.__name__}.dat": module.compress(pickle.dumps(WEIGHTS)) for module in (gzip, bz2, lzma, zlib)},
    **{f"a{suffix}": b"x" for suffix in (".dill", ".cloudpickle", ".p", ".pk", ".PT")},
}
SECRETS = [
    b"hf_" + b"oauth_eyJhbGciOiJFZERTQSJ9.eyJz_cope", b"hf_" + b"jwt_eyJhbGciOiJFZERTQSJ9.eyJz-cope", b"MY_" + TOKEN,
    b"glpat-" + b"Ab1_-" * 4, b"AIza" + b"Ab1_-" * 7,
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_content_that_must_not_be_published_is_refused_before_the_first_call(
    hub_here, logic_run, copied, capsys, spoil, message
):
    run = copied(logic_run)
    spoil(run)
    assert main(["publish", str(run), "--repo-id", REPO]) == (2 if message else 0)
    error = capsys.readouterr().err
    assert (message or "") in error and TOKEN.decode() not in error
    assert bool(hub_here.requests) == (message is None)


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_refused_whatever_it_is_called_and_however_it_is_packed(logic_run, copied, name):
    run = copied(logic_run)
    write(name, PICKLES[name])(run)
    with pytest.raises(ValueError, match=f"{name} is a pickle or an archive"):
        plan(run, REPO)


def test_text_that_begins_like_a_pickle_is_accepted_and_other_code_is_left_out(logic_run, copied):
    run = copied(logic_run)
    notes = {
        ".gitignore": b".venv\n",
        "hello.txt": b"hello.",
        "x.txt": b"x^2 + 1\n",
        "empty.txt": b"",
        "my_hyla.py": b"",
    }
    for name, content in notes.items():
        write(name, content)(run)
    [repository] = plan(run, REPO)
    assert set(notes) <= set(repository.left_out) and not set(notes) & set(repository.files)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", [".env", "checkpoints/notes.txt"])
def test_a_secret_is_found_even_in_files_that_are_not_published(logic_run, copied, name, secret):
    run = copied(logic_run)
    write(name, b"TOKEN=" + secret)(run)
    with pytest.raises(ValueError, match=f"{name} holds what looks like a") as refused:
        plan(run, REPO)
    assert secret.decode() not in str(refused.value)


def test_the_token_in_use_is_found_in_any_format_and_names_in_code_are_not_secrets(logic_run, copied, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "short-one")
    run = copied(logic_run)
    write("notes.txt", b"see hf_hyla.runs.record.finished and hf_transfer_a_long_name_of_a_thing")(run)
    plan(run, REPO)
    write("notes.txt", b"x=short-one;")(run)
    with pytest.raises(ValueError, match="holds what looks like your own Hugging Face token"):
        plan(run, REPO)


def test_a_token_in_the_record_is_refused_and_not_repeated(hub_here, logic_run, copied):
    record = json.loads((logic_run / "run.json").read_text())
    run = copied(logic_run, hardware=record["hardware"] | {"system": TOKEN.decode()})
    with pytest.raises(ValueError, match="holds what looks like a Hugging Face token") as refused:
        plan(run, REPO)
    assert TOKEN.decode() not in str(refused.value)


@pytest.mark.parametrize("commit", ["0" * 40 + "+changes", "main", "0" * 7, ""])
def test_a_run_of_uncommitted_code_is_refused(logic_run, copied, commit):
    record = json.loads((logic_run / "run.json").read_text())
    run = copied(logic_run, environment=record["environment"] | {"git_commit": commit})
    with pytest.raises(ValueError, match="commit the changes, and train again"):
        plan(run, REPO)


def test_a_run_that_was_trained_from_a_folder_is_refused(logic_run, copied):
    recipe = json.loads((logic_run / "run.json").read_text())["recipe"]
    recipe["model"]["model_name_or_path"] = str(logic_run)
    with pytest.raises(ValueError, match="which nobody else has: publish that model first"):
        plan(copied(logic_run, recipe=recipe), REPO)


@pytest.mark.parametrize("repo_id", ["hyla", "a/b/c", "org/-x", "org/x y"])
def test_an_invalid_name_of_a_repository_is_refused(logic_run, repo_id):
    with pytest.raises(ValueError, match=r"ORG/NAME|[Rr]epo id|alphanumeric"):
        plan(logic_run, repo_id)


def test_a_folder_without_a_dataset_is_refused(logic_run, dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        plan(logic_run, REPO, dataset=tmp_path / "nowhere")
    (dataset / "cache.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cache\.pkl is a pickle"):
        plan(logic_run, REPO, dataset=dataset)
    (dataset / "cache.pkl").unlink()
    with pytest.raises(ValueError, match=r"holds data of the task .*'sraven'.* was requested"):
        plan(logic_run, REPO, dataset=dataset)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SHARD = "data/ood-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: halve(folder / SHARD), "cannot be read"),
        (lambda folder: (folder / SHARD).unlink(), "holds 0 examples of ood in 0 files"),
        (lambda folder: shutil.copy(folder / SHARD, folder / "data/ood-00001-of-00002.parquet"), "20 examples of ood"),
        (lambda folder: shutil.copy(folder / SHARD, folder / "data/test-00000-of-00001.parquet"), "does not name"),
        (lambda folder: shutil.copy(folder / SHARD, folder / "ood.parquet"), "does not name"),
        (lambda folder: (folder / "task.json").unlink(), "holds no data of a task"),
        (lambda folder: (folder / "README.md").unlink(), "has no card"),
    ],
)
def test_a_dataset_that_differs_from_its_task_json_is_refused(sraven_run, dataset, spoil, message):
    spoil(dataset)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan(sraven_run, "org/x", dataset=dataset)


def test_data_of_other_settings_have_a_repository_of_their_own(tmp_path, sraven_run, dataset):
    names = [
        dataset_repo(get_task("sraven", **settings), "org/x") for settings in ({}, {"seed": 1}, {"permute": False})
    ]
    assert names == ["org/sraven", "org/sraven-seed-1", "org/sraven-permute-false"]
    assert dataset_repo(get_task("logic", num_examples=32, held_out=0.7), "org/x") == "org/logic"
    first, _ = plan(sraven_run, "org/x", dataset=dataset)
    assert first.repo_id == SRAVEN_DATA
    assert f"- {SRAVEN_DATA}\n" in card_files(Run.load(sraven_run), "org/x")["README.md"]

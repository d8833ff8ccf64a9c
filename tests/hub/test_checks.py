"""Tests of the checks before publishing, which refuse with a sentence before the first request."""

import bz2
import gzip
import hashlib
import json
import lzma
import pickle
import shutil
import subprocess
import zlib
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_hyla import HylaForSequenceClassification
from hf_hyla.cli import main
from hf_hyla.hub import secrets
from hf_hyla.hub.cards import dataset_repo
from hf_hyla.hub.checks import CODE, check_scores, check_unaltered
from hf_hyla.hub.model_card import card_files
from hf_hyla.hub.repository import plan
from hf_hyla.hub.secrets import check_secrets
from hf_hyla.runs import Run, RunRecord
from hf_hyla.runs.environment import code_of
from hf_hyla.runs.record import file_digest
from hf_hyla.tasks import get_task
from hf_hyla.training import evaluate


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


def spoil_some(change):
    """Changes the largest tensor of the weights."""

    def spoil(run):
        tensors = load_file(run / "model.safetensors")
        name = max(tensors, key=lambda name: tensors[name].numel())
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, run / "model.safetensors", {"format": "pt"})

    return spoil


def spoil_record(change):
    def spoil(run):
        record = json.loads((run / "run.json").read_text())
        change(record)
        (run / "run.json").write_text(json.dumps(record))

    return spoil


def without_digests(spoil):
    """As `spoil`, of a run that is older than the digests."""

    def spoil_old(run):
        spoil(run)
        spoil_record(lambda record: record.pop("digests"))(run)

    return spoil_old


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
    # Weights that are others than those that were scored, or not those of a model.
    (spoil_some(lambda tensor: tensor.flip(0)), "model.safetensors is not what the run has written"),
    (without_digests(spoil_some(lambda tensor: 3 * tensor.flip(0))), "weights and scores do not belong together"),
    (spoil_some(lambda tensor: (100 * tensor).to(torch.int8)), "as int8, expected real numbers"),
    (spoil_some(lambda tensor: tensor.to(torch.complex64)), "as complex64, expected real numbers"),
    (spoil_some(lambda tensor: tensor > 0), "as bool, expected real numbers"),
    (spoil_some(lambda tensor: tensor[1:]), "the weights are not those of config.json"),
    (
        lambda run: shutil.copy(run / "model.safetensors", run / "model-2.safetensors"),
        "holds model-2.safetensors beside",
    ),
    (lambda run: shutil.copy(run / "model.safetensors", run / "other.safetensors"), "holds other.safetensors beside"),
    (write("model.safetensors.index.json", b"{}"), "holds model.safetensors.index.json beside"),
    (spoil_config(attention_dropout=0.5), "config.json is not what the run has written"),
    # Scores of something else.
    (
        spoil_record(lambda record: record["metrics"]["ood"].update(r2=0.9999)),
        "says that ood/r2 is 0.9999, but these weights",
    ),
    (
        spoil_record(lambda record: record["metrics"]["test"].update(r2=-1e9)),
        "weights and scores do not belong together",
    ),
    (
        spoil_record(lambda record: record.update(data_fingerprint=f"sha256:{'0' * 64}")),
        "was trained and scored on other data",
    ),
    (spoil_record(lambda record: record["digests"].clear()), "config.json is not what the run has written"),
    # Code that was altered beside the weights.
    (append("layers_hyla.py", b"\n# mine\n"), "layers_hyla.py is not what the run has written"),
    # A run that is older than its digests is scored again, and published.
    (without_digests(lambda run: None), None),
]
WEIGHTS = {"weights": [0.5] * 9}
PICKLES = {
    **{f"a{protocol}.dat": pickle.dumps(WEIGHTS, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
    "x_hyla.py": pickle.dumps(WEIGHTS, 0),
    **{
        f"call{protocol}.dat": pickle.dumps(Fraction(1, 3), protocol)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "spaced.dat": pickle.dumps(WEIGHTS, 0) + b"\n \n",
    "two.dat": pickle.dumps(None, 0) + pickle.dumps([1], 1),
    **{
        f"{name}.txt": before + pickle.dumps(Fraction(1, 3), protocol) + b"and more"
        for name, before, protocol in (("first", b"", 0), ("second", b"N.", 0), ("third", b").].", 1))
    },
    **{
        f"{name}.txt": program + b"more"
        for name, program in {
            "instance": b"(ios\nsystem\n.",
            "object": b"(cos\nsystem\no.",
            "build": b"NNb.",
            "persistent": b"Px\n.",
            "binary_persistent": b"NQ.",
            "extension": b"\x82\x01.",
        }.items()
    },
    **{f"{module.__name__}.dat": module.compress(pickle.dumps(WEIGHTS)) for module in (gzip, bz2, lzma, zlib)},
    **{f"a{suffix}": b"x" for suffix in (".dill", ".cloudpickle", ".p", ".pk", ".PT")},
}
KEY = b"a1B2" * 10
# In hexadecimal, as long as a commit's digest.
HEX = b"0a1b" * 10
SECRETS = [
    b"AKIA" + b"ABCD" * 4, b"ASIA" + b"ABCD" * 4, b"aws_secret_access_key = " + KEY, b'"SecretAccessKey": "' + KEY + b'"', KEY,
    b"WANDB_API_KEY=" + HEX, b"wandb login " + HEX, b'wandb.login(key="' + HEX + b'")', b"wandb_v1_" + KEY, HEX,
    b"machine api.wandb.ai\n  login user\n  password " + HEX,
    b"eyJhbGciOiJIUzI1NiJ9." + b"eyJzdWIiOiIxMjM0NTY3ODkwIn0." + KEY,
    b"password = " + b"hunter2hunter", b'DB_PASSWORD="' + b"correct horse" + b'"', b'"password": "' + b"s3cretly" + b'"',
    b"passwd: " + b"abc123def", b"postgres://bob:" + b"s3cretpw@db.example.com/x", b"OPENAI_API_KEY=" + KEY,
    b"-----BEGIN " + b"OPENSSH PRIVATE KEY-----", b"-----BEGIN " + b"PGP PRIVATE KEY BLOCK-----", b"sk-" + KEY,
    # Right behind a letter, and in UTF-16 and UTF-32.
    b"my" + TOKEN, b"keyAKIA" + b"ABCD" * 4, b"xghp_" + KEY[:36], b"xsk-proj-" + KEY,
    TOKEN.decode().encode("utf-16"), ("password = " + "hunter22").encode("utf-16-be"), KEY.decode().join(["key=", ""]).encode("utf-16"),
    TOKEN.decode().encode("utf-32"), ("password = " + "hunter22").encode("utf-32-be"),
    b"hf_" + b"oauth_eyJhbGciOiJFZERTQSJ9.eyJz_cope", b"hf_" + b"jwt_eyJhbGciOiJFZERTQSJ9.eyJz-cope", b"MY_" + TOKEN,
    b"glpat-" + b"Ab1_-" * 4, b"AIza" + b"Ab1_-" * 7, b"GOCSPX-" + KEY, b"ya29." + KEY, b"AccountKey=" + KEY * 2, b"npm_" + KEY[:36],
    b"github_" + b"pat_11ABCDEFG0_" + KEY, b"pypi-" + b"AgEIcHlwaS5vcmc" + KEY, b"dckr_pat_" + KEY, b"gsk_" + KEY, b"hvs." + KEY,
    b"xapp-" + b"1-A0123456789-" + KEY, b"hooks.slack.com/" + b"services/T0/B0/" + KEY, b"discord.com/" + b"api/webhooks/1/" + KEY,
    b"SG." + KEY[:20] + b"." + KEY, b"sk_live_" + KEY, b"nvapi-" + KEY, b"xai-" + KEY * 2, b"AGE-SECRET-" + b"KEY-1" + b"Q8" * 29,
    b"Authorization: " + b"Bearer " + KEY, b'{"username": "bob", "key": "' + HEX[:32] + b'"}', b"dapi" + HEX[:32], b"r8_" + KEY[:37],
    b"shpat_" + HEX[:32], b"dp.pt." + KEY + b"abc", b"dp.st.prd." + KEY + b"abc", b"lin_api_" + KEY, b"figd_" + KEY, b"ntn_" + KEY,
    b"secret_" + KEY + b"abc", b"pat" + KEY[:14] + b"." + b"0a1b" * 16, b"PMAK-" + HEX[:24] + b"-" + HEX[:34], b"NRAK-" + b"A1B" * 9,
    b"sntrys_" + KEY, b"glsa_" + KEY, b"key-" + HEX[:32], HEX[:32] + b"-us" + b"12", b"1234567890:" + b"AA" + KEY[:33], b"SK" + HEX[:32],
    b"TWILIO_AUTH_TOKEN=" + HEX[:32],
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
        plan(Run.load(run), REPO)


def test_text_that_begins_like_a_pickle_is_accepted_and_other_code_is_left_out(logic_run, copied):
    run = copied(logic_run)
    notes = {
        ".gitignore": b".venv\n",
        "hello.txt": b"hello.",
        "x.txt": b"x^2 + 1\n",
        "empty.txt": b"",
        "note.txt": b"N.B. this run was stopped once.\n",
        "brackets.txt": b").\nThe rest",
        "list.txt": b"]. The rest\n",
        "my_hyla.py": b"",
    }
    for name, content in notes.items():
        write(name, content)(run)
    [repository] = plan(Run.load(run), REPO)
    assert set(notes) <= set(repository.left_out) and not set(notes) & set(repository.files)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_found_and_not_repeated(tmp_path, secret):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\nTOKEN=" + secret if secret[:2] not in (b"\xff\xfe", b"\0p") else secret)
    with pytest.raises(ValueError, match=r"notes\.txt holds what looks like a") as refused:
        check_secrets("notes.txt", path)
    assert secret.decode(errors="ignore") not in str(refused.value)
    with pytest.raises(ValueError, match="x holds what looks like a"):
        check_secrets("x", path.read_bytes())


@pytest.mark.parametrize("name", [".env", "checkpoints/notes.txt"])
def test_a_secret_is_found_even_in_files_that_are_not_published(logic_run, copied, name):
    run = copied(logic_run)
    write(name, b"TOKEN=" + TOKEN)(run)
    with pytest.raises(ValueError, match=f"{name} holds what looks like a Hugging Face token"):
        plan(Run.load(run), REPO)


def test_a_secret_is_found_where_two_parts_of_a_large_file_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "_PART", 10_000)
    for place in range(9_950, 10_010, 7):
        (tmp_path / "x.txt").write_bytes(b" " * place + TOKEN + b" " * 30_000)
        with pytest.raises(ValueError, match=rf"a Hugging Face token \(at byte {place}\)"):
            check_secrets("x", tmp_path / "x.txt")


@pytest.mark.parametrize(
    "text",
    [
        b'"git_commit": "' + HEX + b'"', b'"model.safetensors": "sha256:' + b"0a1b" * 16 + b'"', b"sha256 " + b"0a1b" * 16,
        b'"report_to": ["wandb"],\n"git_commit": "' + HEX + b'"', b"pad_token_id = 8", b"wandb: 0.21, commit " + HEX,
        b"password = getpass.getpass()", b"password=None", b"password: the one that you chose", b"PASSWORD=$SECRET",
        b"password = os.environ['X']", b"password: str | None", b"task-embedding-of-the-last-layer-mean-9",
        b"https://huggingface.co/org/x@main", b"hf_transfer_a_long_name_of_a_thing",
        b"Authorization: Bearer <your token>", b'{"Authorization": f"Bearer {token}"}', b'"key": "' + HEX[:32] + b'"',
        b"data-" + HEX[:32], b"fig_" + KEY, HEX[:32] + b"-use", b"12:AA", b"secret_of_a_name", b"lin_proj.weight", b"dp.rank.0",
    ],
)  # fmt: skip
def test_digests_commits_and_code_are_no_secrets(text):
    check_secrets("x", text)


@pytest.mark.parametrize("name", ["layers_hyla.py", "gone_hyla.py"])
def test_a_run_of_another_version_of_the_code_is_scored_again_and_published_with_a_note(logic_run, copied, name):
    run = copied(logic_run)
    assert plan(Run.load(run), REPO)[0].note is None
    (run / "layers_hyla.py").unlink()
    spoil_record(lambda record: record["digests"].update({name: f"sha256:{'0' * 64}"}))(run)
    assert plan(Run.load(run), REPO)[0].note.startswith(f"{name} has changed since the model was trained")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_parameters", 7),
        ("samples_seen", 10**9),
        ("seeds", {"task": 5, "trainer": 0}),
        ("seeds", {"task": 0, "trainer": 9}),
    ],
)
def test_counts_and_seeds_that_are_not_those_of_the_recipe_are_refused(logic_run, copied, name, value):
    with pytest.raises(ValueError, match=rf"says that {name}[.\w]* is \d+, but its recipe and config make it \d+"):
        plan(Run.load(copied(logic_run, **{name: value})), REPO)


def test_a_score_that_is_off_by_more_than_rounding_is_refused(logic_run, copied, monkeypatch):
    scored = json.loads((logic_run / "run.json").read_text())
    for split in scored["metrics"]:  # on more than one part, which a smaller check would stop in
        found = evaluate(
            HylaForSequenceClassification.from_pretrained(logic_run), Run.load(logic_run).task, split, 1500
        )
        scored["metrics"][split] = found
    true = scored["metrics"]["ood"]["r2"]
    run = copied(logic_run, metrics=scored["metrics"])
    check_scores(Run.load(run))

    def says(difference, **trainer):
        score = true + difference * max(1.0, abs(true))
        recipe = scored["recipe"] | {"trainer": scored["recipe"]["trainer"] | trainer}
        spoil_record(lambda record: record["metrics"]["ood"].update(r2=score))(run)
        spoil_record(lambda record: record.update(recipe=recipe))(run)
        return Run.load(run)

    for difference in (-0.005, 0.002, 0.005):
        with pytest.raises(ValueError, match="weights and scores do not belong together"):
            check_scores(says(difference))
    check_scores(says(0.0005))  # as other hardware may round
    check_scores(says(0.005, bf16=True))
    with pytest.raises(ValueError, match=r"on 1,500 samples: weights and scores do not"):
        check_scores(says(0.02, bf16=True))
    # Where a split is larger than what is scored again, chance is added.
    monkeypatch.setattr("hf_hyla.hub.checks._SCORED_AGAIN", 1000)
    monkeypatch.setattr("hf_hyla.hub.checks._AT_A_TIME", 8)
    check_scores(says(0.0))
    with pytest.raises(ValueError, match=r"on the first 1,000 samples"):
        check_scores(says(1e6))


def test_a_commit_whose_code_is_another_is_found_where_the_checkout_knows_it(logic_run, monkeypatch):
    of_run = RunRecord.load(logic_run).digests
    # A later commit may have other code.
    for of_commit in (None, of_run, {**of_run, "new_hyla.py": "sha256:0"}):
        monkeypatch.setattr("hf_hyla.hub.checks.code_of", lambda commit, found=of_commit: found)
        check_unaltered(Run.load(logic_run))
    for of_commit in ({}, {**of_run, "modeling_hyla.py": "sha256:0"}):
        monkeypatch.setattr("hf_hyla.hub.checks.code_of", lambda commit, found=of_commit: found)
        with pytest.raises(ValueError, match=r"does not have the digests that run\.json holds"):
            check_unaltered(Run.load(logic_run))


def test_the_code_of_a_commit_is_what_it_was_then(tmp_path, monkeypatch):
    code = tmp_path / "hf_hyla" / "model" / "x_hyla.py"
    code.parent.mkdir(parents=True)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path)]
    commits, expected = [], []
    subprocess.run([*git, "init", "-q"], check=True)
    for text in ("1\r\n", "2"):
        code.write_bytes(text.encode())
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", text], check=True)
        commits.append(subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip())
        expected.append({code.name: file_digest([code])})
    for module in ("hf_hyla.runs.environment", "hf_hyla.utils"):
        monkeypatch.setattr(f"{module}.CHECKOUT", tmp_path)
    assert [code_of(commit) for commit in (*commits, "0" * 40, "--help", None)] == [*expected, None, None, None]


def test_a_run_notes_the_digests_of_its_weights_config_and_code(logic_run):
    found = RunRecord.load(logic_run).digests
    assert set(found) == {"config.json", "model.safetensors", *CODE}
    for name, digest in found.items():
        assert digest == f"sha256:{hashlib.sha256((logic_run / name).read_bytes()).hexdigest()}"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "layers_hyla.py"])
def test_a_card_is_not_made_of_what_has_been_altered_either(logic_run, copied, name):
    run = copied(logic_run)
    write(name, (run / name).read_bytes() + b" ")(run)
    with pytest.raises(ValueError, match=f"{name} is not what the run has written, whose digest is in run.json"):
        card_files(Run.load(run))


def test_the_token_in_use_is_found_in_any_format_and_names_in_code_are_not_secrets(logic_run, copied, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "short-one")
    run = copied(logic_run)
    write("notes.txt", b"see hf_hyla.runs.record.finished and hf_transfer_a_long_name_of_a_thing")(run)
    plan(Run.load(run), REPO)
    write("notes.txt", b"x=short-one;")(run)
    with pytest.raises(ValueError, match="holds what looks like your own Hugging Face token"):
        plan(Run.load(run), REPO)


def test_a_token_in_the_record_is_refused_and_not_repeated(hub_here, logic_run, copied):
    record = json.loads((logic_run / "run.json").read_text())
    run = copied(logic_run, hardware=record["hardware"] | {"system": TOKEN.decode()})
    with pytest.raises(ValueError, match="holds what looks like a Hugging Face token") as refused:
        plan(Run.load(run), REPO)
    assert TOKEN.decode() not in str(refused.value)


@pytest.mark.parametrize("commit", ["0" * 40 + "+changes", "main", "0" * 7, ""])
def test_a_run_of_uncommitted_code_is_refused(logic_run, copied, commit):
    record = json.loads((logic_run / "run.json").read_text())
    run = copied(logic_run, environment=record["environment"] | {"git_commit": commit})
    with pytest.raises(ValueError, match="commit the changes, and train again"):
        plan(Run.load(run), REPO)


@pytest.mark.parametrize("name", ["{run}", "runs/base"])
def test_a_run_that_was_trained_from_a_folder_is_refused_wherever_that_folder_is(name, logic_run, copied):
    recipe = json.loads((logic_run / "run.json").read_text())["recipe"]
    recipe["model"]["model_name_or_path"] = name.format(run=logic_run)  # the second reads as ORG/NAME, and is not here
    with pytest.raises(ValueError, match="which nobody else has: publish that model first"):
        plan(Run.load(copied(logic_run, recipe=recipe)), REPO)


@pytest.mark.parametrize("repo_id", ["hyla", "a/b/c", "org/-x", "org/x y"])
def test_an_invalid_name_of_a_repository_is_refused(logic_run, repo_id):
    with pytest.raises(ValueError, match=r"ORG/NAME|[Rr]epo id|alphanumeric"):
        plan(Run.load(logic_run), repo_id)


def test_a_folder_without_a_dataset_is_refused(logic_run, dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        plan(Run.load(logic_run), REPO, dataset=tmp_path / "nowhere")
    (dataset / "cache.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cache\.pkl is a pickle"):
        plan(Run.load(logic_run), REPO, dataset=dataset)
    (dataset / "cache.pkl").unlink()
    with pytest.raises(ValueError, match=r"data of a task whose name is 'sraven', but 'logic' was requested"):
        plan(Run.load(logic_run), REPO, dataset=dataset)


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
        plan(Run.load(sraven_run), "org/x", dataset=dataset)


def test_data_of_other_settings_have_a_repository_of_their_own(tmp_path, sraven_run, dataset):
    names = [
        dataset_repo(get_task("sraven", **settings), "org/x") for settings in ({}, {"seed": 1}, {"permute": False})
    ]
    assert names == ["org/sraven", "org/sraven-seed-1", "org/sraven-permute-false"]
    assert dataset_repo(get_task("logic", num_examples=32, held_out=0.7), "org/x") == "org/logic"
    first, _ = plan(Run.load(sraven_run), "org/x", dataset=dataset)
    assert first.repo_id == SRAVEN_DATA
    assert f"- {SRAVEN_DATA}\n" in card_files(Run.load(sraven_run), "org/x")["README.md"]

"""A record that somebody else has written: text stays text on the card, and wrong types end in one sentence."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.cli import main
from hf_hyla.hub import model_card
from hf_hyla.hub.cards import as_code, as_text, run_snippet
from hf_hyla.runs import Run, RunRecord, plots
from hf_hyla.runs.compare import compare, table
from hf_hyla.tasks import get_task


RECORD = json.loads((Path(__file__).parents[2] / "recipes" / "results" / "logic-demo" / "0.json").read_text())
RECORD["curve"] = [RECORD["curve"][0], RECORD["curve"][-1]]
RECORD["recipe"]["expect"] = {"metric": "ood/r2", "value": 0.7, "tolerance": 0.1, "source": "us", "budget": 512_000}
RECORD["recipe"]["model"] |= {"attention_type": "hyla"}
RECORD["digests"] = None
# Of settings and facts that are alike, one or two of each type.
for section, kept in (
    (RECORD["environment"], {"python", "git_commit"}),
    (RECORD["recipe"]["trainer"], {"max_steps", "learning_rate", "seed"}),
    (RECORD["recipe"]["task"], {"name", "seed", "num_examples", "held_out"}),
):
    for name in section.keys() - kept:
        del section[name]
EVIL = (
    "x\n\n# Evil\n\n<img src=x onerror=alert(1)> |a| [evil](http://evil.example) `` ` ``` **bold** $\\frac{ <!-- http://evil.example\n"
    "```python\nraise SystemExit('evil')\n```\n---\n"
)
# What pictures show.
DRAWN = ("name", "metrics", "curve", "steps", "samples_seen")
WRONG = [None, True, "text", "", -1, 0, 1.5, 1e400, float("nan"), 10**400, [], [1], {}, {"a": {"b": 1}}, EVIL]


def leaves(content, path=()):
    """Every place in a record, by its keys; containers too."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def with_value(path, value):
    record = copy.deepcopy(RECORD)
    inside = record
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a model, for the records of these tests."""
    folder = tmp_path_factory.mktemp("hostile")
    task = get_task(**RECORD["recipe"]["task"])
    HylaForSequenceClassification(HylaConfig(**task.model_defaults)).save_pretrained(folder)
    return folder


def rendered(folder, record: dict, pictures: bool = True) -> str:
    """The card of a record, without what takes long: the model's answer and the drawing of the pictures."""
    (folder / "run.json").write_text(json.dumps(record))
    run = Run.load(folder)
    text = model_card._render(run, "org/x", seeds=[run.record], baselines=[])
    model_card.check_card(text)
    yaml.safe_load(model_card._eval_results(run, "org/x"))
    table(compare([run.record]))
    if pictures:
        plots.over_samples([[run.record]])
        plots.learning_curve(run.record, True)
    return text


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: b"")


@pytest.mark.parametrize("path", list(leaves(RECORD)), ids=lambda path: ".".join(map(str, path)))
def test_a_value_of_a_wrong_type_anywhere_ends_in_one_sentence_or_is_harmless(folder, path):
    for value in WRONG:
        try:
            rendered(folder, with_value(path, value), pictures=path[0] in DRAWN)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, (path, value)


@pytest.mark.parametrize(
    "path", [path for path in leaves(RECORD) if len(path) > 1], ids=lambda path: ".".join(map(str, path))
)
def test_whatever_is_missing_ends_in_one_sentence_or_is_harmless(folder, path):
    record = copy.deepcopy(RECORD)
    inside = record
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    try:
        rendered(folder, record, pictures=path[0] in DRAWN)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("metrics", "ood"), {"r2": 0.5}, "its metrics of 'ood' lack num_samples"),
        (("metrics", "ood"), {"r2": 0.5, "num_samples": 0}, "its num_samples must be at least 1, got 0"),
        (("curve", 0), {"loss": 1.0, "seconds": 1.0, "step": -5}, "its step must be at least 0, got -5"),
        (("curve", 0), {"loss": 1.0, "seconds": 1.0}, "entry 0 of its curve lacks step or seconds"),
        (("hardware", "num_processes"), "2", "its num_processes is '2'"),
        (("metrics",), [], "'metrics'"),
        (
            ("metrics", "evil"),
            {"r2": 0.5, "num_samples": 1},
            "has scores of the split 'evil', which the task logic lacks",
        ),
        (("samples_seen",), 0, "its samples_seen must be at least 1, got 0"),
        (("recipe", "model", "model_name_or_path"), 7, "its recipe's model.model_name_or_path is not text"),
        (("recipe", "model", "to_dict"), 7, "recipe's section model does not describe a model"),
        (("recipe", "task", "num_examples"), 10**9, "num_examples must be 2 to 10000"),
        (("data_fingerprint",), "x", "'x' is not a sha256 digest"),
        (("digests",), {"model.safetensors": "x"}, "'x' is not a sha256 digest"),
        (("environment", "git_commit"), ["x"], "its git_commit is neither text nor a number"),
        (("recipe", "expect"), {"metric": "ood/r2"}, "its recipe lacks expect.source"),
    ],
)
def test_what_is_wrong_is_named(folder, path, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rendered(folder, with_value(path, value))


def outside_of_code(text: str) -> str:
    """Markdown without its blocks of code and its inline code."""
    text = re.sub(r"^```.*?^```$", "", ModelCard(text).text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?[^`])\1(?!`)", "code", text)


def evil_everywhere() -> dict:
    """The record with evil text wherever text is allowed, as a value and as a name."""
    record = copy.deepcopy(RECORD) | {"name": EVIL}
    for section in (record["environment"], record["hardware"], record["recipe"]["trainer"]):
        for key, value in section.items():
            if isinstance(value, str):
                section[key] = EVIL
        section[EVIL] = EVIL
    record["environment"]["git_commit"] = EVIL
    record["recipe"]["expect"]["source"] = EVIL
    return record


def test_text_of_others_stays_text_on_the_card(folder):
    plain, evil = rendered(folder, RECORD), rendered(folder, evil_everywhere())
    run = Run.load(folder)
    titled = model_card._render(run, None, seeds=[run.record], baselines=[])  # by the name of the record
    for text in (evil, titled):
        assert "onerror" in text
        for sign in ("<img", "onerror", "Evil\n", "](http://evil", "http://evil", "**bold**", "<!--", "SystemExit"):
            assert sign not in outside_of_code(text), sign
        assert re.findall(r"```python\n", ModelCard(text).text) == ["```python\n"]
    lines, plain_lines = (ModelCard(text).text.splitlines() for text in (evil, plain))
    assert [line for line in lines if line[:1] == "#"] == [line for line in plain_lines if line[:1] == "#"]
    # Each name that was added is a row of a table, once: environment and hardware are one table.
    assert len(lines) == len(plain_lines) + 2
    # Cells end at a | that is not escaped.
    rows = [line for line in lines if "onerror" in line and line.startswith("|")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_a_title_with_line_breaks_leaves_the_metadata_whole(folder):
    (folder / "run.json").write_text(json.dumps(RECORD | {"name": "a\n---\nlicense: evil\n---\n# b"}))
    run = Run.load(folder)
    data = ModelCard(model_card._render(run, None, seeds=[run.record], baselines=[])).data
    assert data.license == "apache-2.0" and data.model_name == "a --- license: evil --- # b"


def test_weights_that_a_run_started_from_are_a_repository_or_a_folder(folder, logic_run, copied):
    recipe = RunRecord.load(logic_run).recipe
    recipe["model"] |= {"model_name_or_path": "org/x\n# Evil", "revision": "a" * 40}
    with pytest.raises(
        ValueError, match="does not say which weights it is trained from: A repository is named ORG/NAME"
    ):
        model_card.card_files(Run.load(copied(logic_run, recipe=recipe)), "org/x")


@pytest.fixture
def with_code(tmp_path):
    """A copy of a published model whose config names a model type and classes of its own, in a file that leaves a trace."""
    folder, trace = tmp_path / "evil", tmp_path / "trace"
    shutil.copytree(Path(__file__).parents[2] / "hub_cards" / "hyla-logic", folder)
    shutil.rmtree(folder / "probe")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evilmodel",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForSequenceClassification": "evil.EvilModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"digests": None}))
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nraise SystemExit('evil')\n")
    return folder, trace


@pytest.mark.parametrize("command", [["card"], ["publish", "--repo-id", "org/x", "--dry-run"]])
def test_the_code_of_a_folder_never_runs(with_code, capsys, command):
    folder, trace = with_code
    assert main([*command, str(folder)]) == 2
    assert "config.json is not the config of a model: its model_type is 'evilmodel'" in capsys.readouterr().err
    assert not trace.exists()


def test_a_snippet_runs_without_the_code_of_the_folder(with_code):
    folder, trace = with_code
    snippet = get_task("logic").words(get_task("logic")).snippet(str(folder))
    assert "trust_remote_code=True" in snippet
    with pytest.raises(ValueError, match="The snippet of the card fails"):
        run_snippet(f"```python\n{snippet}\n```", {})
    assert not trace.exists()


def test_the_card_is_for_a_name_that_the_hub_takes(logic_run):
    for repo_id in ("x", "org/x y", "org/x\n# Evil", "org/x--y", "a/b/c"):
        with pytest.raises(ValueError, match="A repository is named ORG/NAME"):
            model_card.card_files(Run.load(logic_run), repo_id)


def test_plain_settings_are_shown_as_they_are():
    shown = {0.003: "0.003", 100.0: "100", None: "none", True: "yes", "muon": "muon", "2.13.0+cpu": "2.13.0+cpu",
             "Linux x86_64": "Linux x86_64", "AMD EPYC (2 cores)": "AMD EPYC (2 cores)"}  # fmt: skip
    assert {value: as_text(value) for value in shown} == shown
    assert [as_text(text) for text in ("", "a|b", "<b>", "http://x", "[x](y)", "# x", "__x__")] == [
        "`  `", r"`a\|b`", "`<b>`", "`http://x`", "`[x](y)`", "`# x`", "`__x__`"
    ]  # fmt: skip
    for text in ("see www.evil.com now", "(www.evil.com", "_private_", "a _b_ c", "(_b_)", "see http://x now"):
        assert as_text(text) == f"`{text}`"
    assert [as_text(text) for text in ("rms_head", "a_b_c d")] == ["rms_head", "a_b_c d"]
    assert as_code("a `` b") == "```a `` b```" and as_code("`") == "`` ` ``"

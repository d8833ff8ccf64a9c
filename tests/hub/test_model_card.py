"""Tests of model cards: their numbers come from run.json, their outputs from their snippets, and they are checked before a run."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import jinja2
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from jinja2 import meta

from hf_hyla import HylaForSequenceClassification, metrics
from hf_hyla.cli import main
from hf_hyla.hub import cards, model_card, spaces
from hf_hyla.hub.cards import dataset_repo, template
from hf_hyla.hub.publish import check_before_training
from hf_hyla.metrics import modules
from hf_hyla.runs import Run, RunRecord
from hf_hyla.tasks import get_task
from hf_hyla.training import load_recipe


PROJECT = Path(__file__).parents[2]
TEMPLATES = PROJECT / "hf_hyla" / "hub" / "templates"


def card_files(folder, *args, **kwargs):
    return model_card.card_files(Run.load(folder), *args, **kwargs)


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table_row(text, first):
    """The cells of the row whose first cell this is."""
    return next(
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {first} |")
    )


@pytest.fixture(scope="module")
def demo_card(demo_run):
    return card_files(demo_run, "org/hyla-logic-demo")


def test_the_card_shows_the_records_scores_beside_the_papers(demo_run, demo_card):
    record = RunRecord.load(demo_run)
    row = table_row(demo_card["README.md"], "**HYLA, this model**")
    assert row[1:] == [
        "1",
        "512,000",
        *(f"{scores['r2']:.4f}" for scores in record.metrics.values()),
        "0.8113 ± 0.0777",
    ]
    for split, scores in record.metrics.items():
        row = table_row(demo_card["README.md"], f"`{split}`")
        assert row[1:3] == [f"{scores['num_samples']:,}", f"{scores['r2']:.4f}"]
    for name, value in {**record.environment, **record.hardware, **record.recipe["trainer"]}.items():
        [_, shown] = table_row(demo_card["README.md"].replace("`", ""), name)
        assert shown == ("none" if value is None else f"{value:g}" if isinstance(value, float) else str(value))


def test_a_budget_below_the_papers_is_named_in_the_first_lines(demo_card, logic_run, copied):
    text = ModelCard(demo_card["README.md"]).text
    assert "> Trained on 512,000 samples, 8 % of the paper's 6,400,000" in "\n".join(text.splitlines()[:6])
    assert (
        model_card._percent(0.99999) == "99.9 %"
        and model_card._percent(1.0) == "100 %"
        and model_card._percent(0.0808) == "8.08 %"
    )
    whole = card_files(copied(logic_run, samples_seen=6_400_000))["README.md"]
    assert "WARNING" not in whole and "The paper reports no result for this model on this task" in whole


def test_other_numbers_in_the_record_give_other_numbers_in_the_card(demo_run, copied):
    record = RunRecord.load(demo_run)
    record.metrics["ood"]["r2"] = 0.12345
    files = card_files(copied(demo_run, metrics=record.metrics, samples_seen=6_400_000), "org/x")
    assert table_row(files["README.md"], "`ood`")[2] == "0.1235" and "WARNING" not in files["README.md"]
    assert "Its r2 on `ood` is 0.6879 below the paper's mean" in files["README.md"]
    # With the digits of the table.
    assert "value: 0.1235\n" in files["README.md"] and "value: 0.1235\n" in files[".eval_results/logic.yaml"]


def test_metadata_and_eval_results_read_back_as_the_record(demo_run, demo_card):
    data = ModelCard(demo_card["README.md"]).data
    assert (data.license, data.library_name, data.datasets) == ("apache-2.0", "transformers", ["org/logic"])
    assert data.metrics == ["r2"] and "hyla" in data.tags and data.model_name == "hyla-logic-demo"
    metrics = RunRecord.load(demo_run).metrics
    expected = {split: round(scores["r2"], 4) for split, scores in metrics.items()}
    assert {result.dataset_split: result.metric_value for result in data.eval_results} == expected
    entries = parse_eval_result_entries(yaml.safe_load(demo_card[".eval_results/logic.yaml"]))
    assert {entry.task_id: entry.value for entry in entries} == expected
    assert {entry.dataset_id for entry in entries} == {"org/logic"}


def test_a_fine_tuned_model_is_not_compared_with_the_paper(demo_run, copied):
    recipe = RunRecord.load(demo_run).recipe
    recipe["model"] |= {"model_name_or_path": "org/base", "revision": "a" * 40}
    files = card_files(copied(demo_run, recipe=recipe))
    text = files["README.md"]
    assert ModelCard(text).data.base_model == "org/base"
    assert f"from the weights of `org/base`, commit `{'a' * 40}`, and continued for 512,000 samples" in text
    assert "a model that was trained further" in text and "0.8113" not in text
    assert "WARNING" not in text and "of the paper's" not in text + files[".eval_results/logic.yaml"]


def test_only_settings_that_differ_from_the_default_are_listed_as_such(sraven_run):
    text = card_files(sraven_run, "org/x")["README.md"]
    differing = text.partition("differ from the default")[2].partition("The recipe sets")[0]
    assert re.findall(r"^\| `([\w.]+)` \| (\S+) \| (\S+) \|", differing, flags=re.MULTILINE) == [
        ("task.num_features", "2", "4"),
        ("model.hidden_size", "16", "128"),
        ("model.intermediate_size", "16", "256"),
        ("model.num_hidden_layers", "1", "4"),
    ]


@pytest.mark.parametrize("task", ["logic", "sraven"])
def test_snippets_print_what_the_cards_show(request, task, tmp_path):
    run = request.getfixturevalue(f"{task}_run")
    text = card_files(run)["README.md"]
    [(code, shown)] = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, flags=re.DOTALL)
    assert f'model="{run}", trust_remote_code=True' in code and "answer" in shown
    assert cards.run_snippet(text, {}) == shown.strip()
    # A folder's name may hold what ends a text in Python.
    odd = tmp_path / 'a"b\\n'
    shutil.copytree(run, odd)
    assert card_files(odd)["README.md"].count(r'model="' + str(tmp_path) + r'/a\"b\\n"') == 1
    # The puzzle and its answer are a sample of the split that it is said to be of.
    if task == "sraven":
        sample = get_task("sraven", num_features=2).dataset("ood")[0]
        assert str(sample["labels"].tolist()) in shown
        values = [int(word) for word in re.findall(r"\d+", code.partition("puzzle = [")[2].partition("None")[0])]
        assert values == sample["input_ids"].tolist()[:-2]


def test_a_run_with_muon_names_both_optimisers_with_their_rates(logic_run, copied):
    record = RunRecord.load(logic_run)
    assert "Muon" not in card_files(logic_run)["README.md"]
    record.recipe["trainer"] |= {"optim": "muon", "muon_learning_rate": 4e-3, "learning_rate": 1e-3}
    folder = copied(logic_run, recipe=record.recipe)
    said = "Muon trained the matrices inside the layers, at a learning rate of 0.004{}; AdamW trained everything else, at 0.001."
    assert said.format("") in card_files(folder)["README.md"]
    record.recipe["trainer"]["muon_learning_rate_qk"] = 2e-3
    (folder / "run.json").write_text(
        json.dumps(json.loads((folder / "run.json").read_text()) | {"recipe": record.recipe})
    )
    queries = " (0.002 for the projections of queries and keys)"
    assert said.format(queries) in card_files(folder)["README.md"]


def test_the_command_of_the_card_repeats_the_run(logic_run):
    text = card_files(logic_run)["README.md"]
    [command] = re.findall(r"```bash\n(.*?)\n```", text, flags=re.DOTALL)
    assert command == "hyla train resolved_recipe.yaml --output run"
    assert load_recipe(logic_run / "resolved_recipe.yaml").settings == RunRecord.load(logic_run).recipe


def test_the_command_of_a_run_of_two_processes_starts_two_on_a_cpu(logic_run):
    record = RunRecord.load(logic_run)
    record.hardware |= {"num_processes": 2, "accelerator": None}
    words = shlex.split(model_card._command(record))
    start = words.index("train")
    assert words[start:] == ["train", "resolved_recipe.yaml", "--output", "run"]
    accelerate = str(Path(sys.executable).parent / words[0])
    launched = subprocess.run(
        [accelerate, *words[1:start], "env"], capture_output=True, text=True, cwd=PROJECT, timeout=300
    )
    assert launched.stdout.count('"num_processes": 2') == 2, launched.stderr[-2000:]


def test_the_spread_is_the_standard_error_over_the_seeds(logic_run, other_seed):
    text = card_files(logic_run, others=[other_seed / "run.json"])["README.md"]
    first, second = (RunRecord.load(run).metrics["ood"]["r2"] for run in (logic_run, other_seed))
    # Of two values, the standard error is half their distance.
    expected = f"{(first + second) / 2:.4f} ± {abs(first - second) / 2:.4f}"
    assert table_row(text, "**HYLA, this model**")[4] == f"{first:.4f}"
    assert table_row(text, "HYLA, all seeds")[1:5:3] == ["2", expected]
    assert text == card_files(logic_run, others=[logic_run, other_seed])["README.md"]
    assert "not known how far scores vary from seed to seed" not in text
    # The two differ in the training's seed only, and each is listed.
    assert "2 runs differ in their seeds only; this card's" in text
    assert "| 0 | 0 | " in text and re.search(rf"\| 0 \| 1 \| [-.\d]+ \| {second:.4f} \|", text)


def test_the_spread_names_differing_held_out_combinations(logic_run, other_seed, tmp_path):
    record = RunRecord.load(other_seed)
    record.seeds["task"] = record.recipe["task"]["seed"] = 1
    record.save(tmp_path)
    text = card_files(logic_run, others=[tmp_path])["README.md"]
    assert "in their seeds only, which also draw other held-out combinations; this card's" in text


def test_a_spread_over_runs_of_another_recipe_is_refused(logic_run, sraven_run, other_seed, copied):
    with pytest.raises(ValueError, match="cannot be compared with this run"):
        card_files(logic_run, others=[sraven_run])
    metrics = RunRecord.load(other_seed).metrics
    metrics["ood"]["r2"] += 0.1
    with pytest.raises(ValueError, match="have the same seeds, but other results"):
        card_files(logic_run, others=[other_seed, copied(other_seed, metrics=metrics)])


def test_copies_of_a_run_are_no_other_seeds(logic_run, other_seed, copied):
    copy = copied(other_seed, seconds=1.0)
    once = card_files(logic_run, others=[other_seed])["README.md"]
    assert card_files(logic_run, others=[other_seed, copy, other_seed / "run.json"])["README.md"] == once


def test_the_card_shows_a_probe_report_only_of_its_own_weights(logic_run, copied):
    run = copied(logic_run, digests=None)  # so that the report is what is refused below
    command = ["probe", str(run), "--train-samples", "400", "--num-samples", "200", "--ablate"]
    assert main(command) == 0
    report = json.loads((run / "probe" / "probe.json").read_text())
    files = card_files(run)
    text = files["README.md"]
    for name in ("probe.json", "probes.png", "similarity.png", "ablation.png", "map_layer_1.png"):
        assert files[f"probe/{name}"] == (run / "probe" / name).read_bytes()
        assert name == "probe.json" or f"](probe/{name})" in text
    last = next(r for r in report["probes"] if (r["subject"], r["layer"]) == ("target", None))
    row = table_row(text, "target")
    for cell, score in ((row[3], last["scores"]), (row[4], last["control"])):
        shown = f"{score['r2']['value']:.3f} ± {score['r2']['standard_error']:.3f} ({last['chance']['r2']:.3f})"
        assert cell == shown
    assert "400 samples of trained combinations and scored on 200 of `ood`" in text
    assert f"{report['ablation']['whole']:.4f} with all heads" in text
    assert "What its latent codes reveal" not in card_files(logic_run)["README.md"]

    for spoilt, message in [
        (report | {"figures": ["../../secret.txt"]}, "names the figure '../../secret.txt'"),
        (report | {"figures": ["../run.png"]}, "names the figure"),
        (report | {"figures": [7]}, "names the figure 7"),
        (report | {"figures": []}, "drawing them was not finished"),
        (report | {"probes": [{}]}, "is not a report of a probe"),
        ({"weights": report["weights"]}, "is not a report of a probe"),
        ([], "is not a report of a probe"),
    ]:
        (run / "probe" / "probe.json").write_text(json.dumps(spoilt))
        with pytest.raises(ValueError, match=re.escape(message)):
            card_files(run)
    without_maps = [name for name in report["figures"] if not name.startswith("map_")]
    (run / "probe" / "probe.json").write_text(json.dumps(report | {"figures": without_maps}))
    assert "](probe/similarity.png)" in card_files(run)["README.md"]
    assert "](probe/map_" not in card_files(run)["README.md"]
    (run / "probe" / "probe.json").write_text(json.dumps(report))

    other = HylaForSequenceClassification.from_pretrained(run)
    with torch.no_grad():
        other.classifier.bias += 1
    other.save_pretrained(run)
    with pytest.raises(ValueError, match="is about other weights"):
        card_files(run)


def test_rendering_needs_no_network_changes_nothing_and_gives_the_same_files_again(logic_run, monkeypatch):
    def connect(*_):
        raise AssertionError("a card must need no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    before = files_in(logic_run)
    first = card_files(logic_run, "org/x")
    assert first == card_files(logic_run, "org/x")
    assert files_in(logic_run) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {}}, "has no result test/r2"),
        ({"metrics": {"test": {"r2": float("nan"), "num_samples": 1}}}, "has no result test/r2, got nan"),
        ({"steps": 5}, "made 5 of 6 updates"),
    ],
)
def test_a_run_without_results_gets_no_card(logic_run, copied, changes, message):
    with pytest.raises(ValueError, match=message):
        card_files(copied(logic_run, **changes))


def test_a_score_without_samples_is_shown_as_missing(sraven_run, copied):
    metrics = json.loads((sraven_run / "run.json").read_text())["metrics"]
    del metrics["ood"]["accuracy_unique"]
    text = card_files(copied(sraven_run, metrics=metrics))["README.md"]
    row = next(line for line in text.splitlines() if line.startswith("| `ood` |"))
    assert row.split("|")[5].strip() == "–"
    assert sum(line.strip() == "- type: accuracy_unique" for line in text.splitlines()) == 1  # of test


def test_an_unfinished_run_gets_no_card(logic_run, copied):
    run = copied(logic_run)
    (run / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        card_files(run)


def test_a_model_that_cannot_be_loaded_gets_no_card(logic_run, copied):
    run = copied(logic_run, digests=None)
    (run / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match=r"snippet of the card fails \(SafetensorError"):
        card_files(run)


def test_baselines_stand_beside_the_model_with_what_differs_besides_the_attention(logic_run, other_seed, tmp_path):
    def with_attention(attention, source, **trainer):
        record = RunRecord.load(source)
        record.name = f"tiny-{attention}"
        record.recipe["model"]["attention_type"] = attention
        record.recipe["trainer"] |= trainer
        record.metrics["ood"]["r2"] += 0.25
        folder = tmp_path / f"{attention}-{record.seeds['trainer']}-{len(trainer)}"
        folder.mkdir()
        record.save(folder)
        return folder

    softmax = [with_attention("softmax", run) for run in (logic_run, other_seed)]
    text = card_files(logic_run, others=softmax)["README.md"]
    first, second = (RunRecord.load(run).metrics["ood"]["r2"] + 0.25 for run in (logic_run, other_seed))
    row = table_row(text, "softmax attention")
    assert (row[1], row[4]) == ("2", f"{(first + second) / 2:.4f} ± {abs(first - second) / 2:.4f}")
    assert "differ in nothing but the attention" in text and "all seeds" not in text
    linear = with_attention("linear", logic_run, learning_rate=0.5)
    slow = [with_attention("softmax", run, learning_rate=0.5) for run in (logic_run, other_seed)]
    text = card_files(logic_run, others=[*slow, linear])["README.md"]
    assert table_row(text, "`trainer.learning_rate`")[1:] == ["0.01", "0.5 (softmax attention; linear attention)"]
    text = card_files(logic_run, others=[*softmax, linear])["README.md"]
    assert table_row(text, "linear attention")[1] == "1"
    assert table_row(text, "`trainer.learning_rate`")[1:] == ["0.01", "0.5 (linear attention)"]
    again = RunRecord.load(softmax[0])
    again.metrics["ood"]["r2"] += 0.25
    (tmp_path / "again").mkdir()
    again.save(tmp_path / "again")
    with pytest.raises(ValueError, match="have the same seeds, but other results"):
        card_files(logic_run, others=[softmax[0], tmp_path / "again"])


def test_other_recipes_of_one_attention_are_named_by_what_tells_them_apart(logic_run, tmp_path):
    def run_with(attention, steps, **trainer):
        record = RunRecord.load(logic_run)
        record.recipe["model"]["attention_type"] = attention
        record.recipe["trainer"] |= trainer
        record.samples_seen = 4 * steps
        folder = tmp_path / f"{attention}-{steps}"
        folder.mkdir()
        record.save(folder)
        return folder

    others = [run_with("hyla", 5, max_steps=5), run_with("linear", 6), run_with("linear", 7, max_steps=7)]
    text = card_files(logic_run, others=others)["README.md"]
    for label, samples in (("HYLA", 20), ("linear attention", 24), ("linear attention", 28)):
        assert table_row(text, f"{label}, max_steps={samples // 4}")[1:3] == ["1", str(samples)]
    steps = "5 (HYLA, max_steps=5), 7 (linear attention, max_steps=7)"
    assert table_row(text, "`trainer.max_steps`")[1:] == ["6", steps]
    assert text.count("| `trainer.max_steps` | 6 | ") == 1


def test_a_setting_that_a_recipe_leaves_out_is_shown_by_its_default(logic_run, tmp_path):
    record = RunRecord.load(logic_run)
    record.recipe["model"] |= {"attention_type": "softmax", "attention_out_multiplier": 0.25}
    record.recipe["model"] |= {"norm_type": "layer_norm", "score_norm": "softmax"}  # the first is the default
    del record.recipe["trainer"]["logging_steps"]
    record.save(tmp_path)
    text = card_files(logic_run, others=[tmp_path])["README.md"]
    text = text.partition("Apart from the attention type")[2].partition("## Use")[0]
    rows = [re.findall("[^|]+", line) for line in text.splitlines() if line.startswith("| `")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["`trainer.logging_steps`", "2", "default (softmax attention)"],
        ["`model.attention_out_multiplier`", "1", "0.25 (softmax attention)"],
        ["`model.score_norm`", "rms_head", "softmax (softmax attention)"],
    ]


def test_without_matplotlib_the_message_says_what_to_install(logic_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install hf-hyla\[analysis\]"):
        card_files(logic_run)


def test_every_placeholder_of_the_template_is_filled(logic_run, monkeypatch):
    given = {}
    render = ModelCard.from_template.__func__
    monkeypatch.setattr(
        ModelCard,
        "from_template",
        classmethod(lambda cls, data, **values: given.update(values) or render(cls, data, **values)),
    )
    card_files(logic_run)
    named = meta.find_undeclared_variables(jinja2.Environment().parse(template("model_card.md")))
    assert named <= {*given, "card_data"} and set(given) <= {*named, "template_str"}


def test_an_invalid_card_stops_a_run_before_it_starts(logic_run, tmp_path, monkeypatch, capsys):
    recipe = load_recipe(logic_run / "resolved_recipe.yaml")
    check_before_training(recipe.name, recipe.settings, recipe.task, recipe.config)
    monkeypatch.setattr(model_card, "LICENSE", None)
    command = ["train", str(logic_run / "resolved_recipe.yaml"), "--output", str(tmp_path / "run")]
    for words in (command, [*command, "--dry-run"]):
        assert main(words) == 2
        assert "metadata lack license" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_writes_the_card_beside_the_model_or_into_another_folder(logic_run, copied, tmp_path, capsys):
    run = copied(logic_run)
    assert main(["card", str(run)]) == 0
    assert main(["card", str(run), "--repo-id", "org/x", "--output", str(tmp_path / "else")]) == 0
    assert {"README.md", "comparison.png", "learning_curve.png"} < {path.name for path in run.iterdir()}
    assert 'model="org/x"' in (tmp_path / "else" / "README.md").read_text()
    assert main(["card", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


@pytest.fixture
def gradio(monkeypatch):
    """Stands in for gradio, whose pages only hand on what their function returns or raises."""
    gradio = types.ModuleType("gradio")
    gradio.Error = type("Error", (Exception,), {})
    gradio.Textbox = gradio.Interface = gradio.JSON = lambda *_, **__: None
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    return gradio


@pytest.mark.parametrize("task", ["logic", "sraven"])
def test_the_page_of_a_metric_scores_its_example_and_answers_bad_lists_with_a_sentence(task, gradio, monkeypatch):
    loaded = {"org/hyla_logic_r2": metrics.LogicR2, "org/hyla_sraven_accuracy": metrics.SravenAccuracy}
    monkeypatch.setattr("evaluate.load", lambda name: loaded[name](keep_in_memory=True))
    files = spaces.metric_files(get_task(task), "org/x")
    app = {"__name__": "app"}
    exec(compile(files["app.py"], "app.py", "exec"), app)
    first, *others = map(json.dumps, app["EXAMPLE"].values())
    shown = re.search(r"```text\n(.*?)\n```", files["README.md"], flags=re.DOTALL)[1]
    assert str(app["compute"](first, *others)) == shown
    for bad in ("[1", "[1]", '{"a": 1}', '["x"]', "1"):
        with pytest.raises(gradio.Error, match="Expected lists like those of the example"):
            app["compute"](bad, *others)


def test_all_citations_of_the_paper_are_the_same():
    # The metrics travel alone and cannot import it.
    assert modules._CITATION == cards.CITATION
    assert "@inproceedings" not in "".join(path.read_text() for path in TEMPLATES.iterdir())


def test_a_dataset_is_named_by_its_settings_or_else_by_a_digest():
    assert dataset_repo(get_task("sraven", num_features=3), "org/model") == "org/sraven-num_features-3"
    settings = {"num_features": 3, "num_values": 7, "held_out": 0.125, "permute": False, "unambiguous": True}
    names = {
        dataset_repo(get_task("sraven", **task), "org/model")
        for task in ({"seed": -1}, {"seed": -2}, {**settings, "seed": 10**40}, {**settings, "seed": 10**40 + 1})
    }
    assert len(names) == 4 and all(re.fullmatch(r"org/sraven-[0-9a-f]{8}", name) for name in names)

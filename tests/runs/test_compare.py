"""Tests of `hyla compare`: spread, budget, verdict and exit code."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from hf_hyla.cli import main
from hf_hyla.runs import RunRecord
from hf_hyla.runs.compare import compare, find_records
from hf_hyla.training import load_recipe


RESULTS = Path(__file__).parents[2] / "recipes" / "results"
EXPECT = {"metric": "ood/r2", "value": 0.7, "tolerance": 0.05, "source": "us", "budget": 512_000}


@pytest.fixture
def record() -> RunRecord:
    return RunRecord.load(RESULTS / "logic-demo" / "0.json")


def run_of(record, seed=0, r2=0.7, expect=None, **changes):
    run = copy.deepcopy(record)
    run.seeds = {"task": seed, "trainer": seed}
    run.recipe["task"]["seed"] = run.recipe["trainer"]["seed"] = seed
    run.metrics["ood"]["r2"] = r2
    if expect:
        run.recipe["expect"] = {**EXPECT, **expect}
    return dataclasses.replace(run, **changes)


def test_a_score_that_is_not_a_number_is_missed_and_null_in_json(record, tmp_path, capsys):
    for seed, r2 in enumerate((0.7, math.nan)):
        run = run_of(record, seed, r2, {"metric": "ood/r2"})
        (one,) = compare([run])
        assert one.standard_error is None
        (tmp_path / f"{seed}.json").write_text(json.dumps(dataclasses.asdict(run)))
    names = [str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    assert main(["compare", *names]) == 1
    assert "nan (2)" in capsys.readouterr().out
    assert main(["compare", *names, "--json"]) == 1
    [found] = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert (found["values"], found["mean"], found["verdict"]) == ([0.7, None], None, "missed")


def test_seeds_of_a_recipe_become_mean_and_standard_error(record):
    (one,) = compare([run_of(record, seed, r2) for seed, r2 in ((2, 0.9), (0, 0.6), (1, 0.6))])
    assert one.values == [0.6, 0.6, 0.9]
    assert one.mean == pytest.approx(0.7) and one.standard_error == pytest.approx(math.sqrt(0.03) / math.sqrt(3))
    assert (one.paper, one.paper_standard_error) == (0.8113, 0.0777)
    assert one.samples / one.budget == 0.08
    assert one.verdict == "nothing expected"


def test_copies_of_a_run_are_one_wherever_they_lie(record, tmp_path, capsys):
    runs = [run_of(record, 0, 0.7), run_of(record, 1, 0.8)]
    published = run_of(record, 1, 0.8, seconds=1.0)
    published.recipe["trainer"] |= {"push_to_hub": True, "hub_model_id": "org/x"}
    for number, run in enumerate([*runs, published, run_of(record, 1, 0.8, environment={}, hardware={})]):
        (tmp_path / "runs" / str(number)).mkdir(parents=True)
        run.save(tmp_path / "runs" / str(number))
    shutil.copytree(tmp_path / "runs", tmp_path / "elsewhere" / "again")
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "0")
    for paths in (
        ["runs", "elsewhere"],
        ["runs", "runs/0", "runs/0/run.json", "link"],
        ["runs/0", "runs/3", "elsewhere"],
    ):
        assert main(["compare", *(str(tmp_path / path) for path in paths), "--json"]) == 0
        (one,) = json.loads(capsys.readouterr().out)
        assert one["values"] == [0.7, 0.8] and one["mean"] == pytest.approx(0.75)


def test_runs_with_the_same_seeds_but_other_data_or_another_result_are_refused(record, tmp_path, capsys):
    others = [run_of(record, 0, 0.71), run_of(record, 0, data_fingerprint=f"sha256:{'0' * 64}"), run_of(record)]
    others[-1].metrics["test"]["num_samples"] += 1
    for other in others:
        with pytest.raises(
            ValueError, match="Two of the records of logic-demo have the same seeds, but other results"
        ):
            compare([run_of(record), run_of(record, 1), other])
    for number, run in enumerate((run_of(record), others[0])):
        (tmp_path / str(number)).mkdir()
        run.save(tmp_path / str(number))
    assert main(["compare", str(tmp_path)]) == 2
    assert 'logic-demo have the same seeds, but other results ("task": 0, "trainer": 0)' in capsys.readouterr().err
    (one,) = compare([run_of(record), run_of(record, 1)])
    assert len(one.values) == 2


def test_a_terminal_is_not_given_what_it_would_obey(record, tmp_path, capsys):
    dataclasses.replace(record, name="\x1b[2J\u202ename").save(tmp_path)
    assert main(["compare", str(tmp_path)]) == 0
    assert "\ufffd[2J\ufffdname" in capsys.readouterr().out
    assert main(["compare", "no\x1b[2J"]) == 2
    assert "no\ufffd[2J" in capsys.readouterr().err


def test_a_single_run_has_no_spread(record):
    assert compare([record])[0].standard_error is None


@pytest.mark.parametrize(
    ("r2", "expect", "verdict"),
    [
        (0.66, {}, "reached"),
        (0.74, {}, "reached"),
        (0.64, {}, "missed"),
        (0.76, {}, "exceeded"),
        (float("nan"), {}, "missed"),
        (0.1, {"budget": 512_001}, "too few samples"),
        (0.1, {"budget": None}, "missed"),
        (0.9, {"metric": "test/r2", "value": 0.9}, "reached"),  # the record's test R² is 0.8962
    ],
)
def test_a_verdict_needs_the_budget_and_the_tolerance(record, r2, expect, verdict):
    assert compare([run_of(record, r2=r2, expect={"source": "us", **expect})])[0].verdict == verdict


def test_the_verdict_is_about_the_mean(record):
    runs = [run_of(record, seed, r2, {"value": 0.7}) for seed, r2 in ((0, 0.5), (1, 0.9))]
    assert compare(runs)[0].verdict == "reached"
    assert compare(runs[:1])[0].verdict == "missed"


def test_a_changed_expectation_does_not_separate_seeds(record):
    (one,) = compare([run_of(record, 0, expect={"value": 0.5}), run_of(record, 1, expect={"value": 0.7})])
    assert len(one.values) == 2


@pytest.mark.parametrize(
    "setting",
    [
        {"disable_tqdm": True},
        {"cuda_graphs": True},
        {"dataloader_num_workers": 4},
        {"save_steps": 7},
        {"report_to": "all"},
    ],
    ids=str,
)
def test_settings_that_do_not_change_the_result_do_not_separate_seeds(record, setting):
    other = run_of(record, seed=1, r2=0.9)
    other.recipe["trainer"] |= setting
    (one,) = compare([run_of(record), other])
    assert one.values == [0.7, 0.9] and one.name == compare([record])[0].name


def test_recipes_of_one_name_are_distinguished_by_their_differences(record):
    other = copy.deepcopy(record)
    other.recipe["model"]["attention_type"] = "softmax"
    assert [one.name for one in compare([record, other])] == [
        "logic-demo attention_type=hyla",
        "logic-demo attention_type=softmax",
    ]


def test_folders_of_runs_files_and_folders_of_files_are_found(record, tmp_path):
    (tmp_path / "sweep/a/0").mkdir(parents=True)
    record.save(tmp_path / "sweep/a/0")
    committed = len(list(RESULTS.glob("*/[0-9]*.json")))
    paths = [tmp_path / "sweep/a/0", tmp_path / "sweep", RESULTS, RESULTS / "logic-demo/0.json"]
    assert len(find_records(paths)) == 1 + committed


def test_the_command_prints_a_line_for_each_recipe_and_fails_on_a_miss(record, tmp_path, capsys):
    for seed, r2 in enumerate((0.71, 0.72)):
        (tmp_path / f"{seed}").mkdir()
        run_of(record, seed, r2, {"value": 0.7}).save(tmp_path / f"{seed}")
    assert main(["compare", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split("  ")[0] == "logic-demo"
    assert all(
        part in line for part in ("0.7150 ± 0.0050 (2)", "0.7000 ± 0.0500", "0.8113 ± 0.0777", "100.0%", "reached")
    )

    run_of(record, 2, 0.0, {"value": 0.7}).save(tmp_path / "1")
    assert main(["compare", str(tmp_path), "--json"]) == 1
    (one,) = json.loads(capsys.readouterr().out)
    assert one["verdict"] == "missed" and one["values"] == [0.71, 0.0] and one["budget"] == 512_000


def test_a_path_that_is_not_a_run_is_refused(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "nothing")]) == 2
    assert "There is no run" in capsys.readouterr().err
    assert main(["compare", str(tmp_path)]) == 2
    assert "holds no run record" in capsys.readouterr().err
    (tmp_path / "0.json").write_text("{}")
    assert main(["compare", str(tmp_path)]) == 2
    assert "is not a run record" in capsys.readouterr().err


def test_a_record_without_the_compared_metric_is_named(record):
    for lacking, message in (
        ({"metrics": {}}, r"record of logic-demo with the seeds .* lacks the score ood/r2: train"),
        ({"metrics": {"ood": {"loss": 1.0}}}, "lacks the score ood/r2"),
    ):
        with pytest.raises(ValueError, match=message):
            compare([record, dataclasses.replace(record, seeds={"task": 0, "trainer": 1}, **lacking)])


def test_another_seed_of_a_recipe_keeps_its_expectation():
    recipe = load_recipe("logic/hyla.yaml", {"task.seed": "1", "trainer.seed": "1"})
    assert recipe.expect is not None and recipe.settings["expect"]["budget"] == 6_400_000
    assert load_recipe("logic/hyla.yaml", {"task.seed": "1", "trainer.max_steps": "4000"}).expect is None


def test_the_committed_results_are_compared_and_other_files_ignored():
    results = Path(__file__).parents[2] / "recipes" / "results"
    assert len(find_records([results])) == len(list(results.glob("*/[0-9]*.json"))) > 0

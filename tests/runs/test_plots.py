"""The pictures of runs: what they show is what the records hold, and nothing covers anything."""

import sys
from pathlib import Path

import pytest

from hf_hyla.cli import main
from hf_hyla.runs import RunRecord, plots
from hf_hyla.runs.compare import grouped
from hf_hyla.runs.paper import paper_result
from hf_hyla.runs.plots import learning_curve, over_samples


RESULTS = Path(__file__).parents[2] / "recipes" / "results"
RECORD = RESULTS / "logic-demo" / "0.json"


@pytest.fixture
def figure_of(monkeypatch):
    """Calls a function of `plots`, and returns its figure in place of the picture."""
    monkeypatch.setattr(plots, "_png", lambda figure: figure)

    def draw(function, *arguments):
        figure = function(*arguments)
        figure.draw_without_rendering()
        return figure

    return draw


def records(*names):
    return [RunRecord.load(RESULTS / name) for name in names]


def test_the_curve_shows_the_loss_and_every_metric_of_each_split_in_two_columns(figure_of):
    [record] = records("sraven-hyla-30k/0.json")
    figure = figure_of(learning_curve, record, True)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy", "feature_accuracy", "accuracy_unique"]
    assert len({axes.get_window_extent().x0 for axes in figure.axes}) == 2 and figure.get_figwidth() == 8
    losses, scored, *_ = figure.axes
    assert losses.lines[0].get_ydata().tolist() == [point["loss"] for point in record.curve if "loss" in point]
    assert losses.lines[0].get_xdata()[-1] == record.samples_seen
    assert [line.get_label() for line in losses.lines] == ["train", "test", "ood"]
    assert scored.lines[1].get_ydata().tolist() == [p["ood/accuracy"] for p in record.curve if "ood/accuracy" in p]


@pytest.mark.parametrize("name", ["logic-demo/0.json", "sraven-hyla-30k/0.json", "logic-hyla/0.json"])
def test_ticks_of_the_loss_are_plain_numbers_and_the_legend_covers_no_curve(figure_of, name):
    figure = figure_of(learning_curve, *records(name), True)
    losses, [legend] = figure.axes[0], figure.legends
    low, high = losses.get_ylim()
    ticks = [tick.get_text() for tick in losses.get_yticklabels() if low <= tick.get_position()[1] <= high]
    assert len(ticks) >= 3 and all(float(text) > 0 for text in ticks)
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_the_curve_says_that_training_has_dropout_where_it_has(figure_of):
    [record] = records("logic-demo/0.json")
    assert "with dropout" in figure_of(learning_curve, record, True).legends[0].get_title().get_text()
    assert "dropout" not in figure_of(learning_curve, record, False).legends[0].get_title().get_text()


def test_a_picture_of_several_attentions_shows_their_scores_the_papers_and_the_ideal_observers(figure_of):
    hyla, softmax = runs = records("sraven-hyla-30k/0.json", "sraven-softmax-30k/0.json")
    [axes] = figure_of(over_samples, grouped(runs)).axes
    lines = {line.get_label(): line for line in axes.lines}
    for record, name in ((hyla, "HYLA"), (softmax, "softmax attention")):
        assert list(lines[name].get_ydata()) == [p["ood/accuracy"] for p in record.curve if "ood/accuracy" in p]
        assert lines[name].get_xdata()[-1] == record.samples_seen
    marks = [tuple(one[0].get_xydata()[0]) for one in axes.containers]
    results = [(record.samples_seen, record.metrics["ood"]["accuracy"]) for record in runs]
    assert marks == [*results, (20_000_000, 0.6913), (20_000_000, 0.5656)]
    assert list(lines["ideal observer"].get_ydata()) == [0.9445703125] * 2
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "accuracy on ood"


def test_the_papers_value_is_drawn_once_for_each_model_that_it_reports(figure_of):
    def like_demo(name, **model):
        [record] = records("logic-demo/0.json")
        record.name = name
        record.recipe["model"] |= model
        return record

    runs = [
        like_demo("standard"),
        like_demo("shorter", attention_out_multiplier=0.5),  # the same model of the paper
        like_demo("wide", hidden_size=256),  # which the paper does not report
        like_demo("without", score_norm="none"),
    ]
    groups = [[run] for run in runs]
    papers = [paper_result(run.recipe) for run in runs]
    assert papers[0] == papers[1] and papers[2] is None and papers[3] != papers[0]
    [axes] = figure_of(over_samples, groups).axes
    diamonds = [one[0] for one in axes.containers if one[0].get_marker() == "D"]
    assert [tuple(one.get_xydata()[0]) for one in diamonds] == [(6_400_000, papers[i].mean) for i in (0, 3)]
    [axes] = figure_of(over_samples, groups[2:3]).axes
    assert "the paper" not in " ".join(line.get_label() for line in axes.lines)


def test_runs_that_differ_in_their_seeds_are_one_line_with_their_mean(figure_of):
    runs = records(*(f"logic-hyla/{seed}.json" for seed in range(3)))
    [axes] = figure_of(over_samples, grouped(runs)).axes
    line = axes.lines[0]
    assert line.get_label() == "HYLA, 3 seeds"
    last = [[p["ood/r2"] for p in run.curve if "ood/r2" in p][-1] for run in runs]
    assert line.get_ydata()[-1] == pytest.approx(sum(last) / 3)
    assert "ideal observer" not in [line.get_label() for line in axes.lines]


def test_recipes_of_one_attention_are_told_apart_and_a_wide_legend_fits_the_picture(figure_of):
    names = ("sraven-hyla-30k/0.json", "sraven-muon-trials/hyla.json", "sraven-muon-trials/softmax.json")
    figure = figure_of(over_samples, grouped(records(*names)))
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert labels[:3] == ["HYLA, sraven-hyla-30k", "HYLA, sraven-hyla-muon", "softmax attention"]
    assert figure.axes[0].lines[0].get_linestyle() != figure.axes[0].lines[2].get_linestyle()
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width
    assert not extent.overlaps(figure.axes[0].get_window_extent())


def test_the_command_draws_the_runs_of_one_task_and_refuses_others(tmp_path, capsys):
    sraven = [str(RESULTS / f"sraven-{name}-30k") for name in ("hyla", "softmax")]
    picture = tmp_path / "pictures" / "sraven.png"
    assert main(["compare", *sraven, "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and "sraven-hyla-30k" in capsys.readouterr().out
    assert main(["compare", *sraven, str(RESULTS / "logic-hyla"), "--output", str(picture)]) == 2
    assert "One picture shows one task" in capsys.readouterr().err
    assert main(["compare", *sraven, "--output", str(tmp_path / "x.pdf")]) == 2
    assert "must name a picture that ends with .png" in capsys.readouterr().err


def test_a_run_without_a_curve_is_drawn_too_and_the_same_run_gives_the_same_file():
    record = RunRecord.load(RECORD)
    assert learning_curve(record, True) == learning_curve(record, True)
    record.curve = []
    for picture in (learning_curve(record, True), over_samples([[record]])):
        assert picture.startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install hf-hyla\[analysis\]"):
        learning_curve(RunRecord.load(RECORD), True)

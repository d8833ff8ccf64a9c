"""The learning curve of a run, as a picture."""

import sys
from pathlib import Path

import pytest

from hf_hyla.runs import RunRecord
from hf_hyla.runs.plots import learning_curve


RECORD = Path(__file__).parents[2] / "recipes" / "results" / "logic-demo" / "0.json"


def test_the_curve_is_a_png_with_the_loss_and_every_metric(monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}
    save = Figure.savefig

    def noting(figure, *args, **kwargs):
        for axis in figure.axes:
            drawn[axis.get_title()] = {line.get_label(): list(line.get_xdata()) for line in axis.lines}
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noting)
    record = RunRecord.load(RECORD)
    assert learning_curve(record).startswith(b"\x89PNG")
    assert learning_curve(record) == learning_curve(record)
    assert drawn.keys() == {"loss", "r2"}
    assert drawn["loss"].keys() == {"train", "test", "ood", "extrapolation"}
    assert drawn["r2"]["ood"] == [128_000, 256_000, 384_000, 512_000]  # in training samples


def test_a_run_without_a_curve_is_drawn_too():
    record = RunRecord.load(RECORD)
    record.curve = []
    assert learning_curve(record).startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install hf-hyla\[analysis\]"):
        learning_curve(RunRecord.load(RECORD))

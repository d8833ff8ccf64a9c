"""The pictures of runs and benchmarks, drawn from their records as PNG files. They need matplotlib, from the extra `analysis`."""

import io
from importlib.util import find_spec

from .paper import PaperResult
from .record import RunRecord


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def learning_curve(record: RunRecord) -> bytes:
    """
    The training loss of a run and the scores of its splits, over training samples.

    Raises:
        ValueError: without matplotlib.
    """
    splits = ["train", *record.metrics]
    noted = {name for point in record.curve for name in point}
    named = {"loss": {"train": "loss"}}  # of each axis: what it shows of which split
    for split, scores in record.metrics.items():
        for metric in scores:
            if f"{split}/{metric}" in noted:
                named.setdefault(metric, {})[split] = f"{split}/{metric}"

    figure = _figure(width=4.5 * len(named), height=3.2)
    # Imported after `_figure` has said what is missing.
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for axes, (metric, names) in zip(figure.subplots(1, len(named), squeeze=False)[0], named.items(), strict=True):
        for split, name in names.items():
            points = [(point["step"], point[name]) for point in record.curve if name in point]
            samples = [step * record.samples_seen / record.steps for step, _ in points]
            marker = "o" if len(points) < 10 else ""  # a line of a single point would not be seen
            values = [value for _, value in points]
            axes.plot(samples, values, label=split, color=f"C{splits.index(split)}", marker=marker)
        axes.set(title=metric, xlabel="training samples", yscale="log" if metric == "loss" else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    # Below the axes, where it covers no curve.
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=max(len(lines), 1))
    figure.suptitle(record.name)
    return _png(figure)


def scores(record: RunRecord, metric: str, paper: PaperResult | None) -> bytes:
    """
    A bar for each split's `metric`, and the paper's value with its standard error, if it has one.

    Raises:
        ValueError: without matplotlib.
    """
    figure = _figure(width=5.5, height=3.5)
    axes = figure.subplots()
    splits = list(record.metrics)
    bars = axes.bar(splits, [record.metrics[split][metric] for split in splits], width=0.5, label="this run")
    axes.bar_label(bars, fmt="%.3f", padding=2)
    if paper:
        axes.errorbar(
            [paper.metric.partition("/")[0]],
            [paper.mean],
            yerr=[paper.standard_error],
            fmt="D",
            color="black",
            capsize=6,
            label="paper" if record.samples_seen >= paper.num_samples else "paper, full budget",
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set(title=f"{metric} on each split")
    axes.legend()
    return _png(figure)


def length_curves(rows: list[dict]) -> bytes | None:
    """
    Time and peak memory of forward and backward over the length, a line for each subject, from the rows of `hyla bench`
    that have a `length`; `None` if none has one.

    Raises:
        ValueError: without matplotlib.
    """
    rows = [row for row in rows if "length" in row and row["work"] == "forward + backward"]
    if not rows:
        return None
    units = {"seconds": ("milliseconds", 1e3), "peak_bytes": ("peak extra memory, MiB", 2**-20)}
    figure = _figure(width=10.5, height=3.6)
    for axes, (field, (label, factor)) in zip(figure.subplots(1, 2), units.items(), strict=True):
        for subject in dict.fromkeys(row["subject"] for row in rows):
            points = sorted(
                (row["length"], factor * row[field]) for row in rows if row["subject"] == subject and row[field]
            )
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker="o", markersize=3, label=subject)
        axes.set(xlabel="tokens", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    # Beside the axes, where it covers no curve.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.suptitle("Attention, forward and backward")
    return _png(figure)


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("The pictures of a run need matplotlib: pip install hf-hyla[analysis].") from None
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _png(figure) -> bytes:
    file = io.BytesIO()
    # Without the library's version in it, the same run gives the same file.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()

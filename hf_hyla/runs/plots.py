"""The pictures of runs and benchmarks, drawn from their records as PNG files. They need matplotlib, from the extra `analysis`."""

import io
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from ..tasks import get_task
from ..utils import ATTENTION_NAMES
from .compare import settings_apart
from .paper import PaperResult, paper_result
from .record import RunRecord, mean_and_error, without_seeds


# The colour of each attention, from Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {"hyla": "#0072B2", "softmax": "#D55E00", "linear": "#009E73", None: "#000000"}
_STYLES = ("-", "--", ":", "-.")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def attention_of(record: RunRecord) -> str | None:
    """The attention type of a run's model; `None` where the weights it started from decide, which the record does not hold."""
    model = record.recipe["model"]
    return None if "model_name_or_path" in model else model.get("attention_type", "hyla")


def task_settings(record: RunRecord) -> dict[str, Any]:
    """The settings of a run's task, its seed left out."""
    return {key: value for key, value in without_seeds(record.recipe).items() if key.startswith("task.")}


def learning_curve(record: RunRecord, with_dropout: bool) -> bytes:
    """
    The training loss of a run and the scores of its splits, over training samples, two pictures a row.

    Args:
        with_dropout: whether the model was trained with dropout, which its training loss is then noted to include.

    Raises:
        ValueError: without matplotlib.
    """
    splits = ["train", *record.metrics]
    noted = {name for point in record.curve for name in point}
    named = {"loss": {"train": "loss"}}  # for each axis, the name of each split's curve in the record
    for split, scores in record.metrics.items():
        for metric in scores:
            if f"{split}/{metric}" in noted:
                named.setdefault(metric, {})[split] = f"{split}/{metric}"

    rows, columns = -(-len(named) // 2), min(len(named), 2)
    figure = _figure(width=8, height=2.6 * rows + 0.9)
    # Imported after `_figure` has said what is missing.
    from matplotlib.ticker import EngFormatter, MaxNLocator

    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (metric, names) in zip(places, named.items(), strict=False):
        for split, name in names.items():
            points = [(point["step"], point[name]) for point in record.curve if name in point]
            samples = [step * record.samples_seen / record.steps for step, _ in points]
            marker = "o" if len(points) < 10 else ""  # a line of a single point would not be seen
            values = [value for _, value in points]
            axes.plot(samples, values, label=split, color=f"C{splits.index(split)}", marker=marker)
        axes.set(title=metric, xlabel="training samples")
        if metric == "loss":
            _plain_log_scale(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    for axes in places[len(named) :]:
        axes.remove()
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    note = "The loss on train is measured with dropout, and so is higher than without." if with_dropout else None
    # Below the axes, where it covers no curve.
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside lower center",
        ncols=max(len(lines), 1),
        title=note,
        title_fontsize=9,
    )
    figure.suptitle(record.name)
    return _png(figure)


def over_samples(groups: list[list[RunRecord]]) -> bytes:
    """
    The headline score on the headline split, such as `ood`, over training samples. Each recipe has a line for the mean of its
    runs, and a dot with a standard error for their results. The paper's values are drawn at the paper's budget, and what an
    ideal observer reaches as a horizontal line.

    Args:
        groups: the runs of each recipe, see `grouped`.

    Raises:
        ValueError: without matplotlib, or if the records are of several tasks.
    """
    records = [record for group in groups for record in group]
    for other in records:
        if task_settings(other) != task_settings(records[0]):
            raise ValueError(
                f"One picture shows one task, but {other.name} is trained on another than {records[0].name}: leave one out."
            )
    task = get_task(**records[0].recipe["task"])
    metric, split = task.metric_names[0], task.headline_split
    figure = _figure(width=8, height=4.6)
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes = figure.subplots()
    axes.set(
        xscale="log",
        xlabel="training samples (log scale)",
        ylabel=f"{metric} on {split}",
        title=task.words(task).title,
    )
    for group, (label, style, colour) in _named_lines(groups):
        samples, values = _mean_curve(group, f"{split}/{metric}")
        mean, error = mean_and_error([record.metrics[split][metric] for record in group])
        axes.plot(samples, values, style, color=colour, label=label)
        axes.errorbar(group[0].samples_seen, mean, yerr=error, fmt="o", color=colour, capsize=4)
    axes.plot([], [], "o", color="grey", label="result of the finished run")
    left, right = axes.dataLim.intervalx
    budget = _draw_papers(axes, groups)
    # The automatic limits ignore markers that are drawn beside their places.
    axes.set_xlim(left / 1.2, max(right, budget) * 1.4)
    if ceiling := task.words(task).ceiling(split):
        axes.axhline(ceiling, color="grey", linestyle="--", label="ideal observer")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if all(record.metrics[split][metric] >= 0 for record in records):
        axes.set_ylim(bottom=0)  # early scores may lie far below
    axes.grid(alpha=0.3)
    for columns in (3, 2, 1):
        legend = figure.legend(loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()
    return _png(figure)


def labels(groups: list[list[RunRecord]]) -> list[str]:
    """
    What to call each recipe: its attention, and what tells it apart where several have that. This is the recipe's name, or the
    settings in which recipes of one name differ.
    """
    recipes = [group[0] for group in groups]
    found = []
    for recipe in recipes:
        attention = ATTENTION_NAMES.get(attention_of(recipe) or "")
        alike = [other for other in recipes if attention_of(other) == attention_of(recipe)]
        several_names = len({other.name for other in alike}) > 1
        apart = [one for one in settings_apart(recipe, alike) if not one.startswith("attention_type=")]
        name = [recipe.name] if several_names or not (attention and (apart or len(alike) == 1)) else []
        found.append(", ".join(filter(None, [attention, " ".join(name + apart)])))
    return found


def _named_lines(groups: list[list[RunRecord]]) -> Iterator[tuple[list[RunRecord], tuple[str, str, str]]]:
    """Each group with its label, style and colour. Recipes of one attention differ in their style."""
    attentions = [attention_of(group[0]) for group in groups]
    for number, (group, name, attention) in enumerate(zip(groups, labels(groups), attentions, strict=True)):
        style = _STYLES[attentions[:number].count(attention) % len(_STYLES)]
        seeds = f", {len(group)} seeds" if len(group) > 1 else ""
        yield group, (name + seeds, style, _COLOURS[attention])


def _draw_papers(axes, groups: list[list[RunRecord]]) -> int:
    """Draws what the paper reports for the models of these runs. Returns its number of training samples, or 0 without any."""
    from matplotlib.transforms import ScaledTranslation

    drawn: list[PaperResult] = []
    for group in groups:
        paper = paper_result(group[0].recipe)
        if paper and paper not in drawn:
            # Beside its place, where it does not cover a result after the same number of samples.
            aside = ScaledTranslation((9 + 7 * len(drawn)) / 72, 0, axes.figure.dpi_scale_trans)
            axes.errorbar(
                paper.num_samples, paper.mean, yerr=paper.standard_error, fmt="D", color=_COLOURS[attention_of(group[0])],
                fillstyle="none", capsize=3, transform=axes.transData + aside,
            )  # fmt: skip
            drawn.append(paper)
    budget = drawn[0].num_samples if drawn else 0
    if drawn:
        label = f"the paper, after {budget / 1e6:g}M samples"
        axes.plot([], [], "D", color="grey", fillstyle="none", label=label)
    return budget


def _mean_curve(group: list[RunRecord], name: str) -> tuple[list[float], list[float]]:
    """The numbers of training samples at which all runs noted the score, and the mean score there."""
    noted: dict[float, list[float]] = {}
    for record in group:
        for point in record.curve:
            if name in point:
                noted.setdefault(point["step"] * record.samples_seen / record.steps, []).append(point[name])
    samples = [place for place, values in sorted(noted.items()) if len(values) == len(group)]
    return samples, [sum(noted[place]) / len(group) for place in samples]


def _plain_log_scale(axes) -> None:
    """A log scale whose ticks are plain numbers, some in every range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    values = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    decades = max(values) / min(values) if values else 1
    subs = (1, 1.2, 1.5, 2, 3, 4, 5, 7) if decades < 10 else (1, 2, 5) if decades < 500 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


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
    figure = _figure(width=8, height=3.8)
    from matplotlib.ticker import FuncFormatter

    for axes, (field, (label, factor)) in zip(figure.subplots(1, 2), units.items(), strict=True):
        for subject in dict.fromkeys(row["subject"] for row in rows):
            points = sorted(
                (row["length"], factor * row[field]) for row in rows if row["subject"] == subject and row[field]
            )
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker="o", markersize=3, label=subject)
        axes.set(xlabel="tokens", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.grid(alpha=0.3)
    # Below the axes, where it covers no curve.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
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
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)  # a run's name may hold dollars
    # Without the library's version in it, the same run gives the same file.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()

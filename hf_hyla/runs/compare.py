"""Run records → a table: what each recipe reached over its seeds, what was expected of it, and a verdict."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..tasks import get_task
from ..utils import printable
from .paper import paper_result
from .record import RECORD_NAME, RunRecord, mean_and_error, without_seeds


REACHED, EXCEEDED, MISSED, SHORT, NOT_JUDGED = "reached", "exceeded", "missed", "too few samples", "nothing expected"


@dataclass
class Comparison:
    """
    The runs of one recipe, which differ in their seeds.

    Attributes:
        name: the recipe's name, followed by the overrides of its runs if several recipes share the name.
        metric: `split/name`, the metric that the recipe expects something of, or else the task's headline metric.
        values: the scores, one per run, sorted by seed; copies of a run count once.
        mean, standard_error: of the values. The standard error is `None` for a single run.
        expected, tolerance: what the recipe expects.
        paper, paper_standard_error: what the paper's Table A1 says about this model, if anything.
        samples, budget: the training samples of the shortest run, and the number that the expected value, or else the paper's,
            was reached with.
        verdict: `reached` within the tolerance, `exceeded` if better, `missed` if worse, `too few samples` if a run was shorter
            than the budget, or `nothing expected`.
    """

    name: str
    metric: str
    values: list[float]
    mean: float
    standard_error: float | None
    expected: float | None
    tolerance: float | None
    paper: float | None
    paper_standard_error: float | None
    samples: int
    budget: int | None
    verdict: str


def find_records(paths: Iterable[str | Path]) -> list[RunRecord]:
    """
    The records in these paths: JSON files, folders of runs, or folders of either.

    Raises:
        OSError: if there is no such file or folder.
        ValueError: if a folder holds no record, or a file is not a record.
    """
    found: dict[Path, RunRecord] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"There is no run {path}: expected a run's folder or a record file.")
        files = [path] if not path.is_dir() else [path / RECORD_NAME] if (path / RECORD_NAME).exists() else []
        if not files:
            # Committed records are named by their seed; other JSON may lie beside them.
            files = sorted(path.rglob(RECORD_NAME)) or sorted(path.rglob("[0-9]*.json"))
        if not files:
            raise ValueError(
                f"{path} holds no run record: expected {RECORD_NAME}, or records that are named by their seed, in it or in a folder "
                "inside it; name other records by their files."
            )
        for file in files:
            found[file.resolve()] = RunRecord.load(file)
    return list(found.values())


def compare(records: Iterable[RunRecord]) -> list[Comparison]:
    """
    One `Comparison` for each recipe, in the order of their first runs. Copies of a run count once, see `RunRecord.identity`.

    Raises:
        ValueError: for a record that lacks the score that is compared, or whose recipe makes no sense, and as `grouped` does.
    """
    groups = grouped(records)
    return [_compared(group, [other[0] for other in groups]) for group in groups]


def grouped(records: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """
    The runs of each recipe, which differ in their seeds. Recipes are in the order of their first runs; copies count once.

    Raises:
        ValueError: for two runs of a recipe with the same seeds, but other results.
    """
    groups: dict[str, dict[str, RunRecord]] = {}
    for record in records:
        recipe = json.dumps([record.name, without_seeds(record.recipe)], sort_keys=True)
        groups.setdefault(recipe, {}).setdefault(record.identity, record)
    for runs in groups.values():
        check_seeds(runs.values())
    return [list(runs.values()) for runs in groups.values()]


def check_seeds(runs: Iterable[RunRecord]) -> None:
    """
    Raises:
        ValueError: for two runs with the same seeds, which would count as two seeds.
    """
    seen = set()
    for run in runs:
        seeds = json.dumps(run.seeds, sort_keys=True)
        if seeds in seen:
            raise ValueError(
                f"Two of the records of {run.name} have the same seeds, but other results ({seeds.strip('{}')}): name one of them."
            )
        seen.add(seeds)


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as lines of text."""
    rows = [("recipe", "metric", "mean ± se (n)", "expected", "paper", "budget", "verdict")]
    for one in comparisons:
        rows.append(
            (
                printable(one.name),
                printable(one.metric),
                f"{_pair(one.mean, one.standard_error)} ({len(one.values)})",
                _pair(one.expected, one.tolerance),
                _pair(one.paper, one.paper_standard_error),
                "-" if one.budget is None else f"{one.samples / one.budget:.1%}",
                one.verdict,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_json(comparisons: list[Comparison]) -> str:
    # JSON cannot hold NaN and infinity.
    return json.dumps([_finite(asdict(one)) for one in comparisons], indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _compared(runs: list[RunRecord], all_recipes: list[RunRecord]) -> Comparison:
    runs = sorted(runs, key=lambda run: sorted(run.seeds.items()))
    first = runs[0]
    expect: dict[str, Any] = first.recipe.get("expect") or {}
    paper = paper_result(first.recipe)
    task = get_task(**first.recipe["task"])
    metric = expect.get("metric") or (paper.metric if paper else f"{task.headline_split}/{task.metric_names[0]}")
    split, _, score = metric.partition("/")
    for run in runs:
        if score not in run.metrics.get(split, {}):
            raise ValueError(
                f"The record of {run.name} with the seeds {run.seeds} lacks the score {metric}: train the run again, or "
                "leave it out."
            )
    values = [run.metrics[split][score] for run in runs]
    mean, standard_error = mean_and_error(values)
    samples = min(run.samples_seen for run in runs)
    budget = (expect.get("budget") or samples) if expect else paper.num_samples if paper else None
    return Comparison(
        name=told_apart(first, all_recipes),
        metric=metric,
        values=values,
        mean=mean,
        standard_error=standard_error,
        expected=expect.get("value"),
        tolerance=expect.get("tolerance"),
        paper=paper.mean if paper else None,
        paper_standard_error=paper.standard_error if paper else None,
        samples=samples,
        budget=budget,
        verdict=_verdict(
            mean, expect, has_budget=not budget or samples >= budget, greater_is_better=task.greater_is_better
        ),
    )


def _verdict(mean: float, expect: dict[str, Any], *, has_budget: bool, greater_is_better: bool) -> str:
    if not expect:
        return NOT_JUDGED
    if not has_budget:
        return SHORT
    distance = mean - expect["value"]
    if abs(distance) <= expect["tolerance"]:
        return REACHED
    # A mean of NaN is missed too: a failed run has reached nothing.
    return EXCEEDED if (distance > 0 if greater_is_better else distance < 0) else MISSED


def told_apart(record: RunRecord, all_recipes: list[RunRecord]) -> str:
    """The recipe's name, and its settings in which the recipes of this name differ."""
    return " ".join([record.name, *settings_apart(record, all_recipes)])


def settings_apart(record: RunRecord, all_recipes: list[RunRecord]) -> list[str]:
    """The settings of a recipe in which recipes of its name differ, such as `max_steps=40000`."""
    namesakes = [other for other in all_recipes if other.name == record.name]
    settings, *others = (without_seeds(one.recipe) for one in (record, *namesakes))
    differing = [key for key in settings if any(other.get(key) != settings[key] for other in others)]
    return [f"{key.partition('.')[2]}={settings[key]}" for key in differing]


def _pair(value: float | None, spread: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")

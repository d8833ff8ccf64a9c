"""Scores of a model by combination, beside the number of training combinations that share its parts."""

from collections import Counter
from typing import Any

import numpy as np
import torch

from ..model import HylaForSequenceClassification
from ..tasks import Task
from ..utils import no_score
from .latents import run
from .subjects import combinations_of, task_batches


def score_by_combination(
    model: HylaForSequenceClassification,
    task: Task,
    split: str,
    num_samples: int | None = None,
    batch_size: int = 1024,
) -> list[dict[str, Any]]:
    """
    The scores of a classification model on each combination of a split, the worst first.

    Args:
        num_samples: the number of samples of the split; `None` for the paper's.

    Returns:
        A dict for each combination that occurs among the samples: `parts` (ids), `trained` (the number of training
        combinations with each of these parts), `num_samples`, and `scores` by metric.

    Raises:
        ValueError: if the model does not fit the task, or the split is unknown.
        FloatingPointError: if an answer of the model is not finite.
    """
    task.check_model(model.config)
    trained = Counter(part for combination in task.combinations("train") for part in set(combination))
    num_samples = len(task.dataset(split, num_samples))
    read = next(name for name in task.model_columns if name not in task.label_columns)
    parts_column = task.parts_column
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("logits", *task.label_columns, read, parts_column)}
    for batch in task_batches(task, split, num_samples, batch_size):
        logits = run(model, batch).logits.float().cpu()
        for name, column in (batch | {"logits": task.predictions(logits, task.labels_of(batch))}).items():
            if name in kept:
                kept[name].append(column)
    columns = {name: torch.cat(parts).numpy() for name, parts in kept.items()}
    if not np.isfinite(columns["logits"]).all():
        raise no_score(split)
    groups = combinations_of(task, columns)
    found = []
    for group in range(groups.max() + 1):
        rows = groups == group
        parts = sorted(columns[parts_column][rows][0].tolist())
        of_group = {name: column[rows] for name, column in columns.items()}
        found.append(
            {
                "parts": parts,
                "trained": [trained[part] for part in parts],
                "num_samples": int(rows.sum()),
                "scores": task.metrics(of_group["logits"], task.labels_of(of_group), of_group[read]),
            }
        )
    return sorted(found, key=lambda one: one["scores"][task.metric_names[0]], reverse=not task.greater_is_better)


def table(found: list[dict[str, Any]], metric: str) -> str:
    """
    The result of `score_by_combination` as text: a row for each combination, then the mean score of all combinations whose
    rarest part was trained equally often.
    """
    lines = [f"{'combination':<16}{'trained with':<20}{'samples':>8}{metric:>12}"]
    for one in found:
        parts, trained = (" ".join(map(str, one[key])) for key in ("parts", "trained"))
        lines.append(f"{parts:<16}{trained:<20}{one['num_samples']:>8}{one['scores'][metric]:>12.4f}")
    lines.append("")
    for rarest in sorted({min(one["trained"]) for one in found}):
        scores = [one["scores"][metric] for one in found if min(one["trained"]) == rarest]
        lines.append(
            f"{metric} {sum(scores) / len(scores):.4f} over the {len(scores)} combinations whose rarest part is in {rarest} of the "
            "trained ones"
        )
    return "\n".join(lines)

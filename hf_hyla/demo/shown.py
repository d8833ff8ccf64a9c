"""The models that the demo shows, each with the record of its run, which names its task and its scores."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..model import HylaForSequenceClassification
from ..runs import Run, RunRecord
from ..runs.folder import record_of
from ..runs.weights import load_model
from ..tasks import TASKS, Task, get_task
from ..utils import ATTENTION_NAMES


@dataclasses.dataclass
class Shown:
    """
    Attributes:
        name: the model's folder or repository.
        title: the name of the model's attention, followed by the model's name if several models have that attention.
        model: the model in evaluation mode.
        record: the record of the run that made the model.
    """

    name: str
    title: str
    model: HylaForSequenceClassification
    record: RunRecord

    def accuracy(self) -> str:
        """How good the model is, from the record of its run."""
        task, scores = get_task(**self.record.recipe["task"]), self.record.metrics
        metric = task.metric_names[0]
        unseen, trained = scores["ood"], scores["test"]
        if metric == "accuracy":
            known = f"Right on {unseen[metric]:.1%} of unseen and {trained[metric]:.1%} of trained combinations"
        else:
            known = f"R² {unseen[metric]:.3f} on unseen and {trained[metric]:.3f} on trained combinations"
        return f"{known} ({unseen['num_samples']:,} samples each, by the record of its run of {self.record.steps:,} steps)."


def load(names: Sequence[str]) -> list[tuple[Task, list[Shown]]]:
    """
    The models of each task.

    Args:
        names: folders of runs, or repositories on the Hub to which runs were published.

    Raises:
        ValueError: if a name is not that of a finished run of one of the paper's tasks, or if two runs of one task have different
            task settings.
        OSError: if one cannot be read.
    """
    found: dict[str, tuple[Task, list[Shown]]] = {}
    for name in dict.fromkeys(names):
        record = record_of(name)
        kind = record.recipe["task"]["name"]
        papers = [own for own, task in TASKS.items() if task.paper]
        if kind not in papers:
            raise ValueError(f"{name} was trained on the task {kind}, and the demo shows {' and '.join(papers)}.")
        Run(Path(name), record).check_finished()
        settings = record.recipe["task"]
        task, models = found.setdefault(kind, (get_task(**settings), []))
        if get_task(**settings).spec != task.spec:
            raise ValueError(
                f"{name} was trained on other settings of the task {kind} than {models[0].name}: show one of them at a time."
            )
        # The eager implementation gives the codes, and needs no compilation.
        model = load_model(name, attn_implementation="eager").eval()
        task.check_model(model.config)
        title = ATTENTION_NAMES[model.config.attention_type]
        models.append(Shown(name, title[0].upper() + title[1:], model, record))
    for _, models in found.values():
        titles = [one.title for one in models]
        for one in models:
            if titles.count(one.title) > 1:
                one.title = f"{one.title} ({one.name})"
    return [found[kind] for kind in ("sraven", "logic") if kind in found]

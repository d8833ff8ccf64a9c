"""The Spaces beside a model: its task's metric, as evaluate.load reads it, and a page that asks the model."""

import json
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from .. import metrics
from ..tasks import HubMetric, Task
from .cards import CITATION, LICENSE, dataset_repo, run_snippet, sibling_repo, template


def metric_repo(task: Task, repo_id: str) -> str:
    """The repository of the task's metric, in the organisation of the model's."""
    return sibling_repo(repo_id, _metric_of(task).name)


def metric_files(task: Task, repo_id: str) -> dict[str, str | bytes]:
    """
    What the metric's repository holds, by name.

    Its code is this package's own; the script that `evaluate.load` reads names both files, since evaluate fetches only
    what the script itself imports.

    Raises:
        ValueError: if the task's metric does not belong to this package.
    """
    metric, metric_id = _metric_of(task), metric_repo(task, repo_id)
    arguments = ", ".join(f"{name}={values}" for name, values in metric.example.items())
    shown = f'evaluate.load("{metric_id}")'
    values = {
        "title": metric.name,
        "description": metric.description,
        "task_title": task.words(task).title,
        "snippet": f"import evaluate\n\nmetric = {shown}\nprint(metric.compute({arguments}))",
        "inputs": metric.inputs,
        "citation": CITATION,
    }
    data = _card_data(metric.name, tags=["evaluate", "metric", "hyla"])
    text = template("metric_card.md")
    unrun = str(SpaceCard.from_template(data, template_str=text, printed="", **values))
    name = metric.class_name
    printed = run_snippet(unrun, {shown: f"{name}(keep_in_memory=True)"}, {name: getattr(metrics, name)})
    app = template("metric_app.py")
    for placeholder, value in {
        "metric_id": metric_id,
        "example": json.dumps(metric.example),
        "title": metric.name,
        "description": metric.description,
    }.items():
        app = app.replace(f"{{{{ {placeholder} }}}}", value)
    code = Path(metrics.__file__).parent
    return {
        "README.md": str(SpaceCard.from_template(data, template_str=text, printed=printed, **values)),
        "app.py": app,
        "requirements.txt": "datasets\nevaluate\nnumpy\n",
        f"{metric.name}.py": f'"""{metric.description}"""\n\nfrom .functions import {metric.function}\nfrom .modules import '
        f'{name}\n\n\n__all__ = ["{name}", "{metric.function}"]\n',
        "modules.py": (code / "modules.py").read_text(encoding="utf-8"),
        "functions.py": (code / "functions.py").read_text(encoding="utf-8"),
    }


def _metric_of(task: Task) -> HubMetric:
    if task.words.metric is None:
        raise ValueError(f"The metric of the task {task.name} is not in hf_hyla.metrics: leave out --metric.")
    return task.words.metric


def demo_repo(repo_id: str) -> str:
    """The repository of the Space that asks the model."""
    return f"{repo_id}-demo"


def demo_files(task: Task, repo_id: str) -> dict[str, str | bytes]:
    """
    What the Space that asks the model holds, by name.

    Raises:
        ValueError: if the task has no puzzles.
    """
    page = task.words(task).page()
    if page is None:
        raise ValueError(f"The Space asks SRAVEN puzzles, and this run is of the task {task.name}: leave out --space.")
    title = f"Ask {repo_id.partition('/')[2]}"
    card = SpaceCard.from_template(
        _card_data(title, tags=["hyla", task.name], models=[repo_id], datasets=[dataset_repo(task, repo_id)]),
        template_str=template("space_card.md"),
        title=title,
        model_id=repo_id,
        **page,
    )
    app = template("space_app.py").replace("{{ model_id }}", repo_id).replace("{{ example }}", page["example"])
    return {
        "README.md": str(card),
        "app.py": app,
        "requirements.txt": "torch>=2.11\ntransformers>=5.17,<6\n",
    }


def _card_data(title: str, **fields) -> SpaceCardData:
    return SpaceCardData(title=title, sdk="gradio", app_file="app.py", license=LICENSE, **fields)

"""The Spaces beside a model: its task's metric, as evaluate.load reads it, and a page that asks the model."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCard, SpaceCardData

from .. import metrics
from ..tasks import Task
from .cards import CITATION, LICENSE, run_snippet, sibling_repo, template
from .model_card import TASK_TITLES


# Of each task: the metric's repository, class and function, what it says of itself, and an example with its inputs.
_METRICS: dict[str, tuple[str, str, str, str, dict[str, list[Any]], str]] = {
    "logic": (
        "hyla_logic_r2",
        "LogicR2",
        "logic_r2",
        "The mean over samples of 1 - squared error / `base_mse`, where `base_mse` is the variance of the sample's values.",
        {"predictions": [0.5, 0.2], "references": [0.5, 0.4], "base_mse": [0.02, 0.05]},
        "Each argument has one number a sample.",
    ),
    "sraven": (
        "hyla_sraven_accuracy",
        "SravenAccuracy",
        "sraven_accuracy",
        "The fraction of puzzles of whose answer every feature is right, and the fraction of right features.",
        {"predictions": [[1, 2, 3, 4], [5, 6, 7, 0]], "references": [[1, 2, 3, 4], [5, 6, 7, 1]]},
        "Each argument is a list of answers, each a list of integers, one a feature.",
    ),
}


def metric_repo(task: Task, repo_id: str) -> str:
    """The repository of the task's metric, in the organisation of the model's."""
    return sibling_repo(repo_id, _METRICS[task.name][0])


def metric_files(task: Task, repo_id: str) -> dict[str, str | bytes]:
    """
    What the metric's repository holds, by name.

    Its code is this package's own; the script that `evaluate.load` reads names both files, since evaluate fetches what
    the script imports and nothing further.
    """
    name, cls, function, description, example, inputs = _METRICS[task.name]
    metric_id = metric_repo(task, repo_id)
    arguments = ", ".join(f"{name}={values}" for name, values in example.items())
    shown = f'evaluate.load("{metric_id}")'
    values = {
        "title": name,
        "description": description,
        "task_title": TASK_TITLES[task.name],
        "snippet": f"import evaluate\n\nmetric = {shown}\nprint(metric.compute({arguments}))",
        "inputs": inputs,
        "citation": CITATION,
    }
    data = _card_data(name, tags=["evaluate", "metric", "hyla"])
    text = template("metric_card.md")
    unrun = str(SpaceCard.from_template(data, template_str=text, printed="", **values))
    printed = run_snippet(unrun, {shown: f"{cls}(keep_in_memory=True)"}, {cls: getattr(metrics, cls)})
    app = template("metric_app.py")
    for placeholder, value in {
        "metric_id": metric_id,
        "example": json.dumps(example),
        "title": name,
        "description": description,
    }.items():
        app = app.replace(f"{{{{ {placeholder} }}}}", value)
    code = Path(metrics.__file__).parent
    return {
        "README.md": str(SpaceCard.from_template(data, template_str=text, printed=printed, **values)),
        "app.py": app,
        "requirements.txt": "datasets\nevaluate\nnumpy\n",
        f"{name}.py": f'"""{description}"""\n\nfrom .functions import {function}\nfrom .modules import {cls}\n\n\n'
        f'__all__ = ["{cls}", "{function}"]\n',
        "modules.py": (code / "modules.py").read_text(encoding="utf-8"),
        "functions.py": (code / "functions.py").read_text(encoding="utf-8"),
    }


def demo_repo(repo_id: str) -> str:
    """The repository of the Space that asks the model."""
    return f"{repo_id}-demo"


def demo_files(task: Task, repo_id: str) -> dict[str, str | bytes]:
    """
    What the Space that asks the model holds, by name.

    Raises:
        ValueError: if the task is not SRAVEN.
    """
    if task.name != "sraven":
        raise ValueError(f"The Space asks SRAVEN puzzles, and this run is of the task {task.name}: leave out --space.")
    panels = task.dataset("ood")[0]["input_ids"].reshape(9, -1)[:8]
    example = "\n".join(" ".join(map(str, panel)) for panel in panels.tolist())
    title = f"Ask {repo_id.partition('/')[2]}"
    card = SpaceCard.from_template(
        _card_data(title, tags=["hyla", "sraven"], models=[repo_id], datasets=[sibling_repo(repo_id, task.name)]),
        template_str=template("space_card.md"),
        title=title,
        model_id=repo_id,
        features=task.settings["num_features"],
        values=task.settings["num_values"],
    )
    app = template("space_app.py").replace("{{ model_id }}", repo_id).replace("{{ example }}", example)
    return {
        "README.md": str(card),
        "app.py": app,
        "requirements.txt": "torch>=2.11\ntransformers>=5.17,<6\n",
    }


def _card_data(title: str, **fields) -> SpaceCardData:
    return SpaceCardData(title=title, sdk="gradio", app_file="app.py", license=LICENSE, **fields)

"""The Spaces beside a model: its task's metric, as evaluate.load reads it, and a page for trying the model."""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from .. import metrics
from ..tasks import HubMetric, Task
from .cards import CITATION, LICENSE, dataset_repo, run_snippet, sibling_repo, template


# The version of gradio that the pages were tested with.
GRADIO_VERSION = "6.31.0"
# The parts of the package that the page of a model needs, besides the files at the package's top level.
_PARTS = ("analysis", "demo", "metrics", "model", "runs", "tasks")
_REQUIREMENTS = """\
--extra-index-url https://download.pytorch.org/whl/cpu
numpy>=1.26
scikit-learn>=1.5
torch>=2.11
tqdm>=4.66
transformers>=5.17,<6
"""


def metric_repo(task: Task, repo_id: str) -> str:
    """The repository of the task's metric, in the organisation of the model's."""
    return sibling_repo(repo_id, _metric_of(task).name)


def metric_files(task: Task, repo_id: str) -> dict[str, str | bytes]:
    """
    The files of the metric's repository, by name.

    The code is a copy of this package's. The script that `evaluate.load` reads imports both files, since evaluate fetches only
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
    data = _card_data(
        metric.name,
        "📏",
        f"The metric of {task.name}, with a page to try it",
        tags=["evaluate", "metric", "hyla"],
    )
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
    """The repository of the Space for trying the model."""
    return f"{repo_id}-demo"


def demo_files(task: Task, repo_id: str, beside: Sequence[str] = ()) -> dict[str, str | bytes]:
    """
    The files of the Space for trying the model, by name: the page of `hyla demo`, and the code that it needs.

    Args:
        beside: repositories of other models of the same task, which the page shows too.

    Raises:
        ValueError: if there is no page for the task.
    """
    page = task.words(task).page()
    if page is None:
        raise ValueError(f"There is no page for trying models of the task {task.name}: leave out --space.")
    title = f"Ask {repo_id.partition('/')[2]}"
    models = [repo_id, *beside]
    data = _card_data(
        title,
        page["emoji"],
        page["short_description"],
        tags=["hyla", task.name],
        models=models,
        datasets=[dataset_repo(task, repo_id)],
    )
    text = template("space_card.md")
    card = SpaceCard.from_template(data, template_str=text, title=title, models=models, about=page["about"])
    app = template("space_app.py").replace("{{ models }}", ", ".join(models))
    package = Path(metrics.__file__).parents[1]
    code = [*package.glob("*.py"), *(path for part in _PARTS for path in (package / part).rglob("*"))]
    return {
        "README.md": str(card),
        "app.py": app,
        "requirements.txt": _REQUIREMENTS,
        **{
            f"hf_hyla/{path.relative_to(package).as_posix()}": path.read_bytes()
            for path in sorted(code)
            if path.suffix in (".py", ".css")
        },
    }


def _card_data(title: str, emoji: str, short_description: str, **fields) -> SpaceCardData:
    return SpaceCardData(
        title=title,
        emoji=emoji,
        colorFrom="indigo",
        colorTo="purple",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.11",
        app_file="app.py",
        short_description=short_description,
        license=LICENSE,
        **fields,
    )

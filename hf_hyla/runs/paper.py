"""The results of arXiv 2406.05816 that runs are compared with: Table A1, whose columns belong to the tasks."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..model import HylaConfig
from ..tasks import Task, get_task
from ..utils import one_line


_ROW_FIELDS = ("attention_type", "score_norm", "value_activation", "value_depth", "ffn_type")
# The paper does not say how its mixtures of experts are made.
_UNKNOWN_FIELDS = ("num_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
# These belong to the training, like the optimiser: the weights of `o_proj` can make up for any multiplier of attention's output.
_TRAINING_FIELDS = ("attention_dropout", "attention_out_multiplier")
# The rows of Table A1: the values of the fields above, and the name of the row in the tasks' results.
_ROWS = {
    ("softmax", "softmax", "none", 1, "mlp"): "softmax",
    ("linear", "none", "none", 1, "mlp"): "linear",
    ("hyla", "rms_head", "relu", 1, "mlp"): "hyla",
    ("linear", "rms_head", "none", 1, "mlp"): "linear-rms-head",
    ("linear", "rms_head", "relu", 1, "mlp"): "linear-rms-head-nonlinear-value",
    ("hyla", "none", "relu", 1, "mlp"): "hyla-no-rms-head",
    ("hyla", "rms_head", "none", 1, "mlp"): "hyla-linear-value",
    ("hyla", "none", "none", 1, "mlp"): "hyla-linear-value-no-rms-head",
    ("hyla", "softmax", "relu", 1, "mlp"): "hyla-softmax",
    ("hyla", "rms_head", "relu", 2, "mlp"): "hyla-plus",
    ("softmax", "softmax", "none", 1, "moe"): "softmax-moe",
    ("linear", "none", "none", 1, "moe"): "linear-moe",
    ("hyla", "rms_head", "relu", 1, "moe"): "hyla-moe",
}


@dataclass(frozen=True)
class PaperResult:
    """The mean and standard error of `metric` (`split/name`) over three seeds, after `num_samples` training samples."""

    metric: str
    mean: float
    standard_error: float
    num_samples: int


def differing_settings(task: Task) -> dict[str, Any]:
    """
    The settings of a task that differ from the paper's or, for a task that is not the paper's, from the defaults; a seed other
    than 0 counts as a difference.
    """
    papers = {**type(task)().settings, **(task.paper.settings if task.paper else {}), "seed": 0}
    return {name: value for name, value in task.settings.items() if value != papers.get(name)}


def config_of(settings: dict[str, Any]) -> HylaConfig:
    """
    The config of the model that a recipe with these sections `task` and `model` makes from fresh weights.

    Raises:
        ValueError: if the settings make no task or no model.
    """
    defaults = get_task(**settings["task"]).model_defaults
    try:
        return HylaConfig.from_dict({**defaults, **settings["model"]})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"The recipe's section model does not describe a model: {one_line(error)}") from None


def effective(config: HylaConfig, name: str) -> Any:
    """The value of a field that the model uses, where the field may be `None`."""
    return getattr(config, f"effective_{name}", getattr(config, name))


def paper_result(settings: dict[str, Any]) -> PaperResult | None:
    """
    What Table A1 says about the model of a run with these settings, which are the sections `task` and `model` of a recipe.
    Optimiser and dropout may differ from the paper's. The result is `None` if the paper has no such row, if anything else
    differs, or if training started from a checkpoint, since the paper never does that.

    Raises:
        ValueError: if the settings make no task or no model.
    """
    task = get_task(**settings["task"])
    if task.paper is None or "model_name_or_path" in settings["model"]:
        return None
    if any(task.settings[name] != value for name, value in task.paper.settings.items()):
        return None
    papers, config = HylaConfig(**task.model_defaults), config_of(settings)
    others = set(HylaConfig.__annotations__) - {*_ROW_FIELDS, *_UNKNOWN_FIELDS, *_TRAINING_FIELDS}
    if any(getattr(config, name) != getattr(papers, name) for name in others):
        return None
    row = _ROWS.get(tuple(effective(config, name) for name in _ROW_FIELDS))
    if row is None:
        return None
    mean, standard_error = task.paper.table_a1[row]
    return PaperResult(f"ood/{task.metric_names[0]}", mean, standard_error, task.num_samples["train"])

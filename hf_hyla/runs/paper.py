"""The figures of arXiv 2406.05816 that runs are compared with: Table A1, and the budgets behind it."""

from dataclasses import dataclass
from typing import Any

from ..model import HylaConfig
from ..tasks import get_task


_ROW_FIELDS = ("attention_type", "score_norm", "value_activation", "value_depth", "ffn_type")
# The paper does not say how its mixtures of experts are made.
_UNKNOWN_FIELDS = ("num_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")


@dataclass(frozen=True)
class PaperResult:
    """Mean and standard error over three seeds, of the metric named `split/metric`, after `num_samples` samples."""

    metric: str
    mean: float
    standard_error: float
    num_samples: int


# The fields above, as they hold: out-of-distribution results (mean, standard error) on
# fuzzy logic (R², 32 examples in context, 70 % of the combinations held out) and SRAVEN (accuracy, 4 layers).
_TABLE_A1 = {
    ("softmax", "softmax", "none", 1, "mlp"): ((0.6328, 0.0231), (0.5656, 0.0105)),
    ("linear", "none", "none", 1, "mlp"): ((0.5989, 0.0522), (0.5630, 0.0111)),
    ("hyla", "rms_head", "relu", 1, "mlp"): ((0.8113, 0.0777), (0.6913, 0.0190)),
    ("linear", "rms_head", "none", 1, "mlp"): ((0.6893, 0.0510), (0.5901, 0.0250)),
    ("linear", "rms_head", "relu", 1, "mlp"): ((0.5691, 0.0425), (0.5538, 0.0032)),
    ("hyla", "none", "relu", 1, "mlp"): ((0.8127, 0.0788), (0.6253, 0.0573)),
    ("hyla", "rms_head", "none", 1, "mlp"): ((0.8454, 0.0532), (0.5654, 0.0021)),
    ("hyla", "none", "none", 1, "mlp"): ((0.7942, 0.0743), (0.5633, 0.0141)),
    ("hyla", "softmax", "relu", 1, "mlp"): ((0.7098, 0.0708), (0.3821, 0.0298)),
    ("hyla", "rms_head", "relu", 2, "mlp"): ((0.8765, 0.0454), (0.6659, 0.0008)),
    ("softmax", "softmax", "none", 1, "moe"): ((0.6383, 0.0607), (0.5768, 0.0131)),
    ("linear", "none", "none", 1, "moe"): ((0.6009, 0.0616), (0.6434, 0.0430)),
    ("hyla", "rms_head", "relu", 1, "moe"): ((0.8237, 0.0655), (0.6694, 0.0394)),
}
# Of each task: the settings that Table A1 is about, the budget and the metric.
_TASKS: dict[str, tuple[dict[str, Any], int, str]] = {
    "logic": ({"num_variables": 4, "num_terms": 2, "num_examples": 32, "held_out": 0.7}, 6_400_000, "ood/r2"),
    "sraven": (
        {"num_features": 4, "num_values": 8, "held_out": 0.25, "permute": True, "unambiguous": False},
        20_000_000,
        "ood/accuracy",
    ),
}


def differing_settings(task) -> dict[str, Any]:
    """The settings of a task that make its samples others than the paper's; the seed counts as one, from 0."""
    papers = {**type(task)().settings, **_TASKS.get(task.name, ({},))[0], "seed": 0}
    return {name: value for name, value in task.settings.items() if value != papers.get(name)}


def paper_result(settings: dict[str, Any]) -> PaperResult | None:
    """
    What Table A1 says of the model of a run with these settings, the sections `task` and `model` of a recipe. `None` where
    the paper has no such row, where task or model differ from the paper's in anything else, and where training started from
    a checkpoint, since the paper trains no model further.
    """
    if "model_name_or_path" in settings["model"]:
        return None
    task = get_task(**settings["task"])
    if task.name not in _TASKS:
        return None
    config = HylaConfig(**{**task.model_defaults, **settings["model"]})
    papers_task, num_samples, metric = _TASKS[task.name]
    if any(task.settings[name] != value for name, value in papers_task.items()):
        return None
    papers = HylaConfig(**task.model_defaults)
    others = set(HylaConfig.__annotations__) - {*_ROW_FIELDS, *_UNKNOWN_FIELDS}
    if any(getattr(config, name) != getattr(papers, name) for name in others):
        return None
    row = _TABLE_A1.get(
        (
            config.attention_type,
            config.effective_score_norm,
            config.effective_value_activation,
            config.value_depth,
            config.ffn_type,
        )
    )
    if row is None:
        return None
    mean, standard_error = row[0 if task.name == "logic" else 1]
    return PaperResult(metric, mean, standard_error, num_samples)

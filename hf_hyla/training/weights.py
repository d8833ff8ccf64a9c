"""The weights that training starts from: those of a checkpoint, or fresh ones."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from transformers import AutoConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from ..model import HylaConfig, HylaPreTrainedModel
from ..runs.paper import effective
from ..runs.weights import CONFIG_ERRORS, load_model, new_model
from ..tasks import Task
from ..utils import one_line


# Keys of a recipe's model section that name a checkpoint to start from.
CHECKPOINT_KEYS = {"model_name_or_path": str, "revision": str}
# Fields that a run may change, since they affect neither the shape nor the meaning of weights.
_OF_THE_RUN = ("attention_dropout", "num_answers", "problem_type", "output_router_logits", "router_aux_loss_coef")


def initial_model(
    settings: dict[str, Any], config: HylaConfig, auto_class: str = "AutoModelForSequenceClassification"
) -> HylaPreTrainedModel:
    """
    The model that a run starts from, with the weights of the checkpoint that its `model` settings name, or with fresh weights.
    Its class is the one that `auto_class` of transformers makes.
    """
    if "model_name_or_path" not in settings:
        return new_model(config, auto_class)
    # Training is in single precision, whatever the dtype of the checkpoint.
    return load_model(
        settings["model_name_or_path"],
        auto_class,
        revision=settings.get("revision"),
        config=config,
        dtype=torch.float32,
    )


def config_of_checkpoint(where: str, settings: dict[str, Any], task: Task) -> HylaConfig:
    """
    The config of the checkpoint that a recipe's model section names, made ready for the task.

    Fields that shape the weights come from the checkpoint, and `settings` must agree with them. The number of answers is
    the task's.

    Args:
        where: the section's name in errors.
        settings: the section. Its `revision` is replaced by the commit that was found, since a resumed run must start from the
            same weights.

    Raises:
        ValueError: if there is no such checkpoint, or settings or task do not fit it.
    """
    name = settings["model_name_or_path"]
    if "revision" in settings and Path(name).exists():
        raise ValueError(
            f"{where}.revision: {name} is a folder, and only repositories have revisions: remove the key."
        )
    try:
        if not Path(name).exists():
            found = cached_file(name, "config.json", revision=settings.get("revision"))
            settings["revision"] = extract_commit_hash(found, None)
        config = AutoConfig.from_pretrained(name, revision=settings.get("revision"), trust_remote_code=False)
    except (OSError, HTTPError, *CONFIG_ERRORS) as error:
        reason = one_line(error).rstrip(".")
        raise ValueError(
            f"{where}.model_name_or_path: {name} cannot be loaded ({reason}): expected the folder of a run or the id of "
            "a repository on the Hub."
        ) from None
    if not isinstance(config, HylaConfig):
        raise ValueError(f"{where}.model_name_or_path: {name} is a {config.model_type} model, expected a hyla model.")

    asked = {key: value for key, value in settings.items() if key not in CHECKPOINT_KEYS}
    try:
        wanted = HylaConfig.from_dict(config.to_dict() | asked)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from None
    for field in asked:
        if field not in _OF_THE_RUN and effective(wanted, field) != effective(config, field):
            raise ValueError(
                f"{where}.{field} is {asked[field]!r}, but the weights of {name} were trained with "
                f"{effective(config, field)!r}: remove the key, or model_name_or_path to start from fresh weights."
            )
    defaults = task.model_defaults
    # Before what the task sets, which may contradict the config of a model that does not fit.
    task.check_model(
        HylaConfig.from_dict(wanted.to_dict() | {"num_answers": defaults.get("num_answers", wanted.num_answers)})
    )
    of_the_task = {name: defaults[name] for name in ("num_answers", "problem_type") if name in defaults.keys() - asked}
    config = HylaConfig.from_dict(wanted.to_dict() | of_the_task)
    task.check_model(config)
    return config

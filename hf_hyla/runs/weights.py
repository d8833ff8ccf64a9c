"""A model with fresh weights, or with those in the folder of a run or in a repository on the Hub."""

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

from ..model import HylaConfig, HylaPreTrainedModel
from ..reading import read_json
from ..utils import one_line


# What a wrong config ends in: values of wrong types fail in transformers wherever they are used first.
CONFIG_ERRORS = (ValueError, StrictDataclassError, TypeError, AttributeError, LookupError)


def new_model(config: HylaConfig, auto_class: str) -> HylaPreTrainedModel:
    """A model with fresh weights, of the class that `auto_class` of transformers makes of the config."""
    return getattr(transformers, auto_class).from_config(config)


def load_model(name: str | Path, auto_class: str = "AutoModelForSequenceClassification", **kwargs: Any):
    """
    The model of a folder or repository, loaded by a class of transformers; `kwargs` are those of its `from_pretrained`.

    Raises:
        ValueError, OSError: if there is no such model, or it is damaged or incomplete. Pickles and remote code are not loaded.
    """
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").exists():
        raise ValueError(f"{name} holds no model: expected a folder with config.json and model.safetensors.")
    if folder.exists() and not list(folder.glob("*.safetensors")):
        raise ValueError(f"{name} holds no weights: expected model.safetensors beside config.json.")
    if folder.exists():
        for path in (folder / "config.json", *folder.glob("*.safetensors")):
            if not path.is_file():  # a pipe would be waited for
                raise ValueError(f"{path} is not a regular file: copy the model again.")
        _check_config(folder)
    try:
        model, report = getattr(transformers, auto_class).from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **kwargs
        )
    except (SafetensorError, StrictDataclassError, RuntimeError, HTTPError) as error:
        if "ignore_mismatched_sizes" in str(error):  # advice that nobody can follow here
            raise ValueError(
                f"{name} cannot be loaded: its weights have other shapes than its config.json says; copy the model again."
            ) from None
        raise ValueError(f"{name} cannot be loaded: {one_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name} lacks weights, {missing[0]} among them: its scores would be those of random weights."
        )
    return model


def _check_config(folder: Path) -> None:
    """
    Raises:
        ValueError: if config.json is not the config of a model.
    """
    try:
        if not isinstance(read_json(folder / "config.json"), dict):
            raise ValueError("it holds no keys and values")
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, *CONFIG_ERRORS) as error:
        reason = one_line(error).rstrip(".")
        raise ValueError(
            f"{folder / 'config.json'} is not the config of a model ({reason}): copy the model again."
        ) from None

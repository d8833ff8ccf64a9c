"""A recipe: one YAML file, one run, one model. Everything in it is checked before anything starts."""

import dataclasses
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from ..model import HylaConfig
from ..tasks import TASKS, Task, get_task, nearest
from .trainer import HylaTrainingArguments, check_schedule
from .weights import CHECKPOINT_KEYS, config_of_checkpoint


SECTIONS = ("task", "model", "trainer", "expect")
_REQUIRED_TRAINER = ("max_steps", "learning_rate", "warmup_steps", "weight_decay")
# Keys that a recipe may not have, and why.
_BY_THE_RUN = "is set by the run itself"
_BY_MAX_STEPS = "has no effect: a run is max_steps long and follows the reference's schedule"
_PUBLISHED_ONCE = (
    "has no effect: a run is published once, when it is finished, and never its checkpoints, which hold pickles"
)
_BY_THE_LAUNCH = "belongs to the launch: write it into the --config_file of accelerate launch"
_NOT_EXACT = "is not supported: an interrupted run would not go on exactly"
_REFUSED_TRAINER = {
    "output_dir": "is set by --output",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), _BY_THE_LAUNCH),
    **dict.fromkeys(
        (
            "save_only_model",
            "ignore_data_skip",
            "eval_on_start",
            "auto_find_batch_size",
            "restore_callback_states_from_checkpoint",
            "enable_jit_checkpoint",
        ),
        _NOT_EXACT,
    ),
    "load_best_model_at_end": "is not supported: a run is scored with the weights of its last step",
    **dict.fromkeys(("resume_from_checkpoint", "include_for_metrics", "remove_unused_columns"), _BY_THE_RUN),
    **dict.fromkeys(("num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio"), _BY_MAX_STEPS),
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), _PUBLISHED_ONCE),
    "hub_token": "must never lie in a file: log in by `hf auth login`, or set HF_TOKEN",
}
# Fields of a config that say what was saved, not what to build.
_REFUSED_MODEL = dict.fromkeys(
    ("architectures", "transformers_version", "dtype", "return_dict", "is_encoder_decoder", "format_version"),
    "says what was saved, not what to build",
)
_LEAST_TRAINER = {
    "max_steps": 1,
    "warmup_steps": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_samples": 1,
    "eval_steps": 1,
    "save_steps": 1,
    "logging_steps": 1,
    "seed": 0,
}


@dataclasses.dataclass
class Expectation:
    """
    What a recipe should reach: `metric` (`split/name`) within `tolerance` of `value`; `source` says who found it, and
    `budget` after how many training samples, by default the recipe's own number.
    """

    metric: str
    value: float
    tolerance: float
    source: str
    budget: int | None = None


@dataclasses.dataclass
class Recipe:
    """
    A checked recipe. `settings` is what the run record keeps: the four sections, overrides applied.

    `expect` is `None` where the recipe names nothing, or an override other than of a seed made it another run than the one
    it is about. `data` is the folder that training samples are read from, made by `hyla data`; `None` where they are drawn.
    It is not among the settings: what is read is what would be drawn, so it is the same run.
    """

    name: str
    task: Task
    config: HylaConfig
    trainer: dict[str, Any]
    expect: Expectation | None
    settings: dict[str, Any]
    data: Path | None = None


def find_recipe(path: str | Path) -> Path:
    """`path`, or else that file among the recipes that come with the package, in a checkout or installed."""
    path = Path(path)
    package = Path(__file__).parents[1]
    for bundled in (package.parent / "recipes", package / "recipes"):
        inside = bundled / Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else bundled / path
        if not path.exists() and inside.is_file():
            return inside
    return path


def load_recipe(path: str | Path, overrides: dict[str, str] | None = None) -> Recipe:
    """
    Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: values as text by `section.key`, such as `{"model.attention_type": "softmax"}`.

    Raises:
        ValueError: for anything missing, misspelt, of the wrong type or contradictory, saying what to write instead.
        OSError: if the file cannot be read.
    """
    path = find_recipe(path)
    try:
        sections = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(sections, dict):
        raise ValueError(f"{path} must hold the sections {', '.join(SECTIONS)}, got {type(sections).__name__}.")
    for name, section in sections.items():
        if name not in SECTIONS:
            raise ValueError(
                f"{path} has an unknown section {name!r}{nearest(str(name), SECTIONS)}: expected {', '.join(SECTIONS)}."
            )
        if not isinstance(section, dict):
            raise ValueError(f"{path}: the section {name!r} must hold keys and values, got {section!r}.")
    for name in ("task", "model", "trainer"):
        if name not in sections:
            raise ValueError(
                f"{path} lacks the section {name!r}: expected {', '.join(SECTIONS)}, of which only expect may miss."
            )
    for key, text in (overrides or {}).items():
        section, _, name = key.partition(".")
        if section not in SECTIONS or not name:
            raise ValueError(
                f"Cannot override {key!r}{nearest(section, SECTIONS)}: expected one of {', '.join(SECTIONS)}, a dot and a key."
            )
        sections.setdefault(section, {})[name] = _value(key, text)
    return check_recipe(
        sections, name=f"{path.parent.name}-{path.stem}".lstrip("-"), source=str(path), overridden=overrides or ()
    )


def check_recipe(sections: dict[str, Any], name: str, source: str, overridden: Collection[str] = ()) -> Recipe:
    """The `Recipe` of these sections; see `load_recipe`. `source` is what errors call it."""
    model_settings = _checked(
        f"{source}: model",
        sections["model"],
        HylaConfig,
        refused=_REFUSED_MODEL,
        also={"num_labels": int, **CHECKPOINT_KEYS},
    )
    trainer = _checked(f"{source}: trainer", sections["trainer"], HylaTrainingArguments, refused=_REFUSED_TRAINER)
    for required in _REQUIRED_TRAINER:
        if required not in trainer:
            raise ValueError(f"{source} lacks trainer.{required}.")
    task_settings = dict(sections["task"])
    data = _in_type(f"{source}: task.data", task_settings.pop("data", None), str | None)
    task = checked_task(f"{source}: task", task_settings)
    if "model_name_or_path" in model_settings:
        config = config_of_checkpoint(f"{source}: model", model_settings, task)
    elif "revision" in model_settings:
        raise ValueError(f"{source}: model.revision is of a model_name_or_path, which is missing: add it.")
    else:
        config = _built(f"{source}: model", HylaConfig, {**task.model_defaults, **model_settings})
        task.check_model(config)
    for key, least in _LEAST_TRAINER.items():
        if trainer.get(key) is not None and trainer[key] < least:
            raise ValueError(f"{source}: trainer.{key} must be at least {least}, got {trainer[key]}.")
    check_schedule(trainer["warmup_steps"], trainer["max_steps"])
    if trainer.get("push_to_hub") and "/" not in (trainer.get("hub_model_id") or ""):
        raise ValueError(
            f"{source}: trainer.push_to_hub needs trainer.hub_model_id, the repository as ORG/NAME, got "
            f"{trainer.get('hub_model_id')!r}."
        )
    # Refuses what only transformers can judge, such as the name of an optimiser.
    _built(f"{source}: trainer", HylaTrainingArguments, {**trainer, "output_dir": "unused"})

    expect = None
    if "expect" in sections:
        expected = _checked(f"{source}: expect", sections["expect"], Expectation)
        for field in ("metric", "value", "tolerance", "source"):
            if field not in expected:
                raise ValueError(
                    f"{source} lacks expect.{field}: expected all of metric, value, tolerance and source."
                )
        for field, least in (("tolerance", 0), ("budget", 1)):
            if expected.get(field) is not None and expected[field] < least:
                raise ValueError(f"{source}: expect.{field} must be at least {least}, got {expected[field]}.")
        scored = [f"{split}/{metric}" for split in task.splits if split != "train" for metric in task.metric_names]
        if expected["metric"] not in scored:
            raise ValueError(f"{source}: expect.metric={expected['metric']!r} must be one of {', '.join(scored)}.")
        other_runs = (key for key in overridden if key.startswith(("task.", "model.", "trainer.")))
        if all(key.endswith(".seed") or key == "task.data" for key in other_runs):
            expect = Expectation(**expected)
    settings = {
        "task": {"name": task.name, **task.settings},
        "model": dict(model_settings),
        "trainer": dict(trainer),
        **({"expect": dataclasses.asdict(expect)} if expect else {}),
    }
    return Recipe(
        name=name,
        task=task,
        config=config,
        trainer=trainer,
        expect=expect,
        settings=settings,
        data=Path(data) if data else None,
    )


def checked_task(where: str, settings: dict[str, Any], overrides: dict[str, str] | None = None) -> Task:
    """
    The task of these settings, of which `name` is one; `overrides` are texts by key.

    Raises:
        ValueError: for a missing, unknown or wrong setting; `where` says in it where the settings come from.
    """
    settings = settings | {key: _value(key, text) for key, text in (overrides or {}).items()}
    if "name" not in settings:
        raise ValueError(f"{where} lacks the key 'name': expected one of {', '.join(TASKS)}.")
    name = settings.pop("name")
    if not isinstance(name, str) or name not in TASKS:
        get_task(name)  # raises, naming the nearest
    return get_task(name, **_checked(where, settings, TASKS[name]))


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"The value of {key} is not valid YAML: {text!r}.") from None


def _built(where: str, cls: type, settings: dict[str, Any]) -> Any:
    try:
        return cls(**settings)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def _checked(
    where: str,
    section: dict[str, Any],
    schema: type,
    refused: dict[str, str] | None = None,
    also: dict[str, type] | None = None,
) -> dict[str, Any]:
    """
    The section's values in the types of the dataclass `schema`; unknown keys fail with the nearest name.

    `refused` are keys that the schema knows and a recipe may not have, with the reason; `also` are keys that it takes
    without declaring them.
    """
    refused = refused or {}
    known: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(schema) if f.init} | (also or {})
    allowed = [name for name in known if name not in refused]
    checked = {}
    for name, value in section.items():
        if name in refused:
            raise ValueError(f"{where} has the key {name!r}, which {refused[name]}: remove it.")
        if name not in known:
            hint = nearest(str(name), allowed) or (f": expected {', '.join(allowed)}" if len(allowed) < 12 else "")
            raise ValueError(f"{where} has no key {name!r}{hint}.")
        checked[name] = _in_type(f"{where}.{name}", value, known[name])
    return checked


def _in_type(where: str, value: Any, annotation: Any) -> Any:
    """`value` if its type is among the scalar types of the annotation; YAML reads 3e-3 as text and 1 as an integer."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if union else (annotation,)
    scalars = {option for option in options if option in (int, float, bool, str, types.NoneType)}
    if not scalars or len(scalars) != len(set(options)) or type(value) in scalars:
        return value  # not a plain scalar: what receives the value checks it
    if float in scalars and type(value) is int:
        return float(value)
    if float in scalars and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    expected = " or ".join(sorted("null" if option is types.NoneType else option.__name__ for option in scalars))
    raise ValueError(f"{where} must be {expected}, got {value!r}.")

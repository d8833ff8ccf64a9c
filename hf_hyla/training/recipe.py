"""A recipe: one YAML file, one run, one model. Everything in it is checked before anything starts."""

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from accelerate.utils import DynamoBackend
from huggingface_hub.errors import StrictDataclassError

from ..model import HylaConfig
from ..paths import find_recipe
from ..runs.record import tells_recipes_apart
from ..settings import BATCH_SIZE_KEY, EXPECT, HUB_KEYS, REFUSED, SECTIONS, TRAINER
from ..tasks import TASKS, Task, find_task, get_task
from ..typed_yaml import Argument, in_type, in_types, one_of, read_mapping
from ..utils import check_repo_id, nearest, one_line
from .arguments import HylaTrainingArguments
from .optimizers import check_optimizer
from .processes import check_devices, share_of_batch
from .schedule import check_schedule
from .weights import CHECKPOINT_KEYS, config_of_checkpoint


_REQUIRED_TRAINER = ("max_steps", "learning_rate", "warmup_steps", "weight_decay")
_REFUSED_TRAINER = {
    field.name: "is not supported: no run has been tested with it"
    for field in dataclasses.fields(HylaTrainingArguments)
    if field.name not in TRAINER
} | REFUSED["trainer"]
# Which there are depends on the version of accelerate.
_COMPILERS = [backend.value.lower() for backend in DynamoBackend if backend is not DynamoBackend.NO]


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
    A checked recipe. `settings` is what the run record keeps: the four sections, with overrides applied.

    `expect` is `None` if the recipe has no such section, or if an override changed a setting that tells recipes apart (see
    `tells_recipes_apart`), since the expectation is then about another run. `data` is the folder, made by `hyla data`, that
    training samples are read from; `None` if they are drawn. It is not part of `settings`, since both give the same samples and
    so the same run.
    """

    name: str
    task: Task
    config: HylaConfig
    trainer: dict[str, Any]
    expect: Expectation | None
    settings: dict[str, Any]
    data: Path | None = None

    @property
    def num_training_samples(self) -> int:
        """Samples that a run of the recipe is trained on."""
        accumulated = self.trainer.get("gradient_accumulation_steps", 1)
        return self.trainer["max_steps"] * _batch_size(self.trainer) * accumulated

    def training_arguments(self, output: str | Path, num_processes: int = 1, **changes: Any) -> HylaTrainingArguments:
        """
        The arguments of a trainer that writes into `output`, for each of the processes that share the recipe's batch.

        Args:
            changes: settings that replace the recipe's, by their names in `HylaTrainingArguments`.

        Raises:
            ValueError: if the processes cannot share the batch evenly, or one of them would drive several devices.
        """
        of_task = {
            "label_names": list(self.task.label_columns),
            "per_device_eval_batch_size": self.trainer.get("per_device_eval_batch_size", self.task.eval_batch_size),
        }
        args = _arguments(self.trainer, output, num_processes, **{**of_task, **changes})
        check_devices(args.n_gpu)
        return args


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
    sections = read_sections(path)
    for key, text in (overrides or {}).items():
        section, _, name = key.partition(".")
        if section not in SECTIONS or not name:
            raise ValueError(
                f"Cannot override {key!r}{nearest(section, SECTIONS)}: expected one of {', '.join(SECTIONS)}, a dot and a key."
            )
        sections.setdefault(section, {})[name] = Argument(text)
    return check_recipe(
        sections, name=f"{path.parent.name}-{path.stem}".lstrip("-"), source=str(path), overridden=overrides or ()
    )


def read_sections(path: Path) -> dict[str, dict[str, Any]]:
    """
    The sections of a recipe's file as they stand there.

    Raises:
        ValueError: if they are not those of a recipe.
        OSError: if the file cannot be read.
    """
    sections = read_mapping(path, "section", SECTIONS, optional=("expect",))
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{path}: the section {name!r} must hold keys and values, got {section!r}.")
    return sections


def check_recipe(sections: dict[str, Any], name: str, source: str, overridden: Collection[str] = ()) -> Recipe:
    """The `Recipe` of these sections; see `load_recipe`. Error messages name the recipe by `source`."""
    model_settings = in_types(
        f"{source}: model",
        sections["model"],
        HylaConfig,
        refused=REFUSED["model"],
        also={"num_labels": int, **CHECKPOINT_KEYS},
    )
    trainer = _checked_trainer(source, sections["trainer"])
    task_settings = dict(sections["task"])
    data = in_type(f"{source}: task.data", task_settings.pop("data", None), str | None)
    # The recipe is the user's own, so it may name a module with a task of theirs.
    task = checked_task(f"{source}: task", task_settings, may_import=True)
    if "model_name_or_path" in model_settings:
        config = config_of_checkpoint(f"{source}: model", model_settings, task)
    elif "revision" in model_settings:
        raise ValueError(f"{source}: model.revision belongs to a model_name_or_path, which is missing: add it.")
    else:
        config = _built(f"{source}: model", HylaConfig, {**task.model_defaults, **model_settings})
        task.check_model(config)
    expect = None
    if "expect" in sections:
        expect = _checked_expectation(source, sections["expect"], task)
        if any(tells_recipes_apart(key) for key in overridden):
            expect = None
    settings = {
        "task": task.spec,
        "model": dict(model_settings),
        "trainer": dict(trainer),
        **({"expect": dataclasses.asdict(expect)} if expect else {}),
    }
    try:  # YAML has keys and values that the record's JSON lacks
        settings = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} holds a value that no JSON file could hold: {one_line(error)}") from None
    return Recipe(
        name=name,
        task=task,
        config=config,
        trainer=trainer,
        expect=expect,
        settings=settings,
        data=Path(data) if data else None,
    )


def checked_task(
    where: str, settings: dict[str, Any], overrides: dict[str, str] | None = None, may_import: bool = False
) -> Task:
    """
    The task with these settings, among them its `name`. `overrides` are texts by key. See `find_task` for `may_import`.

    Raises:
        ValueError: for a missing, unknown or wrong setting. The message names the settings by `where`.
    """
    settings = settings | {key: Argument(text) for key, text in (overrides or {}).items()}
    if "name" not in settings:
        raise ValueError(f"{where} lacks the key 'name': expected one of {', '.join(TASKS)}.")
    name = in_type(f"{where}.name", settings.pop("name"), Any)
    return get_task(name, **in_types(where, settings, find_task(name, may_import)))


def _checked_trainer(source: str, section: dict[str, Any]) -> dict[str, Any]:
    trainer = in_types(
        f"{source}: trainer", section, HylaTrainingArguments, refused=_REFUSED_TRAINER, also={BATCH_SIZE_KEY: int}
    )
    for required in _REQUIRED_TRAINER:
        if required not in trainer:
            raise ValueError(f"{source} lacks trainer.{required}.")
    for key, value in trainer.items():
        where = f"{source}: trainer.{key}"
        TRAINER[key].check(where, value)
        if TRAINER[key].is_whole and value is not None:  # a float to transformers
            trainer[key] = int(value)
        if key == "torch_compile_backend" and value is not None:
            one_of(where, value, _COMPILERS)
    if trainer.get("dataloader_persistent_workers") and not trainer.get("dataloader_num_workers"):
        raise ValueError(
            f"{source}: trainer.dataloader_persistent_workers needs trainer.dataloader_num_workers: add it."
        )
    check_schedule(trainer["warmup_steps"], trainer["max_steps"])
    if trainer.get("push_to_hub") or trainer.get("hub_model_id") is not None:
        try:
            check_repo_id(trainer.get("hub_model_id"))
        except ValueError as error:
            raise ValueError(f"{source}: trainer.push_to_hub needs trainer.hub_model_id: {error}") from None
    # transformers and torch refuse the rest, such as settings that contradict each other.
    args = _built(f"{source}: trainer", _arguments, {"trainer": trainer, "output": "unused"})
    _built(f"{source}: trainer", check_optimizer, {"args": args})
    return trainer


def _batch_size(trainer: dict[str, Any]) -> int:
    return trainer.get(BATCH_SIZE_KEY, HylaTrainingArguments.per_device_train_batch_size)


def _arguments(
    trainer: dict[str, Any], output: str | Path, num_processes: int = 1, **changes: Any
) -> HylaTrainingArguments:
    settings = {key: value for key, value in trainer.items() if key not in (BATCH_SIZE_KEY, *HUB_KEYS)}
    if num_processes == 1:  # transformers would ask for the group of the processes
        settings.pop("ddp_backend", None)
    share = share_of_batch(_batch_size(trainer), num_processes)
    # Tasks draw their samples at random; shuffling 20 million indices would cost a gigabyte and change nothing.
    own = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": share}
    # A tracker that the recipe asks for recognises a resumed run by these.
    own |= {"project": "hf_hyla", "run_name": str(output)}
    return HylaTrainingArguments(**{**own, **settings, **changes, "output_dir": str(output)})


def _checked_expectation(source: str, section: dict[str, Any], task: Task) -> Expectation:
    expected = in_types(f"{source}: expect", section, Expectation)
    for field in ("metric", "value", "tolerance", "source"):
        if field not in expected:
            raise ValueError(f"{source} lacks expect.{field}: expected all of metric, value, tolerance and source.")
    for field, value in expected.items():
        EXPECT[field].check(f"{source}: expect.{field}", value)
    scored = [f"{split}/{metric}" for split in task.splits if split != "train" for metric in task.metric_names]
    one_of(f"{source}: expect.metric", expected["metric"], scored)
    return Expectation(**expected)


def _built(where: str, cls: Callable, settings: dict[str, Any]) -> Any:
    try:
        return cls(**settings)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from None

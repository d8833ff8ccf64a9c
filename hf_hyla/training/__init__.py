"""From a recipe to a run record."""

from ..runs import RunRecord
from .arguments import HylaTrainingArguments
from .recipe import Recipe, load_recipe
from .run import evaluate, train
from .stopping import Stopped
from .trainer import HylaTrainer


__all__ = [
    "HylaTrainer",
    "HylaTrainingArguments",
    "Recipe",
    "RunRecord",
    "Stopped",
    "evaluate",
    "load_recipe",
    "train",
]

"""From a recipe to a run record. Imports neither datasets nor evaluate."""

from ..runs import RunRecord
from .recipe import Recipe, load_recipe
from .run import evaluate, train
from .stopping import Stopped
from .trainer import HylaTrainer, HylaTrainingArguments


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

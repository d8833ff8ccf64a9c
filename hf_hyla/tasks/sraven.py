"""SRAVEN, symbolic Raven's progressive matrices (arXiv 2406.05816, section 4.1)."""

import dataclasses
import itertools
import math
from functools import cached_property
from typing import ClassVar

import numpy as np
from huggingface_hub.dataclasses import strict

from ..metrics.functions import sraven_accuracy
from .base import Task
from .sampling import below


GRID = 3
# Of each rule: its name, what a row adds from column to column, and the sign of the second column in the third where the
# second is free. A rule of another form, as the last, is drawn by a function of its own.
_RULES = (
    ("constant", 0, 0),
    ("progression +1", 1, 0),
    ("progression +2", 2, 0),
    ("progression -1", -1, 0),
    ("progression -2", -2, 0),
    ("sum", 0, 1),
    ("difference", 0, -1),
    ("distribute three", 0, 0),
)
RULES = tuple(name for name, _, _ in _RULES)
_INCREMENT = np.array([increment for _, increment, _ in _RULES])
_SIGN = np.array([sign for _, _, sign in _RULES])
_DISTRIBUTE_THREE = RULES.index("distribute three")
_ORDERS = np.array(list(itertools.permutations(range(GRID))))


@strict
@dataclasses.dataclass
class SravenTask(Task):
    """
    A 3 × 3 grid of panels, each `num_features` integers in 0 to `num_values - 1`. One rule per feature governs every
    row; in each column the features are permuted, the same way in all rows. The last panel is asked for.

    Samples: `input_ids` (9 · num_features), the eight panels row by row and then the answer slots, whose id is
    `num_values`; `labels` (num_features), the last panel; `rules` (num_features), sorted ids into `RULES`, of the
    features before they are permuted; `permutations` (3, num_features): after[column, j] is
    before[column, permutations[column, j]].

    Args:
        num_features (`int`, *optional*, defaults to 4): features of a panel, 2 to 8.
        num_values (`int`, *optional*, defaults to 8): values of a feature, at least 3; arithmetic is modulo this.
        held_out (`float`, *optional*, defaults to 0.25): fraction of the rule combinations held out of training.
        permute (`bool`, *optional*, defaults to `True`): whether columns permute the features.
        seed (`int`, *optional*, defaults to 0): of the held-out combinations and of all samples.
    """

    name: ClassVar[str] = "sraven"
    splits: ClassVar[dict[str, str]] = {
        "train": "training samples",
        "test": "fresh samples of the trained rule combinations",
        "ood": "rule combinations that were held out, of rules that were trained",
    }
    model_columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "feature_accuracy")

    num_features: int = 4
    num_values: int = 8
    held_out: float | int = 0.25
    permute: bool = True
    seed: int = 0

    def __post_init__(self):
        if not 2 <= self.num_features <= 8:
            raise ValueError(f"num_features must be 2 to 8, got {self.num_features}.")
        if self.num_values < GRID:
            raise ValueError(
                f"num_values must be at least {GRID}, since 'distribute three' needs three symbols, got {self.num_values}."
            )
        self._combinations  # noqa: B018  refuses an impossible split here rather than in training

    @property
    def num_samples(self) -> dict[str, int]:
        return {"train": 20_000_000, "test": 51_200, "ood": 51_200}

    @property
    def model_interface(self) -> dict:
        return {
            "vocab_size": self.num_values + 1,
            "answer_token_id": self.num_values,
            "num_answers": self.num_features,
            "num_labels": self.num_values,
        }

    @property
    def model_defaults(self) -> dict:
        return self.model_interface | {
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "head_dim": 4,
            "value_head_dim": 4,
            "relative_attention_num_buckets": GRID * GRID * self.num_features,
            "problem_type": "single_label_classification",
        }

    @cached_property
    def _combinations(self) -> dict[str, np.ndarray]:
        multisets = np.array(list(itertools.combinations_with_replacement(range(len(RULES)), self.num_features)))
        train, held_out = self._hold_out(multisets, self.held_out)
        return {"train": train, "test": train, "ood": held_out}

    @cached_property
    def _permutations(self) -> np.ndarray:
        return np.array(list(itertools.permutations(range(self.num_features))))

    def _sample(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        count, features = len(indices), self.num_features
        words = self._words(split, indices, 1 + GRID + features * 4 * GRID)
        combinations = self._combinations[split]
        rules = combinations[below(words[:, 0], len(combinations))]
        rows = self._rows(rules, words[:, 1 + GRID :].reshape(count, features, 4, GRID))
        panels = rows.transpose(0, 2, 3, 1)  # (sample, row, column, feature)
        if self.permute:
            permutations = self._permutations[below(words[:, 1 : 1 + GRID], math.factorial(features))]
            panels = np.take_along_axis(panels, permutations[:, None], axis=-1)
        else:
            permutations = np.broadcast_to(np.arange(features), (count, GRID, features)).copy()
        input_ids = panels.reshape(count, GRID * GRID * features)
        labels = input_ids[:, -features:].copy()
        input_ids[:, -features:] = self.num_values
        return {"input_ids": input_ids, "labels": labels, "rules": rules, "permutations": permutations}

    def _rows(self, rules: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Rows (sample, feature, row, column) that follow the rules (sample, feature), not yet permuted."""
        first = below(words[:, :, 0], self.num_values)
        free = below(words[:, :, 1], self.num_values)
        increment, sign = _INCREMENT[rules][..., None], _SIGN[rules][..., None]
        second = np.where(sign == 0, first + increment, free)
        third = np.where(sign == 0, first + 2 * increment, first + sign * free)
        rows = np.stack([first, second, third], axis=-1) % self.num_values
        three = rules == _DISTRIBUTE_THREE
        rows[three] = self._distributed(words[three][:, 2:])
        return rows

    def _distributed(self, words: np.ndarray) -> np.ndarray:
        """Three different symbols per puzzle, in a fresh order in every row: (puzzle, row, column)."""
        # The k-th symbol is drawn among those left, then moved past the ones already taken, in ascending order.
        first = below(words[:, 0, 0], self.num_values)
        second = below(words[:, 0, 1], self.num_values - 1)
        second += second >= first
        third = below(words[:, 0, 2], self.num_values - 2)
        third += third >= np.minimum(first, second)
        third += third >= np.maximum(first, second)
        symbols = np.stack([first, second, third], axis=-1)
        orders = _ORDERS[below(words[:, 1], len(_ORDERS))]
        return symbols[np.arange(len(symbols))[:, None, None], orders]

    def metrics(self, logits: np.ndarray, labels: np.ndarray, inputs: np.ndarray) -> dict[str, float]:
        return sraven_accuracy(logits.argmax(axis=-1), labels)

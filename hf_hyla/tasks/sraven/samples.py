"""SRAVEN, symbolic Raven's progressive matrices (arXiv 2406.05816, section 4.1)."""

import dataclasses
import itertools
import math
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict

from ...metrics.functions import sraven_accuracy
from ..base import PaperRuns, Task
from ..sampling import below
from ..subject import Subject
from ..words import Words
from .ambiguity import ambiguity
from .rules import DISTRIBUTE_THREE, GRID, INCREMENT, RULES, SIGN, cells
from .text import text_columns, text_features, worked_examples
from .words import SravenWords


if TYPE_CHECKING:
    import datasets

_ORDERS = np.array(list(itertools.permutations(range(GRID))))
# An unambiguous task is refused if none of this many first puzzles of a split is unique. A sample of any other task hardly ever
# needs the maximum number of draws.
_FIRST = 512
_MAX_ATTEMPTS = 20_000
_MAX_VALUES = 1000


@strict
@dataclasses.dataclass
class SravenTask(Task):
    """
    Puzzles that show eight panels of a 3 × 3 grid and ask for the last.

    A panel is `num_features` integers from 0 to `num_values - 1`. Each feature has a rule, which governs every row. Each
    column permutes the features, in the same way in all rows.

    A sample has these columns:

    - `input_ids` (9 · num_features): the eight panels row by row, then the answer slots, whose id is `num_values`.
    - `labels` (num_features): the last panel.
    - `rules` (num_features): sorted indices into `RULES`, one per feature before the permutation.
    - `permutations` (3, num_features): after[column, j] is before[column, permutations[column, j]].

    Args:
        num_features (`int`, *optional*, defaults to 4): features of a panel, 2 to 8.
        num_values (`int`, *optional*, defaults to 8): number of values of a feature, 3 to 1000; arithmetic is modulo this.
        held_out (`float`, *optional*, defaults to 0.25): fraction of the rule combinations that is held out of training.
        reference_split (`bool`, *optional*, defaults to `False`):
            whether to hold out the combinations that the official implementation holds out for this seed, which may leave
            rules untrained. Otherwise the combinations are drawn so that every rule is trained.
        permute (`bool`, *optional*, defaults to `True`): whether columns permute the features.
        unambiguous (`bool`, *optional*, defaults to `False`):
            whether to draw only puzzles with a unique answer, by the strict meaning of `ambiguity`. Sample i is then the
            first such puzzle of those drawn for i, beginning with sample i of the ambiguous task. Rules that are more often
            mistaken for others become rarer.
        seed (`int`, *optional*, defaults to 0): seed of the held-out combinations and of all samples.
    """

    name: ClassVar[str] = "sraven"
    splits: ClassVar[dict[str, str]] = {
        "train": "training samples",
        "test": "fresh samples of the trained rule combinations",
        "ood": "rule combinations that were held out",
    }
    model_columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    parts_column: ClassVar[str] = "rules"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "feature_accuracy", "accuracy_unique")
    words: ClassVar[type[Words]] = SravenWords
    paper: ClassVar[PaperRuns | None] = PaperRuns(
        settings={"num_features": 4, "num_values": 8, "held_out": 0.25, "permute": True, "unambiguous": False},
        table_a1={
            "softmax": (0.5656, 0.0105),
            "linear": (0.5630, 0.0111),
            "hyla": (0.6913, 0.0190),
            "linear-rms-head": (0.5901, 0.0250),
            "linear-rms-head-nonlinear-value": (0.5538, 0.0032),
            "hyla-no-rms-head": (0.6253, 0.0573),
            "hyla-linear-value": (0.5654, 0.0021),
            "hyla-linear-value-no-rms-head": (0.5633, 0.0141),
            "hyla-softmax": (0.3821, 0.0298),
            "hyla-plus": (0.6659, 0.0008),
            "softmax-moe": (0.5768, 0.0131),
            "linear-moe": (0.6434, 0.0430),
            "hyla-moe": (0.6694, 0.0394),
        },
    )

    num_features: int = 4
    num_values: int = 8
    held_out: float | int = 0.25
    reference_split: bool = False
    permute: bool = True
    unambiguous: bool = False
    seed: int = 0

    def __post_init__(self):
        if not 2 <= self.num_features <= 8:
            raise ValueError(f"num_features must be 2 to 8, got {self.num_features}.")
        if not GRID <= self.num_values <= _MAX_VALUES:
            raise ValueError(
                f"num_values must be {GRID} to {_MAX_VALUES}, since 'distribute three' needs three symbols, got {self.num_values}."
            )
        self.split_combinations  # noqa: B018  an impossible split is refused here rather than in training
        if self.unambiguous:
            self._check_unique_puzzles_exist()

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
            # What pipelines call an answer; transformers would call it LABEL_3.
            "id2label": {value: str(value) for value in range(self.num_values)},
            "label2id": {str(value): value for value in range(self.num_values)},
        }

    @cached_property
    def split_combinations(self) -> dict[str, np.ndarray]:
        multisets = np.array(list(itertools.combinations_with_replacement(range(len(RULES)), self.num_features)))
        train, held_out = self.hold_out(multisets, self.held_out)
        return {"train": train, "test": train, "ood": held_out}

    @cached_property
    def _permutations(self) -> np.ndarray:
        return np.array(list(itertools.permutations(range(self.num_features))))

    def draw(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        samples = self._draw_attempt(split, indices)
        if not self.unambiguous:
            return samples
        left = np.arange(len(indices))
        for attempt in range(1, _MAX_ATTEMPTS):
            drawn = samples if attempt == 1 else {name: column[left] for name, column in samples.items()}
            left = left[self.ambiguous(drawn["input_ids"], drawn["labels"])[1]]
            if not len(left):
                return samples
            for name, column in self._draw_attempt(split, indices[left], attempt).items():
                samples[name][left] = column
        raise ValueError(
            f"No puzzle with a unique answer was found for sample {indices[left[0]]} of {split} in {_MAX_ATTEMPTS} draws: "
            "choose a larger num_values or fewer features."
        )

    def _check_unique_puzzles_exist(self) -> None:
        for split in self.splits:
            first = self._draw_attempt(split, np.arange(_FIRST))
            if self.ambiguous(first["input_ids"], first["labels"])[1].all():
                raise ValueError(
                    f"unambiguous=True needs puzzles with a unique answer, but none of the first {_FIRST} of {split} is one: "
                    "choose a larger num_values or fewer features."
                )

    def with_rules(self, split: str, indices: np.ndarray, rules: np.ndarray) -> dict[str, np.ndarray]:
        """
        The samples with these indices as they would be with other rules. A feature that keeps its rule keeps its values, and
        the columns keep their permutations. It is not checked whether the answer is unique.

        Args:
            rules: (samples, features) ids into `RULES`, in the order of the features before they are permuted.
        """
        self._check_split(split)
        return self._draw_attempt(split, np.asarray(indices), rules=np.asarray(rules))

    def _draw_attempt(
        self, split: str, indices: np.ndarray, attempt: int = 0, rules: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        count, features = len(indices), self.num_features
        # The first attempt reads the same stream as the ambiguous task.
        words = self.random_words(f"{split}/{attempt}" if attempt else split, indices, 1 + GRID + features * 4 * GRID)
        if rules is None:
            combinations = self.split_combinations[split]
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
        """Rows (sample, feature, row, column) that follow the rules (sample, feature), before the permutation."""
        first = below(words[:, :, 0], self.num_values)
        free = below(words[:, :, 1], self.num_values)
        increment, sign = INCREMENT[rules][..., None], SIGN[rules][..., None]
        second = np.where(sign == 0, first + increment, free)
        third = np.where(sign == 0, first + 2 * increment, first + sign * free)
        rows = np.stack([first, second, third], axis=-1) % self.num_values
        three = rules == DISTRIBUTE_THREE
        rows[three] = self._distributed(words[three][:, 2:])
        return rows

    def _distributed(self, words: np.ndarray) -> np.ndarray:
        """Three different symbols per puzzle, in a new order in every row: (puzzle, row, column)."""
        # Each symbol is drawn as an index among those that are left, and moved past the smaller symbols already taken.
        first = below(words[:, 0, 0], self.num_values)
        second = below(words[:, 0, 1], self.num_values - 1)
        second += second >= first
        third = below(words[:, 0, 2], self.num_values - 2)
        third += third >= np.minimum(first, second)
        third += third >= np.maximum(first, second)
        symbols = np.stack([first, second, third], axis=-1)
        orders = _ORDERS[below(words[:, 1], len(_ORDERS))]
        return symbols[np.arange(len(symbols))[:, None, None], orders]

    def features(self) -> "datasets.Features":
        from datasets import ClassLabel, Features, List, Value

        def numbers(*shape: int):
            return List(numbers(*shape[1:]), length=shape[0]) if shape else Value("int64")

        return Features(
            {
                "panels": numbers(GRID * GRID - 1, self.num_features),
                "answer": numbers(self.num_features),
                "rules": List(ClassLabel(names=list(RULES)), length=self.num_features),
                "permutations": numbers(GRID, self.num_features),
                "ambiguous_official": Value("bool"),
                "ambiguous_strict": Value("bool"),
            }
        )

    def to_table(self, samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        official, strict = self.ambiguous(samples["input_ids"], samples["labels"])
        panels = samples["input_ids"][:, : -self.num_features].reshape(-1, GRID * GRID - 1, self.num_features)
        described = {"rules": samples["rules"], "permutations": samples["permutations"]}
        ambiguous = {"ambiguous_official": official, "ambiguous_strict": strict}
        return {"panels": panels, "answer": samples["labels"], **described, **ambiguous}

    def from_table(self, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer = np.asarray(table["answer"])
        shown = np.asarray(table["panels"]).reshape(len(answer), -1)
        input_ids = np.concatenate([shown, np.full_like(answer, self.num_values)], axis=1)
        described = {"rules": table["rules"], "permutations": table["permutations"]}
        return {"input_ids": input_ids, "labels": answer, **described}

    def text_features(self) -> "datasets.Features":
        """The types of the columns that `text_columns` returns."""
        return text_features()

    def text_columns(self, split: str, indices: np.ndarray, samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Puzzles as prompts and answers. The worked examples of a prompt are puzzles of the split train."""
        worked = self.samples("train", worked_examples(indices))
        combinations = self.combinations(split)
        return text_columns(
            samples, worked, combinations=combinations, num_values=self.num_values, permute=self.permute
        )

    def show(self, sample: dict[str, np.ndarray]) -> str:
        panels = cells(sample["input_ids"][None], sample["labels"][None])[0].tolist()
        width = len(str(self.num_values - 1))
        texts = [[" ".join(f"{value:>{width}}" for value in panel) for panel in row] for row in panels]
        answer, texts[-1][-1] = texts[-1][-1], "?"
        rules = ", ".join(RULES[rule] for rule in sample["rules"])
        return "\n".join([*("  |  ".join(row) for row in texts), f"answer: {answer}", f"rules: {rules}"])

    def metrics(self, logits: np.ndarray, labels: np.ndarray, inputs: np.ndarray) -> dict[str, float]:
        predictions = logits.argmax(axis=-1)
        unique = ~self.ambiguous(inputs, labels)[1]
        scores = sraven_accuracy(predictions, labels)
        if unique.any():
            scores["accuracy_unique"] = sraven_accuracy(predictions[unique], labels[unique])["accuracy"]
        return scores

    def subjects(self, columns: dict[str, np.ndarray]) -> list[Subject]:
        """The rule of the answer's feature, and its value."""
        rules = np.take_along_axis(columns["rules"], columns["permutations"][:, GRID - 1], axis=1)
        values = tuple(map(str, range(self.num_values)))
        return [Subject("rule", rules.ravel(), RULES), Subject("target", columns["labels"].ravel(), values)]

    def answer_keys(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The two shown cells of the last row with the same feature as the answer token, from which the feature's rule gives the
        answer. The official analysis takes the same cells. The columns' permutations say where they are.
        """
        permutations = batch["permutations"]
        features = permutations.shape[-1]
        place = permutations.argsort(dim=-1)  # the place of each feature in each column
        asked = permutations[:, GRID - 1]
        panels = GRID * (GRID - 1)
        keys = [(panels + column) * features + place[:, column].gather(1, asked) for column in range(GRID - 1)]
        return torch.stack(keys, dim=-1)

    def ambiguous(self, input_ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether these samples are ambiguous, officially and strictly, each (samples,); see `ambiguity`."""
        return ambiguity(cells(input_ids, labels), self.num_values, self.permute)

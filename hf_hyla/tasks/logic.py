"""Fuzzy logic functions, learnt in context (arXiv 2406.05816, section 3)."""

import dataclasses
import functools
import itertools
import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from huggingface_hub.dataclasses import strict

from ..metrics.functions import base_mse, logic_r2
from ..utils import as_literal
from .base import PaperRuns, Task
from .sampling import below, uniform
from .subject import Subject
from .words import HubMetric, PaperWords, Words


if TYPE_CHECKING:
    import datasets

_SET_ASIDE = 0.25
# Limits for settings from somebody else's file, which keep the work to a few seconds and megabytes.
_MAX_EXAMPLES, _MAX_COMBINATIONS = 10_000, 2_000_000


class LogicWords(PaperWords):
    """Texts of cards about fuzzy logic."""

    title = "fuzzy logic"
    dataset_title = "Fuzzy logic functions in context"
    dataset_categories = ("tabular-regression",)
    metric = HubMetric(
        name="hyla_logic_r2",
        class_name="LogicR2",
        function="logic_r2",
        description="The mean over samples of 1 - squared error / `base_mse`, where `base_mse` is the variance of the sample's values.",
        example={"predictions": [0.5, 0.2], "references": [0.5, 0.4], "base_mse": [0.02, 0.05]},
        inputs="Each argument has one number per sample.",
    )

    def model(self) -> str:
        task = self.task
        return f"""\
It is shown {task.num_examples - 1} points of a fuzzy logic function of {task.num_variables} variables with their values, and answers with the value at one
more point. A function is the *or* (maximum) of {task.num_terms} terms, each the *and* (minimum) of all variables, plain or negated (1 - x).
Some combinations of terms are held out of training."""

    def metrics(self) -> str:
        return """\
`r2` is the mean over functions of 1 - squared error / variance of the function's values: 1 at best, 0 for the mean value, and
far below 0 for some functions whose values hardly vary."""

    def probed(self, fixed_query: bool, attention_type: str) -> str:
        point = ""
        if fixed_query:
            point = "; all functions are asked for the same point, so that codes differ by the function alone"
            if attention_type != "softmax":
                point += ". In the first layer the code depends on the point only, so there it is always the same"
        return f"""\
The probes read the code of the
answer token for itself. They ask for the function's terms (`term`, named by a digit for each variable, 1 for plain and 0 for
negated) and for its value (`target`){point}."""

    def limits(self) -> list[str]:
        return [
            *super().limits(),
            "Variables are numbers from 0 to 1, and the function uses every one of them in every term. Other inputs give numbers without meaning.",
        ]

    def snippet(self, model_id: str) -> str:
        sample = self.task.dataset("ood")[0]
        rows = [[f"{number:.2f}" for number in row] for row in sample["input_values"].tolist()]
        rows[-1][-1] = "None"
        per_line = max(1, 115 // (6 * len(rows[0]) + 2))
        written = [f"[{', '.join(row)}]" for row in rows]
        lines = [", ".join(written[start : start + per_line]) for start in range(0, len(rows), per_line)]
        table = "".join(f"\n    {line}," for line in lines)
        return f"""\
from transformers import pipeline

solve = pipeline("symbolic-reasoning", model={as_literal(model_id)}, trust_remote_code=True)

# Each row of the truth table is a point and the function's value there. The last value is asked for. The terms of this function
# were never trained in this combination.
table = [{table}
]
print(f"answer {{solve(table)['answer']:.2f}}, true value {sample["labels"]:.2f}")"""

    def dataset(self) -> str:
        task = self.task
        return f"""\
A sequence shows a function f by {task.num_examples - 1} points and its values there, and asks for its value at one more point. Points lie in
[0, 1]^{task.num_variables}. The function is the disjunction of {task.num_terms} different terms; a term is the conjunction of all {task.num_variables} variables, each plain
or negated. Operators are Zadeh's: *a and b* is min(a, b), *a or b* is max(a, b), *not a* is 1 − a. A task is the set of its
terms."""

    def inputs(self) -> str:
        return """\
def to_inputs(rows):
    values = np.pad(rows["values"], ((0, 0), (0, 1)))  # the last is asked for, and reads as 0
    return {"input_values": np.concatenate([rows["points"], values[..., None]], axis=-1), "labels": rows["target"]}"""

    def splits(self) -> str:
        trained = "" if self.task.reference_split else "; each of\ntheir terms occurs in training"
        return f"""\
{self.task.held_out * 100:g} % of the combinations of the terms that are not set aside are held out of training and make `ood`{trained}. The gap between `test` and `ood` is what matters.

The official loaders draw their splits from one stream of random numbers, so that
the points are the same in all splits. Here every split has a stream of its own."""

    def fields(self) -> str:
        task = self.task
        return f"""\
| `points` | {task.num_examples} × {task.num_variables} numbers | the points at which the function is shown; in the last row, the point that is asked for |
| `values` | {task.num_examples - 1} numbers | its values at these points, except the last |
| `target` | number | the last value |
| `terms` | {task.num_terms} class labels | the function's terms |
| `base_mse` | number | variance of all {task.num_examples} values: R² of an example is 1 − squared error / `base_mse` |"""

    def page(self) -> dict[str, str]:
        return {
            "emoji": "📈",
            "short_description": "Fuzzy logic learnt in context: answers against truth",
            "about": "Choose the terms of a fuzzy logic function and the variable that moves, and see the answers as a curve "
            "against the truth.",
        }


@strict
@dataclasses.dataclass
class LogicTask(Task):
    """
    Fuzzy logic functions in context. A sample shows a function by its values at some points and asks for its value at one
    more point.

    A function of `num_variables` numbers in [0, 1] is the disjunction (max) of `num_terms` different terms. A term is the
    conjunction (min) of all variables, each plain (x) or negated (1 - x).

    A sample has these columns:

    - `input_values` (num_examples, num_variables + 1): each point beside its value. The last value is set to 0.
    - `labels`: the last value.
    - `terms` (num_terms): sorted ids. The binary digits of an id are the variables, 1 for plain. The first variable is the
      most significant digit.
    - `base_mse`: the variance of all the sample's values, including the last.

    Args:
        num_variables (`int`, *optional*, defaults to 4): variables, 2 to 8.
        num_terms (`int`, *optional*, defaults to 2): conjunctions in a function; at most two million combinations.
        num_examples (`int`, *optional*, defaults to 16): points in a sample, including the last; 2 to 10,000.
        held_out (`float`, *optional*, defaults to 0.5):
            fraction of the combinations that are held out of training. The last quarter of all terms is set aside for
            `extrapolation`, and only combinations of the other terms count here.
        reference_split (`bool`, *optional*, defaults to `False`):
            whether to hold out the combinations that the official implementation holds out for this seed, which may leave
            terms untrained. Otherwise the combinations are drawn so that every term is trained.
        seed (`int`, *optional*, defaults to 0): seed of the held-out combinations and of all samples.
    """

    name: ClassVar[str] = "logic"
    splits: ClassVar[dict[str, str]] = {
        "train": "training samples",
        "test": "fresh samples of the trained term combinations",
        "ood": "term combinations that were held out, of terms that are not set aside",
        "extrapolation": "combinations of terms that were never trained",
    }
    model_columns: ClassVar[tuple[str, ...]] = ("input_values", "labels")
    parts_column: ClassVar[str] = "terms"
    metric_names: ClassVar[tuple[str, ...]] = ("r2",)
    words: ClassVar[type[Words]] = LogicWords
    paper: ClassVar[PaperRuns | None] = PaperRuns(
        settings={"num_variables": 4, "num_terms": 2, "num_examples": 32, "held_out": 0.7},
        table_a1={
            "softmax": (0.6328, 0.0231),
            "linear": (0.5989, 0.0522),
            "hyla": (0.8113, 0.0777),
            "linear-rms-head": (0.6893, 0.0510),
            "linear-rms-head-nonlinear-value": (0.5691, 0.0425),
            "hyla-no-rms-head": (0.8127, 0.0788),
            "hyla-linear-value": (0.8454, 0.0532),
            "hyla-linear-value-no-rms-head": (0.7942, 0.0743),
            "hyla-softmax": (0.7098, 0.0708),
            "hyla-plus": (0.8765, 0.0454),
            "softmax-moe": (0.6383, 0.0607),
            "linear-moe": (0.6009, 0.0616),
            "hyla-moe": (0.8237, 0.0655),
        },
    )

    num_variables: int = 4
    num_terms: int = 2
    num_examples: int = 16
    held_out: float | int = 0.5
    reference_split: bool = False
    seed: int = 0

    def __post_init__(self):
        if not 2 <= self.num_variables <= 8:
            raise ValueError(f"num_variables must be 2 to 8, got {self.num_variables}.")
        if not 2 <= self.num_examples <= _MAX_EXAMPLES:
            raise ValueError(
                f"num_examples must be 2 to {_MAX_EXAMPLES}, one to answer and the others to learn from, got {self.num_examples}."
            )
        set_aside = self._num_set_aside
        if not 1 <= self.num_terms <= set_aside:
            raise ValueError(
                f"num_terms must be 1 to {set_aside}, the number of terms set aside for extrapolation with "
                f"{self.num_variables} variables, got {self.num_terms}."
            )
        combinations = math.comb(2**self.num_variables - set_aside, self.num_terms)
        if combinations > _MAX_COMBINATIONS:
            raise ValueError(
                f"{self.num_terms} terms of {self.num_variables} variables have {combinations:.1e} combinations, more than the "
                f"{_MAX_COMBINATIONS:.0e} that can be listed: choose a smaller num_terms or num_variables."
            )
        self.split_combinations  # noqa: B018  an impossible split is refused here rather than in training

    @property
    def _num_set_aside(self) -> int:
        return int(2**self.num_variables * _SET_ASIDE)

    @property
    def num_samples(self) -> dict[str, int]:
        train = 12_800_000 if self.num_variables > 4 else 6_400_000
        return {"train": train, "test": 16_000, "ood": 16_000, "extrapolation": 16_000}

    @property
    def model_interface(self) -> dict:
        return {"vocab_size": None, "input_size": self.num_variables + 1, "num_answers": 1, "num_labels": 1}

    @property
    def model_defaults(self) -> dict:
        return self.model_interface | {
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "head_dim": 2,
            "value_head_dim": 2,
            "relative_attention_num_buckets": self.num_examples,
            "problem_type": "regression",
        }

    @functools.cached_property
    def split_combinations(self) -> dict[str, np.ndarray]:
        num_known = 2**self.num_variables - self._num_set_aside
        known = np.array(list(itertools.combinations(range(num_known), self.num_terms)))
        aside = np.array(list(itertools.combinations(range(num_known, 2**self.num_variables), self.num_terms)))
        train, held_out = self.hold_out(known, self.held_out)
        return {"train": train, "test": train, "ood": held_out, "extrapolation": aside}

    def draw(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        count, points, variables = len(indices), self.num_examples, self.num_variables
        words = self.random_words(split, indices, 1 + points * variables)
        combinations = self.split_combinations[split]
        terms = combinations[below(words[:, 0], len(combinations))]
        input_values = np.empty((count, points, variables + 1), dtype=np.float32)
        x = input_values[..., :-1]
        x[:] = uniform(words[:, 1:]).reshape(x.shape)
        values = disjunction(terms, x)
        input_values[..., -1] = values
        input_values[:, -1, -1] = 0.0
        return {
            "input_values": input_values,
            "labels": values[:, -1].copy(),
            "terms": terms,
            "base_mse": base_mse(values).astype(np.float32),
        }

    def features(self) -> "datasets.Features":
        from datasets import ClassLabel, Features, List, Value

        number = Value("float32")
        terms = ClassLabel(names=[self.term_in_words(term) for term in range(2**self.num_variables)])
        return Features(
            {
                "points": List(List(number, length=self.num_variables), length=self.num_examples),
                "values": List(number, length=self.num_examples - 1),
                "target": number,
                "terms": List(terms, length=self.num_terms),
                "base_mse": number,
            }
        )

    def to_table(self, samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        points, values = samples["input_values"][..., :-1], samples["input_values"][:, :-1, -1]
        described = {"terms": samples["terms"], "base_mse": samples["base_mse"]}
        return {"points": points, "values": values, "target": samples["labels"], **described}

    def from_table(self, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = np.pad(np.asarray(table["values"]), ((0, 0), (0, 1)))  # the value at the last point is not shown
        input_values = np.concatenate([np.asarray(table["points"]), values[..., None]], axis=-1)
        described = {"terms": table["terms"], "base_mse": table["base_mse"]}
        return {"input_values": input_values, "labels": table["target"], **described}

    def show(self, sample: dict[str, np.ndarray]) -> str:
        points = [
            f"f({', '.join(f'{x:.2f}' for x in point[:-1])}) = {point[-1]:.2f}" for point in sample["input_values"]
        ]
        points[-1] = points[-1].partition(" = ")[0] + " = ?"
        hidden = [f"... {len(points) - 4} more ..."] if len(points) > 4 else []
        function = " or ".join(f"({self.term_in_words(int(term))})" for term in sample["terms"])
        return "\n".join(
            [*points[:3], *hidden, *points[3:][-1:], f"answer: {sample['labels']:.2f}", f"f = {function}"]
        )

    def term_in_words(self, term: int) -> str:
        """A term by its id, such as `x1 and not x2`."""
        bits = enumerate(self.part_name(term), start=1)
        return " and ".join(f"x{i}" if bit == "1" else f"not x{i}" for i, bit in bits)

    def part_name(self, part: int) -> str:
        """The binary digits of a term, one per variable, 1 for plain and 0 for negated."""
        return f"{part:0{self.num_variables}b}"

    def subjects(self, columns: dict[str, np.ndarray]) -> list[Subject]:
        """The terms of the function and its value."""
        term, target = super().subjects(columns)
        return [dataclasses.replace(term, name="term"), target]

    def query_point(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).random(self.num_variables).astype(np.float32)

    def ask(self, samples: dict[str, np.ndarray], point: np.ndarray) -> dict[str, np.ndarray]:
        """The functions queried at another point (variables,). `base_mse` is left out, since it depends on the sample's point."""
        input_values = samples["input_values"].copy()
        input_values[:, -1, :-1] = point
        labels = disjunction(samples["terms"], input_values[:, -1:, :-1])[:, 0]
        return {"input_values": input_values, "labels": labels, "terms": samples["terms"]}

    def metrics(self, logits: np.ndarray, labels: np.ndarray, inputs: np.ndarray) -> dict[str, float]:
        values = np.concatenate([inputs[:, :-1, -1], labels.reshape(-1, 1)], axis=1)
        return logic_r2(logits.reshape(-1), labels.reshape(-1), base_mse(values))


def disjunction(terms: np.ndarray, x: np.ndarray) -> np.ndarray:
    """
    Zadeh's fuzzy logic: max over terms of the min over variables of x (plain) or 1 - x (negated).

    Args:
        terms: (samples, terms), ids as in `LogicTask`.
        x: (samples, points, variables).

    Returns:
        (samples, points).
    """
    variables = x.shape[-1]
    # Samples are the last axis, since numpy is fast along long axes.
    values = np.ascontiguousarray(x.transpose(2, 1, 0))
    plain = terms.T >> np.arange(variables)[::-1, None, None] & 1
    negated = (1 - plain).astype(x.dtype)

    def conjunction(term: int) -> np.ndarray:
        # |x - 0| = x for plain variables and |x - 1| = 1 - x for negated ones, both exactly.
        literals = (np.abs(values[variable] - negated[variable, term]) for variable in range(variables))
        return functools.reduce(np.minimum, literals)

    return np.ascontiguousarray(functools.reduce(np.maximum, map(conjunction, range(terms.shape[1]))).T)

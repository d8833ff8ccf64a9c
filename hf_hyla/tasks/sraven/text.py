"""SRAVEN as text for language models: prompts, the right answers, and whether the ideal observer answers right."""

from typing import TYPE_CHECKING

import numpy as np

from .observer import explain, most_probable, posterior
from .rules import RULES, cells


if TYPE_CHECKING:
    import datasets

# The number of solved puzzles of the split train that a prompt with worked examples shows before its own puzzle.
WORKED_EXAMPLES = 3
_INSTRUCTION = """\
A puzzle is a grid of three rows of three panels. Each panel holds {features} numbers from 0 to {last}. Each number follows one \
rule, which is the same in every row: {rules}. A progression adds the same number from panel to panel; sum and difference make \
the third number from the first and the second; distribute three shows the same three numbers in every row, in any order. After \
{last} comes 0.{permuted} Find the missing panel.
"""
_PERMUTED = """ In every column of panels the numbers stand in an order of its own, the same in all three rows."""


def text_features() -> "datasets.Features":
    """The columns that `text_columns` adds to those of the task."""
    from datasets import Features, Value

    names = ("prompt", "prompt_with_examples", "answer_text")
    return Features({name: Value("string") for name in names} | {"observer_right": Value("bool")})


def worked_examples(indices: np.ndarray) -> np.ndarray:
    """
    The indices (samples · `WORKED_EXAMPLES`) of the puzzles of the split train that the prompts of these samples show solved. For
    sample i of any split these are 3 i + 2 to 3 i + 4, none of which is i.
    """
    first = WORKED_EXAMPLES * np.asarray(indices) + 2
    return (first[:, None] + np.arange(WORKED_EXAMPLES)).reshape(-1)


def text_columns(
    samples: dict[str, np.ndarray],
    worked: dict[str, np.ndarray],
    *,
    combinations: list[tuple[int, ...]],
    num_values: int,
    permute: bool,
) -> dict[str, np.ndarray]:
    """
    Samples of a split as text.

    A prompt is the instruction, the puzzle and `Answer:`. A prompt with worked examples also has three puzzles of the split
    train with their answers, after the instruction.

    Args:
        samples: the columns of these samples, as `Task.samples` gives them.
        worked: those of `worked_examples`.
        combinations: the split's combinations of rules, as `Task.combinations` gives them.
        num_values, permute: settings of the task.

    Returns:
        `prompt`, `prompt_with_examples` and `answer_text`, strings; and `observer_right`, whether the answer of the ideal
        observer is the one that counts as right. The observer knows the generator and the split's combinations of rules.
    """
    start = instruction(samples["labels"].shape[1], num_values, permute)
    solved = [f"{one}{answer}\n" for one, answer in zip(_puzzles(worked), _answers(worked), strict=True)]
    puzzles, answers = _puzzles(samples), _answers(samples)
    examples = ["\n".join(solved[i * WORKED_EXAMPLES : (i + 1) * WORKED_EXAMPLES]) for i in range(len(puzzles))]
    columns = {
        "prompt": [f"{start}\n{one}" for one in puzzles],
        "prompt_with_examples": [f"{start}\n{shown}\n{one}" for shown, one in zip(examples, puzzles, strict=True)],
        "answer_text": [answer.strip() for answer in answers],
    }
    texts = {name: np.array(column, dtype=object) for name, column in columns.items()}
    return texts | {"observer_right": _observer_right(samples, combinations, num_values, permute)}


def instruction(num_features: int, num_values: int, permute: bool) -> str:
    """What every prompt begins with."""
    return _INSTRUCTION.format(
        features=num_features,
        last=num_values - 1,
        rules=", ".join(RULES[:-1]) + f" or {RULES[-1]}",
        permuted=_PERMUTED if permute else "",
    )


def _puzzles(samples: dict[str, np.ndarray]) -> list[str]:
    """The rows of each puzzle, and the word that asks for the answer, without a space at the end."""
    texts = []
    for grid in cells(samples["input_ids"], samples["labels"]).tolist():
        rows = [[" ".join(map(str, panel)) for panel in row] for row in grid]
        rows[-1][-1] = "?"
        texts.append("\n".join(" | ".join(row) for row in rows) + "\nAnswer:")
    return texts


def _answers(samples: dict[str, np.ndarray]) -> list[str]:
    """What follows a puzzle, with the space before it."""
    return [" " + " ".join(map(str, label)) for label in samples["labels"].tolist()]


def _observer_right(
    samples: dict[str, np.ndarray], combinations: list[tuple[int, ...]], num_values: int, permute: bool
) -> np.ndarray:
    explained = explain(cells(samples["input_ids"], samples["labels"]), num_values, permute)
    answers = [most_probable(posterior(one, combinations, permute)) for one in explained]
    return (np.array(answers).reshape(samples["labels"].shape) == samples["labels"]).all(axis=1)

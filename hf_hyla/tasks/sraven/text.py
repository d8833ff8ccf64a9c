"""SRAVEN as text for language models: prompts, the right answers, and whether the ideal observer answers right."""

from typing import TYPE_CHECKING

import numpy as np

from .observer import explain, most_probable, posterior
from .rules import RULES
from .samples import SravenTask, cells


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


def text_columns(
    task: SravenTask, split: str, indices: np.ndarray, samples: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """
    Samples of a split as text.

    A prompt is the instruction, the puzzle and `Answer:`. A prompt with worked examples also has three puzzles of the split
    train with their answers, after the instruction. For sample i of any split these are the samples 3 i + 2 to 3 i + 4, none of
    which is i.

    Args:
        indices: (samples,), the indices of the samples in the split.
        samples: the columns of these samples, as `Task.samples` gives them.

    Returns:
        `prompt`, `prompt_with_examples` and `answer_text`, strings; and `observer_right`, whether the answer of the ideal
        observer is the one that counts as right. The observer knows the generator and the split's combinations of rules.
    """
    start = instruction(task)
    first = WORKED_EXAMPLES * np.asarray(indices) + 2
    train = task.samples("train", (first[:, None] + np.arange(WORKED_EXAMPLES)).reshape(-1))
    worked = [f"{one}{answer}\n" for one, answer in zip(_puzzles(train), _answers(train), strict=True)]
    puzzles, answers = _puzzles(samples), _answers(samples)
    examples = ["\n".join(worked[i * WORKED_EXAMPLES : (i + 1) * WORKED_EXAMPLES]) for i in range(len(indices))]
    columns = {
        "prompt": [f"{start}\n{one}" for one in puzzles],
        "prompt_with_examples": [f"{start}\n{shown}\n{one}" for shown, one in zip(examples, puzzles, strict=True)],
        "answer_text": [answer.strip() for answer in answers],
    }
    texts = {name: np.array(column, dtype=object) for name, column in columns.items()}
    return texts | {"observer_right": _observer_right(task, split, samples)}


def instruction(task: SravenTask) -> str:
    """What every prompt begins with."""
    return _INSTRUCTION.format(
        features=task.num_features,
        last=task.num_values - 1,
        rules=", ".join(RULES[:-1]) + f" or {RULES[-1]}",
        permuted=_PERMUTED if task.permute else "",
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


def _observer_right(task: SravenTask, split: str, samples: dict[str, np.ndarray]) -> np.ndarray:
    combinations = task.combinations(split)
    explained = explain(cells(samples["input_ids"], samples["labels"]), task)
    answers = [most_probable(posterior(one, combinations, task.permute)) for one in explained]
    return (np.array(answers).reshape(-1, task.num_features) == samples["labels"]).all(axis=1)

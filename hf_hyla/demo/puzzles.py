"""SRAVEN for the demo: puzzles by chosen rules, what models and the ideal observer answer, and what the codes tell."""

import dataclasses
import re
from typing import Any

import numpy as np
import torch

from ..analysis.latents import Codes, collect_codes
from ..analysis.probes import fit_probe
from ..analysis.subjects import task_batches
from ..model import SymbolicReasoningPipeline
from ..tasks.sraven import GRID, RULES, SravenTask
from ..tasks.sraven.observer import explain, most_probable, posterior
from .shown import Shown


# The number of puzzles that a probe is fitted on, and of those that it is scored on. That takes a second or two per model.
_PROBE_PUZZLES = 500
PANELS = GRID * GRID - 1


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """
    Attributes:
        split, index: the split and the index of the sample that the puzzle was made from.
        rules: the rules of the features, in the order in which the last column lists these.
        shuffled: whether every column lists the features in its own order.
        panels: nine tuples of features. The last is the answer that the puzzle was made with.
        permutations: (3, features), see `SravenTask`.
        edited: whether a panel was changed. The rules then need not hold any more.
    """

    split: str
    index: int
    rules: tuple[int, ...]
    shuffled: bool
    panels: tuple[tuple[int, ...], ...]
    permutations: tuple[tuple[int, ...], ...]
    edited: bool = False

    @property
    def rows(self) -> list:
        """As the pipeline reads it: the last panel is `None`."""
        panels = [*map(list, self.panels[:-1]), None]
        return [panels[row * GRID : (row + 1) * GRID] for row in range(GRID)]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """
    The verdict of the ideal observer, which knows how puzzles are made and considers all combinations of rules possible.

    Attributes:
        possible: the probability of every possible ninth panel.
        right: the panel that counts as right: the one that the puzzle was made with or, for an edited puzzle, the most
            probable one; `None` if no rules explain the panels.
    """

    possible: dict[tuple[int, ...], float]
    right: tuple[int, ...] | None

    def mark(self, panel: tuple[int, ...]) -> str:
        """`"right"`, `"possible"` or `"wrong"`."""
        return "right" if panel == self.right else "possible" if panel in self.possible else "wrong"

    def words(self) -> str:
        if not self.possible:
            return "No rules explain these eight panels, so that no answer is right."
        best = most_probable(self.possible)
        if len(self.possible) == 1:
            return f"The answer is unique: only {_digits(best)} is possible."
        own = ""
        if self.right is not None and self.right != best:
            own = f" The puzzle was made with {_digits(self.right)}, {_share(self.possible[self.right])}."
        return (
            f"The answer is not unique: {len(self.possible)} panels are possible, and {_digits(best)} is the most probable, "
            f"{_share(self.possible[best])}.{own}"
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """
    What a model says about a puzzle.

    Attributes:
        panel: the model's answer.
        probabilities: (features, values), of each value.
        codes: (layers, features, keys, heads), the codes of each answer token for the two cells of its feature in the last row.
        rules: (features, rules), the probability that the probe gives each rule.
    """

    panel: tuple[int, ...]
    probabilities: np.ndarray
    codes: np.ndarray
    rules: np.ndarray


class Solver:
    """
    A model with its pipeline and a probe that reads the rules from its codes.

    Attributes:
        scales: (layers,), the magnitude that 98 % of a layer's scores do not exceed.
        probe_accuracy: the accuracy of the probe on unseen combinations of rules.
    """

    def __init__(self, shown: Shown, task: SravenTask):
        self.shown, self.task = shown, task
        self._solve = SymbolicReasoningPipeline(model=shown.model, task="symbolic-reasoning")
        train, unseen = (
            collect_codes(shown.model, task_batches(task, split, _PROBE_PUZZLES), task.answer_keys)
            for split in ("train", "ood")
        )
        (fitted, _), (scored, _) = task.subjects(train.columns), task.subjects(unseen.columns)
        self._probe = fit_probe(train.features(), fitted.values)
        self._classes = self._probe.classes_
        self.probe_accuracy = float(self._probe.score(unseen.features(), scored.values))
        self.scales = np.quantile(np.abs(train.codes), 0.98, axis=(0, 2, 3, 4))

    def answer(self, puzzle: Puzzle) -> Answer:
        result: dict[str, Any] = self._solve(puzzle.rows, return_codes=True)
        keys = _answer_keys(self.task, puzzle)
        codes = result["codes"].float().numpy()  # (layers, heads, answers, keys)
        chosen = np.take_along_axis(codes, keys[None, None], axis=-1).transpose(0, 2, 3, 1)
        rules = np.zeros((len(keys), len(RULES)))
        rules[:, self._classes] = self._probe.predict_proba(Codes(chosen[None], {}).features())
        return Answer(tuple(result["answer"]), np.array(result["scores"]), chosen, rules)


def sample(task: SravenTask, split: str, index: int, shuffled: bool) -> Puzzle:
    """A sample of a split. Unless it is `shuffled`, its features have the same order in every column."""
    rules = task.samples(split, [index])["rules"][0]
    return _made(task, split, index, rules, shuffled)


def with_rules(task: SravenTask, puzzle: Puzzle, rules: tuple[int, ...], shuffled: bool) -> Puzzle:
    """The same puzzle by other rules, which are in the order of the last column. Edits are undone."""
    # If the order of the last column changes, rules stay with their features.
    before = np.empty(task.num_features, dtype=np.int64)
    before[list(puzzle.permutations[-1])] = rules
    return _made(task, puzzle.split, puzzle.index, before, shuffled)


def edit(task: SravenTask, puzzle: Puzzle, panel: int, text: str) -> Puzzle:
    """
    The puzzle with other features in a panel.

    Args:
        panel: 0 to 7, row by row.
        text: the panel's numbers, with spaces or commas between them, or without if every number has one digit.

    Raises:
        ValueError: if the text does not hold the numbers of a panel.
    """
    words = re.findall(r"\d+", text)
    if len(words) == 1 and len(words[0]) == task.num_features and task.num_values <= 10:
        words = list(words[0])
    rest = re.sub(r"[\d\s,;|]", "", text)
    if rest or len(words) != task.num_features or not all(int(word) < task.num_values for word in words):
        raise ValueError(
            f"A panel is {task.num_features} whole numbers from 0 to {task.num_values - 1}, such as "
            f"{_digits(puzzle.panels[panel])}, got {text.strip()!r}."
        )
    panels = list(puzzle.panels)
    panels[panel] = tuple(map(int, words))
    changed = puzzle.edited or panels[panel] != puzzle.panels[panel]
    return dataclasses.replace(puzzle, panels=tuple(panels), edited=changed)


def seen(task: SravenTask, rules: tuple[int, ...]) -> bool:
    """Whether models of the task were trained on this combination of rules."""
    return tuple(sorted(rules)) in set(task.combinations("train"))


def verdict(task: SravenTask, puzzle: Puzzle) -> Verdict:
    cells = np.array(puzzle.panels).reshape(1, GRID, GRID, task.num_features)
    combinations = {one for split in task.splits for one in task.combinations(split)}
    if not task.permute:  # the task's rules have one order, and rules that were chosen have any
        combinations.add(puzzle.rules)
    possible = posterior(explain(cells, task.num_values, task.permute)[0], sorted(combinations), task.permute)
    best = most_probable(possible) if possible else None
    return Verdict(possible, best if puzzle.edited else puzzle.panels[-1])


def _made(task: SravenTask, split: str, index: int, rules: np.ndarray, shuffled: bool) -> Puzzle:
    drawn = dataclasses.replace(task, permute=shuffled, unambiguous=False).with_rules(
        split, np.array([index]), rules[None]
    )
    features = task.num_features
    grid = np.concatenate([drawn["input_ids"][0, :-features], drawn["labels"][0]]).reshape(-1, features)
    permutations = drawn["permutations"][0]
    return Puzzle(
        split=split,
        index=index,
        rules=tuple(rules[permutations[-1]].tolist()),
        shuffled=shuffled,
        panels=tuple(map(tuple, grid.tolist())),
        permutations=tuple(map(tuple, permutations.tolist())),
    )


def _answer_keys(task: SravenTask, puzzle: Puzzle) -> np.ndarray:
    return task.answer_keys({"permutations": torch.tensor([puzzle.permutations])})[0].numpy()


def _digits(panel) -> str:
    return " ".join(map(str, panel))


def _share(probability: float) -> str:
    return f"probability {probability:.0%}" if probability >= 0.005 else "probability below 1%"

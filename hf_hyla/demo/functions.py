"""Fuzzy logic for the demo: functions of chosen terms, and what models answer for them."""

import dataclasses

import numpy as np
import torch

from ..tasks.logic import LogicTask, disjunction
from .shown import Shown


_STEPS = 81
_RANDOM_POINTS = 256


@dataclasses.dataclass(frozen=True)
class Curve:
    """
    Attributes:
        x: (points,), values of one variable; the others stay where they are.
        truth: (points,), the values of the function.
        answers: (points,), the answers of each model, by its title.
        r2: the R² of each model over random points, by its title.
        point: (variables,), the values of all variables at the curve's first point.
    """

    x: np.ndarray
    truth: np.ndarray
    answers: dict[str, np.ndarray]
    r2: dict[str, float]
    point: np.ndarray


def term_names(task: LogicTask) -> list[str]:
    return [task.term_in_words(term) for term in range(2**task.num_variables)]


def status(task: LogicTask, terms: tuple[int, ...]) -> str:
    """Whether models of the task were trained on functions of these terms."""
    combination = tuple(sorted(terms))
    if combination in task.combinations("train"):
        return "Models were trained on functions of these terms."
    if combination in task.combinations("ood"):
        trained = {term for one in task.combinations("train") for term in one}
        if not trained.issuperset(combination):  # in one of the paper's own draws
            return "Unseen combination, with a term that no training function has."
        return "Unseen combination: each term was trained, but never these together."
    return "At least one of these terms was set aside, and no training function has it."


def curve(task: LogicTask, models: list[Shown], terms: tuple[int, ...], index: int, variable: int) -> Curve:
    """
    What models answer when a function is shown by the points of a sample and asked for along one variable.

    Args:
        terms: ids of the function's terms, see `LogicTask`.
        index: the index of the sample in the split ood whose points show the function.
        variable: the number of the variable that moves, from 0.

    Raises:
        ValueError: if two terms are the same.
    """
    if len(set(terms)) < task.num_terms:
        raise ValueError(f"A function has {task.num_terms} different terms: choose another one.")
    points = task.samples("ood", [index])["input_values"][0, :, :-1]
    anywhere = np.random.default_rng(index).random((_RANDOM_POINTS, task.num_variables), dtype=np.float32)
    # The variable moves through that random point at which the function depends on it most.
    x = np.linspace(0, 1, _STEPS, dtype=np.float32)
    lines = np.repeat(anywhere[:, None], _STEPS, axis=1)
    lines[:, :, variable] = x
    values = disjunction(np.repeat([terms], _RANDOM_POINTS, axis=0), lines)
    along = lines[np.ptp(values, axis=1).argmax()]
    asked = np.concatenate([along, anywhere])
    truth = disjunction(np.array([terms]), asked[None])[0]
    shown = np.concatenate([points[:-1], disjunction(np.array([terms]), points[None, :-1])[0][:, None]], axis=1)
    tables = np.concatenate(
        [np.repeat(shown[None], len(asked), axis=0), np.pad(asked, ((0, 0), (0, 1)))[:, None]], axis=1
    )
    answers, r2 = {}, {}
    for one in models:
        with torch.no_grad():
            found = one.model(input_values=torch.from_numpy(tables)).logits.reshape(-1).float().numpy()
        answers[one.title] = found[:_STEPS]
        error = ((found - truth)[_STEPS:] ** 2).mean()
        r2[one.title] = float(1 - error / truth[_STEPS:].var())
    return Curve(x, truth[:_STEPS], answers, r2, along[0])

"""The ambiguity of SRAVEN puzzles, by the official check and by the strict meaning of the word."""

import functools
import itertools

import numpy as np

from .rules import rule_fits


# The number of triples of features, over all puzzles of a chunk, that are processed together.
_CHUNK = 2**18


def ambiguity(cells: np.ndarray, num_values: int, permute: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """
    Whether puzzles are ambiguous, in two meanings of the word.

    An explanation matches the features of the three columns one to one, and gives every triple a rule that fits it. It
    predicts a value for each feature of the last panel. A puzzle is ambiguous

    - *officially*, if some explanation predicts a wrong value for every feature;
    - *strictly*, if some explanation predicts a wrong value for at least one feature, so that the last panel is not unique.

    Both let symbols of "distribute three" repeat, as the official check does. The generator's own rules are narrower, so a
    puzzle that is not strictly ambiguous has only one answer under them too.

    The result is exact for every number of features. The search goes through the features of the third column, and its state
    is the pair of subsets of the other two columns' features that are used up, instead of a permutation.

    Args:
        cells: (puzzles, row, column, features), integers, including the true last panel.
        num_values: number of values of a feature; arithmetic is modulo this.
        permute: whether features may be permuted from column to column.

    Returns:
        `official` and `strict`, each (puzzles,) of bool.

    Raises:
        ValueError: if `cells` has another shape.
    """
    if cells.ndim != 4 or cells.shape[1:3] != (3, 3):
        raise ValueError(f"Expected the cells of puzzles as (puzzles, 3, 3, features), got shape {cells.shape}.")
    answers = np.zeros((2, len(cells)), dtype=bool)
    chunk = _CHUNK // cells.shape[-1] ** 3
    for start in range(0, len(cells), chunk):
        answers[:, start : start + chunk] = _ambiguity(cells[start : start + chunk], num_values, permute)
    official, strict = answers
    return official, strict


def _ambiguity(cells: np.ndarray, num_values: int, permute: bool) -> np.ndarray:
    puzzles, features = len(cells), cells.shape[-1]
    truth = cells[:, 2, 2].T.astype(np.min_scalar_type(-3 * num_values))
    fits = np.zeros((features, features, features, puzzles), dtype=bool)
    differs = np.zeros_like(fits)
    for fits_rule, prediction in rule_fits(cells, num_values, permute, repeats=True):
        fits |= fits_rule
        differs |= fits_rule & (prediction != truth)

    # One bit per puzzle, so that eight puzzles are processed at a time.
    fits, differs = np.packbits(fits, axis=-1), np.packbits(differs, axis=-1)
    consistent = all_differ = np.full((1, 1, fits.shape[-1]), 255, dtype=np.uint8)
    one_differs = np.zeros_like(consistent)
    for c in range(features):
        one_differs = _extend(one_differs, fits[:, :, c], c) | _extend(consistent, differs[:, :, c], c)
        all_differ = _extend(all_differ, differs[:, :, c], c)
        consistent = _extend(consistent, fits[:, :, c], c)
    return np.unpackbits(np.stack([all_differ[0, 0], one_differs[0, 0]]), axis=-1, count=puzzles)


def _extend(reached: np.ndarray, allowed: np.ndarray, size: int) -> np.ndarray:
    """
    Extends the search from pairs of subsets of `size` features to pairs with one feature more.

    Args:
        reached: (subsets of the first column's features, of the second's, bits), whether a pair can be used up.
        allowed: (features of the first column, of the second, bits), whether a pair of features may be added.
    """
    without, added = _subsets(len(allowed), size + 1)
    first, second = np.s_[:, None, :, None], np.s_[None, :, None, :]
    each = reached[without[first], without[second]] & allowed[added[first], added[second]]
    return np.bitwise_or.reduce(each, axis=(2, 3))


@functools.lru_cache
def _subsets(features: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For every subset of this size, the indices of the subsets that lack one of its features, and these features."""
    indices = {subset: index for index, subset in enumerate(itertools.combinations(range(features), size - 1))}
    added = np.array(list(itertools.combinations(range(features), size)))
    without = [
        [indices[(*subset[:i], *subset[i + 1 :])] for i in range(size)] for subset in map(tuple, added.tolist())
    ]
    return np.array(without), added

"""Whether the answer of a SRAVEN puzzle is unique: the official check, and the plain meaning of the word."""

import functools
import itertools

import numpy as np

from .rules import rule_fits


# Triples of features that are looked at together, over all puzzles of a chunk.
_CHUNK = 2**18


def ambiguity(cells: np.ndarray, num_values: int, permute: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """
    Two answers to whether puzzles are ambiguous.

    An explanation pairs the features of the three columns, one to one, and gives every triple a rule that fits it; it
    predicts a value for each feature of the last panel. A puzzle is ambiguous

    - *officially*, if some explanation predicts another value than the true one for every feature;
    - *strictly*, if some explanation predicts another value for at least one: the last panel is not unique.

    Both take "distribute three" as the official check does, whose symbols may repeat; so a puzzle that is not strictly
    ambiguous has one answer under the generator's own rules too. Exact for every number of features: what is known of
    the pairings of the first features of the third column is kept for each pair of subsets of the others, not for each
    permutation.

    Args:
        cells: (puzzles, 3, 3, features) integers, rows first, the true last panel included.
        num_values: values of a feature; arithmetic is modulo this.
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

    # A bit for each puzzle, eight at a time.
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
    Which pairs of subsets of `size` features can be used up, extended to one feature more.

    Args:
        reached: (subsets of the first column's features, of the second's, bits).
        allowed: (feature of the first column, of the second, bits) that may be added together.
    """
    without, added = _subsets(len(allowed), size + 1)
    first, second = np.s_[:, None, :, None], np.s_[None, :, None, :]
    each = reached[without[first], without[second]] & allowed[added[first], added[second]]
    return np.bitwise_or.reduce(each, axis=(2, 3))


@functools.lru_cache
def _subsets(features: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every subset of that size: the numbers of the subsets that lack one of its features, and these features."""
    numbers = {subset: number for number, subset in enumerate(itertools.combinations(range(features), size - 1))}
    added = np.array(list(itertools.combinations(range(features), size)))
    without = [
        [numbers[(*subset[:i], *subset[i + 1 :])] for i in range(size)] for subset in map(tuple, added.tolist())
    ]
    return np.array(without), added

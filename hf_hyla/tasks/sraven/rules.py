"""The eight rules of SRAVEN, and the search for rules that fit the cells of a puzzle."""

from collections.abc import Iterator

import numpy as np


GRID = 3
# Each rule has a name, the increment from column to column, and a sign. A sign of 0 means that the increment makes the row.
# Otherwise the second cell is free, and the third is the first plus or minus the second. The last rule does not fit into this
# table, so functions of its own draw and recognise it.
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
INCREMENT = np.array([increment for _, increment, _ in _RULES])
SIGN = np.array([sign for _, _, sign in _RULES])
DISTRIBUTE_THREE = RULES.index("distribute three")


def rule_fits(
    cells: np.ndarray, num_values: int, permute: bool = True, repeats: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Finds, for each rule in turn, the triples that it fits and the values of their last cells.

    A triple (a, b, c) takes feature a of the first column, b of the second and c of the third, in all rows. A rule fits a
    triple if it governs the first two rows and allows the first two cells of the third.

    Args:
        cells: (puzzles, row, column, features), integers. The last panel is not read.
        num_values: number of values of a feature; arithmetic is modulo this.
        permute: whether features may be permuted from column to column. If not, only triples (a, a, a) fit.
        repeats:
            whether symbols of "distribute three" may occur twice, in the puzzle and in the third row, as in the official
            check for ambiguity. The last cell is then the smallest of the least used symbols.

    Yields:
        `fits` and `predictions`, which broadcast to (features a, b, c, puzzles). Puzzles are the last axis, the longest.
    """
    # A type that holds the differences of two values and the sums of three.
    x = np.ascontiguousarray(cells.transpose(1, 2, 3, 0), dtype=np.min_scalar_type(-3 * num_values))
    a, b, c = x[:, 0, :, None, None], x[:, 1, None, :, None], x[:2, 2, None, None, :]
    allowed = True if permute else _diagonal(cells.shape[-1])[..., None]
    for _, increment, sign in _RULES[:DISTRIBUTE_THREE]:
        if sign:
            thirds = (a + sign * b) % num_values
            fits = (c == thirds[:2]).all(axis=0)
        else:
            thirds = (a + 2 * increment) % num_values
            fits = (c == thirds[:2]).all(axis=0) & (b == (a + increment) % num_values).all(axis=0)
        yield fits & allowed, thirds[2]
    fits, predictions = _distribute_three(a, b, c, repeats)
    yield fits & allowed, predictions


def cells(input_ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The nine panels (samples, row, column, feature) of `input_ids` (samples, 9 · features) and `labels` (samples, features)."""
    count, features = labels.shape
    return np.concatenate([input_ids[:, :-features], labels], axis=1).reshape(count, GRID, GRID, features)


def _distribute_three(a: np.ndarray, b: np.ndarray, c: np.ndarray, repeats: bool) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.minimum(np.minimum(a[:2], b[:2]), c), np.maximum(np.maximum(a[:2], b[:2]), c)
    middle = a[:2] + b[:2] + c - low - high
    fits = (low[0] == low[1]) & (middle[0] == middle[1]) & (high[0] == high[1])
    low, middle, high = low[0], middle[0], high[0]
    used_low, used_middle, used_high = (
        (a[2] == symbol).view(np.int8) + (b[2] == symbol) for symbol in (low, middle, high)
    )
    fits &= ((a[2] == low) | (a[2] == middle) | (a[2] == high)) & ((b[2] == low) | (b[2] == middle) | (b[2] == high))
    if not repeats:
        fits &= (low < middle) & (middle < high) & (a[2] != b[2])
    least_middle_high = np.where(used_middle <= used_high, middle, high)
    is_low = (used_low <= used_middle) & (used_low <= used_high)
    return fits, np.where(is_low, low, least_middle_high)


def _diagonal(features: int) -> np.ndarray:
    diagonal = np.zeros((features,) * 3, dtype=bool)
    diagonal[(np.arange(features),) * 3] = True
    return diagonal

"""The eight rules of SRAVEN: their table, and which of them fit the cells of a puzzle."""

from collections.abc import Iterator

import numpy as np


GRID = 3
# Of each rule: its name, what a row adds from column to column, and the sign of the second column in the third where the
# second is free. A rule that does not fit into this table, such as the last, is drawn and recognised by functions of its own.
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
    For each rule in turn: which triples of cells it fits, and which value of the last cell it then predicts.

    A triple (a, b, c) is feature a of the first column, b of the second and c of the third, over all rows. A rule fits
    it if it governs the first two rows and allows the first two cells of the third.

    Args:
        cells: (puzzles, 3, 3, features) integers, rows first; the last panel is not read.
        num_values: values of a feature; arithmetic is modulo this.
        permute: whether features may be permuted from column to column; if not, only triples (a, a, a) fit.
        repeats:
            whether symbols of "distribute three" may occur twice, in the puzzle and in the third row, as the official
            check for ambiguity lets them. The last cell is then the smallest of the least used symbols.

    Yields:
        `fits` and `predictions`, broadcasting to (features a, b, c, puzzles): puzzles come last, since they are many.
    """
    # Differences of two values and sums of three fit into this type.
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

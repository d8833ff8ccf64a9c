"""A finished run: its folder and record, the paper's values beside it, comparisons and pictures. Imports no trainer."""

from .folder import Run
from .record import RunRecord


__all__ = ["Run", "RunRecord"]

"""A finished run: its folder and record, the paper's figures beside it, comparison and pictures. Imports no trainer."""

from .folder import Run
from .record import RunRecord


__all__ = ["Run", "RunRecord"]

"""SRAVEN: its rules, samples, ideal observer, and texts for cards."""

from .rules import GRID, RULES, cells
from .samples import SravenTask


__all__ = ["GRID", "RULES", "SravenTask", "cells"]

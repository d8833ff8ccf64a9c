"""SRAVEN: its rules, samples, ideal observer, and texts for cards."""

from .rules import GRID, RULES
from .samples import SravenTask, cells


__all__ = ["GRID", "RULES", "SravenTask", "cells"]

"""SRAVEN: its rules, its samples, what an ideal observer reaches, and what cards say of it."""

from .rules import GRID, RULES
from .samples import SravenTask, cells


__all__ = ["GRID", "RULES", "SravenTask", "cells"]

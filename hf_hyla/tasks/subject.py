"""The subjects of probes: properties of answers that codes may reveal."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Subject:
    """
    A property of each answer that a probe reads from its code.

    Attributes:
        name: the property's name.
        values: one row per answer token: integers (rows,) for classes, booleans (rows, names) if several classes can be true
            at once, or floats (rows,) for a number.
        names: names of the classes; empty for a number.
    """

    name: str
    values: np.ndarray
    names: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        if not self.names:
            return "number"
        return "labels" if self.values.dtype == bool else "classes"

    @property
    def counts(self) -> np.ndarray:
        """How often each class occurs."""
        if self.kind == "labels":
            return self.values.sum(axis=0)
        return np.bincount(self.values, minlength=len(self.names))

"""What probes read from the codes of a task's answer tokens."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Subject:
    """
    A property of each answer that a probe reads from its code.

    Attributes:
        name: of the property.
        values: per answer token: classes (rows,) as integers, several at a time (rows, names) as booleans, or numbers (rows,).
        names: of the classes; empty for numbers.
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

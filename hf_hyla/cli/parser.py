"""The parser of the command line, and the types of its arguments."""

import argparse
import math
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from ..utils import nearest


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are `ValueError`s with one sentence."""

    def __init__(self, **kwargs: Any):
        self.options: list[str] = []  # the names of its `--options`
        super().__init__(**kwargs, allow_abbrev=False)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        self.options += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            ValueError: always.
        """
        message = re.sub(r"^argument (\S+): must", r"\1 must", message)
        raise ValueError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def whole(at_least: int, at_most: int = 10**9) -> Callable[[str], int]:
    """An argument type for integers from `at_least` to `at_most`, by default more than any command could finish."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,1000}", text) or int(text) < at_least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {at_least}, got {text:.40}")
        if int(text) > at_most:
            raise argparse.ArgumentTypeError(f"must be at most {at_most}, got {text:.40}")
        return int(text)

    return read


def positive(text: str) -> float:
    """An argument type for finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be larger than 0, got {text}")
    return value


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """An argument type for one of these names. An error gives the nearest name."""

    def read(text: str) -> str:
        if text in names:
            return text
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {text!r}{nearest(text, names)}")

    return read

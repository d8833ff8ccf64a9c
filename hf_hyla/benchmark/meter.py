"""Times what is compared in turn, and reads the memory that it takes."""

import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..runs.record import environment, hardware


# Version 2 says "chunked" for "lean", counts the matrix products of a step by their own shapes, and has inference.
SCHEMA_VERSION = 2
# Of inputs, weights and dropout.
SEED = 0
# Without a number of repeats: as many as fit into these seconds, within these bounds.
_SECONDS = 10.0
_FEWEST, _MOST = 5, 100

Work = Callable[[], Any]


class Meter:
    """Times works in turn and notes the rows."""

    def __init__(self, device: torch.device, repeats: int | None, say: Callable[[str], None]):
        self.device, self.repeats, self.say = device, repeats, say
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def result(self) -> dict[str, Any]:
        """What is measured, where and how. The lists in it grow with what is measured later."""
        return {
            "schema_version": SCHEMA_VERSION,
            "rows": self.rows,
            "skipped": self.skipped,
            "failed": self.failed,
            "seed": SEED,
            "threads": torch.get_num_threads(),
            "repeats": self.repeats,
            "environment": environment(),
            "hardware": hardware(),
        }

    def compare(
        self,
        works: dict[str, Work],
        against: tuple[str, ...],
        facts: dict[str, Any],
        factors: dict[str, float] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """
        Times the works, by the name of their subject, and appends a row for each with its ratios to those named in
        `against` and the `facts`; the seconds of a subject in `factors` count that many times. Returns the rows by subject;
        a work that cannot be run has none.
        """
        what = ", ".join(fact for fact in facts.values() if isinstance(fact, str))
        self.say(what)
        peaks = {}
        for name, work in works.items():
            try:
                work()  # compiles what there is to compile
                peaks[name] = self._peak_bytes(work)
            except Exception as error:  # compilers and drivers raise what they like
                self.fail(f"{what}: {name} cannot be run ({in_a_line(error)}), so no speed of it is reported.")
        times: dict[str, list[float]] = {name: [] for name in peaks}
        started = time.perf_counter()
        while times and self._goes_on(len(next(iter(times.values()))), time.perf_counter() - started):
            for name in times:
                times[name].append(self._seconds(works[name]) * (factors or {}).get(name, 1.0))
        medians = {name: statistics.median(measured) for name, measured in times.items()}
        rows = {}
        for name, measured in times.items():
            spread = statistics.quantiles(measured, n=4, method="inclusive") if len(measured) > 1 else measured * 3
            rows[name] = {
                **facts,
                "subject": name,
                "seconds": medians[name],
                "quartiles": [spread[0], spread[2]],
                "repeats": len(measured),
                "peak_bytes": peaks[name],
                "ratios": {other: medians[name] / medians[other] for other in against if other in medians},
            }
        self.rows += rows.values()
        return rows

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        self.say(f"{what} is skipped: {why}")

    def fail(self, sentence: str) -> None:
        self.failed.append(sentence)
        self.say(sentence)

    def _goes_on(self, done: int, seconds: float) -> bool:
        if self.repeats is not None:
            return done < self.repeats
        return done < _FEWEST or (seconds < _SECONDS and done < _MOST)

    def _seconds(self, work: Work) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak_bytes(self, work: Work) -> int | None:
        if self.device.type == "cuda":
            self._wait()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            self._wait()
            return torch.cuda.max_memory_allocated() - before
        if sys.platform != "linux":
            return None
        # Memory that was freed but kept by the C library would be used again unseen.
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        except OSError:
            return None
        before = _proc_bytes("self/status", "VmRSS")
        work()
        return max(_proc_bytes("self/status", "VmHWM") - before, 0)


def _proc_bytes(file: str, field: str) -> int:
    """A field in kilobytes of a file under Linux's /proc, in bytes."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def in_a_line(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def available_bytes() -> int | None:
    return _proc_bytes("meminfo", "MemAvailable") if sys.platform == "linux" else None

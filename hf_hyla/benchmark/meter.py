"""Times workloads in turn, and reads the memory that they take."""

import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..runs.environment import environment, hardware


# Version 2 says "chunked" where version 1 said "lean", counts the matrix products of a step by their own shapes, and includes
# inference.
SCHEMA_VERSION = 2
# The seed of inputs, weights and dropout.
SEED = 0
# If no number of repeats is given, as many are made as fit into these seconds, within these bounds.
_SECONDS = 10.0
_MIN_REPEATS, _MAX_REPEATS = 5, 100

Workload = Callable[[], Any]


class Meter:
    """Times workloads in turn and collects the rows of the result."""

    def __init__(self, device: torch.device, repeats: int | None, say: Callable[[str], None]):
        self.device, self.repeats, self.say = device, repeats, say
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def result(self) -> dict[str, Any]:
        """The result so far, with where and how it was measured. Its lists grow with later measurements."""
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
        workloads: dict[str, Workload],
        against: tuple[str, ...],
        facts: dict[str, Any],
        factors: dict[str, float] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """
        Times the workloads in turn, appends a row for each, and returns the rows by subject. A workload that cannot be run
        has none.

        Args:
            workloads: the workloads, by the name of their subject.
            against: subjects by whose medians each median is divided.
            facts: other entries of the rows.
            factors: what the seconds of a subject are multiplied by, 1 by default.
        """
        what = ", ".join(fact for fact in facts.values() if isinstance(fact, str))
        self.say(what)
        peaks = {}
        for name, workload in workloads.items():
            try:
                workload()  # compiles what there is to compile
                peaks[name] = self._peak_bytes(workload)
            except Exception as error:  # compilers and drivers raise errors of any type
                self.fail(f"{what}: {name} cannot be run ({in_a_line(error)}), so its speed is not reported.")
        times: dict[str, list[float]] = {name: [] for name in peaks}
        started = time.perf_counter()
        while times and self._continues(len(next(iter(times.values()))), time.perf_counter() - started):
            for name in times:
                times[name].append(self._seconds(workloads[name]) * (factors or {}).get(name, 1.0))
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

    def _continues(self, done: int, seconds: float) -> bool:
        if self.repeats is not None:
            return done < self.repeats
        return done < _MIN_REPEATS or (seconds < _SECONDS and done < _MAX_REPEATS)

    def _seconds(self, workload: Workload) -> float:
        return seconds_of(workload, self.device)

    def _peak_bytes(self, workload: Workload) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            workload()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        if sys.platform != "linux":
            return None
        # The C library keeps freed memory, and its reuse would not be counted.
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        except OSError:
            return None
        before = _proc_bytes("self/status", "VmRSS")
        workload()
        return max(_proc_bytes("self/status", "VmHWM") - before, 0)


def seconds_of(workload: Workload, device: torch.device) -> float:
    """The seconds of one run, queued work on a GPU included."""
    _wait(device)
    started = time.perf_counter()
    workload()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _proc_bytes(file: str, field: str) -> int:
    """The value of a field in a file under Linux's /proc, in bytes. The file has it in kilobytes."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def in_a_line(error: Exception) -> str:
    """The type of an error, and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def available_bytes() -> int | None:
    return _proc_bytes("meminfo", "MemAvailable") if sys.platform == "linux" else None

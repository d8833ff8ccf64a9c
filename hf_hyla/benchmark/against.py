"""`hyla bench --against`: training steps and attention of this checkout, compared with another commit or folder."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..paths import find_recipe, find_version
from ..utils import CHECKOUT, git
from .meter import SEED, Meter


_DRIVER = Path(__file__).with_name("driver.py")
# Both sides keep freed memory, as training does, whatever they would set themselves.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def compare_with(
    other: str,
    *,
    recipe: str = "sraven/hyla",
    bf16: bool = False,
    threads: int | None = None,
    repeats: int | None = None,
    overrides: dict[str, str] | None = None,
    batch_size: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """
    Times both sides, each in its own process. They take turns: one training step here, one there, and so on.

    Args:
        other: a folder with a checkout, or a commit of this one.
        recipe: the recipe whose steps are compared, with AdamW in place of its optimiser. If it comes with the package, each
            side takes its own file.
        bf16: whether both compute under `torch.autocast` in bfloat16.
        batch_size: samples in a step, by default as many as in the recipe.
        threads, repeats, overrides, say: as `benchmark` takes them.

    Returns:
        A dict as `benchmark` returns it. The subjects of its rows are "this checkout" and the commit or the folder's name.

    Raises:
        ValueError: if there is no such folder or commit, or a side cannot be started; the message says why.
        OSError: if there is no such recipe.
    """
    version = find_version(other)
    file = find_recipe(recipe).resolve()
    file = file.relative_to(CHECKOUT) if file.is_relative_to(CHECKOUT) else file
    asked = {
        "threads": threads or torch.get_num_threads(),
        "seed": SEED,
        "bf16": bf16,
        "overrides": overrides,
        "batch_size": batch_size,
    }
    meter = _DriversMeter(torch.device("cpu"), repeats, say)
    with contextlib.ExitStack() as stack:
        other_folder = stack.enter_context(_folder(version))
        other_name = version.name if isinstance(version, Path) else other
        drivers = {}
        # The other version first, since it may not start.
        for name, folder in {other_name: other_folder, "this checkout": CHECKOUT}.items():
            say(f"starts {name}")
            drivers[name] = stack.enter_context(_driver(name, folder, asked | {"recipe": str(folder / file)}))
        precision = "bfloat16 autocast" if bf16 else "float32"
        for workload in ("attention", "step"):
            meter.compare(
                {name: partial(drivers[name], workload) for name in ("this checkout", other_name)},
                against=(other_name,),
                facts={"part": "against", "work": f"{workload} of {file.parent.name}/{file.stem}, {precision}"},
            )
    return meter.result() | {"threads": asked["threads"]}


@contextlib.contextmanager
def _folder(version: Path | str) -> Iterator[Path]:
    """The folder itself, or a temporary folder with the files of the commit."""
    if isinstance(version, Path):
        yield version
        return
    archive = git("archive", version)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder).resolve()


@contextlib.contextmanager
def _driver(name: str, folder: Path, asked: dict[str, Any]) -> Iterator[Callable[[str], float]]:
    """Starts a process that times the package in a folder, and yields a function that runs a workload there: its seconds."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-P", str(_DRIVER), json.dumps(asked)],
            cwd=folder,
            env=os.environ | _KEEP_FREED_MEMORY | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
        ) as process,
    ):
        questions: Any = process.stdin
        answers: Any = process.stdout

        def answer() -> bytes:
            if line := answers.readline():
                return line
            errors.seek(0)
            said = errors.read().strip().splitlines()
            raise ValueError(f"{name} cannot be measured: {said[-1] if said else 'its process ended'}")

        def seconds(workload: str) -> float:
            with contextlib.suppress(BrokenPipeError):  # `answer` says what happened
                questions.write(f"{workload}\n".encode())
            return float(answer())

        try:
            answer()  # waits until the process is ready
            yield seconds
        finally:
            process.kill()


class _DriversMeter(Meter):
    """Takes the seconds that a workload returns. The memory of its process cannot be read."""

    def _seconds(self, workload: Callable[[], float]) -> float:
        return workload()

    def _peak_bytes(self, workload: Callable[[], float]) -> None:
        workload()

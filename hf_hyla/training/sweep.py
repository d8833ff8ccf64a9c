"""Sweeps of a base recipe × a grid of settings × seeds. Each point is a run in a separate folder."""

import dataclasses
import itertools
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch

from ..paths import find_recipe
from ..runs.record import RECORD_NAME, RunRecord, first_difference
from ..typed_yaml import read_mapping
from ..utils import folder_name, one_line
from .recipe import Recipe, load_recipe


_KEYS = ("base", "grid", "seeds")
_SEEDS = ("task.seed", "trainer.seed")


@dataclasses.dataclass
class Point:
    """One run of a sweep: its folder inside the sweep's, its overrides as texts by key, and the resulting recipe."""

    folder: str
    overrides: dict[str, str]
    recipe: Recipe


@dataclasses.dataclass
class Sweep:
    """A checked sweep: its name, base recipe and points."""

    name: str
    base: Path
    points: list[Point]


def load_sweep(path: str | Path) -> Sweep:
    """
    Reads a sweep from a YAML file with these keys:

    - `base`: a recipe beside the sweep, or found as `hyla train` finds it.
    - `grid`: axes, whose combinations are the points. An axis is named like a setting (`task.held_out`) and lists its values, or
      it has a name without a dot and lists mappings of settings that change together.
    - `seeds`: integers, each of which sets `task.seed` and `trainer.seed`.

    Raises:
        ValueError: for a missing, misspelt or contradictory entry, and for a point whose recipe is refused.
        OSError: if the file or its base cannot be read.
    """
    path = find_recipe(path)
    content = read_mapping(path, "key", _KEYS)
    base, seeds = content["base"], content["seeds"]
    if not isinstance(base, str):
        raise ValueError(f"{path}: base must be the path of a recipe, got {base!r}.")
    beside = path.parent / base
    base = str(beside) if beside.is_file() else base
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{path}: seeds must be a list of integers, got {seeds!r}.")
    axes = [_axis(path, name, values) for name, values in _mapping(path, "grid", content["grid"]).items()]
    points = []
    for choice in itertools.product(*axes):
        settings: dict[str, Any] = {}
        for chosen in choice:
            if both := settings.keys() & chosen.keys():
                raise ValueError(f"{path}: two axes of the grid set {both.pop()}.")
            settings |= chosen
        if both := settings.keys() & set(_SEEDS):
            raise ValueError(
                f"{path}: the grid sets {both.pop()}, which seeds sets for every point: list its values in seeds instead."
            )
        for seed in seeds:
            overrides = {**settings, **dict.fromkeys(_SEEDS, seed)}
            texts = {key: _as_text(path, key, value) for key, value in overrides.items()}
            slug = "-".join(f"{key.partition('.')[2]}={value}" for key, value in settings.items()) or "base"
            points.append(Point(f"{folder_name(slug.replace(' ', ''))}/{seed}", texts, load_recipe(base, texts)))
    if len({point.folder for point in points}) < len(points):
        raise ValueError(f"{path} names a point twice: remove the second.")
    if any(point.recipe.trainer.get("push_to_hub") for point in points):
        raise ValueError(
            f"{path}: the runs of a sweep would replace each other in one repository, but push_to_hub is set: leave it out, and "
            "publish the run that you choose by hyla publish."
        )
    return Sweep(path.stem, Path(base), points)


def _as_text(path: Path, key: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(
            f"{path}: {key} has a value that no recipe takes ({one_line(error)}): {value!r:.200}."
        ) from None


def run_sweep(sweep: Sweep, output: Path, jobs: int | None = None) -> Iterator[tuple[Point, str]]:
    """
    Runs the points that are not finished, `jobs` at a time (by default one per GPU, or one).

    Each run is a separate process, whose output goes into a log file beside the run's folder. An interrupted run resumes.

    Yields:
        Each point in turn with its outcome: `finished`, `done before`, or `failed: ` and the error.
    """
    devices = _visible_devices()
    jobs = jobs or max(1, len(devices))
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    running: set[Popen] = set()
    stopping = threading.Event()

    def outcome(point: Point) -> str:
        slot = slots.get()
        try:
            return run(point, output / point.folder, slot)
        except (ValueError, OSError) as error:  # only this point fails, and the others continue
            return f"failed: {one_line(error)}"
        finally:
            slots.put(slot)

    def run(point: Point, folder: Path, slot: int) -> str:
        if (folder / RECORD_NAME).exists():
            if key := first_difference(point.recipe.settings, RunRecord.load(folder).recipe):
                return (
                    f"failed: {folder} holds a run of another recipe, which differs in {key}: choose another --output"
                )
            return "done before"
        environment = dict(os.environ)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        elif jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        words = [f"--{key}={value}" for key, value in point.overrides.items()]
        command = [sys.executable, "-m", "hf_hyla", "train", str(sweep.base), "--output", str(folder), *words]
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        with log.open("a") as file:
            # In a new session, since Ctrl-C in a terminal would otherwise end the run before it has saved.
            process = Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        running.add(process)
        if stopping.is_set():
            process.terminate()
        code = process.wait()
        running.discard(process)
        if code == 0:
            return "finished"
        lines = log.read_text().splitlines()
        return f"failed: {lines[-1].removeprefix('hyla: ') if lines else f'exit code {code}'} (see {log})"

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from zip(sweep.points, pool.map(outcome, sweep.points), strict=True)
        except BaseException:
            # Runs that have begun save a checkpoint before they end, and the pool waits for them. The others never start.
            pool.shutdown(wait=False, cancel_futures=True)
            stopping.set()
            for process in list(running):
                process.terminate()
            raise


def _visible_devices() -> list[str]:
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    return inherited.split(",")[:count] if inherited else [str(number) for number in range(count)]


def _axis(path: Path, name: str, values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path}: the axis {name!r} must be a list of values, got {values!r}.")
    if "." in name:
        return [{name: value} for value in values]
    return [_mapping(path, f"every value of the axis {name!r}", value) for value in values]


def _mapping(path: Path, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or any(not isinstance(key, str) for key in value):
        raise ValueError(f"{path}: {what} must hold keys and values, got {value!r}.")
    return value

"""A task's samples as a folder of Parquet files, which `datasets.load_dataset` reads, and training from such a folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..utils import write_whole
from .base import Task, TaskDataset


MANIFEST_NAME = "task.json"
_EXAMPLES_PER_FILE = 250_000
_EXAMPLES_AT_ONCE = 10_000
_COMPARED = 64


@dataclasses.dataclass
class Manifest:
    """
    What a folder holds, as its task.json says.

    Attributes:
        task: the task's settings, and its `name`.
        data_fingerprint: `Task.fingerprint`.
        splits: of each split, `num_examples`, `num_bytes` (in memory), `file_bytes`, and the mean of every column that is one
            number or truth value per example.
    """

    task: dict[str, Any]
    data_fingerprint: str
    splits: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, task: Task) -> "Manifest":
        return cls(task.spec, task.fingerprint())

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """
        Raises:
            ValueError: if the folder has no manifest.
        """
        try:
            return cls(**json.loads((folder / MANIFEST_NAME).read_text()))
        except (OSError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{folder} holds no data of a task ({MANIFEST_NAME}: {error}): expected a folder that `hyla data` wrote."
            ) from None

    def check(self, task: Task, folder: Path) -> None:
        """
        Raises:
            ValueError: if the folder's data are not those of the task.
        """
        expected = Manifest.of(task)
        if self.task != expected.task:
            raise ValueError(
                f"{folder} holds data of the task {self.task}, but {expected.task} is asked for: use another folder."
            )
        if self.data_fingerprint != expected.data_fingerprint:
            raise ValueError(
                f"{folder} was written by other generators: its fingerprint is {self.data_fingerprint}, but these settings "
                f"now give {expected.data_fingerprint}; write the folder again."
            )

    def check_files(self, folder: Path) -> None:
        """
        Raises:
            ValueError: if the folder's Parquet files are not whole, or not those of the splits that are named here.
        """
        files = {path.relative_to(folder) for path in folder.rglob("*.parquet")}
        for split, held in self.splits.items():
            shards = sorted((folder / "data").glob(f"{split}-*.parquet"))
            files -= {path.relative_to(folder) for path in shards}
            try:
                found = sum(pq.read_metadata(path).num_rows for path in shards)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"The data of {folder} cannot be read: {error}; write the folder again.") from None
            if found != held["num_examples"] or sum(path.stat().st_size for path in shards) != held["file_bytes"]:
                raise ValueError(
                    f"{folder} holds {found} examples of {split} in {len(shards)} files, which are not the "
                    f"{held['num_examples']} that {MANIFEST_NAME} names: write the folder again."
                )
        if files:
            raise ValueError(f"{folder} holds {min(files)}, which {MANIFEST_NAME} does not name: remove it.")


def write_data(task: Task, splits: list[str], num_examples: int | None, folder: Path) -> Manifest:
    """
    Writes the first samples of splits as Parquet files, beside a task.json; a folder that holds splits of the same task keeps
    them, so the same call resumes after an interruption.

    Args:
        task: whose samples.
        splits: names of splits.
        num_examples: per split; the paper's number if it is `None`.
        folder: is made if it does not exist.

    Raises:
        ValueError: for an unknown split, a number below 1, or a folder of another task.
        FileExistsError: if the folder holds something else, or one of the splits with another number of examples.
    """
    lengths = {
        split: len(task.dataset(split, num_examples)) for split in splits
    }  # refuses unknown splits and lengths below 1
    if (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        manifest.check(task, folder)
    elif folder.exists() and any(path.name not in ("data", f"{MANIFEST_NAME}.tmp") for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no data of a task: choose another folder.")
    else:
        manifest = Manifest.of(task)
    for split, length in lengths.items():
        held = manifest.splits.get(split, {}).get("num_examples", length)
        if held != length:
            raise FileExistsError(
                f"{folder} holds the split {split} already, of {held} examples, and {length} are asked for: choose another "
                "folder."
            )
    for split, length in lengths.items():
        if manifest.splits.get(split, {}).get("file_bytes") == _file_bytes(folder / "data", split):
            continue
        manifest.splits[split] = _write_split(task, split, length, folder / "data")
        manifest.splits = {name: manifest.splits[name] for name in task.splits if name in manifest.splits}
        # Last, so that all it names is complete.
        write_whole(folder / MANIFEST_NAME, json.dumps(dataclasses.asdict(manifest), indent=2, allow_nan=False) + "\n")
    return manifest


def _write_split(task: Task, split: str, num_examples: int, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f"{split}-*.parquet"):
        unfinished.unlink()
    features = task.features()
    num_files = -(-num_examples // _EXAMPLES_PER_FILE)
    num_bytes = 0
    # Of every column that is one number or truth value per example.
    sums = {name: 0.0 for name, column in features.items() if getattr(column, "dtype", None) in ("bool", "float32")}
    for number in range(num_files):
        path = folder / f"{split}-{number:05d}-of-{num_files:05d}.parquet"
        stop = min((number + 1) * _EXAMPLES_PER_FILE, num_examples)
        with pq.ParquetWriter(path, features.arrow_schema) as writer:
            for start in range(number * _EXAMPLES_PER_FILE, stop, _EXAMPLES_AT_ONCE):
                indices = np.arange(start, min(start + _EXAMPLES_AT_ONCE, stop))
                columns = task.to_table(task.samples(split, indices))
                arrays = [
                    _arrow(columns[name], field.type)
                    for name, field in zip(features, features.arrow_schema, strict=True)
                ]
                table = pa.Table.from_arrays(arrays, schema=features.arrow_schema)
                writer.write_table(table)
                num_bytes += table.nbytes
                for name in sums:
                    sums[name] += float(columns[name].sum(dtype=np.float64))
    return {
        "num_examples": num_examples,
        "num_bytes": num_bytes,
        "file_bytes": _file_bytes(folder, split),
        "means": {name: total / num_examples for name, total in sums.items()},
    }


def _file_bytes(folder: Path, split: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{split}-*.parquet"))


def _arrow(column: np.ndarray, arrow_type: pa.DataType) -> pa.Array:
    if column.ndim == 1:
        return pa.array(column, type=arrow_type)
    flat = _arrow(column.reshape(-1, *column.shape[2:]), arrow_type.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=arrow_type)


def _numpy(column: pa.Array) -> np.ndarray:
    if not pa.types.is_fixed_size_list(column.type):
        return np.array(column.to_numpy(zero_copy_only=False))  # a copy: torch wants memory that it may write
    inner = _numpy(column.flatten())
    return inner.reshape(len(column), column.type.list_size, *inner.shape[1:])


class FolderDataset(TaskDataset):
    """
    The first `num_samples` samples of a split, read from a folder that `write_data` made; the same samples as the task's
    own, so a run that reads them is the same run.

    Raises:
        ValueError: if the folder is not of this task, or holds too few examples, or others than the task draws.
    """

    def __init__(self, folder: str | Path, task: Task, split: str, num_samples: int):
        super().__init__(task, split, num_samples)
        folder = Path(folder)
        manifest = Manifest.load(folder)
        manifest.check(task, folder)
        held = manifest.splits.get(split, {}).get("num_examples", 0)
        if held < num_samples:
            raise ValueError(
                f"{folder} holds {held} examples of {split}, but {num_samples} are needed: write as many into a folder by "
                "`hyla data`."
            )
        files = sorted(str(path) for path in (folder / "data").glob(f"{split}-*.parquet"))
        try:
            rows = datasets.load_dataset("parquet", data_files=files, split="train", features=task.features())
        except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, pa.ArrowException) as error:
            raise ValueError(f"The data of {folder} cannot be read: {error}; write the folder again.") from None
        self.rows = rows.with_format("arrow")
        ends = np.r_[0 : min(_COMPARED, held), max(held - _COMPARED, 0) : held]
        expected = task.samples(split, ends)
        if len(rows) != held or any(
            not np.array_equal(self._samples(ends)[name], expected[name]) for name in expected
        ):
            raise ValueError(f"The data of {folder} are not those of its {MANIFEST_NAME}: write the folder again.")

    def _samples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        # Reading a range takes a twentieth of the time of gathering its rows.
        consecutive = len(indices) > 0 and bool((np.diff(indices) == 1).all())
        table = self.rows[range(int(indices[0]), int(indices[-1]) + 1) if consecutive else indices.tolist()]
        return self.task.from_table({name: _numpy(table[name].combine_chunks()) for name in table.column_names})

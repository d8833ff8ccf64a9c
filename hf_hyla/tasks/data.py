"""Folders of Parquet files with a task's samples: writing them for `datasets.load_dataset`, and training from them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm

from ..reading import read_json
from ..utils import one_line, write_whole
from .base import Task, TaskDataset


MANIFEST_NAME = "task.json"
_EXAMPLES_PER_FILE = 250_000
_EXAMPLES_AT_ONCE = 10_000
_COMPARED = 64


@strict
@dataclasses.dataclass
class Manifest:
    """
    The content of a folder's task.json.

    Attributes:
        task: the task's `name` and settings.
        data_fingerprint: the task's `fingerprint`.
        splits: for each split, `num_examples`, `num_bytes` (in memory), `file_bytes`, and `means`, the mean of every column
            that holds one number or truth value per example.
        text: whether there are also columns with text for language models, see `Task.text_columns`.
    """

    task: dict[str, Any]
    data_fingerprint: str
    splits: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    text: bool = False

    @classmethod
    def of(cls, task: Task) -> "Manifest":
        return cls(task.spec, task.fingerprint())

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """
        Raises:
            ValueError: if the folder has no task.json, or its content is not a manifest.
        """
        try:
            manifest = cls(**read_json(folder / MANIFEST_NAME))
            for held in manifest.splits.values():
                counts = [held[name] for name in ("num_examples", "num_bytes", "file_bytes")]
                if {type(count) for count in counts} != {int} or not isinstance(held["means"], dict):
                    raise ValueError("a split lacks a number")
        except (OSError, ValueError, TypeError, LookupError, StrictDataclassError) as error:
            raise ValueError(
                f"{folder} holds no data of a task ({MANIFEST_NAME}: {one_line(error)}): expected a folder that `hyla data` wrote."
            ) from None
        return manifest

    def check(self, task: Task, folder: Path) -> None:
        """
        Raises:
            ValueError: if the folder holds data of another task.
        """
        expected = Manifest.of(task)
        if unknown := sorted(self.splits.keys() - task.splits.keys()):
            raise ValueError(
                f"{folder} holds a split {unknown[0]!r:.80}, which the task {task.name} lacks: remove the folder, and write it again."
            )
        if self.task != expected.task:
            ours, theirs = expected.task, self.task
            key = next(key for key in ["name", *ours, *theirs] if ours.get(key) != theirs.get(key))
            raise ValueError(
                f"{folder} holds data of a task whose {key} is {theirs.get(key)!r:.80}, but {ours.get(key)!r:.80} was requested: "
                "use another folder."
            )
        if self.data_fingerprint != expected.data_fingerprint:
            raise ValueError(
                f"{folder} was written by another version of the generators: its fingerprint is {self.data_fingerprint}, but "
                f"these settings now give {expected.data_fingerprint}; remove the folder, and write it again."
            )

    def check_files(self, folder: Path) -> None:
        """
        Raises:
            ValueError: if the folder's Parquet files are incomplete, or do not belong to the splits that are named here.
        """
        files = {path.relative_to(folder) for path in folder.rglob("*.parquet")}
        for split, held in self.splits.items():
            shards = sorted((folder / "data").glob(f"{split}-*.parquet"))
            files -= {path.relative_to(folder) for path in shards}
            try:
                found = sum(pq.read_metadata(path).num_rows for path in shards)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"The data of {folder} cannot be read: {error}; remove the folder, and write it again."
                ) from None
            if found != held["num_examples"] or sum(path.stat().st_size for path in shards) != held["file_bytes"]:
                raise ValueError(
                    f"{folder} holds {found} examples of {split} in {len(shards)} files, which are not those that "
                    f"{MANIFEST_NAME} describes, with {held['num_examples']} examples: remove the folder, and write it again."
                )
        if files:
            raise ValueError(f"{folder} holds {min(files)}, which {MANIFEST_NAME} does not name: remove it.")


def features_of(task: Task, text: bool) -> datasets.Features:
    """
    The columns of a folder of the task, with or without those of `Task.text_columns`.

    Raises:
        ValueError: if the task cannot be written as text.
    """
    of_text = task.text_features() if text else {}
    if text and not of_text:
        raise ValueError(
            f"The task {task.name} cannot be written as text, since it has no text_features: leave out --format text."
        )
    return datasets.Features({**task.features(), **of_text})


def write_data(task: Task, splits: list[str], num_examples: int | None, folder: Path, text: bool = False) -> Manifest:
    """
    Writes the first samples of splits as Parquet files, beside a task.json. Complete splits of the same task stay in the
    folder, so the same call resumes after an interruption.

    Args:
        task: the task whose samples are written.
        splits: names of the splits.
        num_examples: examples per split; `None` for the paper's number.
        folder: the folder to write into, which is created if it does not exist.
        text: whether to add columns with text for language models.

    Raises:
        ValueError: for a task that cannot be written as text, an unknown split, a number below 1, or a folder of another task.
        FileExistsError: if the folder holds something else, or one of the splits with another number of examples.
    """
    # `task.dataset` refuses unknown splits and lengths below 1, and `features_of` tasks without text.
    lengths = {split: len(task.dataset(split, num_examples)) for split in splits}
    features_of(task, text)
    if (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        manifest.check(task, folder)
        if manifest.text != text:
            raise FileExistsError(
                f"{folder} was written {'with' if manifest.text else 'without'} --format text: choose another folder, or the same "
                "format."
            )
    elif folder.exists() and any(path.name not in ("data", f"{MANIFEST_NAME}.tmp") for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no data of a task: choose another folder.")
    else:
        manifest = dataclasses.replace(Manifest.of(task), text=text)
    for split, length in lengths.items():
        held = manifest.splits.get(split, {}).get("num_examples", length)
        if held != length:
            raise FileExistsError(
                f"{folder} already holds the split {split} with {held} examples, but {length} were requested: choose another "
                "folder."
            )
    for split, length in lengths.items():
        if manifest.splits.get(split, {}).get("file_bytes") == _file_bytes(folder / "data", split):
            continue
        manifest.splits[split] = _write_split(task, split, length, folder / "data", text)
        manifest.splits = {name: manifest.splits[name] for name in task.splits if name in manifest.splits}
        # task.json is written last, so that every file that it names is complete.
        write_whole(folder / MANIFEST_NAME, json.dumps(dataclasses.asdict(manifest), indent=2, allow_nan=False) + "\n")
    return manifest


def _write_split(task: Task, split: str, num_examples: int, folder: Path, text: bool) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f"{split}-*.parquet"):
        unfinished.unlink()
    features = features_of(task, text)
    num_files = -(-num_examples // _EXAMPLES_PER_FILE)
    num_bytes = 0
    # Sums of the columns that hold one number or truth value per example.
    sums = {name: 0.0 for name, column in features.items() if getattr(column, "dtype", None) in ("bool", "float32")}
    # Only a terminal gets the bar.
    bar = tqdm(total=num_examples, desc=f"Writes {split}", unit=" examples", leave=False, disable=None)
    for number in range(num_files):
        path = folder / f"{split}-{number:05d}-of-{num_files:05d}.parquet"
        stop = min((number + 1) * _EXAMPLES_PER_FILE, num_examples)
        with pq.ParquetWriter(path, features.arrow_schema) as writer:
            for start in range(number * _EXAMPLES_PER_FILE, stop, _EXAMPLES_AT_ONCE):
                indices = np.arange(start, min(start + _EXAMPLES_AT_ONCE, stop))
                samples = task.samples(split, indices)
                columns = task.to_table(samples) | (task.text_columns(split, indices, samples) if text else {})
                arrays = [
                    _arrow(columns[name], field.type)
                    for name, field in zip(features, features.arrow_schema, strict=True)
                ]
                table = pa.Table.from_arrays(arrays, schema=features.arrow_schema)
                writer.write_table(table)
                num_bytes += table.nbytes
                bar.update(len(indices))
                for name in sums:
                    sums[name] += float(columns[name].sum(dtype=np.float64))
    bar.close()
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
        return np.array(column.to_numpy(zero_copy_only=False))  # copied, since torch needs writable memory
    inner = _numpy(column.flatten())
    return inner.reshape(len(column), column.type.list_size, *inner.shape[1:])


class FolderDataset(TaskDataset):
    """
    The first `num_samples` samples of a split, read from a folder that `write_data` made. They equal those that the task
    draws, so a run that reads them is the same run.

    Raises:
        ValueError: if the folder holds another task, too few examples, or other examples than the task draws.
    """

    def __init__(self, folder: str | Path, task: Task, split: str, num_samples: int):
        super().__init__(task, split, num_samples)
        folder = Path(folder)
        manifest = Manifest.load(folder)
        manifest.check(task, folder)
        held = manifest.splits.get(split, {}).get("num_examples", 0)
        if held < num_samples:
            raise ValueError(
                f"{folder} holds {held} examples of {split}, but {num_samples} are needed: write a folder with that many by "
                "`hyla data`."
            )
        files = sorted(str(path) for path in (folder / "data").glob(f"{split}-*.parquet"))
        if not files:
            raise ValueError(
                f"{folder} lacks the files of {split} that its {MANIFEST_NAME} names: write them again by `hyla data`."
            )
        try:
            rows = datasets.load_dataset(
                "parquet", data_files=files, split="train", features=features_of(task, manifest.text)
            )
        except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, pa.ArrowException) as error:
            raise ValueError(
                f"The data of {folder} cannot be read: {error}; remove the folder, and write it again."
            ) from None
        self.rows = rows.select_columns(list(task.features())).with_format("arrow")
        ends = np.r_[0 : min(_COMPARED, held), max(held - _COMPARED, 0) : held]
        expected = task.samples(split, ends)
        if len(rows) != held or any(
            not np.array_equal(self._samples(ends)[name], expected[name]) for name in expected
        ):
            raise ValueError(
                f"The data of {folder} do not match its {MANIFEST_NAME}: remove the folder, and write it again."
            )

    def _samples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        # Reading consecutive rows as a range takes a twentieth of the time of gathering them.
        consecutive = len(indices) > 0 and bool((np.diff(indices) == 1).all())
        table = self.rows[range(int(indices[0]), int(indices[-1]) + 1) if consecutive else indices.tolist()]
        return self.task.from_table({name: _numpy(table[name].combine_chunks()) for name in table.column_names})

"""Where documents come from, and which of them are held out."""

import functools
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...utils import nearest, one_line


logger = logging.get_logger(__name__)

# Folders inside that of the standard library that not every interpreter has, or that do not belong to the library.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
Documents = dict[str, list[str]]


def read_documents(
    *,
    files: str | None,
    dataset_name: str | None,
    dataset_config_name: str | None,
    dataset_split: str,
    dataset_test_split: str | None,
    text_column: str,
    held_out: float,
) -> Documents:
    """
    The documents of the splits `train` and `test`, see `TextTask` for the arguments. Empty documents are left out, and so are
    those of a dataset's training split that its test split holds as well.

    Raises:
        ValueError: if there are no documents, if one is not text, or if a split is empty.
        OSError: if a file or a folder is missing or cannot be read.
    """
    if dataset_name is not None:
        of_split = functools.partial(_texts, dataset_name, dataset_config_name, text_column)
        rows = of_split(dataset_split)
        if dataset_test_split is None:
            documents = _held_out(((text, text) for text in rows), held_out)
        else:
            documents = _apart(rows, of_split(dataset_test_split), dataset_name)
        named = f"The dataset {dataset_name}"
    elif files is not None:
        documents, named = _held_out(_local(files), held_out), f"files={files!r}"
    else:
        documents, named = _held_out(_standard_library(), held_out), "The standard library"
    documents = {split: [text for text in texts if text] for split, texts in documents.items()}
    if empty := [split for split, texts in documents.items() if not texts]:
        counts = " and ".join(f"{len(texts)} for {split}" for split, texts in documents.items())
        change = f"change held_out, which is {held_out}" if dataset_test_split is None else "name other splits"
        raise ValueError(
            f"{named} has {counts} documents, but {empty[0]} needs at least one: each file or row is one document, so name more of "
            f"them, or {change}."
        )
    return documents


def is_held_out(name: str, held_out: float) -> bool:
    """
    Whether a document belongs to `test`: where the first eight bytes of the SHA-256 of its name, as a fraction of 2**64, are
    below `held_out`. The answer depends on no other document and on no seed.
    """
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") < held_out * 2**64


def _held_out(documents: Iterable[tuple[str, str]], held_out: float) -> Documents:
    """Documents, given as name and text, by split."""
    splits: Documents = {"train": [], "test": []}
    for name, text in documents:
        splits["test" if is_held_out(name, held_out) else "train"].append(text)
    return splits


def _apart(train: list[str], test: list[str], dataset: str) -> Documents:
    """The splits of a dataset, with those documents left out of `train` that `test` holds as well."""
    held_out = set(filter(None, test))
    kept = [text for text in train if text not in held_out]
    if len(kept) < len(train):
        logger.warning(
            f"{len(train) - len(kept):,} of the {len(train):,} documents for training are left out, since the dataset {dataset} "
            "holds them in its test split as well."
        )
    return {"train": kept, "test": test}


def _standard_library() -> Iterator[tuple[str, str]]:
    """The Python sources of the running interpreter's library, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        # _sysconfigdata holds paths of the machine that built the interpreter.
        if not _NOT_LIBRARY & set(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            yield relative.as_posix(), _read(path)


def _local(files: str) -> Iterator[tuple[str, str]]:
    """The documents of a file, of a folder without its hidden files, or of a pattern, by paths relative to the folder."""
    top = Path(files)
    if top.is_dir():
        paths = [path for path in top.rglob("*") if path.is_file()]
        paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(top).parts)]
    elif glob.has_magic(files):
        # The folder before the first part with a wildcard.
        parts = Path(files).parts
        top = Path(*parts[: next(place for place, part in enumerate(parts) if glob.has_magic(part))])
        paths = [Path(found) for found in glob.glob(files, recursive=True) if Path(found).is_file()]
        if not paths:
            raise FileNotFoundError(
                f"No file matches {files}, which the task reads its documents from: check task.files."
            )
    elif top.is_file():
        top, paths = top.parent, [top]
    else:
        raise FileNotFoundError(
            f"There is no file or folder {files}, which the task's files name: name a file, a folder or a pattern such as "
            "'texts/**/*.txt'."
        )
    for path in sorted(paths, key=lambda path: path.relative_to(top).as_posix()):
        yield path.relative_to(top).as_posix(), _read(path)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # line ends stay as they are
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}): name the files that are text, by a pattern such "
            "as 'texts/**/*.txt'."
        ) from None


def _texts(dataset: str, config: str | None, column: str, split: str) -> list[str]:
    """The column of a split of a dataset, on the Hub or in a folder."""
    import datasets  # slow to import

    try:
        rows: Any = datasets.load_dataset(dataset, config, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        where = ", ".join(filter(None, [dataset, config, split]))
        raise ValueError(
            f"The dataset {where} cannot be loaded ({one_line(error):.300}): name a dataset on the Hub, or a folder that "
            "datasets.load_dataset reads."
        ) from None
    if column not in rows.column_names:
        raise ValueError(
            f"The dataset {dataset} has no column {column!r}{nearest(column, rows.column_names)}: set text_column to one of "
            f"{', '.join(rows.column_names)}."
        )
    texts = rows[column][:]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"The column {column} of the dataset {dataset} does not hold text in every row: set text_column."
        )
    return texts

"""Checkpoints that are whole or not there: written aside, sealed with sizes and hashes, then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..utils import fsync_folder, write_whole


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


SEAL = "seal.json"
# Locked by the process that trains in a folder.
LOCK = ".lock"
# Where a checkpoint lies while it is written.
UNFINISHED = "unfinished"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """
    Keeps other processes out of the folder of a run, until the block ends or this process dies.

    Raises:
        FileExistsError: if another process trains there.
    """
    with (folder / LOCK).open("w") as file:  # closing it gives the lock back
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FileExistsError(
                f"Another process trains in {folder}: wait for it to end, or choose another --output."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def publish(written: Path, checkpoint: Path) -> None:
    """Seals the folder `written`, all of whose files are on the disk before it takes the name `checkpoint`."""
    files = {}
    for path in _files(written):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(written).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    write_whole(written / SEAL, json.dumps(files, indent=2) + "\n")
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    written.rename(checkpoint)
    fsync_folder(checkpoint.parent)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; `None` if it is whole."""
    try:
        files = json.loads((checkpoint / SEAL).read_bytes())
        expected = {name: (facts["size"], facts["sha256"]) for name, facts in files.items()}
    except FileNotFoundError:
        return f"has no {SEAL}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"has a damaged {SEAL}"
    for name, (size, sha256) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size:
            return f"holds {path.stat().st_size:,} of the {size:,} bytes of {name}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return f"holds a {name} whose bytes have changed"
    return None


def last_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """
    The last checkpoint of a run that is whole, and a line about each later one, which is put aside: what it held is
    computed again, but it may be somebody's only copy.
    """
    said = []
    if (checkpoints / UNFINISHED).exists():
        shutil.rmtree(checkpoints / UNFINISHED)
        said.append("The last checkpoint was not written to its end.")
    found = [folder for folder in checkpoints.glob("checkpoint-*") if _step(folder) >= 0]
    for checkpoint in sorted(found, key=_step, reverse=True):
        problem = fault(checkpoint)
        if problem is None:
            return checkpoint, said
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        said.append(f"{checkpoint.name} is damaged and not used: it {problem}; it is kept as {aside.name}.")
    if said:
        said.append("No checkpoint is whole: training starts from the beginning.")
    return None, said


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())

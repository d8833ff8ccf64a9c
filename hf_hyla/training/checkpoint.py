"""Whole checkpoints: a seal with the sizes and hashes of a checkpoint's files is written after all of them."""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils import fsync_folder, write_whole


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


SEAL = "seal.json"
# Locked by the process that trains in a folder.
LOCK = ".lock"
# Folders that this process has claimed, since the system's lock keeps out other processes only.
_claimed: set[Path] = set()
_claiming = threading.Lock()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """
    Keeps other processes and threads out of a run's folder until the block ends or this process dies.

    Raises:
        FileExistsError: if another process or thread trains there.
    """
    place = folder.resolve()
    with _claiming:
        if place in _claimed:
            raise FileExistsError(f"This process already trains in {folder}: choose another --output.")
        _claimed.add(place)
    try:
        with _locked(folder):
            yield
    finally:
        _claimed.discard(place)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("w") as file:  # closing the file releases the lock
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


def seal(checkpoint: Path) -> None:
    """Writes the seal of a checkpoint once all of its files have reached the disk."""
    files = {}
    for path in _files(checkpoint):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    write_whole(checkpoint / SEAL, json.dumps(files, indent=2) + "\n")
    fsync_folder(checkpoint.parent)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; `None` if it is whole."""
    try:
        files = json.loads((checkpoint / SEAL).read_bytes())
        expected = {name: (facts["size"], facts["sha256"]) for name, facts in files.items()}
    except FileNotFoundError:
        return f"has no {SEAL}, so it was not written to its end"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"has a damaged {SEAL}"
    if TRAINER_STATE_NAME not in expected:
        return f"has a {SEAL} that leaves out {TRAINER_STATE_NAME}"
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


def newest_whole(checkpoints: Path) -> Path | None:
    """The last whole checkpoint in a folder."""
    return next((checkpoint for checkpoint in _newest_first(checkpoints) if fault(checkpoint) is None), None)


def last_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """
    The last whole checkpoint of a run, and a line about each later one. A damaged checkpoint is renamed, not removed, since
    it may be the only copy of its weights.
    """
    said: list[str] = []
    for checkpoint in _newest_first(checkpoints):
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


def _newest_first(checkpoints: Path) -> list[Path]:
    found = [folder for folder in checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(folder) >= 0]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)

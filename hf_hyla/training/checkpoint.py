"""Checkpoints that are whole or not there: written aside, sealed with sizes and hashes, then renamed."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


SEAL = "seal.json"
# Locked by the process that trains in a folder.
LOCK = ".lock"
# Where a checkpoint lies while it is written.
UNFINISHED = "unfinished"


def claim(folder: Path) -> IO[str] | None:
    """
    Keeps other processes out of the folder of a run, until the file that is returned is closed or this process dies.

    Raises:
        FileExistsError: if another process trains there.
    """
    if fcntl is None:
        return None
    file = (folder / LOCK).open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise FileExistsError(
            f"Another process trains in {folder}: wait for it to end, or choose another --output."
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


def write_whole(path: Path, text: str) -> None:
    """Writes a file that after a crash holds either this text or what it held before."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync_folder(path.parent)


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
    _fsync_folder(checkpoint.parent)


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
    The last checkpoint of a run that is whole, and a line about each later one, which is removed: what it held is
    computed again.
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
        said.append(f"{checkpoint.name} is damaged and not used: it {problem}.")
        shutil.rmtree(checkpoint)
    return None, said


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":  # which cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

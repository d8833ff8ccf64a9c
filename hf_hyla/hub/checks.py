"""What must hold of a run's folder, and of every file in it, before anything is published."""

import ast
import io
import json
import mmap
import pickletools
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..model import HylaForSequenceClassification
from ..model.configuration_hyla import FORMAT_VERSION
from ..runs import Run
from ..utils import one_line


_PICKLES = (
    *(".pkl", ".pickle", ".p", ".pk", ".dill", ".cloudpickle", ".joblib"),
    *(".bin", ".ckpt", ".npy", ".npz", ".pt", ".pth"),
)
# Pickles from protocol 2 on, zip, gzip, bzip2, xz, 7z and zstandard.
_PICKLE_STARTS = (
    *(bytes((0x80, protocol)) for protocol in range(2, 6)),
    *(b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd"),
)
# Parquet and PNG, which are binary but none of the above.
_KNOWN_STARTS = (b"PAR1", b"\x89PNG\r\n\x1a\n")
_SECRETS = {
    "a Hugging Face token": rb"(?:hf|api_org)_(?:[A-Za-z0-9]{20,}|(?:oauth|jwt)_[A-Za-z0-9._-]{20,})",
    "a GitHub token": rb"(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})",
    "a GitLab token": rb"glpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": rb"AKIA[0-9A-Z]{16}(?![0-9A-Z])",
    "a Google key": rb"AIza[A-Za-z0-9_-]{35}",
    "an API key": rb"sk-[A-Za-z0-9_-]{24,}",
    "a Slack token": rb"xox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
_PARSERS: dict[str, Callable[[str], Any]] = {".py": ast.parse, ".json": json.loads, ".yaml": yaml.safe_load}


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        ValueError: unless it is `ORG/NAME`, as the Hub writes it.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"A repository is named ORG/NAME, got {repo_id!r}.")
    validate_repo_id(repo_id)


def check_base_model(base_model: str | None, run: str) -> None:
    """
    Raises:
        ValueError: if the weights that a run started from are a folder's.
    """
    if base_model and Path(base_model).exists():
        raise ValueError(
            f"{run} is trained from the folder {base_model}, which nobody else has: publish that model first, and train from "
            "its repository."
        )


def check_committed(commit: str | None, run: str) -> None:
    """
    Raises:
        ValueError: if the code of a checkout is not that of a commit; `None` is an installed package, known by its version.
    """
    if commit is not None and not re.fullmatch("[0-9a-f]{40}", commit):
        raise ValueError(
            f"{run} is made by code that differs from its commit (git_commit is {commit}), so that nobody can repeat it: "
            "commit the changes, and train again before it is published."
        )


def check_file(path: Path) -> None:
    """
    Raises:
        ValueError: if a file is a pickle, or an archive that may hold one, by name or by content.
    """
    if path.suffix.lower() in _PICKLES or _is_pickle(path):
        raise ValueError(
            f"{path} is a pickle or an archive, which can run code where it is loaded: remove it from the folder; only "
            "safetensors, Parquet, pictures and text are published."
        )


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(_PICKLE_STARTS):
            return True
        # Read by libraries of their own; their numbers may look like anything.
        if path.suffix == ".safetensors" or start.startswith(_KNOWN_STARTS):
            return False
        data = start + file.read()
    try:
        if data[:1] == b"x" and zlib.decompressobj().decompress(data):
            return True
    except zlib.error:
        pass
    try:
        # Protocols 0 and 1 have no mark of their own, but no other file is a program that leaves one object.
        pickletools.dis(data, out=io.StringIO())
    except (ValueError, IndexError):
        return False
    return True


def check_text(files: dict[str, Path]) -> None:
    """
    Raises:
        ValueError: if a file whose name says that it is Python, JSON or YAML is not.
    """
    for path in files.values():
        try:
            if parse := _PARSERS.get(path.suffix):
                parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(
                f"{path} cannot be read as {path.suffix[1:]} ({one_line(error)}): train again, or copy it again."
            ) from None


def check_format(run: Run) -> None:
    """
    Raises:
        ValueError: if the code of this package reads weights of another format than the run's.
    """
    if run.config.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{run.folder} was saved in format {run.config.format_version}, but the code of this package, which is published "
            f"beside the weights, reads format {FORMAT_VERSION}: publish with the version of hf_hyla that trained the run."
        )


def check_weights(run: Run, files: dict[str, Path]) -> None:
    """
    Raises:
        FileNotFoundError: if the weights are missing.
        ValueError: if they are damaged, not those of the config's model, or not finite.
    """
    weights = [path for name, path in files.items() if name.endswith(".safetensors")]
    if not weights or "config.json" not in files:
        raise FileNotFoundError(f"{run.folder} holds no model: expected config.json and model.safetensors.")
    names: set[str] = set()
    for path in weights:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    names.add(name)
                    if not torch.isfinite(tensors.get_tensor(name)).all():
                        raise ValueError(
                            f"{path} holds NaN or infinite numbers in {name}: the training diverged; do not publish it."
                        )
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): train again, or copy it again.") from None
    with torch.device("meta"):
        expected = set(HylaForSequenceClassification(run.config).state_dict())
    if different := sorted(names ^ expected):
        raise ValueError(
            f"{run.folder}: the weights are not those of config.json, {different[0]} is in one of the two only."
        )


def check_secrets(name: str, content: Path | bytes) -> None:
    """
    Raises:
        ValueError: for anything that looks like a secret, or is the token in use; it is not repeated.
    """
    if isinstance(content, bytes):
        return _check_secrets(name, content)
    if content.stat().st_size:  # an empty file cannot be mapped
        with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_secrets(name, data)


def _check_secrets(name: str, data: bytes | mmap.mmap) -> None:
    patterns = {what: rb"(?<![A-Za-z0-9])" + pattern for what, pattern in _SECRETS.items()}
    if token := get_token():
        patterns["your own Hugging Face token"] = re.escape(token.encode())
    for what, pattern in patterns.items():
        if match := re.search(pattern, data):
            raise ValueError(
                f"{name} holds what looks like {what} (at byte {match.start()}): remove it, and revoke it if it is one."
            )

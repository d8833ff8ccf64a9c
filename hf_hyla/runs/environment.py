"""What a run ran with: versions, the commit of the code, and hardware."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from typing import Any

import torch

from ..utils import CHECKOUT, git


_PACKAGES = ("hf-hyla", "torch", "transformers", "accelerate", "datasets", "evaluate", "safetensors", "numpy")
UNKNOWN_COMMIT = "unknown"
_CODE_FOLDER = "hf_hyla/model/"


def environment() -> dict[str, Any]:
    """Versions of Python and packages, and the git commit where the package is a checkout."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    # torch.__version__ also says what torch was built for, which the metadata of some distributions leave out.
    return versions | {"torch": str(torch.__version__), "git_commit": _git_commit()}


def code_of(commit: str | None) -> dict[str, str] | None:
    """
    The digest of each file of the model's code at a commit, by name; `None` if the package does not lie in a checkout that holds
    the commit.
    """
    if not re.fullmatch("[0-9a-f]{40}", commit or "") or not (CHECKOUT / ".git").exists():
        return None
    try:
        names = git("ls-tree", "--name-only", str(commit), _CODE_FOLDER, text=True)
        if names.returncode:
            return None
        files = {path: git("show", f"{commit}:{path}").stdout for path in names.stdout.split() if path.endswith(".py")}
    except (OSError, subprocess.SubprocessError):
        return None
    return {path.rpartition("/")[2]: f"sha256:{hashlib.sha256(code).hexdigest()}" for path, code in files.items()}


def hardware(device: torch.device | None = None) -> dict[str, Any]:
    """What the run runs on, without anything that names the machine; by default on the GPU if there is one."""
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if on_gpu else None,
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _git_commit() -> str | None:
    """
    The commit of the checkout this package lies in, with `+changes` where files differ from it; `"unknown"` if git does not tell
    it, and `None` for an installed package.
    """
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        commit, changes = (git(*words, text=True) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN_COMMIT
    if commit.returncode or changes.returncode:
        return UNKNOWN_COMMIT
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")

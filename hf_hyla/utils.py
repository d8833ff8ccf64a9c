"""What several parts share: whole files in spite of crashes, the folders that come with the package, names, and errors."""

import difflib
import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path


# The names of attention types on cards and in pictures.
ATTENTION_NAMES = {"hyla": "HYLA", "softmax": "softmax attention", "linear": "linear attention"}
# What the system says of a full disk and of a full quota.
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# The folder of the checkout, if the package lies in one.
CHECKOUT = Path(__file__).resolve().parents[1]
# The models of `hub_cards/` that an installed package has too; pyproject.toml lists their files.
DEMO_MODELS = ("hyla-sraven", "softmax-sraven", "hyla-logic", "softmax-logic")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically: after a crash it holds either this text or its earlier content."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Flushes a folder's entries to the disk."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writing_advice(error: Exception) -> str:
    """What to do about an error of writing. Those of torch and safetensors have the system's reason in their text, if at all."""
    full = getattr(error, "errno", None) in DISK_IS_FULL or any(os.strerror(one) in str(error) for one in DISK_IS_FULL)
    return "free some space" if full else "check that the folder can be written to and has space"


# By these, which git sets for its hooks, it would look at another repository than the checkout.
_OF_A_REPOSITORY = {
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_COMMON_DIR",
    "GIT_PREFIX",
}


def git(*arguments: str, text: bool = False) -> subprocess.CompletedProcess:
    """Runs git in the checkout that the package lies in."""
    variables = {name: value for name, value in os.environ.items() if name not in _OF_A_REPOSITORY}
    words = ["git", "-C", str(CHECKOUT), *arguments]
    return subprocess.run(words, capture_output=True, text=text, env=variables, timeout=30)


def recipes_folder() -> Path:
    """The folder of the recipes that come with the package."""
    return _folder("recipes")


def models_folder() -> Path:
    """The folder of the models that come with the package; a checkout has more than `DEMO_MODELS`."""
    return _folder("hub_cards")


def _folder(name: str) -> Path:
    """The folder of this name: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or an empty string if no known name is close."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def printable(text: str) -> str:
    """
    The text with U+FFFD in place of characters that cannot be printed. A terminal would obey some of them, such as an escape
    sequence in the name of a file.
    """
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def folder_name(text: str) -> str:
    """The text as the name of a folder: without slashes, and a digest of it if it is long."""
    text = text.replace("/", "_")
    # File systems limit names to 255 bytes, and other words may be added to this one.
    return text if len(text.encode()) <= 150 else hashlib.sha256(text.encode()).hexdigest()[:8]


def as_literal(text: str) -> str:
    """The text as a literal of Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def one_line(error: BaseException) -> str:
    """An error's message in one line, without the name of the validator that huggingface_hub puts before it."""
    # Imported here, since it takes a tenth of a second, which wrong arguments on the command line should not wait for.
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, StrictDataclassError) and error.__cause__:
        error = error.__cause__
    return " ".join(str(error).split())


def check_repo_id(repo_id: str | None) -> None:
    """
    Raises:
        ValueError: unless it is `ORG/NAME`, as the Hub writes it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = ""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = f" ({one_line(error).rstrip('.')})"
    if reason or not isinstance(repo_id, str) or repo_id.count("/") != 1:
        raise ValueError(f"A repository is named ORG/NAME, got {repo_id!r:.120}{reason:.200}.")


def no_score(split: str) -> FloatingPointError:
    """The error for a model whose answers on a split are not all finite."""
    return FloatingPointError(
        f"The model's answers on the split {split} are not all finite, so they have no score: its weights are damaged, or "
        "its training has diverged; take another checkpoint, or train it again."
    )

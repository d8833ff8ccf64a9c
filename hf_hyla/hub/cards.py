"""What all cards share: templates, licence, citation, the running of snippets, and the names of repositories."""

import contextlib
import hashlib
import importlib.resources
import io
import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..runs.paper import differing_settings
from ..tasks import Task


LICENSE = "apache-2.0"
CITATION = """\
@inproceedings{schug2025attention,
  title={Attention as a Hypernetwork},
  author={Schug, Simon and Kobayashi, Seijin and Akram, Yassir and Sacramento, Jo{\\~a}o and Pascanu, Razvan},
  booktitle={International Conference on Learning Representations},
  year={2025},
  url={https://arxiv.org/abs/2406.05816}
}"""


def template(name: str) -> str:
    """The text of a file in `templates/`."""
    return (importlib.resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


# Words, numbers, versions and paths, which mean nothing else in Markdown.
_PLAIN = re.compile(r"[\w(][\w .,:;%()/+=-]*")
# Markdown makes links of addresses, and emphasis of words between underscores.
_MARKED = re.compile(r"://|www\.|__|\b_|_\b", re.IGNORECASE)


def as_code(text: str) -> str:
    """A text as inline code of Markdown in one line, which also fits into a table, and which Markdown shows as it is."""
    text = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if not text or text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def as_text(value: Any) -> str:
    """A setting as a reader would write it. Whatever Markdown could take for something other than words is inline code."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):  # the types of a recipe turn some whole numbers into floats
        return f"{value:g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) and not _MARKED.search(text) else as_code(text)


def run_snippet(text: str, replacements: dict[str, str], names: dict[str, Any] | None = None) -> str:
    """
    What the first Python snippet of a card prints.

    Args:
        text: the card.
        replacements: texts of the snippet, and what replaces them while it runs without network.
        names: variables that are defined for the snippet.

    Raises:
        ValueError: if it fails.
    """
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]  # type: ignore[index]
    # The classes of this package serve the model, so that nobody's code in the folder is run.
    for shown, real in {**replacements, "trust_remote_code=True": "trust_remote_code=False"}.items():
        code = code.replace(shown, real)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(code, "README.md", "exec"), dict(names or {}))
    except Exception as error:  # whatever the snippet raises
        raise ValueError(
            f"The snippet of the card fails ({type(error).__name__}: {error}): the model beside the record cannot be used."
        ) from error
    return printed.getvalue().rstrip()


def sibling_repo(repo_id: str | None, name: str) -> str:
    """`name` in the organisation of `repo_id`."""
    return f"{repo_id.partition('/')[0]}/{name}" if repo_id else name


def dataset_repo(task: Task, repo_id: str | None) -> str | None:
    """
    The repository of a task's samples, or `None` if there is no such repository. Settings other than the paper's are in its name,
    since the samples depend on them; if that name would not be valid, their digest is.
    """
    elsewhere = task.words(task).dataset_id
    if elsewhere is not None:
        return elsewhere or None
    settings = "".join(f"-{name}-{value}".lower() for name, value in differing_settings(task).items())
    try:
        validate_repo_id(task.name + settings)
    except HFValidationError:  # too long, or of a negative number
        settings = f"-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    return sibling_repo(repo_id, task.name + settings)

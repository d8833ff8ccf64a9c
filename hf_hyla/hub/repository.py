"""A finished run → the repositories that it is published as: its model, and on request its dataset, its metric and a Space."""

import dataclasses
import fnmatch
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard

from ..reading import read_text, read_yaml
from ..runs import Run
from ..runs.folder import CHECKPOINTS, RECIPE_NAME
from ..runs.record import RECORD_NAME
from ..tasks import Task
from ..utils import check_repo_id, one_line, printable
from .cards import dataset_repo
from .checks import (
    CODE,
    check_base_model,
    check_committed,
    check_counts,
    check_file,
    check_format,
    check_scores,
    check_text,
    check_weights,
    differing_code,
)
from .model_card import card_files
from .secrets import check_secrets
from .spaces import demo_files, demo_repo, metric_files, metric_repo


# The files that are published from the folder of a run, and of a dataset.
_RUN_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    RECORD_NAME,
    RECIPE_NAME,
)
_DATASET_FILES = ("README.md", "task.json", "data/*.parquet")
_NO_DIGESTS = (
    f"{RECORD_NAME} is older than digests of weights and code. That its scores are those of these weights is known only from a new "
    "scoring of its samples."
)
_OTHER_CODE = (
    "{} has changed since the model was trained. The package's version is published, and reaches the record's scores on the same "
    "samples."
)
# What the card of a dataset calls its own folder, before the dataset is on the Hub.
_DATASET_PLACE = "path/to/this/folder"


@dataclasses.dataclass
class Repository:
    """
    What a repository will hold.

    Attributes:
        repo_id: `ORG/NAME`.
        repo_type: `"model"`, `"dataset"` or `"space"`.
        files: the path or the content of each file, by its name in the repository.
        left_out: the names of the folder's files that are not published.
        note: a sentence about what could not be checked.
    """

    repo_id: str
    repo_type: str
    files: dict[str, Path | bytes]
    left_out: list[str] = dataclasses.field(default_factory=list)
    note: str | None = None

    def listing(self) -> str:
        """The files and their sizes, one per line."""
        sizes = {
            name: content.stat().st_size if isinstance(content, Path) else len(content)
            for name, content in self.files.items()
        }
        lines = [f"{self.repo_type} {self.repo_id}: {len(sizes)} files, {sum(sizes.values()):,} bytes"]
        lines += [f"  {size:>12,}  {printable(name)}" for name, size in sorted(sizes.items())]
        lines += [f"  {'left out':>12}  {printable(name)}" for name in self.left_out]
        lines += [f"  note: {self.note}"] if self.note else []
        return "\n".join(lines)

    def check_folder(self, folder: Path) -> None:
        """
        Raises:
            FileExistsError: if a folder that the repository is to be written into holds other files.
        """
        others = sorted(
            name
            for path in folder.rglob("*")
            if path.is_file() and (name := path.relative_to(folder).as_posix()) not in self.files
        )
        if others:
            raise FileExistsError(
                f"{folder} holds {others[0]}, which would not be published: remove it, or choose another --output."
            )

    def write(self, folder: Path) -> None:
        """Writes what the repository will hold into a folder."""
        contents = {name: c.read_bytes() if isinstance(c, Path) else c for name, c in self.files.items()}
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def write_all(repositories: Sequence[Repository], output: Path) -> None:
    """
    Writes each repository into a folder of its name inside `output`. Where a model and a dataset share a name, their types are added.

    Raises:
        FileExistsError: if one of the folders holds other files. Nothing is written then.
    """
    names = [repository.repo_id.partition("/")[2] for repository in repositories]
    folders = [
        output / (f"{name}-{repository.repo_type}" if names.count(name) > 1 else name)
        for name, repository in zip(names, repositories, strict=True)
    ]
    for repository, folder in zip(repositories, folders, strict=True):
        repository.check_folder(folder)
    for repository, folder in zip(repositories, folders, strict=True):
        repository.write(folder)


def plan(
    run: Run,
    repo_id: str,
    dataset: str | Path | None = None,
    metric: bool = False,
    space: bool = False,
    beside: Sequence[str] = (),
    others: Sequence[str | Path] = (),
) -> list[Repository]:
    """
    The repositories of a run, checked; nothing is sent.

    Args:
        run: the run.
        repo_id: `ORG/NAME` of the model; the other repositories are in the same organisation.
        dataset: a folder that `hyla data` wrote and that is published too.
        metric, space: whether to publish the task's metric and a page for trying the model.
        beside: repositories of other models that the page shows too.
        others: see `card_files`.

    Raises:
        ValueError: if anything must not be published. The message says what and why.
        OSError: if something is missing.
    """
    for model_id in (repo_id, *beside):
        check_repo_id(model_id)
    task = run.task
    found, left_out = _files_in(run.folder, _RUN_FILES, skipped=(CHECKPOINTS,))
    check_text(found)
    _check_repeatable(run)
    check_format(run)
    check_weights(run, found | {name: run.folder / name for name in left_out})
    check_counts(run)
    card = card_files(run, repo_id, others)
    check_scores(run)
    repositories = []
    if dataset is not None:
        samples_repo = dataset_repo(task, repo_id)
        if samples_repo is None:
            raise ValueError(
                f"Samples of the task {task.name} have no repository of their own: leave out the dataset."
            )
        repositories.append(_dataset_repository(Path(dataset), task, samples_repo))
    if metric:
        repositories.append(Repository(metric_repo(task, repo_id), "space", encoded(metric_files(task, repo_id))))
    # A card in the folder is rendered again, and its code is taken from the package.
    left_out = [name for name in left_out if name not in card and name not in CODE]
    note = None
    if run.record.digests is None:
        note = _NO_DIGESTS
    elif name := differing_code(run.record):
        note = _OTHER_CODE.format(name)
    repositories.append(Repository(repo_id, "model", {**encoded(card), **found, **CODE}, left_out, note))
    if space:
        repositories.append(Repository(demo_repo(repo_id), "space", encoded(demo_files(task, repo_id, beside))))
    for repository in repositories:
        for name, content in repository.files.items():
            if isinstance(content, bytes) or name in CODE:  # other files were checked in their folder
                check_secrets(f"{repository.repo_id}/{name}", content)
    return repositories


def _check_repeatable(run: Run) -> None:
    """A run is published only if its code and its recipe can be found again."""
    check_committed(run.record.environment.get("git_commit"), str(run.folder))
    check_base_model(run.record.recipe["model"], str(run.folder))
    written = run.folder / RECIPE_NAME
    if not written.exists():
        raise FileNotFoundError(f"{run.folder} lacks {RECIPE_NAME}, the recipe that made it: train it again.")
    if read_yaml(written) != run.record.recipe:
        raise ValueError(f"{written} is not the recipe in {RECORD_NAME}: it was changed after the run; train again.")


def _files_in(
    folder: Path, patterns: tuple[str, ...], skipped: tuple[str, ...] = ()
) -> tuple[dict[str, Path], list[str]]:
    """
    The files that are published, by name, and the names of the others.

    Raises:
        ValueError: for a secret or a pickle anywhere in the folder, even in a file that is not published. `skipped` folders are
            searched for secrets only.
    """
    found: dict[str, Path] = {}
    left_out = [f"{name}/" for name in skipped if (folder / name).is_dir()]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        check_secrets(str(path), path)
        if path.relative_to(folder).parts[0] in skipped:
            continue
        check_file(path)
        if matches(name, patterns):
            found[name] = path
        else:
            left_out.append(name)
    return found, left_out


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the name fits one of the patterns. An asterisk does not match a slash."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _dataset_repository(folder: Path, task: Task, repo_id: str) -> Repository:
    # datasets is slow to import and not needed otherwise.
    from ..tasks.data import Manifest

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: write a dataset by `hyla data`, and name its folder.")
    files, left_out = _files_in(folder, _DATASET_FILES)
    manifest = Manifest.load(folder)
    manifest.check(task, folder)
    manifest.check_files(folder)
    if "README.md" not in files:
        raise FileNotFoundError(f"{folder} has no card: expected README.md, as `hyla data` writes it.")
    readme = folder / "README.md"
    try:
        text = read_text(readme)
        DatasetCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{readme} is not the card of a dataset ({one_line(error)}): write it again by `hyla data`."
        ) from None
    card = text.replace(_DATASET_PLACE, repo_id).encode()
    return Repository(repo_id, "dataset", {**files, "README.md": card}, left_out)


def encoded(contents: dict[str, str | bytes]) -> dict[str, Path | bytes]:
    """The contents of files as bytes."""
    return {name: text.encode() if isinstance(text, str) else text for name, text in contents.items()}

"""
A finished run → repositories on the Hub: its model, and on request its dataset, its metric and a Space.

Everything is read and checked before the first call; then each repository gets one commit, so that whatever breaks
leaves its files as they were or whole, and the same command goes on from there. A repository that is made for them may be
left empty.
"""

import contextlib
import dataclasses
import fnmatch
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .. import model
from ..model import HylaConfig
from ..runs import Run
from ..runs.folder import CHECKPOINTS, RECIPE_NAME
from ..runs.record import RECORD_NAME, environment
from ..tasks import Task
from .checks import check_committed, check_file, check_format, check_secrets, check_text, check_weights
from .model_card import card_files, check_card_before_training, dataset_repo
from .spaces import demo_files, demo_repo, metric_files, metric_repo


# The model's code, which is published beside the weights, by the names that it has in the repository.
CODE = {path.name: path for path in sorted(Path(model.__file__).parent.glob("*_hyla.py"))}
# What of a folder is published, in a run's and in a dataset's.
_RUN_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    RECORD_NAME,
    RECIPE_NAME,
)
_DATASET_FILES = ("README.md", "task.json", "data/*.parquet")
# What the card of a dataset calls its own place, before it has one on the Hub.
_DATASET_PLACE = "path/to/this/folder"
# Files on the Hub that a publication may remove where it no longer has them; any other is left alone.
_OURS = {
    "model": ("*.safetensors", "model.safetensors.index.json", "*_hyla.py", ".eval_results/*.yaml", "probe/*"),
    "dataset": ("*.parquet", "*/*.parquet"),
    "space": (),
}


@dataclasses.dataclass
class Repository:
    """
    What a repository is to hold.

    Attributes:
        repo_id: `ORG/NAME`.
        repo_type: `"model"`, `"dataset"` or `"space"`.
        files: by their names in the repository, each a path or its content.
        left_out: files of the folder that are not published.
    """

    repo_id: str
    repo_type: str
    files: dict[str, Path | bytes]
    left_out: list[str] = dataclasses.field(default_factory=list)

    def listing(self) -> str:
        """The files and their sizes, one a line."""
        sizes = {
            name: content.stat().st_size if isinstance(content, Path) else len(content)
            for name, content in self.files.items()
        }
        lines = [f"{self.repo_type} {self.repo_id}: {len(sizes)} files, {sum(sizes.values()):,} bytes"]
        lines += [f"  {size:>12,}  {name}" for name, size in sorted(sizes.items())]
        lines += [f"  {'left out':>12}  {name}" for name in self.left_out]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """
        Writes what the repository is to hold into a folder.

        Raises:
            FileExistsError: if the folder holds other files.
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
        contents = {name: c.read_bytes() if isinstance(c, Path) else c for name, c in self.files.items()}
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def plan(
    folder: str | Path,
    repo_id: str,
    dataset: str | Path | None = None,
    metric: bool = False,
    space: bool = False,
    others: Sequence[str | Path] = (),
) -> list[Repository]:
    """
    The repositories of a run, checked; nothing is sent.

    Args:
        folder: of a finished run.
        repo_id: `ORG/NAME` of the model; the other repositories are in the same organisation.
        dataset: folder that `hyla data` wrote, to publish it too.
        metric, space: whether to publish the task's metric and a page that asks the model.
        others: see `card_files`.

    Raises:
        ValueError: if anything must not be published, saying what and why.
        OSError: if something is missing.
    """
    check_repo_id(repo_id)
    run = Run.load(folder)
    task = run.task
    found, left_out = _files_in(run.folder, _RUN_FILES, skipped=(CHECKPOINTS,))
    check_text(found)
    _check_repeatable(run)
    check_format(run)
    check_weights(run, found)
    card = card_files(run, repo_id, others)
    repositories = []
    if dataset is not None:
        repositories.append(_dataset_repository(Path(dataset), task, dataset_repo(task, repo_id)))
    if metric:
        repositories.append(Repository(metric_repo(task, repo_id), "space", _encoded(metric_files(task, repo_id))))
    # A card and code that lie in the folder are made and taken anew.
    left_out = [name for name in left_out if name not in card and name not in CODE]
    repositories.append(Repository(repo_id, "model", {**_encoded(card), **found, **CODE}, left_out))
    if space:
        repositories.append(Repository(demo_repo(repo_id), "space", _encoded(demo_files(task, repo_id))))
    for repository in repositories:
        for name, content in repository.files.items():
            if isinstance(content, bytes) or name in CODE:  # the others have been looked at in their folder
                check_secrets(f"{repository.repo_id}/{name}", content)
    return repositories


def publish(
    repositories: Iterable[Repository],
    private: bool | None = None,
    collection: str | None = None,
    token: str | None = None,
) -> list[str]:
    """
    Publishes what `plan` returned; a line on each repository, and one on the collection.

    Args:
        private: whether the repositories are only for their organisation; `None` for its default.
        collection: title of a collection of the organisation, which all of them are put into.
        token: default: the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        OSError: if the Hub refuses or cannot be reached; the files of each repository are then as they were or whole, and
            the same call goes on from there.
        ValueError: if a repository is public already, and `private` is set; nothing is sent then.
    """
    api = HfApi(token=token)
    repositories = list(repositories)
    lines: list[str] = []
    if private:
        public = [one for one in repositories if _is_public(api, one)]
        if public:
            raise ValueError(
                f"The {public[0].repo_type} {public[0].repo_id} is public already, so nothing was sent: make it private in "
                "its settings on the Hub, or leave out --private."
            )
    for repository in repositories:
        with _in_one_sentence(f"{repository.repo_type} {repository.repo_id}", _STATE, lines):
            lines.append(_commit(api, repository, private))
    if collection:
        namespace = repositories[0].repo_id.partition("/")[0]
        with _in_one_sentence(f"collection {collection!r}", "it may hold some of them only", lines):
            made = api.create_collection(collection, namespace=namespace, private=bool(private), exists_ok=True)
            for repository in repositories:
                api.add_collection_item(made.slug, repository.repo_id, repository.repo_type, exists_ok=True)  # type: ignore[arg-type]
            lines.append(f"collection {made.slug}: holds {len(repositories)} of them")
    return lines


def publish_run(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """
    Publishes a finished run; a line on what it did. See `plan` and `publish`.

    Raises:
        ValueError, OSError: as they do, saying too how to publish the run later.
    """
    try:
        [line] = publish(plan(folder, repo_id), private)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{error} The run itself is finished; `hyla publish {folder} --repo-id {repo_id}` publishes it."
        ) from error
    return line


def check_before_training(name: str, settings: dict[str, Any], task: Task, config: HylaConfig) -> None:
    """
    Refuses what would keep a run from getting its card or, where its recipe says `push_to_hub`, from the Hub.

    Args:
        name: of the recipe.
        settings: the recipe's sections.
        task, config: that the settings make.

    Raises:
        ValueError: saying what to do.
    """
    check_card_before_training(name, settings, task, config)
    if not settings["trainer"].get("push_to_hub"):
        return
    check_publishable(settings, settings["trainer"]["hub_model_id"])
    if get_token() is None:
        raise ValueError("push_to_hub needs a token: log in by `hf auth login`, or set HF_TOKEN.")


def check_publishable(settings: dict[str, Any], repo_id: str) -> None:
    """
    Refuses what would keep a run of a recipe with these settings from being published, whatever it reaches.

    Raises:
        ValueError: saying what to do.
    """
    check_repo_id(repo_id)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("A card needs matplotlib for its plots: pip install hf-hyla[analysis].")
    check_committed(environment()["git_commit"], "This run")
    _check_base_model(settings["model"].get("model_name_or_path"), "This run")


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        ValueError: unless it is `ORG/NAME`, as the Hub writes it.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"A repository is named ORG/NAME, got {repo_id!r}.")
    validate_repo_id(repo_id)


def _commit(api: HfApi, repository: Repository, private: bool | None) -> str:
    repo_id, repo_type = repository.repo_id, repository.repo_type
    sdk = "gradio" if repo_type == "space" else None
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
    before = api.repo_info(repo_id, repo_type=repo_type)
    there = [file.rfilename for file in before.siblings or []]  # type: ignore[union-attr]
    gone = [name for name in there if name not in repository.files and _matches(name, _OURS[repo_type])]
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in repository.files.items()]
    operations += [CommitOperationDelete(name) for name in gone]
    commit = api.create_commit(
        repo_id,
        operations,
        repo_type=repo_type,
        commit_message="Publish with hf_hyla",
        # So that what somebody else has committed in between is noticed, not overwritten.
        parent_commit=before.sha,
    )
    state = "unchanged" if commit.oid == before.sha else "published"
    return f"{repo_type} {repo_id}: {state}, {commit.commit_url}"


def _is_public(api: HfApi, repository: Repository) -> bool:
    with _in_one_sentence(f"{repository.repo_type} {repository.repo_id}", "nothing was sent", []):
        try:
            return not api.repo_info(repository.repo_id, repo_type=repository.repo_type).private
        except RepositoryNotFoundError:
            return False


@contextlib.contextmanager
def _in_one_sentence(what: str, state: str, done: list[str]) -> Iterator[None]:
    """
    Turns an answer of the Hub that is none of success, and a missing answer, into one sentence that says what to do and holds
    no word of the request. Any other error is not the Hub's, and stays as it is.

    `state` says what may have become of `what`, and `done` what was published before.
    """
    try:
        yield
    except (HTTPError, RuntimeError, ValueError) as error:
        # huggingface_hub wraps what breaks an upload in a RuntimeError, and metadata that the Hub refuses in a ValueError.
        cause = error if isinstance(error, (HTTPError, json.JSONDecodeError)) else error.__cause__
        if not isinstance(cause, (HTTPError, json.JSONDecodeError)):
            raise
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, json.JSONDecodeError):
            reason = "the Hub answers with something else than JSON: wait"
        elif status is None:
            reason = f"the Hub cannot be reached ({type(cause).__name__}): look at the network"
        elif status >= 500:
            reason = f"the Hub is in trouble (status {status}): wait"
        else:
            reason = _REASONS.get(status, f"the Hub refuses it (status {status}): look at the name and at your rights")
        published = f" Before it came: {', '.join(line.partition(': ')[0] for line in done)}." if done else ""
        raise OSError(
            f"Publishing the {what} failed, since {reason}, then publish again; {state}.{published}"
        ) from error


_STATE = "its files are as they were or all published, and if it is new, it may be there and empty"
_REASONS = {
    400: "the Hub refuses the card's metadata or the files (status 400): look at the top of the card",
    401: "the Hub does not accept your token (status 401): log in by `hf auth login`, or set HF_TOKEN",
    403: "your token may not write there (status 403): take one with write access, or another organisation",
    409: "it is being changed by somebody else (status 409): see what they did",
    412: "somebody else has changed it in the meantime (status 412): see what they did",
    429: "the Hub has had too many requests (status 429): wait some minutes",
}


def _check_repeatable(run: Run) -> None:
    """A run is published only if its code and its recipe can be found again."""
    check_committed(run.record.environment.get("git_commit"), str(run.folder))
    _check_base_model(run.base_model, str(run.folder))
    written = run.folder / RECIPE_NAME
    if not written.exists():
        raise FileNotFoundError(f"{run.folder} lacks {RECIPE_NAME}, the recipe it was made by: train it again.")
    if yaml.safe_load(written.read_text(encoding="utf-8")) != run.record.recipe:
        raise ValueError(
            f"{written} is not the recipe that {RECORD_NAME} was made by: it was changed after the run; train again."
        )


def _check_base_model(base_model: str | None, run: str) -> None:
    if base_model and Path(base_model).exists():
        raise ValueError(
            f"{run} is trained from the folder {base_model}, which nobody else has: publish that model first, and train from "
            "its repository."
        )


def _files_in(
    folder: Path, patterns: tuple[str, ...], skipped: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[str]]:
    """
    The files that are published, by name, and the names of the others.

    Raises:
        ValueError: for a secret or a pickle, which may lie in no published folder, published or not; the `skipped` ones
            are local, and only searched for secrets.
    """
    found: dict[str, Any] = {}
    left_out = [f"{name}/" for name in skipped if (folder / name).is_dir()]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        check_secrets(str(path), path)
        if path.relative_to(folder).parts[0] in skipped:
            continue
        check_file(path)
        if _matches(name, patterns):
            found[name] = path
        else:
            left_out.append(name)
    return found, left_out


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits; its asterisks stay within one folder."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _dataset_repository(folder: Path, task: Task, repo_id: str) -> Repository:
    # datasets is slow to import and not needed otherwise.
    from ..tasks.data import Manifest

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: write a dataset by `hyla data`, and name its folder.")
    files, left_out = _files_in(folder, _DATASET_FILES)
    manifest = Manifest.load(folder)
    manifest.check(task, folder)
    manifest.check_files(folder)
    if "README.md" not in files:
        raise FileNotFoundError(f"{folder} has no card: expected README.md, as `hyla data` writes it.")
    readme = folder / "README.md"
    DatasetCard.load(readme)
    files["README.md"] = readme.read_text(encoding="utf-8").replace(_DATASET_PLACE, repo_id).encode()
    return Repository(repo_id, "dataset", files, left_out)


def _encoded(contents: dict[str, str | bytes]) -> dict[str, Path | bytes]:
    return {name: text.encode() if isinstance(text, str) else text for name, text in contents.items()}

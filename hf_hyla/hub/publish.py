"""
Repositories → the Hub.

Everything is read and checked before the first call to the Hub. Each repository gets one commit. So its files are as they were
or complete, whatever breaks, and the same command resumes from there. A new repository may be left empty.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from ..model import HylaConfig
from ..runs import Run
from ..runs.environment import environment
from ..runs.plots import can_draw
from ..tasks import Task
from ..utils import check_repo_id
from .checks import check_base_model, check_committed
from .model_card import check_card_before_training
from .repository import Repository, matches, plan


# Files on the Hub that a publication removes if it no longer has them; any other is left alone.
_OURS = {
    "model": ("*.safetensors", "model.safetensors.index.json", "*_hyla.py", ".eval_results/*.yaml", "probe/*"),
    "dataset": ("*.parquet", "*/*.parquet"),
    "space": ("hf_hyla/*", "hf_hyla/*/*", "hf_hyla/*/*/*"),
}
# What is said of a publication that failed: the state of its repository, and by the Hub's status, why it failed and what to do.
_STATE = "its files are either unchanged or all published, and a new repository may exist but be empty"
_REASONS = {
    400: "the Hub refuses the card's metadata or the files (status 400): look at the top of the card",
    401: "the Hub does not accept your token (status 401): log in by `hf auth login`, or set HF_TOKEN",
    403: "your token may not write there (status 403): take one with write access, or another organisation",
    409: "somebody else is changing it (status 409): look at their commit",
    412: "somebody else has changed it in the meantime (status 412): look at their commit",
    429: "the Hub has had too many requests (status 429): wait some minutes",
}
_REASONS_OF_COLLECTION = _REASONS | {400: "the Hub refuses it (status 400): choose another title"}


def publish(
    repositories: Iterable[Repository],
    private: bool | None = None,
    collection: str | None = None,
    token: str | None = None,
) -> list[str]:
    """
    Publishes what `plan` returned. Returns a line about each repository, and one about the collection.

    Args:
        private: whether only the organisation can see the repositories; `None` for the organisation's default.
        collection: the title of a collection of the organisation, which all of the repositories are put into.
        token: by default the token of `hf auth login` or `HF_TOKEN`.

    Raises:
        OSError: if the Hub refuses or cannot be reached. The files of each repository are then as they were or complete, and
            the same call resumes from there.
        ValueError: if a repository is already public, and `private` is set. Nothing is sent then.
    """
    api = HfApi(token=token)
    repositories = list(repositories)
    lines: list[str] = []
    if private:
        for one in repositories:
            if _is_public(api, one.repo_id, one.repo_type):
                raise ValueError(
                    f"The {one.repo_type} {one.repo_id} is public already, so nothing was sent: make it private in its settings "
                    "on the Hub, or publish with --no-private."
                )
    for repository in repositories:
        with _in_one_sentence(f"{repository.repo_type} {repository.repo_id}", _STATE, lines):
            lines.append(_commit(api, repository, private))
    if collection:
        namespace = repositories[0].repo_id.partition("/")[0]
        state = "it may hold some of them only"
        with _in_one_sentence(f"collection {collection!r}", state, lines, _REASONS_OF_COLLECTION):
            made = api.create_collection(collection, namespace=namespace, private=bool(private), exists_ok=True)
            for repository in repositories:
                api.add_collection_item(made.slug, repository.repo_id, repository.repo_type, exists_ok=True)  # type: ignore[arg-type]
            lines.append(f"collection {made.slug}: holds {len(repositories)} of them")
    return lines


def publish_run(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """
    Publishes a finished run. Returns a line about what was done. See `plan` and `publish`.

    Raises:
        ValueError, OSError: as they do. The message also says how to publish the run later.
    """
    try:
        [line] = publish(plan(Run.load(folder), repo_id), private)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{error} The run itself is finished; `hyla publish {folder} --repo-id {repo_id}{' --private' if private else ''}` "
            "publishes it."
        ) from error
    return line


def check_before_training(name: str, settings: dict[str, Any], task: Task, config: HylaConfig) -> None:
    """
    Checks before the training that a run can get its card and, if its recipe says `push_to_hub`, can be published.

    Args:
        name: the recipe's name.
        settings: the recipe's sections.
        task, config: the task and the config that the settings make.

    Raises:
        ValueError: if it cannot. The message says what to do.
    """
    check_card_before_training(name, settings, task, config)
    trainer = settings["trainer"]
    if not trainer.get("push_to_hub"):
        return
    repo_id = trainer["hub_model_id"]
    check_publishable(settings, repo_id)
    if get_token() is None:
        raise ValueError("push_to_hub needs a token: log in by `hf auth login`, or set HF_TOKEN.")
    if trainer.get("hub_private_repo"):
        with contextlib.suppress(OSError):  # a Hub that does not answer now is asked again when the run is published
            if _is_public(HfApi(), repo_id, "model"):
                raise ValueError(
                    f"The model {repo_id} is public already, but the recipe says trainer.hub_private_repo: make it private in its "
                    "settings on the Hub, or leave out trainer.hub_private_repo."
                )


def check_publishable(settings: dict[str, Any], repo_id: str) -> None:
    """
    Checks that a run of a recipe with these settings can be published, whatever scores it reaches.

    Raises:
        ValueError: if it cannot. The message says what to do.
    """
    check_repo_id(repo_id)
    if not can_draw():
        raise ValueError("A card needs matplotlib for its plots: pip install hf-hyla[analysis].")
    check_committed(environment()["git_commit"], "This run")
    check_base_model(settings["model"], "This run")


def _commit(api: HfApi, repository: Repository, private: bool | None) -> str:
    repo_id, repo_type = repository.repo_id, repository.repo_type
    sdk = "gradio" if repo_type == "space" else None
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
    before = api.repo_info(repo_id, repo_type=repo_type)
    there = [file.rfilename for file in before.siblings or []]  # type: ignore[union-attr]
    gone = [name for name in there if name not in repository.files and matches(name, _OURS[repo_type])]
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in repository.files.items()]
    operations += [CommitOperationDelete(name) for name in gone]
    commit = api.create_commit(
        repo_id,
        operations,
        repo_type=repo_type,
        commit_message="Publish with hf_hyla",
        # A commit that somebody else makes in between is then noticed, and not overwritten.
        parent_commit=before.sha,
    )
    state = "unchanged" if commit.oid == before.sha else "published"
    return f"{repo_type} {repo_id}: {state}, {commit.commit_url}"


def _is_public(api: HfApi, repo_id: str, repo_type: str) -> bool:
    with _in_one_sentence(f"{repo_type} {repo_id}", "nothing was sent", []):
        try:
            return not api.repo_info(repo_id, repo_type=repo_type).private
        except RepositoryNotFoundError:
            return False


@contextlib.contextmanager
def _in_one_sentence(what: str, state: str, done: list[str], reasons: dict[int, str] = _REASONS) -> Iterator[None]:
    """
    Turns a failed or missing answer of the Hub into one sentence that says what to do and repeats nothing of the request. Other
    errors stay as they are.

    Args:
        what: what is being published.
        state: the state that it may be in after a failure.
        done: a line about each thing that was published before.
        reasons: by status, why it failed and what to do.
    """
    try:
        yield
    except (HTTPError, ConnectionError, RuntimeError, ValueError) as error:
        # huggingface_hub wraps what breaks an upload in a RuntimeError, and metadata that the Hub refuses in a ValueError. hf_xet
        # raises Python's ConnectionError, also for an answer with a status.
        of_hub = (HTTPError, ConnectionError, json.JSONDecodeError)
        cause = error if isinstance(error, of_hub) else error.__cause__
        if not isinstance(cause, of_hub) or isinstance(cause, OfflineModeIsEnabled):
            raise
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, ConnectionError) and (said := re.search(r"status\D{0,30}([45]\d\d)\b", str(cause))):
            status = int(said[1])
        if isinstance(cause, json.JSONDecodeError):
            reason = "the Hub answers with something other than JSON: wait"
        elif status is None:
            reason = f"the Hub cannot be reached ({type(cause).__name__}): check the connection"
        elif status >= 500:
            reason = f"the Hub has an error of its own (status {status}): wait"
        else:
            reason = reasons.get(status, f"the Hub refuses it (status {status}): look at the name and at your rights")
        published = f" Published before it: {', '.join(line.partition(': ')[0] for line in done)}." if done else ""
        raise OSError(
            f"Publishing the {what} failed, since {reason}, then publish again; {state}.{published}"
        ) from error

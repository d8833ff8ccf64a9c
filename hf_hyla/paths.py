"""
Paths from words on the command line, which name recipes, runs, models, files and versions of this package.

A word is a path, or else the name of a file or folder among the recipes that come with the package. A word that names nothing
is refused with the nearest name, before anything slow is imported.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

from .utils import CHECKOUT, git, models_folder, recipes_folder


def find_recipe(word: str | Path) -> Path:
    """
    The file of a recipe or a sweep. `.yaml` may be left out. `recipes/` may be left out for those that come with the package.

    Raises:
        OSError: if there is no such file.
    """
    path = Path(word)
    spellings = (path, path.with_name(f"{path.name}.yaml")) if path.name else (path,)  # `.` and `/` have no name
    candidates = [found for one in spellings for found in (one, _among_recipes(one))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    is_there = next((candidate for candidate in candidates if candidate.exists()), None)
    known = {
        str(file.relative_to(recipes_folder())): file.stem for file in sorted(recipes_folder().rglob("*.yaml"))
    } | {str(file): file.stem for file in sorted(path.parent.glob("*.yaml")) if file.is_file()}
    wanted = path.with_suffix("") if path.suffix == ".yaml" else path
    # "demo" can only mean logic/demo.yaml, but "hyla" names two recipes. The error lists the candidates, and none is guessed.
    near = [name for name, stem in known.items() if stem == wanted.name][:3]
    near = near or _near(str(path).removeprefix("recipes/"), known)
    near = near or [name for name, stem in known.items() if stem in _near(wanted.name, known.values())][:1]
    if is_there is None:
        raise FileNotFoundError(
            f"There is no recipe {word}{_did_you_mean(near)}: expected a YAML file, or a name that `hyla recipes` lists."
        )
    kind = "a folder" if is_there.is_dir() else "not a regular file"
    raise FileNotFoundError(f"{word} is {kind}{_did_you_mean(near)}: expected the YAML file of a recipe.")


def find_existing(word: str | Path, what: str) -> Path:
    """
    The file or folder with this name, here or among the recipes that come with the package. `what` is the word for it in error
    messages.

    Raises:
        FileNotFoundError: if there is no such file or folder.
    """
    path = Path(word)
    for candidate in (path, _among_recipes(path)):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"There is no {what} {word}{_did_you_mean(_near_paths(path))}.")


def find_file(word: str | Path, what: str) -> Path:
    """
    The regular file with this name; see `find_existing`.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = find_existing(word, what)
    if not path.is_file():
        raise FileNotFoundError(
            f"{word} is {'a folder' if path.is_dir() else 'not a regular file'}, expected a {what}."
        )
    return path


def find_record(word: str | Path) -> Path:
    """
    The folder of a run or the file of its record, here or among the recipes and models that come with the package.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(word)
    for candidate in (path, _among_recipes(path), _among_models(path)):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(
        f"There is no run {word}{_did_you_mean(_near_paths(path))}: expected the folder of a finished run, or the file of its "
        "record."
    )


def find_run(word: str | Path) -> Path:
    """
    The folder of a run; see `find_record`.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    path = find_record(word)
    if path.is_file():
        raise FileNotFoundError(_not_a_folder(word, path))
    return path


def find_model(word: str) -> str:
    """
    The folder of a run or a model, here or among those that come with the package, such as `hyla-logic` or
    `hub_cards/hyla-logic`; or else the name of a repository on the Hub, which is asked once.

    Raises:
        OSError: if there is no such folder and no such repository.
    """
    path = Path(word)
    if path.is_file():
        raise FileNotFoundError(_not_a_folder(word, path))
    if path.exists():
        return word
    if (_among_models(path) / "config.json").is_file():
        return str(_among_models(path))
    missing = f"There is no run or model {word}{_did_you_mean(_near_paths(path))}"
    if word.count("/") != 1:
        raise FileNotFoundError(
            f"{missing}: expected the folder of a run or a model, or a repository on the Hub as ORG/NAME."
        )
    if reason := _missing_on_hub(word):
        raise FileNotFoundError(f"{missing} here, and {reason}.")
    return word


def find_version(word: str) -> Path | str:
    """
    The folder of a checkout, or the hash of a commit of the checkout that this package lies in.

    Raises:
        ValueError: if there is neither.
    """
    path = Path(word)
    if path.is_dir():
        if not (path / "hf_hyla" / "__init__.py").is_file():
            raise ValueError(f"{word} holds no hf_hyla/__init__.py: name the folder of a checkout, or a commit.")
        return path.resolve()
    if not (CHECKOUT / ".git").exists():
        raise ValueError(f"--against must be the folder of a checkout, since this package lies in none, got {word}.")
    answer = git("rev-parse", "--verify", "--end-of-options", word + "^{commit}", text=True)
    if answer.returncode:
        why = " ".join(answer.stderr.split())
        raise ValueError(f"--against must be a folder, or a commit of this checkout, got {word}: {why}.")
    return answer.stdout.strip()


def _not_a_folder(word: str | Path, path: Path) -> str:
    near = [str(path.parent)] if (path.parent / "config.json").is_file() else []
    return f"{word} is a file{_did_you_mean(near)}: expected the folder of a run or a model."


def _missing_on_hub(repo_id: str) -> str | None:
    """The reason why a model cannot be loaded from the Hub or its cache, or `None` if it can. The Hub is asked once."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        if isinstance(try_to_load_from_cache(repo_id, "config.json"), str):
            return None
        if HfApi().file_exists(repo_id, "config.json"):
            return None
        return f"the Hub has no model {repo_id} that you can read: check the name, or log in by `hf auth login`"
    except OfflineModeIsEnabled:
        return "the Hub is not asked, since HF_HUB_OFFLINE is set"
    except HFValidationError:
        return f"{repo_id} is not a valid name of a repository"
    except (HTTPError, OSError) as error:
        return f"the Hub cannot be reached ({' '.join(str(error).split())})"


def _among_models(path: Path) -> Path:
    return models_folder() / path.name if path.parent.name in ("", "hub_cards") else path


def _among_recipes(path: Path) -> Path:
    return recipes_folder() / (Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else path)


def _near_paths(path: Path) -> list[str]:
    """The nearest of the files and folders beside the path and in `runs/`."""
    folders = [folder for folder in (path.parent, Path("runs")) if folder.is_dir()]
    # Without links that lead nowhere, of which the path itself may be one.
    beside = [str(other) for folder in folders for other in folder.iterdir() if other.exists()]
    names = _near(path.name, [Path(one).name for one in beside])
    return _near(str(path), beside) or [one for one in beside if Path(one).name in names][:1]


def _near(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)


def _did_you_mean(near: list[str]) -> str:
    return f" (did you mean {' or '.join(near)}?)" if near else ""

"""The folder of a run, before and at its start: claimed, checked, and on request emptied of an earlier run."""

import contextlib
import inspect
import shutil
import sys
from pathlib import Path

import yaml
from accelerate import PartialState

from ..model import HylaForSequenceClassification
from ..runs.folder import (
    CARD_NAME,
    CHECKPOINTS,
    COMPARISON_NAME,
    CURVE_NAME,
    EVAL_RESULTS,
    PROBE_NAME,
    RECIPE_NAME,
)
from ..runs.record import RECORD_NAME, RunRecord, first_difference
from ..utils import one_line, write_whole
from .checkpoint import LOCK, claimed, last_whole
from .recipe import Recipe, read_sections


def prepare_folder(recipe: Recipe, output: Path, overwrite: bool, until_the_end: contextlib.ExitStack) -> Path | None:
    """
    Makes the folder, claims it until the `ExitStack` closes, and writes the recipe into it, unless it holds a run that is
    to be overwritten later. Returns the checkpoint to resume from, or `None`.

    Raises:
        FileExistsError: if it holds other files, a finished run or one of another recipe, or if somebody trains there.
        ValueError: if what lies there is damaged, or if the run starts from weights that would be overwritten.
        OSError: if it cannot be used.
    """
    written = output / RECIPE_NAME
    ours = {LOCK, f"{RECIPE_NAME}.tmp"}
    try:
        others = [path for path in output.iterdir() if path.name not in ours] if output.exists() else []
        if others and not written.exists():
            raise FileExistsError(f"{output} is not empty and holds no run: choose another --output.")
        output.mkdir(parents=True, exist_ok=True)
        until_the_end.enter_context(claimed(output))
        if overwrite:
            _check_start(recipe, output)
        elif written.exists() and (key := first_difference(recipe.settings, _written_recipe(written))):
            raise FileExistsError(
                f"{output} holds a run of another recipe, which differs in {key}: choose another --output, or pass "
                "--overwrite."
            )
        elif (output / RECORD_NAME).exists():
            _check_record(output)
            raise FileExistsError(f"{output} holds a finished run: choose another --output, or pass --overwrite.")
        if overwrite and written.exists():
            return None
        _write_recipe(recipe, output)
        checkpoint, said = last_whole(output / CHECKPOINTS)
    except OSError as error:
        if error.errno is None:  # raised above
            raise
        raise OSError(f"{output} cannot be used ({error.strerror}): choose another --output.") from error
    for line in said:
        PartialState().print(line, file=sys.stderr, flush=True)
    return checkpoint


def replace_run(recipe: Recipe, output: Path) -> None:
    """
    Removes the files that a run and its card write, and no others. The record goes first: the run is then unfinished.

    Raises:
        OSError: if one of them cannot be removed.
    """
    code = [path.name for path in Path(inspect.getfile(HylaForSequenceClassification)).parent.glob("*_hyla.py")]
    saved = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    names = [RECORD_NAME, CURVE_NAME, *saved, CARD_NAME, COMPARISON_NAME, *code, PROBE_NAME]
    files = [output / name for name in names]
    files += [*(output / PROBE_NAME).parent.glob("*.png"), *(output / EVAL_RESULTS).glob("*.yaml")]
    try:
        for file in files:
            file.unlink(missing_ok=True)
        for pattern in ("checkpoint-*", "damaged-checkpoint-*"):
            for checkpoint in (output / CHECKPOINTS).glob(pattern):  # the folder may be a link to another disk
                shutil.rmtree(checkpoint)
        _write_recipe(recipe, output)
    except OSError as error:
        raise OSError(
            f"The run in {output} cannot be removed whole ({error.strerror or one_line(error)}): remove it, or choose another "
            "--output."
        ) from error


def _check_start(recipe: Recipe, output: Path) -> None:
    """A run is not removed if the new one starts from its weights."""
    start = Path(recipe.settings["model"].get("model_name_or_path") or "")
    if start.name and start.exists() and start.resolve().is_relative_to(output.resolve()):
        raise ValueError(
            f"The run starts from the weights in {start}, which --overwrite would remove: choose another --output."
        )


def _check_record(output: Path) -> None:
    try:
        RunRecord.load(output)
    except ValueError as error:
        raise ValueError(
            f"{one_line(error).rstrip('.')}; or remove that file to resume the run from its checkpoints, or pass --overwrite to "
            "start over."
        ) from error


def _written_recipe(path: Path) -> dict:
    try:
        return read_sections(path)
    except ValueError:
        raise ValueError(
            f"{path} is damaged, so it is unknown whether the run there is of this recipe: choose another --output, or "
            "pass --overwrite."
        ) from None


def _write_recipe(recipe: Recipe, output: Path) -> None:
    write_whole(output / RECIPE_NAME, yaml.safe_dump(recipe.settings, sort_keys=False, allow_unicode=True))

"""What must hold of a run's folder, and of every file in it, before anything is published."""

import ast
import contextlib
import io
import pickletools
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from .. import model
from ..model import HylaPreTrainedModel
from ..model.configuration_hyla import FORMAT_VERSION
from ..reading import read_json, read_text, read_yaml
from ..runs import Run
from ..runs.environment import UNKNOWN_COMMIT, code_of
from ..runs.record import RECORD_NAME, RunRecord, digests, file_digest, mean_and_error
from ..runs.weights import load_model, new_model
from ..settings import BATCH_SIZE_KEY, DEFAULT_BATCH_SIZE
from ..tasks import Task, TaskDataset
from ..utils import check_repo_id, one_line


_PICKLES = (
    *(".pkl", ".pickle", ".p", ".pk", ".dill", ".cloudpickle", ".joblib"),
    *(".bin", ".ckpt", ".npy", ".npz", ".pt", ".pth"),
)
# Pickles from protocol 2 on, zip, gzip, bzip2, xz, 7z and zstandard.
_PICKLE_STARTS = (
    *(bytes((0x80, protocol)) for protocol in range(2, 6)),
    *(b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd"),
)
# The instructions of pickle that import, call or fetch something.
_CALLS = (
    *("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "PERSID", "BINPERSID"),
    *("EXT1", "EXT2", "EXT4"),
)
# Parquet and PNG, which are binary but none of the above.
_KNOWN_STARTS = (b"PAR1", b"\x89PNG\r\n\x1a\n")
_PARSERS: dict[str, Callable[[Path], Any]] = {
    ".py": lambda path: ast.parse(read_text(path)),
    ".json": read_json,
    ".yaml": read_yaml,
}
# The files of the model's code, which are published beside the weights, by their names in the repository.
CODE = {path.name: path for path in sorted(Path(model.__file__).parent.glob("*_hyla.py"))}
_WEIGHTS = "model.safetensors"
# Weights are scored again on the samples of the record, up to this many of each split, and at most so many at a time.
_SCORED_AGAIN, _AT_A_TIME = 1 << 16, 512
# How far a score on the same samples may differ by rounding on other hardware, where some answers flip; and for a run in lower
# precision, since weights are scored again in float32.
_ROUNDING, _LOW_PRECISION_ROUNDING = 1e-3, 1e-2
_LOW_PRECISION = ("bf16", "fp16", "tf32")


def check_base_model(model: dict[str, Any], run: str) -> None:
    """
    Args:
        model: the model section of the run's recipe.

    Raises:
        ValueError: if the weights that the run started from are in a folder, or if their name is not that of a repository.
    """
    base_model = model.get("model_name_or_path")
    if base_model is None:
        return
    # A run that starts from a repository has the commit in its recipe, see `config_of_checkpoint`.
    if "revision" not in model:
        raise ValueError(
            f"{run} is trained from the folder {base_model}, which nobody else has: publish that model first, and train from "
            "its repository."
        )
    try:
        check_repo_id(base_model)
    except ValueError as error:
        raise ValueError(f"{run} does not say which weights it is trained from: {error}") from None


def check_committed(commit: str | None, run: str) -> None:
    """
    Raises:
        ValueError: if the code of a checkout differs from its commit. `None` stands for an installed package, which its version
            identifies.
    """
    if commit == UNKNOWN_COMMIT:
        raise ValueError(
            f"{run} is made by a checkout whose commit git did not tell, so nobody can repeat it: install git, or call git status "
            "in the checkout and do what it says; then train again before it is published."
        )
    if commit is not None and not re.fullmatch("[0-9a-f]{40}", commit):
        raise ValueError(
            f"{run} is made by code that differs from its commit (git_commit is {commit}), so nobody can repeat it: "
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
        # Libraries of their own read these files, whose bytes may look like anything.
        if path.suffix == ".safetensors" or start.startswith(_KNOWN_STARTS):
            return False
        data = start + file.read()
    try:
        if data[:1] == b"x" and zlib.decompressobj().decompress(data):
            return True
    except zlib.error:
        pass
    return _is_unmarked_pickle(data)


def _is_unmarked_pickle(data: bytes) -> bool:
    """
    Whether a file is one or several pickles of protocols 0 and 1, which have no mark: programs that leave one object each. A short
    program may also be the beginning of a text, such as "N.", so one that can call nothing must be the whole file.
    """
    stream, end = io.BytesIO(data), len(data.rstrip())
    try:
        while stream.tell() < end:
            start = stream.tell()
            pickletools.dis(stream, out=io.StringIO())
            stream.seek(start)
            if any(opcode.name in _CALLS for opcode, _, _ in pickletools.genops(stream)):
                return True
            if stream.tell() == end:
                return True
    except (ValueError, IndexError):
        pass
    return False


def check_text(files: dict[str, Path]) -> None:
    """
    Raises:
        ValueError: if a file is not the Python, JSON or YAML that its name says.
    """
    for path in files.values():
        try:
            if parse := _PARSERS.get(path.suffix):
                parse(path)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"{path} cannot be read as {path.suffix[1:]} ({one_line(error)}): train again, or copy it again."
            ) from None


def check_format(run: Run) -> None:
    """
    Raises:
        ValueError: if the code of this package reads another format of weights than the run's.
    """
    if run.config.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{run.folder} was saved in format {run.config.format_version}, but the code of this package, which is published "
            f"beside the weights, reads format {FORMAT_VERSION}: publish with the version of hf_hyla that trained the run."
        )


def check_weights(run: Run, files: dict[str, Path]) -> None:
    """
    Args:
        files: the files of the folder by name, without its checkpoints.

    Raises:
        FileNotFoundError: if the weights are missing.
        ValueError: if there are other weights too, or the weights are damaged, not finite, or not those of the config's model.
    """
    if _WEIGHTS not in files or "config.json" not in files:
        raise FileNotFoundError(f"{run.folder} holds no model: expected config.json and {_WEIGHTS}.")
    others = [
        name for name in files if name != _WEIGHTS and name.endswith((".safetensors", ".safetensors.index.json"))
    ]
    if others:
        raise ValueError(
            f"{run.folder} holds {others[0]} beside {_WEIGHTS}, and only one of them can be what was scored: remove the other."
        )
    with torch.device("meta"):
        untrained = new_model(run.config, run.task.auto_class)
    # Tied weights are saved once.
    expected = {name: p for name, p in untrained.state_dict().items() if name not in untrained.all_tied_weights_keys}
    path = files[_WEIGHTS]
    try:
        with safe_open(path, framework="pt") as tensors:
            names = set(tensors.keys())
            if different := sorted(names ^ expected.keys()):
                raise ValueError(
                    f"{run.folder}: the weights are not those of config.json, {different[0]} is in one of the two only."
                )
            for name in names:
                _check_tensor(path, name, tensors.get_tensor(name), expected[name])
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): train again, or copy it again.") from None


def check_counts(run: Run) -> None:
    """
    Raises:
        ValueError: if the seeds, samples or parameters in the record are not those of its recipe and of the config.
    """
    record, trainer = run.record, run.record.recipe["trainer"]
    with torch.device("meta"):
        num_parameters = new_model(run.config, run.task.auto_class).num_parameters()
    of_an_update = trainer.get(BATCH_SIZE_KEY, DEFAULT_BATCH_SIZE) * trainer.get("gradient_accumulation_steps", 1)
    for name, said, expected in (
        ("num_parameters", record.num_parameters, num_parameters),
        ("samples_seen", record.samples_seen, record.steps * of_an_update),
        ("seeds.task", record.seeds["task"], run.task.seed),
        ("seeds.trainer", record.seeds["trainer"], trainer.get("seed", 0)),
    ):
        if said != expected:
            raise ValueError(
                f"{run.folder / RECORD_NAME} says that {name} is {said}, but its recipe and config make it {expected}: it was "
                "changed; copy the run again, or train it again."
            )


def _check_tensor(path: Path, name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(
            f"{path} holds {name} as {str(tensor.dtype).removeprefix('torch.')}, expected real numbers: publish the weights that "
            "training has written, not quantised ones."
        )
    if tensor.shape != expected.shape:
        raise ValueError(
            f"{path}: the weights are not those of config.json, {name} has the shape {tuple(tensor.shape)}, expected "
            f"{tuple(expected.shape)}."
        )
    if not torch.isfinite(tensor.float()).all():
        raise ValueError(f"{path} holds NaN or infinite numbers in {name}: the training diverged; do not publish it.")


def check_unaltered(run: Run) -> None:
    """
    Raises:
        ValueError: if the weights, the config or the code in the folder are not those of the end of the run, as its record's
            digests say, or if its task now draws other data.
    """
    record, folder = run.record, run.folder
    if record.data_fingerprint not in (None, run.task.fingerprint()):
        raise ValueError(
            f"{folder} was trained and scored on other data than the task {run.task.name} draws now, so its scores do not belong to "
            "these data: train it again, or use the version of hf_hyla that trained it."
        )
    if record.digests is None:  # of an older version
        return
    found = digests(folder)
    # Code may lie in the package alone.
    for name in ("config.json", "tokenizer.json", _WEIGHTS, *(name for name in CODE if name in found)):
        if found.get(name) != record.digests.get(name):
            raise ValueError(
                f"{folder / name} is not what the run has written, whose digest is in {RECORD_NAME}: its scores are not those "
                "of this file; copy the run again, or train it again."
            )
    of_commit = code_of(record.environment.get("git_commit"))
    if of_commit is not None and any(of_commit.get(name) != digest for name, digest in _code_of_run(record).items()):
        raise ValueError(
            f"{folder}: the model's code at the commit {record.environment['git_commit']} does not have the digests that "
            f"{RECORD_NAME} holds, so the record was changed: train it again."
        )


def differing_code(record: RunRecord) -> str | None:
    """A file of the model's code that has changed since the end of the run, or `None`."""
    of_run = _code_of_run(record)
    of_package = {name: file_digest([path]) for name, path in CODE.items()}
    return next((name for name in sorted({*of_run, *of_package}) if of_run.get(name) != of_package.get(name)), None)


def _code_of_run(record: RunRecord) -> dict[str, str]:
    """The digests of the model's code at the end of the run, by file name."""
    return {name: digest for name, digest in (record.digests or {}).items() if name.endswith("_hyla.py")}


def check_scores(run: Run) -> None:
    """
    Scores the weights again, on the samples that the record's scores were measured on.

    Raises:
        ValueError: if a score differs from the record's by more than rounding; or, if only a part of a split is scored again, by
            more than rounding and chance.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bar
        trained = load_model(run.folder, run.task.auto_class).eval()
    is_low_precision = any(run.record.recipe["trainer"].get(key) for key in _LOW_PRECISION)
    rounding = _LOW_PRECISION_ROUNDING if is_low_precision else _ROUNDING
    for split, recorded in run.record.metrics.items():
        count = min(int(recorded["num_samples"]), _SCORED_AGAIN)
        dataset = run.task.dataset(split, count)
        indices = torch.arange(count).split(min(run.task.eval_batch_size, _AT_A_TIME))
        bar = tqdm(indices, f"Scores {split} again", leave=False, disable=None)
        parts = [_answers(trained, run.task, dataset, part) for part in bar]
        scores = _scores(run.task, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        is_sample = count < recorded["num_samples"]
        of_parts = [_scores(run.task, part) for part in parts] if is_sample else []
        for name in (name for name in run.task.metric_names if name in recorded and name in scores):
            # A part of the samples differs from all of them by chance. Six standard errors are allowed, since the estimated error
            # of a metric with long tails, such as r2, is often too small.
            error = mean_and_error([part[name] for part in of_parts if name in part])[1] if of_parts else None
            chance = 6 * (error or 0.0)
            if not abs(scores[name] - recorded[name]) <= chance + rounding * max(1.0, abs(recorded[name])):
                raise ValueError(
                    f"{run.folder}: {RECORD_NAME} says that {split}/{name} is {recorded[name]:.4f}, but these weights reach "
                    f"{scores[name]:.4f} on {'the first ' if is_sample else ''}{count:,} samples: weights and scores do not "
                    "belong together; copy the run again, or train it again."
                )


@torch.no_grad()
def _answers(trained: HylaPreTrainedModel, task: Task, dataset: TaskDataset, indices: torch.Tensor):
    """What `Task.metrics` reads of some samples, by name."""
    batch = task.collate(dataset.__getitems__(indices.tolist()))
    labels = {name: batch.pop(name) for name in task.label_columns}
    predicted = task.predictions(trained(**batch).logits.float(), task.labels_of(labels))
    return {"predictions": predicted, **labels, "inputs": batch[trained.main_input_name]}


def _scores(task: Task, columns: dict[str, torch.Tensor]) -> dict[str, float]:
    arrays = {name: column.numpy() for name, column in columns.items()}
    return task.metrics(arrays["predictions"], task.labels_of(arrays), arrays["inputs"])

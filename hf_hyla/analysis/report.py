"""The report of `hyla probe`: what probes that are fitted on training samples read from other codes, and its figures."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..model import HylaForSequenceClassification
from ..tasks import Subject, Task
from ..utils import write_whole
from .ablation import ablate_heads, corrected_p_values, mean_codes
from .combinations import score_by_combination
from .latents import Codes, collect_codes
from .probes import code_similarity, probe
from .subjects import answer_features, check_sizes, combinations_of, subjects, task_batches


REPORT_NAME = "probe.json"
SCHEMA_VERSION = 1
_BATCH_SIZE = 512
_Pairs = list[tuple[Subject, Subject]]


def probe_report(
    model: HylaForSequenceClassification,
    task: Task,
    *,
    split: str | None = None,
    train_samples: int = 5_000,
    num_samples: int = 5_000,
    seed: int = 0,
    ablate: bool = False,
    fixed_query: bool = False,
    output: Path | None = None,
    progress: bool = False,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Probes, similarities and, on request, ablations of a classification model's codes. With `output`, they are also written into
    that folder, as `probe.json` and figures.

    Probes are fitted on the first `train_samples` of the split train, and scored on the first `num_samples` of `split`,
    layer by layer and on all layers together. `Task.subjects` says what they ask, and `Task.answer_keys` which codes they read.
    For standard errors, the samples of one combination are one observation. Ablations replace a head's codes by the mean codes of
    those training samples.

    Args:
        split: the split to score on; by default the task's `headline_split`.
        seed: the seed of controls, bootstrap and t-SNE, and of the fixed query.
        fixed_query: whether every sample is asked for the same point, as in the official analysis of fuzzy logic. Codes then
            differ only by the combination. Ablations are scored on the task as it is.
        about: other entries of the report, such as the model's name, versions and hardware.

    Returns:
        All settings, and

        - `probes`, for each subject and layer (0 for the first, `None` for all) what `probe` returns, with `f1_by_class` by name;
        - `answer_alone`, for each subject except the answer, the scores of a probe that reads the right answer instead of codes;
        - `similarity`, for each subject with classes their `names`, and a matrix per layer: `layers` for the mean codes as they
            are, and `centred` for their differences from the mean of all codes;
        - `ablation`, which is `None`, or holds the `metric`, its value `whole`, and by layer and head the value `without` that
            head, the `standard_error` of the difference, and its `p_value` by a t-test over combinations with Holm's correction
            for all heads;
        - `figures`, the names of the files.

    Raises:
        ValueError: before anything is computed, if a package is missing, model and task do not fit, the seed is out of range, or
            the split is unknown, holds nothing that was trained, or has too few samples.
        OSError: if the folder cannot be written.
    """
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"Probing needs {package}, which is not installed: pip install hf-hyla[analysis].")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2**32, got {seed}.")
    task.check_model(model.config)
    split = split or task.headline_split
    check_sizes(task, split, train_samples, num_samples)
    if len(task.combinations(split)) < 2:
        raise ValueError(
            f"Probes need several combinations for a standard error, but the split {split} has one: choose another split."
        )
    query = task.query_point(seed) if fixed_query else None
    if output:
        output.mkdir(parents=True, exist_ok=True)

    def collected(split: str, count: int) -> Codes:
        batches = task_batches(task, split, count, _BATCH_SIZE, query)
        return collect_codes(model, batches, task.answer_keys, total=-(-count // _BATCH_SIZE), progress=progress)

    train, other = collected("train", train_samples), collected(split, num_samples)
    # Each subject of the training samples beside the same one of the others.
    pairs = list(zip(subjects(task, train.columns), subjects(task, other.columns), strict=True))
    _, layers, answers, keys, heads = other.codes.shape
    groups = combinations_of(task, other.columns).repeat(answers)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **(about or {}),
        "task": task.spec,
        "data_fingerprint": task.fingerprint(),
        "attention_type": model.config.attention_type,
        "split": split,
        "num_samples": {"train": train_samples, split: num_samples},
        "seed": seed,
        "fixed_query": None if query is None else query.tolist(),
        "codes": {"layers": layers, "answers": answers, "keys": keys, "heads": heads},
        "probes": _probes(train, other, pairs, groups=groups, seed=seed, progress=progress),
        "answer_alone": _answer_alone(pairs, groups=groups, seed=seed),
        "similarity": {s.name: _similarity(other, s) for _, s in pairs if s.kind != "number"},
        "ablation": _ablation(
            model, task, split, train_samples=train_samples, num_samples=num_samples, progress=progress
        )
        if ablate
        else None,
        "figures": [],
    }
    if output:
        from .plots import draw

        _save(report, output)  # before what may still fail
        report["figures"] = draw(report, other, [subject for _, subject in pairs], output, progress)
        _save(report, output)
    return report


def table(report: dict[str, Any]) -> str:
    """The probes' scores as text, a line for each subject, layer and metric, and the ablation's largest difference."""
    lines = [f"{'codes tell':<10}{'layer':>6}{'metric':>10}{'score':>17}{'shuffled':>17}{'chance':>8}"]
    for result in report["probes"]:
        layer = "all" if result["layer"] is None else result["layer"] + 1
        for metric, score in result["scores"].items():
            scores = [f"{s['value']:.3f} ± {s['standard_error']:.3f}" for s in (score, result["control"][metric])]
            lines.append(
                f"{result['subject']:<10}{layer:>6}{metric:>10}{scores[0]:>17}{scores[1]:>17}"
                f"{result['chance'][metric]:>8.3f}"
            )
    for name, scores in report["answer_alone"].items():
        for metric, score in scores.items():
            lines.append(
                f"{name:<10}{'':>6}{metric:>10}{score['value']:>9.3f} ± {score['standard_error']:.3f}  from the answer alone"
            )
    if ablation := report["ablation"]:
        without = np.array(ablation["without"])
        layer, head = np.unravel_index(np.abs(without - ablation["whole"]).argmax(), without.shape)
        lines.append(
            f"{report['split']}/{ablation['metric']} {ablation['whole']:.4f}; largest difference: {without[layer, head]:.4f} when head "
            f"{head + 1} of layer {layer + 1} is replaced by its mean code"
        )
    return "\n".join(lines)


def _save(report: dict[str, Any], output: Path) -> None:
    write_whole(output / REPORT_NAME, json.dumps(report, indent=2, allow_nan=False) + "\n")


def _probes(train: Codes, other: Codes, pairs: _Pairs, *, groups, seed: int, progress: bool) -> list[dict[str, Any]]:
    layers = [*range(other.codes.shape[1]), None]
    cases = [(pair, layer) for pair in pairs for layer in layers]
    results = []
    for (fitted, asked), layer in tqdm(cases, desc="Probing", disable=not progress):
        result = probe(
            train.features(layer),
            fitted.values,
            other.features(layer),
            asked.values,
            groups=groups,
            seed=seed,
        )
        if "f1_by_class" in result:
            result["f1_by_class"] = {asked.names[i]: score for i, score in result["f1_by_class"].items()}
        results.append({"subject": asked.name, "kind": asked.kind, "layer": layer, **result})
    return results


def _answer_alone(pairs: _Pairs, *, groups, seed: int) -> dict[str, Any]:
    *asked, targets = pairs
    fitted, scored = answer_features(*targets)
    return {
        subject.name: probe(fitted, train.values, scored, subject.values, groups=groups, seed=seed)["scores"]
        for train, subject in asked
    }


def _similarity(codes: Codes, subject: Subject) -> dict[str, Any]:
    occurs = np.flatnonzero(subject.counts)
    several = subject.kind == "labels"
    values = subject.values[:, occurs] if several else np.searchsorted(occurs, subject.values)
    layers = [codes.features(layer) for layer in range(codes.codes.shape[1])]
    matrices = {
        name: [code_similarity(features, values, len(occurs), centred) for features in layers]
        for name, centred in (("layers", False), ("centred", True))
    }
    rounded = {name: [matrix.round(6).tolist() for matrix in stack] for name, stack in matrices.items()}
    return {"names": [subject.names[i] for i in occurs], **rounded}


def _ablation(
    model, task: Task, split: str, *, train_samples: int, num_samples: int, progress: bool
) -> dict[str, Any]:
    batches = task_batches(task, "train", train_samples, _BATCH_SIZE)
    total = -(-train_samples // _BATCH_SIZE)
    means = mean_codes(model, tqdm(batches, desc="Averaging codes", total=total, disable=not progress))
    metric = task.metric_names[0]

    def sizes_and_scores() -> np.ndarray:
        found = sorted(score_by_combination(model, task, split, num_samples), key=lambda one: one["parts"])
        return np.array([(one["num_samples"], one["scores"][metric]) for one in found])

    whole, without = ablate_heads(model, means, sizes_and_scores, progress)
    share, lost = whole[:, 0] / num_samples, without[..., 1] - whole[:, 1]
    # The standard error of a mean over clusters; a cluster is the samples of one combination.
    spread = (lost - (lost @ share)[..., None]) * share
    error = np.sqrt((spread**2).sum(axis=-1) * len(share) / (len(share) - 1))
    return {
        "metric": metric,
        "whole": float(whole[:, 1] @ share),
        "without": (without[..., 1] @ share).tolist(),
        "standard_error": error.tolist(),
        "p_value": corrected_p_values(lost @ share, error, len(share) - 1).tolist(),
    }

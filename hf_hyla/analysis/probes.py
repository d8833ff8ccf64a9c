"""Linear probes of codes, with a shuffled-label control, and the similarity of the mean codes of classes."""

from typing import Any

import numpy as np


_BOOTSTRAP = 200


def probe(
    train_features: np.ndarray,
    train_values: np.ndarray,
    features: np.ndarray,
    values: np.ndarray,
    groups: np.ndarray | None = None,
    num_shuffles: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Fits a linear probe on training codes and scores it on other codes.

    The probe is a logistic regression with equally weighted classes, or a ridge regression, by the kind of the values.
    Integers (rows,) are classes, booleans (rows, names) are classes of which several may be true at once, and floats (rows,)
    are numbers.

    The control is the same probe fitted on shuffled training values. For classes, chance is the score of predictions that are
    as frequent as the control's and independent of the values. For numbers, chance is the score of predicting the training
    mean. Scores mean little if the control is not at chance.

    Args:
        train_features, features: (rows, features), see `Codes.features`.
        train_values, values: integers (rows,), booleans (rows, names) or floats (rows,).
        groups: integers (rows,), equal for scored rows that are not independent, such as samples of one combination of rules.
            The bootstrap draws whole groups. If it is `None`, every row is a group.
        num_shuffles: number of controls whose scores are averaged.
        seed: seed of shuffles and bootstrap.

    Returns:
        - `scores`: for each metric the `value` and its bootstrap `standard_error`;
        - `control`: for each metric the mean over shuffles as `value`, and its `standard_error`;
        - `chance`: a value for each metric;
        - `f1_by_class`, for classes: the F1 of every class that occurs among the scored rows, by class or index of the name.

        The metric is `r2` for numbers. For classes, the metrics are `accuracy` and `f1`, the mean of `f1_by_class`.

    Raises:
        ValueError: if rows do not fit together, if there are too few rows to fit or to score, or if scikit-learn is not
            installed.
    """
    train_features, train_values, features, values = map(np.asarray, (train_features, train_values, features, values))
    _check(train_features, train_values, features, values)
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"groups must name a group for each of the {len(values)} values, got {len(groups)}.")
    if num_shuffles < 2:
        raise ValueError(
            f"num_shuffles must be at least 2, since their spread gives the control's error, got {num_shuffles}."
        )
    try:
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ValueError("Probes need scikit-learn: pip install hf-hyla[analysis].") from None
    rng = np.random.default_rng(seed)
    scaler = StandardScaler().fit(train_features)
    train, other = scaler.transform(train_features), scaler.transform(features)

    def statistics(train_values: np.ndarray) -> np.ndarray:
        return _statistics(values, _predict(train, train_values, other), train_values)

    own = statistics(train_values)
    by_group = own
    if groups is not None:
        members = np.unique(groups, return_inverse=True)[1]
        if not members.any():
            raise ValueError(
                "Probes need rows of several groups for a standard error, but all are of one: leave out groups."
            )
        by_group = np.zeros((members.max() + 1, own.shape[-1]))
        np.add.at(by_group, members, own)
    count = len(by_group)
    draws = np.stack([np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(_BOOTSTRAP)])
    shuffles = [statistics(rng.permutation(train_values)).sum(axis=0) for _ in range(num_shuffles)]

    numeric = values.dtype.kind == "f"
    score = _r2 if numeric else _f1_and_accuracy
    scores, spread = score(own.sum(axis=0, keepdims=True)), score(draws @ by_group)
    control = score(np.stack(shuffles))
    chance = _constant_r2(values, train_values) if numeric else _independent(np.stack(shuffles), values.ndim == 1)
    result = {
        "scores": {
            name: {"value": float(score[0]), "standard_error": float(spread[name].std())}
            for name, score in scores.items()
            if score.ndim == 1
        },
        "control": {
            name: {"value": float(score.mean()), "standard_error": float(score.std(ddof=1) / num_shuffles**0.5)}
            for name, score in control.items()
            if score.ndim == 1
        },
        "chance": {name: float(score) for name, score in chance.items()},
    }
    if not numeric:
        occurs = own.sum(axis=0)[2:].reshape(3, -1)[0] > 0
        by_class = zip(_classes(values, train_values), scores["by_class"][0], occurs, strict=True)
        result["f1_by_class"] = {int(name): float(f1) for name, f1, found in by_class if found}
    return result


def fit_probe(features: np.ndarray, values: np.ndarray):
    """
    The probe of `probe`, fitted, as a scikit-learn estimator that scales the features itself.

    Args:
        features: (rows, features), see `Codes.features`.
        values: integers (rows,), booleans (rows, names) or floats (rows,).

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    try:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ValueError("Probes need scikit-learn: pip install hf-hyla[analysis].") from None
    return make_pipeline(StandardScaler(), _estimator(values)).fit(features, _targets(values))


def code_similarity(features: np.ndarray, values: np.ndarray, num_classes: int, centred: bool = False) -> np.ndarray:
    """
    Cosine similarity (classes, classes) of the mean codes of classes (arXiv 2406.05816, section 4).

    Args:
        features: (rows, features).
        values: integers (rows,), or booleans (rows, classes).
        centred: whether to subtract the mean of all codes, which hides how the mean codes differ. The similarities of a
            class are then 0 if its mean code differs from that mean by no more than rounding or three standard errors.

    Raises:
        ValueError: if a class has no row.
    """
    shown = (values[:, None] == np.arange(num_classes) if values.ndim == 1 else values).astype(np.float64)
    counts = shown.sum(axis=0)
    if not counts.all():
        raise ValueError(f"Class {int(counts.argmin())} has no codes to average: pass more samples.")
    codes = features.astype(np.float64)
    means = shown.T @ codes / counts[:, None]
    threshold = np.full((num_classes, 1), 1e-6 * np.abs(means).max())
    if centred:
        within = np.maximum(shown.T @ codes**2 / counts[:, None] - means**2, 0).sum(axis=1)
        threshold = np.maximum(threshold, 3 * np.sqrt(within / counts)[:, None])
        means -= codes.mean(axis=0)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    means = np.divide(means, norms, out=np.zeros_like(means), where=norms > threshold)
    return means @ means.T


def _check(train_features, train_values, features, values) -> None:
    for name, labels in (("train_values", train_values), ("values", values)):
        if labels.dtype.kind not in "iufb" or labels.ndim != (2 if labels.dtype.kind == "b" else 1):
            raise ValueError(
                f"{name} must be integers (rows,), booleans (rows, names) or floats (rows,), got {labels.dtype} "
                f"{labels.shape}."
            )
    for name, rows, labels in (("train_", train_features, train_values), ("", features, values)):
        if rows.ndim != 2 or len(rows) != len(labels):
            raise ValueError(
                f"{name}features must be (rows, features), with a row for each of the {len(labels)} {name}values, got "
                f"{rows.shape}."
            )
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"train_features and features must have the same columns, got {train_features.shape[1]} and {features.shape[1]}."
        )
    if values.dtype.kind != train_values.dtype.kind or values.shape[1:] != train_values.shape[1:]:
        raise ValueError(f"train_values and values differ in kind: {train_values.dtype} and {values.dtype}.")
    if train_values.dtype.kind == "f":
        enough = len(np.unique(train_values)) >= 2 and len(np.unique(values)) >= 2
    elif train_values.dtype.kind == "b":
        enough = bool((train_values.any(axis=0) & ~train_values.all(axis=0)).all() and len(values))
    else:
        enough = len(np.unique(train_values)) >= 2 and len(values) > 0
    if not enough:
        raise ValueError(
            f"Too few samples for a probe: the {len(train_values)} rows of train_values must include rows with and without "
            "every class, or at least two different numbers, and there must be rows to score."
        )


def _predict(train: np.ndarray, train_values: np.ndarray, features: np.ndarray) -> np.ndarray:
    predicted = _estimator(train_values).fit(train, _targets(train_values)).predict(features)
    return predicted.astype(bool) if train_values.dtype.kind == "b" else predicted


def _targets(values: np.ndarray) -> np.ndarray:
    """The values as scikit-learn takes them: booleans for several classes become integers."""
    return values.astype(int) if values.dtype.kind == "b" else values


def _estimator(values: np.ndarray):
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if values.dtype.kind == "f":
        return Ridge()
    logistic = LogisticRegression(class_weight="balanced", max_iter=1000)
    return OneVsRestClassifier(logistic) if values.dtype.kind == "b" else logistic


def _statistics(values: np.ndarray, predicted: np.ndarray, train_values: np.ndarray) -> np.ndarray:
    """
    The terms of each row in the sums from which scores are computed. With these terms, resampling is a matrix product.

    For numbers, the columns are 1, the value, its square and the squared error. For classes, they are 1, the accuracy, and
    then for every class whether it is true, whether it is predicted, and whether both hold.
    """
    if values.dtype.kind == "f":
        # The variance loses no digits when values are centred.
        centred = values.astype(np.float64) - values.mean(dtype=np.float64)
        return np.stack([np.ones(len(values)), centred, centred**2, (values - predicted) ** 2], axis=1)
    if values.dtype.kind == "b":
        right = (values == predicted).mean(axis=1)
    else:
        right = values == predicted
        classes = _classes(values, train_values)
        values, predicted = values[:, None] == classes, predicted[:, None] == classes
    return np.column_stack([np.ones(len(values)), right, values, predicted, values & predicted]).astype(np.float64)


def _classes(values: np.ndarray, train_values: np.ndarray) -> np.ndarray:
    """The classes that occur, or the indices of names if several may be true at once."""
    return np.arange(values.shape[1]) if values.dtype.kind == "b" else np.union1d(values, train_values)


def _r2(sums: np.ndarray) -> dict[str, np.ndarray]:
    count, value, square, error = sums.T
    return {"r2": 1 - error / (square - value**2 / count)}


def _constant_r2(values: np.ndarray, train_values: np.ndarray) -> dict[str, float]:
    constant = np.full(len(values), train_values.mean(dtype=np.float64))
    return {"r2": _r2(_statistics(values, constant, train_values).sum(axis=0, keepdims=True))["r2"][0]}


def _f1_and_accuracy(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Scores (replicates,) and the F1 of every class (replicates, classes)."""
    holds, predicted, both = np.split(sums[:, 2:], 3, axis=1)
    f1 = 2 * both / np.maximum(holds + predicted, 1)
    return {"accuracy": sums[:, 1] / sums[:, 0], "f1": _mean_of_occurring(f1, holds), "by_class": f1}


def _independent(sums: np.ndarray, one_class: bool) -> dict[str, float]:
    """The scores of predictions with these frequencies that are independent of the values, averaged over replicates."""
    count = sums[:, :1]
    holds, predicted, _ = np.split(sums[:, 2:] / count, 3, axis=1)
    f1 = 2 * holds * predicted / np.maximum(holds + predicted, 1e-12)
    right = holds * predicted
    accuracy = right.sum(axis=1) if one_class else (right + (1 - holds) * (1 - predicted)).mean(axis=1)
    return {"accuracy": accuracy.mean(), "f1": _mean_of_occurring(f1, holds).mean()}


def _mean_of_occurring(f1: np.ndarray, holds: np.ndarray) -> np.ndarray:
    occurs = holds > 0
    return (f1 * occurs).sum(axis=1) / np.maximum(occurs.sum(axis=1), 1)

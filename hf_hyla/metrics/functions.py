"""The paper's metrics as plain functions of numpy arrays."""

import numpy as np


def sraven_accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """
    The accuracy on SRAVEN, where a puzzle is solved only if every feature of the answer is right.

    Args:
        predictions, references: (puzzles, features), integers.

    Returns:
        `accuracy`, the fraction of puzzles solved, and `feature_accuracy`, the fraction of features that are right.
    """
    _check_same_shape(predictions, references, ndim=2)
    right = np.asarray(predictions) == np.asarray(references)
    return {"accuracy": float(right.all(axis=1).mean()), "feature_accuracy": float(right.mean())}


def base_mse(values: np.ndarray) -> np.ndarray:
    """Variance (samples,) of each sample's values (samples, points), the mean squared error of answering their mean."""
    return np.asarray(values, dtype=np.float64).var(axis=1)


def logic_r2(predictions: np.ndarray, references: np.ndarray, base_mse: np.ndarray) -> dict[str, float]:
    """
    The R² on fuzzy logic, the mean over samples of 1 - squared error / base_mse.

    As in the paper, this is a mean of ratios and not a ratio of means as in scikit-learn. Samples whose values are nearly
    equal weigh heavily.

    Args:
        predictions, references, base_mse: (samples,).

    Returns:
        `r2`, which is 1 at best and has no lower bound.

    Raises:
        ValueError: if shapes differ or a `base_mse` is not positive.
    """
    _check_same_shape(predictions, references, ndim=1)
    _check_same_shape(predictions, base_mse, ndim=1)
    base = np.asarray(base_mse, dtype=np.float64)
    if not (base > 0).all():
        raise ValueError(f"base_mse must be positive, got {base.min()}: the values of a sample must differ.")
    error = (np.asarray(predictions, dtype=np.float64) - np.asarray(references, dtype=np.float64)) ** 2
    return {"r2": float((1 - error / base).mean())}


def perplexity(log_likelihoods: np.ndarray, num_bytes: np.ndarray) -> dict[str, float]:
    """
    The perplexity of a text, and its bits per byte, from the likelihood that a model gave to each token.

    Args:
        log_likelihoods: (tokens,), natural logarithms of the probabilities that the model gave to the tokens.
        num_bytes: (tokens,), bytes of the text that each token stands for, 0 for one that only ends a text.

    Returns:
        `perplexity`, exp of the mean of -log_likelihoods, which compares models with the same tokenizer, and `bits_per_byte`,
        the sum of -log_likelihoods in bits divided by the number of bytes, which compares models with any tokenizers. For both,
        lower is better.

    Raises:
        ValueError: if shapes differ, a logarithm is positive or not a number, or there are no bytes.
    """
    _check_same_shape(log_likelihoods, num_bytes, ndim=1)
    logs, sizes = np.asarray(log_likelihoods, dtype=np.float64), np.asarray(num_bytes)
    if not (logs <= 0).all():
        raise ValueError(
            f"log_likelihoods are logarithms of probabilities, so at most 0, got {logs[~(logs <= 0)][0]}: pass those of log_softmax."
        )
    if (sizes < 0).any() or not sizes.sum():
        raise ValueError(
            f"num_bytes must be 0 or more and not all 0, got a minimum of {sizes.min()} and a sum of {sizes.sum()}."
        )
    return {
        "perplexity": float(np.exp(-logs.mean())),
        "bits_per_byte": float(-logs.sum() / np.log(2) / sizes.sum()),
    }


def _check_same_shape(left: np.ndarray, right: np.ndarray, ndim: int) -> None:
    left, right = np.asarray(left), np.asarray(right)
    if left.shape != right.shape or left.ndim != ndim or left.shape[0] == 0:
        raise ValueError(
            f"Expected two arrays of one shape with {ndim} axes and at least one row, got {left.shape} and {right.shape}."
        )

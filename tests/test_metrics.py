import os
import subprocess
import sys

import numpy as np
import pytest

from hf_hyla.metrics import LogicR2, Perplexity, SravenAccuracy, base_mse, logic_r2, perplexity, sraven_accuracy


def test_a_puzzle_counts_only_if_every_feature_is_right():
    references = np.array([[1, 2, 3, 4], [5, 6, 7, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    predictions = references.copy()
    predictions[1, 0] += 1
    predictions[2] += 1
    assert sraven_accuracy(predictions, references) == {"accuracy": 0.5, "feature_accuracy": 11 / 16}


def test_r2_is_a_mean_of_ratios_not_a_ratio_of_means():
    references, base = np.array([1.0, 0.0, 0.5]), np.array([0.5, 0.1, 0.2])
    predictions = np.array([0.5, 0.0, 1.5])
    expected = np.mean([1 - 0.25 / 0.5, 1.0, 1 - 1.0 / 0.2])
    assert logic_r2(predictions, references, base)["r2"] == pytest.approx(expected)
    values = np.array([[0.0, 1.0, 1.0], [0.2, 0.4, 0.9]])
    np.testing.assert_allclose(base_mse(values), [np.mean((row - row.mean()) ** 2) for row in values])
    np.testing.assert_array_equal(base_mse(values.tolist()), base_mse(values))


def test_perplexity_is_of_tokens_and_bits_are_of_bytes():
    # Of four tokens with probabilities 1/2, 1/2, 1/8, 1/8, the geometric mean is 1/4; they cost 8 bits for 5 bytes.
    logs, sizes = np.log([1 / 2, 1 / 2, 1 / 8, 1 / 8]), np.array([1, 3, 1, 0])
    scores = perplexity(logs, sizes)
    assert scores == {"perplexity": pytest.approx(4.0), "bits_per_byte": pytest.approx(8 / 5)}
    assert Perplexity().compute(log_likelihoods=logs, num_bytes=sizes) == scores


def test_evaluate_modules_equal_the_functions_in_batches():
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 3, (40, 4)), rng.integers(0, 3, (40, 4))
    accuracy = SravenAccuracy()
    for rows in np.split(np.arange(40), 4):
        accuracy.add_batch(predictions=predictions[rows], references=references[rows])
    assert accuracy.compute() == sraven_accuracy(predictions, references)
    numbers = rng.random((3, 40))
    assert LogicR2().compute(predictions=numbers[0], references=numbers[1], base_mse=numbers[2]) == logic_r2(*numbers)


def test_evaluate_modules_need_no_network(tmp_path):
    # Any attempt to open a connection fails.
    script = """
import socket
def refuse(*arguments, **keywords):
    raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from hf_hyla.metrics import SravenAccuracy
assert SravenAccuracy().compute(predictions=[[1, 2]], references=[[1, 2]])["accuracy"] == 1.0
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sraven_accuracy(np.zeros((2, 4)), np.zeros((2, 3))), r"got \(2, 4\) and \(2, 3\)"),
        (lambda: sraven_accuracy(np.zeros((0, 4)), np.zeros((0, 4))), "at least one row"),
        (lambda: logic_r2(np.zeros(2), np.zeros(2), np.array([1.0, 0.0])), "base_mse must be positive"),
        (lambda: perplexity(np.array([-1.0, 0.5]), np.ones(2)), "so at most 0, got 0.5"),
        (lambda: perplexity(np.array([-1.0, np.nan]), np.ones(2)), "so at most 0, got nan"),
        (lambda: perplexity(-np.ones(2), np.zeros(2)), "not all 0, got a minimum of 0.0 and a sum of 0.0"),
        (lambda: perplexity(-np.ones(2), np.ones(3)), r"got \(2,\) and \(3,\)"),
        (lambda: logic_r2(np.zeros((2, 1)), np.zeros(2), np.ones(2)), r"got \(2, 1\) and \(2,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

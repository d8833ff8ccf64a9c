"""Every attention of Table A1 against a plain loop over pairs, in float64, with large random numbers."""

import itertools
import math

import pytest
import torch
from model_helpers import BATCH, HEADS, KEYS, QUERIES, ROW_IDS, ROWS, VALUE_WIDTH, WIDTH, Layer, loop, masks

from hf_hyla.model.attention_hyla import (
    by_pair,
    eager_attention_forward,
    relative_position_buckets,
)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_attention_and_its_gradients_equal_a_plain_loop(row, mask, with_bias):
    torch.manual_seed(0)

    def leaf(*shape):
        return (3 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()

    leaves = {
        "query": leaf(BATCH, HEADS, QUERIES, WIDTH),
        "key": leaf(BATCH, HEADS, KEYS, WIDTH),
        "value": leaf(BATCH, HEADS, KEYS, VALUE_WIDTH),
        "bias": leaf(1, HEADS, QUERIES, KEYS),
        "mixing": leaf(HEADS, VALUE_WIDTH, VALUE_WIDTH),
    }
    attends = masks()[mask]
    mixing = leaves["mixing"] if row[3] == 2 else None
    bias = leaves["bias"] if with_bias else None
    cotangent = torch.randn(BATCH, QUERIES, HEADS, VALUE_WIDTH, dtype=torch.float64)

    expected = loop(row, leaves["query"], leaves["key"], leaves["value"], mixing, attends, bias)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), list(leaves.values()), allow_unused=True)

    additive = torch.zeros(attends.shape, dtype=torch.float64).masked_fill(~attends, torch.finfo(torch.float64).min)
    for attention_mask in [attends, additive] + ([None] if mask == "none" else []):
        output, codes = eager_attention_forward(
            Layer(*row[:3], mixing),
            leaves["query"],
            leaves["key"],
            leaves["value"],
            attention_mask,
            scaling=WIDTH**-0.5,
            position_bias=bias,
        )
        grads = torch.autograd.grad((output * cotangent).sum(), list(leaves.values()), allow_unused=True)
        assert codes.shape == (BATCH, HEADS, QUERIES, KEYS)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
        for name, grad, expected_grad in zip(leaves, grads, expected_grads, strict=True):
            assert (grad is None) == (expected_grad is None), name
            if grad is not None:
                torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close_with_large_scores(row, dtype):
    torch.manual_seed(0)
    # Squares of these scores are beyond float16; unnormalised, the scores themselves multiply the values, twice.
    size = 20.0 if row[1] != "none" else 3.0
    query, key = (size * torch.rand(1, 4, 6, 8) for _ in range(2))
    value, mixing = torch.randn(1, 4, 6, 5), torch.randn(4, 5, 5)

    def run(cast):
        layer = Layer(*row[:3], mixing.to(cast) if row[3] == 2 else None)
        return eager_attention_forward(layer, query.to(cast), key.to(cast), value.to(cast), None, scaling=8**-0.5)[
            0
        ].double()

    assert run(dtype).isfinite().all()
    relative = (run(dtype) - run(torch.float64)).norm() / run(torch.float64).norm()
    assert relative < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_dropout_drops_whole_pairs_for_the_batch_and_all_heads():
    torch.manual_seed(0)
    codes_in = torch.randn(3, 4, 6, 6)
    # With one key dimension per key and unit keys, scores are the queries, and unit values give the used codes back.
    keys = torch.eye(6).expand(3, 4, 6, 6)
    layer = Layer("linear", "none", "none", None)
    output, codes = eager_attention_forward(layer, codes_in, keys, keys, None, scaling=1.0, dropout=0.25)
    torch.testing.assert_close(codes, codes_in)
    factor = output.transpose(1, 2) / codes
    assert torch.equal((factor - factor[:1, :1]).abs() < 1e-5, torch.ones_like(factor, dtype=torch.bool))
    kept = factor[0, 0] > 0.5
    torch.testing.assert_close(factor[0, 0], torch.where(kept, 1 / 0.75, 0.0))
    assert 0 < kept.sum() < 36


def exact_bucket(distance: int, num_buckets: int) -> int:
    half = num_buckets // 2
    if distance < half:
        return max(distance, 0)
    return min(
        num_buckets - 1, half + int(math.log(distance / half) / math.log(num_buckets / half) * (num_buckets - half))
    )


@pytest.mark.parametrize("num_buckets", [2, 3, 7, 16, 32, 36, 63, 64, 96, 128])
def test_position_buckets_equal_those_of_unidirectional_t5(num_buckets):
    length = 2 * num_buckets + 1
    buckets = by_pair(relative_position_buckets(length, length, num_buckets), length, length)
    for query, key in itertools.product(range(length), repeat=2):
        assert buckets[query, key] == exact_bucket(query - key, num_buckets), (query, key)


def test_position_buckets_of_the_sraven_model_have_the_reference_quirks():
    buckets = by_pair(relative_position_buckets(36, 36, 36), 36, 36)
    assert 21 not in buckets
    assert buckets[31, 0] == buckets[32, 0]
    assert (buckets.triu() == 0).all()  # all later keys share bucket 0


def test_the_last_query_has_the_position_of_the_last_key():
    some, all_of_them = (by_pair(relative_position_buckets(n, 9, 16), n, 9) for n in (3, 9))
    torch.testing.assert_close(some, all_of_them[-3:])

"""Every attention of Table A1 against a plain loop over pairs, in float64, with large random numbers."""

import itertools
import math

import pytest
import torch

from hf_hyla.model.attention_hyla import (
    RMS_HEAD_EPS,
    activation_or_none,
    by_pair,
    eager_attention_forward,
    relative_position_buckets,
)


BATCH, HEADS, QUERIES, KEYS, WIDTH, VALUE_WIDTH = 2, 3, 4, 5, 2, 3

# attention_type, score_norm, value_activation, value_depth
ROWS = [
    ("softmax", "softmax", "none", 1),
    ("linear", "none", "none", 1),
    ("hyla", "rms_head", "relu", 1),
    ("linear", "rms_head", "none", 1),
    ("linear", "rms_head", "relu", 1),
    ("hyla", "none", "relu", 1),
    ("hyla", "rms_head", "none", 1),
    ("hyla", "none", "none", 1),
    ("hyla", "softmax", "relu", 1),
    ("hyla", "rms_head", "relu", 2),
]


class Layer:
    """What attention functions read of a layer."""

    training = False

    def __init__(self, attention_type, score_norm, value_activation, value_mixing):
        self.attention_type = attention_type
        self.score_norm = score_norm
        self.value_activation = activation_or_none(value_activation)
        self.value_mixing = value_mixing


def loop(row, query, key, value, mixing, attends, bias):
    """Output (batch, query, heads, value width), by the paper's sums, one number at a time."""
    attention_type, score_norm, activation, _ = row

    def phi(vector):
        return [x if activation == "none" else x.clamp(min=0.0) for x in vector]

    out = torch.zeros(BATCH, QUERIES, HEADS, VALUE_WIDTH, dtype=torch.float64)
    rows = []
    for b, q in itertools.product(range(BATCH), range(QUERIES)):
        score = [[None] * KEYS for _ in range(HEADS)]
        for h, k in itertools.product(range(HEADS), range(KEYS)):
            dot = sum(query[b, h, q, i] * key[b, h, k, i] for i in range(WIDTH)) / math.sqrt(WIDTH)
            score[h][k] = dot if bias is None else dot + bias[0, h, q, k]
        code = [[None] * KEYS for _ in range(HEADS)]
        if score_norm == "softmax":
            for h in range(HEADS):
                seen = [k for k in range(KEYS) if attends[b, 0, q, k]]
                total = sum(torch.exp(score[h][k]) for k in seen)
                for k in range(KEYS):
                    if not seen:
                        code[h][k] = score[h][k] * 0 + 1 / KEYS
                    else:
                        code[h][k] = torch.exp(score[h][k]) / total if k in seen else score[h][k] * 0
        else:
            for k in range(KEYS):
                column = [score[h][k] * (1.0 if attends[b, 0, q, k] else 0.0) for h in range(HEADS)]
                if score_norm == "rms_head":
                    root = torch.sqrt(sum(s * s for s in column) / HEADS + RMS_HEAD_EPS)
                    column = [s / root for s in column]
                for h in range(HEADS):
                    code[h][k] = column[h]
        row_out = [[out.new_zeros(()) for _ in range(VALUE_WIDTH)] for _ in range(HEADS)]
        for k in range(KEYS):
            if attention_type == "hyla":
                hidden = phi([sum(code[h][k] * value[b, h, k, d] for h in range(HEADS)) for d in range(VALUE_WIDTH)])
                if mixing is not None:
                    hidden = phi(
                        [
                            sum(
                                code[h][k] * mixing[h, e, d] * hidden[d]
                                for h in range(HEADS)
                                for d in range(VALUE_WIDTH)
                            )
                            for e in range(VALUE_WIDTH)
                        ]
                    )
            for h in range(HEADS):
                if attention_type != "hyla":
                    hidden = phi([value[b, h, k, d] for d in range(VALUE_WIDTH)])
                for d in range(VALUE_WIDTH):
                    row_out[h][d] = row_out[h][d] + code[h][k] * hidden[d]
        rows.append(torch.stack([torch.stack(h) for h in row_out]))
    return torch.stack(rows).view(BATCH, QUERIES, HEADS, VALUE_WIDTH)


def masks():
    everything = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    causal = everything.tril(KEYS - QUERIES)
    left, right = everything.clone(), everything.clone()
    left[1, :, :, :2] = False
    right[1, :, :, 3:] = False
    no_key = everything.clone()
    no_key[0, :, 1] = False
    return {
        "none": everything,
        "causal": causal,
        "left padding": left,
        "right padding": right,
        "fully masked row": no_key,
    }


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("row", ROWS, ids=["-".join(map(str, row)) for row in ROWS])
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


@pytest.mark.parametrize("row", ROWS, ids=["-".join(map(str, row)) for row in ROWS])
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
def test_position_buckets_equal_t5_unidirectional(num_buckets):
    length = 2 * num_buckets + 1
    buckets = by_pair(relative_position_buckets(length, length, num_buckets), length, length)
    for query, key in itertools.product(range(length), repeat=2):
        assert buckets[query, key] == exact_bucket(query - key, num_buckets), (query, key)


def test_position_buckets_of_the_sraven_model_have_the_reference_quirks():
    buckets = by_pair(relative_position_buckets(36, 36, 36), 36, 36)
    assert 21 not in buckets
    assert buckets[31, 0] == buckets[32, 0]
    assert (buckets.triu() == 0).all()  # all later keys share bucket 0


def test_last_query_stands_beside_the_last_key():
    some, all_of_them = (by_pair(relative_position_buckets(n, 9, 16), n, 9) for n in (3, 9))
    torch.testing.assert_close(some, all_of_them[-3:])

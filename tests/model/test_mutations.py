"""
Tests of the tests of the mathematics. Each entry of the table below breaks one thing in the source of a function, and the
tests beside it must fail.
"""

import inspect
import textwrap

import pytest
import test_attention
import test_causal
import test_parity

from hf_hyla.model.attention_hyla import (
    attention_codes,
    eager_attention_forward,
    generated_values,
    mixed_values,
    pair_dropout,
    relative_position_buckets,
    rotated,
)
from hf_hyla.model.inputs_hyla import pair_mask
from hf_hyla.model.layers_hyla import HylaAttention


ROW = {row: row for row in test_attention.ROWS}
SOFTMAX, LINEAR, HYLA, HYLA_PLUS = (
    ROW[row]
    for row in (
        ("softmax", "softmax", "none", 1),
        ("linear", "none", "none", 1),
        ("hyla", "rms_head", "relu", 1),
        ("hyla", "rms_head", "relu", 2),
    )
)


def loop(row, mask="none"):
    """The comparison with a plain loop over pairs."""
    return lambda golden: test_attention.test_attention_and_its_gradients_equal_a_plain_loop(row, mask, with_bias=True)


def official(case):
    """The comparison with the official implementation's numbers."""
    return lambda golden: test_parity.test_logits_codes_loss_and_gradients_equal_the_official_ones(golden, case)


def cross(golden):
    test_parity.test_attention_function_equals_the_official_layer_with_cross_lengths_mask_and_bias(golden)


def dropout(golden):
    test_attention.test_dropout_drops_whole_pairs_for_the_batch_and_all_heads()


def buckets(golden):
    test_attention.test_position_buckets_equal_those_of_unidirectional_t5(7)


def steps(row, position_type):
    """A token at a time, with a cache, against all at once."""
    return lambda golden: test_causal.test_a_token_at_a_time_gives_the_logits_of_all_at_once(row, position_type)


def padding(position_type):
    return lambda golden: test_causal.test_padding_on_the_left_changes_nothing_with_and_without_a_cache(position_type)


def rotation(golden):
    test_causal.test_rotation_turns_pairs_of_elements_by_the_angle_of_their_position()


# what is broken: (function, its source, what stands there instead, the tests that must see it)
MUTATIONS = {
    "softmax over keys in place of RMSHead": (
        attention_codes,
        'if score_norm == "softmax":',
        'if score_norm in ("softmax", "rms_head"):',
        [loop(HYLA), official("logic_linear_hypatt"), cross],
    ),
    "RMS over keys": (
        attention_codes,
        "mean(dim=1, keepdim=True)",
        "mean(dim=-1, keepdim=True)",
        [loop(HYLA), official("logic_linear_hypatt"), cross],
    ),
    "RMS over queries": (attention_codes, "mean(dim=1, keepdim=True)", "mean(dim=-2, keepdim=True)", [loop(HYLA)]),
    "mask ignored": (
        eager_attention_forward,
        "module.score_norm, attention_mask, position_bias",
        "module.score_norm, None, position_bias",
        [
            *(loop(row, mask) for row in (SOFTMAX, LINEAR, HYLA) for mask in ("causal", "left padding")),
            official("var_causal_hypatt"),
            official("var_padding_mask_softmax"),
        ],
    ),
    "masked scores are small instead of zero": (
        attention_codes,
        "masked_fill(~attended(attention_mask), 0.0)",
        "masked_fill(~attended(attention_mask), 1e-3)",
        [loop(HYLA, "right padding"), cross],
    ),
    "causality ignored": (
        pair_mask,
        "if not config.is_causal",
        "return torch.ones(1, 1, hidden_states.shape[1], hidden_states.shape[1], dtype=torch.bool)\n        if not config.is_causal",
        [official("var_causal_hypatt"), official("lm_linear_hypatt")],
    ),
    "read-out without the code": (
        generated_values,
        '"bhqk,bqkd->bhqd", codes, hidden',
        '"bhqk,bqkd->bhqd", torch.ones_like(codes), hidden',
        [loop(HYLA), loop(HYLA_PLUS), official("logic_linear_hypatt"), cross],
    ),
    "read-out by scores that are not normalised": (
        eager_attention_forward,
        "output = generated_values(used, value, module.value_activation, module.value_mixing)",
        'raw = attention_codes(query, key, scaling, "none", attention_mask, position_bias)\n'
        '        hidden = module.value_activation(torch.einsum("bhqk,bhkd->bqkd", used, value))\n'
        '        output = torch.einsum("bhqk,bqkd->bhqd", raw, hidden)',
        [loop(HYLA), official("logic_linear_hypatt")],
    ),
    "values generated without the code": (
        generated_values,
        '"bhqk,bhkd->bqkd", codes, value',
        '"bhqk,bhkd->bqkd", torch.ones_like(codes), value',
        [loop(HYLA), official("logic_linear_hypatt"), cross],
    ),
    "second layer without the code": (
        generated_values,
        '"bhqk,bqkd->bqkhd", codes, hidden',
        '"bhqk,bqkd->bqkhd", torch.ones_like(codes), hidden',
        [loop(HYLA_PLUS)],
    ),
    "second layer transposed": (generated_values, '"bqkhd,hed->bqke"', '"bqkhd,hde->bqke"', [loop(HYLA_PLUS)]),
    "ReLU left out": (
        eager_attention_forward,
        "generated_values(used, value, module.value_activation, module.value_mixing)",
        "generated_values(used, value, None, module.value_mixing)",
        [loop(HYLA), loop(HYLA_PLUS), official("logic_linear_hypatt")],
    ),
    "ReLU on ordinary values left out": (
        mixed_values,
        "value if activation is None else activation(value)",
        "value",
        [loop(ROW["linear", "rms_head", "relu", 1])],
    ),
    "position bias added after normalisation": (
        eager_attention_forward,
        "codes = attention_codes(query, key, scaling, module.score_norm, attention_mask, position_bias)",
        "codes = attention_codes(query, key, scaling, module.score_norm, attention_mask) + (\n"
        "        by_pair(position_bias, query.shape[2], key.shape[2]) if position_bias.ndim == 2 else position_bias)",
        [loop(SOFTMAX), loop(HYLA), official("raven_softmax_attention"), official("logic_linear_hypatt")],
    ),
    "position bias left out": (
        HylaAttention.forward,
        "position_bias=position_bias,",
        "position_bias=None,",
        [official("logic_linear_hypatt")],
    ),
    "scaling left out": (
        attention_codes,
        "torch.matmul(query * scaling,",
        "torch.matmul(query,",
        [loop(SOFTMAX), loop(LINEAR), loop(HYLA), official("logic_linear_hypatt"), cross],
    ),
    "dropout drawn per head": (
        eager_attention_forward,
        "used = codes * pair_dropout(",
        "used = codes * torch.rand(*codes.shape[:2], 1, 1).round() * pair_dropout(",
        [dropout],
    ),
    "dropout that scales nothing": (pair_dropout, ".to(dtype) / (1 - dropout)", ".to(dtype)", [dropout]),
    "dropout without effect": (eager_attention_forward, "if dropout > 0.0:", "if False:", [dropout]),
    "dropout in the returned codes": (
        eager_attention_forward,
        "used = codes * ",
        "used = codes = codes * ",
        [dropout],
    ),
    "bidirectional buckets: later keys share a bucket of their own": (
        relative_position_buckets,
        "return torch.where(",
        "return (distance == 0) * num_exact + torch.where(",
        [buckets, official("logic_linear_hypatt")],
    ),
    "bidirectional buckets: later keys share those of earlier ones": (
        relative_position_buckets,
        ".clamp(min=0)",
        ".abs()",
        [buckets, official("logic_linear_hypatt")],
    ),
    "distances as if nothing were cached": (
        relative_position_buckets,
        "first_query + query_length - 1",
        "query_length - 1",
        [steps(HYLA, "relative"), steps(SOFTMAX, "relative")],
    ),
    "keys that are not rotated": (
        HylaAttention.forward,
        "rotated(key, position_embeddings)",
        "key",
        [padding("rotary")],
    ),
    "queries and keys that turn by the sum of their positions": (
        rotated,
        "[-second, first]",
        "[second, first]",
        [rotation, padding("rotary")],
    ),
}


def mutate(monkeypatch, function, original, mutated) -> None:
    """Recompiles the function with one change, in place: whoever imported it calls the change."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(original) == 1, f"{function.__name__} was rewritten: state this mutation in its new words"
    namespace = dict(function.__globals__)
    exec(compile(source.replace(original, mutated), f"<mutated {function.__name__}>", "exec"), namespace)
    monkeypatch.setattr(function, "__code__", namespace[function.__name__].__code__)


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_deliberate_mistake_fails_a_test(monkeypatch, golden, name):
    function, original, mutated, tests = MUTATIONS[name]
    mutate(monkeypatch, function, original, mutated)
    for number, test in enumerate(tests):
        try:
            test(golden)
        except AssertionError:
            continue
        pytest.fail(f"test {number} of this mutation passes with {mutated!r}", pytrace=False)


def test_the_same_tests_pass_without_a_mistake(monkeypatch, golden):
    # Recompiled from the same words, so that no mutation above is seen for the recompiling.
    for function, some_words in {function: original for function, original, _, _ in MUTATIONS.values()}.items():
        mutate(monkeypatch, function, some_words, some_words)
    for test in (loop(HYLA), loop(HYLA_PLUS), loop(SOFTMAX, "causal"), cross, dropout, buckets):
        test(golden)
    official("logic_linear_hypatt")(golden)

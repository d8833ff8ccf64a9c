"""HYLA as a part of somebody else's model: the attention layer and the definition by themselves."""

import doctest
import itertools
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import hf_hyla
from hf_hyla import HylaAttention, HylaConfig, HylaModel, eager_attention_forward


RECIPES = Path(__file__).parents[2] / "recipes"
LENGTH = 9


def layer(**settings):
    """A layer by itself in float64, with large random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_attention_heads": 3, "value_head_dim": 5, "relative_attention_num_buckets": 6}
    attention = HylaAttention(HylaConfig(**{"attention_dropout": 0.0, **sizes, **settings})).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return attention


def tokens(batch=2):
    return torch.randn(batch, LENGTH, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["HylaAttention", "HylaConfig", "eager_attention_forward"])
def test_the_examples_of_docstrings_print_what_they_show(name):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    [example] = finder.find(getattr(hf_hyla, name), name)
    assert example.examples
    assert runner.run(example).failed == 0


@pytest.mark.parametrize(("attention_type", "value_depth"), [("hyla", 1), ("hyla", 2), ("linear", 1), ("softmax", 1)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("position_type", ["relative", "none"])
def test_a_layer_by_itself_hides_padding_and_later_tokens(attention_type, value_depth, is_causal, position_type):
    attention = layer(
        attention_type=attention_type, value_depth=value_depth, is_causal=is_causal, position_type=position_type,
        value_activation="tanh" if attention_type == "hyla" else None,  # a ReLU may let nothing of a token through
    )  # fmt: skip
    x = tokens().requires_grad_()
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, 6:] = 0
    for mask in (None, padding, padding.double(), padding.bool()):
        output, codes = attention(x, attention_mask=mask)
        assert output.shape == x.shape and codes is None
        for row, query in itertools.product(range(2), range(LENGTH)):
            [gradient] = torch.autograd.grad(output[row, query].square().sum(), x, retain_graph=True)
            read = set(gradient[row].abs().sum(-1).nonzero().flatten().tolist())
            seen = {
                key for key in range(LENGTH) if (mask is None or padding[row, key]) and not (is_causal and key > query)
            }
            # Every token reads itself besides, as its own query.
            assert read | {query} == seen | {query}
            assert gradient[1 - row].abs().max() == 0


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_layer_by_itself_gives_the_numbers_that_it_gives_within_a_model(is_causal):
    config = HylaConfig(num_hidden_layers=1, is_causal=is_causal, attention_dropout=0.0)
    torch.manual_seed(0)
    model = HylaModel(config).double()
    [attention] = [module for module in model.modules() if isinstance(module, HylaAttention)]
    alone = HylaAttention(HylaConfig(is_causal=is_causal, attention_dropout=0.0)).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    alone.load_state_dict(attention.state_dict())
    seen = {}
    attention.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(inputs=args[0], output=output[0]), with_kwargs=True
    )
    padding = torch.ones(3, LENGTH, dtype=torch.long)
    padding[1, 5:] = padding[2, :2] = 0
    model(input_ids=torch.randint(0, 8, (3, LENGTH)), attention_mask=padding)
    output, _ = alone(seen["inputs"], attention_mask=padding)
    torch.testing.assert_close(output, seen["output"], rtol=1e-12, atol=1e-12)
    last, codes = alone(seen["inputs"], attention_mask=padding, num_last=2, output_attentions=True)
    torch.testing.assert_close(last, output[:, -2:], rtol=1e-12, atol=1e-12)
    assert codes.shape == (3, 16, 2, LENGTH)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("position_type", ["relative", "none"])
def test_a_causal_layer_by_itself_continues_from_a_cache(position_type, window):
    attention = layer(is_causal=True, position_type=position_type, sliding_window=window)
    x, padding = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, :2] = 0
    for mask in (None, padding):
        whole, _ = attention(x, attention_mask=mask)
        parts, cache = [], DynamicCache()
        for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
            seen = None if mask is None else mask[:, :end]
            parts.append(attention(x[:, start:end], attention_mask=seen, cache=cache)[0])
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)
        # With the mask written out, so that a window or a future that both of them forget is seen.
        places = torch.arange(LENGTH)
        visible = places[None] <= places[:, None]
        if window is not None:
            visible &= places[None] > places[:, None] - window
        visible = visible[None, None] & (torch.ones(2, 1, 1, LENGTH) if mask is None else mask[:, None, None]).bool()
        torch.testing.assert_close(whole, attention(x, attention_mask=visible)[0], rtol=1e-12, atol=1e-12)


def test_rotary_positions_must_be_given_to_a_layer_by_itself():
    with pytest.raises(ValueError, match="position_type='rotary' needs position_embeddings"):
        layer(position_type="rotary", head_dim=4)(tokens())


def test_the_chunked_implementation_takes_the_masks_of_a_layer_by_itself():
    expected, found = (layer(is_causal=True, attn_implementation=name) for name in ("eager", "hyla_chunked"))
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, 6:] = 0
    x = tokens()
    for mask in (None, padding):
        torch.testing.assert_close(found(x, mask)[0], expected(x, mask)[0], rtol=1e-10, atol=1e-10)


def test_a_fresh_layer_holds_no_uninitialised_memory_and_learns_in_every_parameter():
    torch.use_deterministic_algorithms(True)
    try:
        attention = HylaAttention(HylaConfig(hidden_size=12, value_depth=2, attention_dropout=0.0))
    finally:
        torch.use_deterministic_algorithms(False)
    output, _ = attention(tokens().float())
    output.square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.isfinite().all() and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_layer_by_itself_takes_the_fastest_implementation_without_a_warning(caplog):
    asked = []
    large = HylaAttention(HylaConfig(hidden_size=12))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "hf_hyla.model.backends_hyla.fastest_implementation", lambda call: asked.append(call) or "eager"
        )
        large(tokens().float())
    assert len(asked) == 1 and not caplog.records


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "nosuch"])
def test_attention_of_transformers_own_is_refused_where_it_would_compute_softmax_attention(name):
    with pytest.raises(ValueError, match=f"no attn_implementation '{name}': expected one of eager, hyla"):
        HylaAttention(HylaConfig(attn_implementation=name))


@pytest.mark.parametrize("shape", [(2, LENGTH + 1), (LENGTH, LENGTH), (1, LENGTH), (2, LENGTH, LENGTH)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \(2, 9\) of the tokens"):
        layer()(tokens(), attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="but this one holds 2: pass one sequence a row"):
        layer()(tokens(), attention_mask=torch.full((2, LENGTH), 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_padding_mask": torch.zeros(2, 7, dtype=torch.bool)}, "pass attention_mask=~key_padding_mask"),
        ({"attn_mask": torch.ones(2, 7)}, "has no attn_mask: its only mask is attention_mask, where True attends"),
        ({"head_mask": torch.ones(4)}, "has no head_mask: its only mask is"),
        ({"past_key_values": DynamicCache()}, "has no past_key_values: pass the cache as cache"),
        ({"need_weights": True}, "has no need_weights: pass output_attentions=True"),
        ({"is_causal": True}, "built with is_causal=False, got is_causal=True: set it in the config"),
        (
            {"key_value_states": torch.zeros(2, 7, 16)},
            "has no key_value_states: it is self-attention, so leave it out",
        ),
        ({"position_buckets": torch.zeros(2, 7, 16)}, "so it takes hidden_states alone"),
        ({"hidden_states": torch.zeros(7, 16)}, r"hidden_states of shape \(batch, tokens, 16\), got \(7, 16\)"),
    ],
)
def test_arguments_of_other_attention_layers_are_refused_instead_of_ignored(arguments, message):
    layer = HylaAttention(HylaConfig(hidden_size=16, num_attention_heads=4))
    with pytest.raises(ValueError, match=message):
        layer(**{"hidden_states": torch.zeros(2, 7, 16), **arguments})
    assert layer(torch.zeros(2, 7, 16), is_causal=False, head_mask=None)[0].shape == (2, 7, 16)


@pytest.mark.parametrize("name", ["attn_mask", "atention_mask"])
def test_a_mask_of_another_name_is_refused_instead_of_ignored(name):
    with pytest.raises(ValueError, match=f"has no {name}: its only mask is attention_mask"):
        layer()(tokens(), **{name: torch.ones(2, LENGTH)})


def test_the_definition_serves_a_module_with_projections_of_its_own():
    class Own(nn.Module):
        attention_type, score_norm, value_mixing = "hyla", "rms_head", None

        def __init__(self):
            super().__init__()
            self.value_activation = nn.ReLU()
            self.qkv = nn.Linear(12, 36)

        def forward(self, x):
            query, key, value = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
            return eager_attention_forward(self, query, key, value, None, scaling=0.5)[0].flatten(2)

    attention = layer(value_head_dim=4, position_type="none")
    own = Own().double()
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    with torch.no_grad():
        own.qkv.weight.copy_(torch.cat([projection.weight for projection in projections]))
        own.qkv.bias.copy_(torch.cat([projection.bias for projection in projections]))
    torch.testing.assert_close(attention.o_proj(own(tokens())), attention(tokens())[0], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["hyla", "torch"])
def test_the_encoder_of_digits_learns_with_either_attention(attention, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["digits.py", "--attention", attention, "--steps", "100"])
    runpy.run_path(str(RECIPES / "vision" / "digits.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(printed.rsplit(maxsplit=1)[-1]) > 0.4, printed  # chance is 0.1

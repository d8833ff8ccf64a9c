"""Tests of equality with the official implementation, on random parameters of which none is zero or one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from hf_hyla import HylaForSequenceClassification
from hf_hyla.convert import convert, model_of
from hf_hyla.model.attention_hyla import attention_codes, generated_values


CASES = [
    "raven_linear_hypatt",
    "raven_softmax_attention",
    "raven_linear_attention",
    "logic_linear_hypatt",
    "lm_linear_hypatt",
    "var_norm_rms",
    "var_normalize_qk",
    "var_causal_hypatt",
    "var_padding_mask_softmax",
]


def read(golden, case):
    description = json.loads((golden / f"{case}.json").read_text())
    tensors = load_file(golden / f"{case}.safetensors")
    params = load_file(golden / description["params_file"])
    return description, tensors, {name: p for name, p in params.items() if name.startswith("params.")}


def model_inputs(tensors) -> dict[str, torch.Tensor]:
    """The official inputs as ours: one-hot symbols become ids, and the all-zero answer slots the id after the last."""
    x = tensors["input.x"]
    if "input.net_in" in tensors:
        # The official model of language reads a 0 and then all tokens but the last; its loss leaves out what follows a 0. Ours
        # shifts its labels, so it reads the last token too.
        ids = torch.cat([tensors["input.net_in"], x[:, -1:]], dim=1).long()
        return {"input_ids": ids, "labels": torch.cat([ids[:, :1], x.masked_fill(ids[:, :-1] == 0, -100)], dim=1)}
    inputs = {"attention_mask": tensors.get("input.mask"), "labels": tensors["input.y"]}
    if tensors["input.y"].is_floating_point():
        return inputs | {"input_values": x}
    is_slot = x.sum(-1) == 0
    return inputs | {"input_ids": torch.where(is_slot, x.shape[-1], x.argmax(-1))}


@pytest.mark.parametrize("case", CASES)
def test_logits_codes_loss_and_gradients_equal_the_official_ones(golden, case):
    description, tensors, params = read(golden, case)
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    config, state_dict = convert(params, description["config"], loss_fn=description["loss_fn"])
    model = model_of(config)(config).eval()

    out = functional_call(model, state_dict, kwargs={**model_inputs(tensors), "output_attentions": True})

    expected, logits = tensors["output64.logits"], out.logits.double()
    if "input.net_in" in tensors:
        logits = logits[:, :-1]
    else:
        expected = expected[:, -config.num_answers :]
    torch.testing.assert_close(logits.view_as(expected), expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(out.loss.item(), description["loss"], atol=0, rtol=1e-5)
    for layer, codes in enumerate(out.attentions):
        if f"output.attn_weights.{layer}" in tensors:
            theirs = tensors[f"output.attn_weights.{layer}"]
            ours = codes[:1, :, : theirs.shape[2], : theirs.shape[3]]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    out.loss.backward()
    for name, checksum in description["grad_checksums"].items():
        grad = params[name.replace("grad.", "params.", 1)].grad.double().flatten()
        if checksum["max_abs"] < 1e-6:  # under softmax the gradient of the keys' bias is zero, up to noise
            assert grad.abs().max() < 1e-6, name
            continue
        with_cos = (grad * torch.arange(grad.numel(), dtype=torch.float64).cos()).sum().item()
        for ours, theirs in ((grad.norm().item(), "l2"), (grad.sum().item(), "sum"), (with_cos, "dot_cos")):
            assert abs(ours - checksum[theirs]) <= 1e-4 * checksum["l2"] * grad.numel() ** 0.5, (name, theirs)
        if name in tensors:
            error = (grad - tensors[name].double().flatten()).norm().item()
            assert error <= 1e-4 * checksum["l2"], name


@pytest.mark.parametrize(
    ("case", "count", "padding"), [("raven_linear_hypatt", 402_824, 128), ("logic_linear_hypatt", 151_009, 0)]
)
def test_parameter_counts_equal_the_official_ones_without_the_row_of_zeros(golden, case, count, padding):
    description, _, params = read(golden, case)
    config, _ = convert(params, description["config"], loss_fn=description["loss_fn"])
    assert description["num_params"] == count
    assert HylaForSequenceClassification(config).num_parameters() == count + padding


def test_attention_function_equals_the_official_layer_with_cross_lengths_mask_and_bias(golden):
    tensors = load_file(golden / "attn_cross_linear_hypatt.safetensors")
    leaves = {
        name: tensors[name].clone().requires_grad_()
        for name in tensors
        if name.startswith(("params.", "input.inputs", "input.attention_bias"))
    }

    def project(role, inputs):
        kernel, bias = leaves[f"params.{role}.kernel"], leaves[f"params.{role}.bias"]
        return torch.einsum("bli,ihd->bhld", leaves[f"input.{inputs}"], kernel) + bias[None, :, None]

    query = project("query", "inputs_q")
    codes = attention_codes(
        query,
        project("key", "inputs_k"),
        scaling=query.shape[-1] ** -0.5,
        score_norm="rms_head",
        attention_mask=tensors["input.mask"],
        position_bias=leaves["input.attention_bias"],
    )
    values = generated_values(codes, project("value", "inputs_v"), torch.relu)
    out = torch.einsum("bhqd,hdo->bqo", values, leaves["params.out.kernel"]) + leaves["params.out.bias"]

    torch.testing.assert_close(codes, tensors["output.attn_weights.0"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), tensors["output64.out"], atol=5e-5, rtol=0)
    (out * tensors["input.cotangent"]).sum().backward()
    for name, leaf in leaves.items():
        expected = tensors["grad." + name.removeprefix("params.")]
        assert (leaf.grad - expected).norm() <= 1e-4 * expected.norm(), name

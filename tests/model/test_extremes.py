"""Tests of every implementation of attention with extreme values, rows that see nothing, or inputs that need no gradient."""

import itertools

import pytest
import torch
from model_helpers import ROWS, Layer

from hf_hyla.model import ops_triton_hyla
from hf_hyla.model.attention_hyla import eager_attention_forward
from hf_hyla.model.backends_hyla import BACKENDS


pytest.importorskip("numba", reason="the fused CPU kernel is compiled by numba")
pytestmark = pytest.mark.usefixtures("one_size_of_tiles")

FUSED = ["hyla_chunked", "hyla_cpu", "hyla_sdpa"]
ROW_IDS = ["-".join(map(str, row)) for row in ROWS]
SOFTMAX = ("softmax", "softmax", "none", 1)
# Triton's interpreter is a process of its own, see test_triton.py, which runs this file's tests there.
if ops_triton_hyla.INTERPRETED:
    FUSED = ["hyla_triton"]
# The interpreter takes its time for every tile.
KEYS = 9 if ops_triton_hyla.INTERPRETED else 19
MAGNITUDES = [1e-20, 1e-10, 1.0, 1e9, 1e15, 1e18, 1e19, 1e25, 1e30]
if ops_triton_hyla.INTERPRETED:
    MAGNITUDES = [1e-20, 1e18, 1e30]


def serves(backend, row):
    return backend != "hyla_sdpa" or row == SOFTMAX


PAIRS = [
    pytest.param(backend, row, id=f"{backend}-{row_id}")
    for backend in FUSED
    for row, row_id in zip(ROWS, ROW_IDS, strict=True)
    if serves(backend, row)
]


def tensors(row, keys=KEYS, size=1.0) -> dict[str, torch.Tensor]:
    """Random numbers in float64, of which scores are about `size`."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    found = {
        "query": normal(2, 3, keys, 5) * size**0.5,
        "key": normal(2, 3, keys, 5) * size**0.5,
        "value": normal(2, 3, keys, 5),
        "position_bias": normal(3, 2 * keys - 1) * size,
    }
    return found | ({"value_mixing": normal(3, 5, 5)} if row[3] == 2 else {})


def causal_with_left_padding(keys=KEYS) -> torch.Tensor:
    """The first rows of the second sequence see nothing, and neither does one row of the first."""
    mask = torch.ones(2, 1, keys, keys, dtype=torch.bool).tril()
    mask[1, :, :, :3] = False
    mask[0, :, keys // 2] = False
    return mask


def differentiate(attention, row, inputs, dtype, needed, keys=KEYS) -> dict[str, torch.Tensor]:
    """Output and the gradients that are needed, of a loss that all rows are part of."""
    leaves = {name: x.to(dtype).requires_grad_(name in needed) for name, x in inputs.items()}
    layer = Layer(*row[:3], leaves.get("value_mixing"))
    given = [leaves[name] for name in ("query", "key", "value")]
    mask = causal_with_left_padding(keys)
    output, _ = attention(layer, *given, mask, 0.4, position_bias=leaves["position_bias"])
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(output, [leaves[name] for name in needed], cotangent)
    return {"output": output.detach(), **dict(zip(needed, gradients, strict=True))}


@pytest.mark.parametrize(("backend", "row"), PAIRS)
def test_a_gradient_does_not_depend_on_which_others_are_requested(backend, row):
    inputs = tensors(row)
    expected = differentiate(eager_attention_forward, row, inputs, torch.float64, list(inputs))
    for count in range(1, len(inputs) + 1):
        for needed in itertools.combinations(inputs, count):
            found = differentiate(BACKENDS[backend], row, inputs, torch.float64, needed)
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=f"{name} of {needed}")


@pytest.mark.parametrize("size", MAGNITUDES)
@pytest.mark.parametrize(
    ("backend", "row"),
    [pair for pair in PAIRS if pair.values[1][1] != "none"]
    + [
        pytest.param("eager", row, id=f"eager-{name}")
        for row, name in zip(ROWS, ROW_IDS, strict=True)
        if row[1] != "none"
    ],
)
def test_scores_of_every_magnitude_in_float32_can_be_normalised(backend, row, size):
    inputs = {name: x.float().double() for name, x in tensors(row, size=size).items()}
    expected = differentiate(eager_attention_forward, row, inputs, torch.float64, list(inputs))
    found = differentiate(BACKENDS[backend], row, inputs, torch.float32, list(inputs))
    for name, tensor in expected.items():
        # Softmax of large scores is a maximum, whose gradient is 0: there is nothing to be relative to.
        scale = tensor.abs().max().clamp(min=1e-36)
        error = ((found[name].double() - tensor).abs().max() / scale).item()
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("keys", [KEYS, 75])  # one tile of the kernels, and several
@pytest.mark.parametrize("broken", [("key",), ("value",), ("key", "value")], ids="+".join)
@pytest.mark.parametrize(("backend", "row"), PAIRS)
def test_a_nan_under_the_mask_reaches_the_same_rows_in_every_implementation(backend, row, broken, keys):
    inputs = tensors(row, keys)
    for name in broken:
        inputs[name][1, :, 1] = torch.nan  # padding
    found, expected = (
        differentiate(attention, row, inputs, torch.float32, list(inputs), keys)
        for attention in (BACKENDS[backend], eager_attention_forward)
    )
    assert torch.equal(found["output"].isnan(), expected["output"].isnan())
    if backend != "hyla_sdpa":  # which gives no NaN to the gradient of queries where the eager implementation does
        assert all(torch.equal(found[name].isnan(), expected[name].isnan()) for name in expected)


@pytest.mark.parametrize("keys", [KEYS, 75, 83])  # the last tile is never full
@pytest.mark.parametrize(("backend", "row"), PAIRS)
def test_the_last_tile_counts_in_every_gradient(backend, row, keys):
    inputs = tensors(row, keys)
    found, expected = (
        differentiate(attention, row, inputs, torch.float64, list(inputs), keys)
        for attention in (BACKENDS[backend], eager_attention_forward)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9 * tensor.abs().max().item(), msg=name)


def penalised(backend, row, differentiated, by) -> None:
    """A gradient penalty, differentiated again by one of the ways there are."""
    leaves = [tensor.float().requires_grad_() for tensor in list(tensors(row).values())[:3]]
    weight = torch.randn(5, requires_grad=True)
    output, _ = BACKENDS[backend](Layer(*row[:3], None), *leaves, None, 0.4)
    gradients = torch.autograd.grad((output * weight).sum(), leaves, create_graph=True)
    penalty = gradients[differentiated].square().sum()
    if by == "backward":
        penalty.backward()
    elif by == "grad":
        torch.autograd.grad(penalty, leaves)
    elif by == "allow_unused":
        torch.autograd.grad(output.sum() + penalty, leaves[differentiated], allow_unused=True)
    else:  # what only the gradient of the output depends on
        torch.autograd.grad(penalty, weight, allow_unused=True)


@pytest.mark.parametrize("by", ["backward", "grad", "allow_unused", "the gradient of the output"])
@pytest.mark.parametrize("differentiated", [0, 1, 2])
@pytest.mark.parametrize("backend", FUSED)
def test_a_gradient_penalty_is_refused_and_not_ignored(backend, differentiated, by):
    row = SOFTMAX if backend == "hyla_sdpa" else ROWS[2]
    with pytest.raises(RuntimeError, match="attn_implementation='eager'"):
        penalised(backend, row, differentiated, by)


TRANSFORMS = {
    "grad": lambda attend: torch.func.grad(lambda query: attend(query).sum()),
    "hessian": lambda attend: torch.func.hessian(lambda query: attend(query).square().sum()),
    "vmap": torch.vmap,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", [*FUSED, "hyla"])
def test_transforms_of_torch_func_are_refused_by_name_and_served_by_the_default(monkeypatch, backend, transform):
    monkeypatch.setattr("hf_hyla.model.backends_hyla._EAGER_ELEMENTS", 0)
    row = SOFTMAX if backend == "hyla_sdpa" else ROWS[2]
    query, key, value = (tensor[:1] for tensor in list(tensors(row).values())[:3])

    def attend(attention):
        def of_query(query):
            return attention(Layer(*row[:3], None), query[None], key, value, None, 0.4)[0]

        return TRANSFORMS[transform](of_query)(query if transform == "vmap" else query[0])

    if backend == "hyla":
        torch.testing.assert_close(attend(BACKENDS[backend]), attend(eager_attention_forward))
        return
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        attend(BACKENDS[backend])

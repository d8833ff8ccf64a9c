"""The Triton kernels against the definition in float64: in Triton's interpreter anywhere, and on a GPU where one is.

Triton decides when it is first imported whether kernels are interpreted, so those tests run in a child process.
"""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.model import ops_triton_hyla as kernels
from hf_hyla.model.attention_hyla import attention_codes, generated_values, mixed_values


triton = pytest.importorskip("triton")

interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="runs in the child process with the interpreter")
compiled = pytest.mark.skipif(kernels.INTERPRETED, reason="kernels are interpreted in this process")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available() or kernels.INTERPRETED, reason="needs a CUDA device")

SHARED_MEMORY = 227 * 1024  # bytes of an H100 that one program can have
NETWORKS = {  # generated, activation, value_mixing
    "hyla": (True, "relu", False),
    "hyla without activation": (True, "none", False),
    "hyla+": (True, "relu", True),
    "hyla+ without activation": (True, "none", True),
    "mixed": (False, "none", False),
    "mixed with relu": (False, "relu", False),
}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """torch fills new memory by NaN in this mode, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@compiled
def test_the_tests_of_extremes_pass_in_the_interpreter():
    # Those of few tiles: the interpreter takes a second for some.
    names = (
        "test_scores_of_every_magnitude_in_float32_can_be_normalised",
        "test_a_gradient_penalty_is_refused_and_not_ignored",
    )
    extremes = [f"{Path(__file__).with_name('test_extremes.py')}::{name}" for name in names]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            __file__,
            *extremes,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0 and re.search(r"\d\d\d passed", result.stdout), result.stdout + result.stderr


def kept(queries, keys, seed, dropout):
    """
    Pair dropout as it is defined, in integers of 64 bits held to 32: True where a pair is kept. Fewer queries than keys are
    the last.
    """

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        return x ^ (x >> 15)

    positions = torch.arange(queries) + max(keys - queries, 0)
    words = mix(mix(positions ^ seed[0])[:, None] ^ mix(torch.arange(keys) ^ seed[1])[None, :])
    return words >= int(dropout * 2**32)


def masks(kind, batch, queries, keys):
    padding = torch.arange(keys) < torch.tensor([max(keys - 4, 0), keys, 1][:batch])[:, None]
    if kind == "padding":  # a row of the batch may have one key only, and its rows of short lengths none
        return padding[:, None, None, :]
    if kind == "pairs":
        mask = torch.rand(batch, 1, queries, keys) > 0.4
        mask[:, :, queries // 2] = False  # nothing attends
        return mask
    if kind == "causal":
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    return None


def problem(batch, heads, queries, keys, width, value_width, mixing, bias, scale=2.0):
    """Large random inputs in float64, by name, and the gradient of the output."""
    inputs = {
        "query": torch.randn(batch, heads, queries, width, dtype=torch.float64) * scale,
        "key": torch.randn(batch, heads, keys, width, dtype=torch.float64) * scale,
        "value": torch.randn(batch, heads, keys, value_width, dtype=torch.float64) * scale,
    }
    if bias:
        inputs["position_bias"] = torch.randn(heads, queries + keys - 1, dtype=torch.float64) * scale
    if mixing:
        inputs["value_mixing"] = torch.randn(heads, value_width, value_width, dtype=torch.float64)
    return inputs, torch.randn(batch, queries, heads, value_width, dtype=torch.float64)


def defined(inputs, gradient, mask, network, score_norm, scaling, dropout, seed):
    """Output and gradients by the functions that define HYLA, in float64."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    queries, keys = leaves["query"].shape[2], leaves["key"].shape[2]
    bias = leaves.get("position_bias")
    if bias is not None:
        distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
        bias = bias[:, distance + queries - 1]
    codes = attention_codes(leaves["query"], leaves["key"], scaling, score_norm, mask, bias)
    if dropout:
        codes = codes * kept(queries, keys, seed, dropout) / (1 - dropout)
    generated, activation, _ = NETWORKS[network]
    phi = torch.nn.ReLU() if activation == "relu" else None
    if generated:
        output = generated_values(codes, leaves["value"], phi, leaves.get("value_mixing"))
    else:
        output = mixed_values(codes, leaves["value"], phi)
    output = output.transpose(1, 2)
    return output, dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), gradient), strict=True))


def fused(inputs, mask, network, score_norm, scaling, dropout=0.0, seed=None):
    generated, activation, _ = NETWORKS[network]
    return kernels.triton_attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        mask=mask,
        position_bias=inputs.get("position_bias"),
        value_mixing=inputs.get("value_mixing"),
        seed=seed,
        scaling=scaling,
        score_norm=score_norm,
        activation=activation,
        generated=generated,
        dropout=dropout,
    )


def compare(
    inputs, gradient, mask, network, score_norm, dtype, tolerances, dropout=0.0, device="cpu", parameters=None
):
    """
    Runs both, position bias and value_mixing in the dtype `parameters` where one is given, and compares by name, relative to
    the largest element of each. Without tolerances errors may be 1.5 times those of the definition in this dtype, and a
    rounding. These are measured over all elements, since the largest one is that of a value near the kink of relu.
    """
    scaling, seed = 0.3, torch.tensor([123456789, 2**31 - 1]) if dropout else None
    dtypes = dict.fromkeys(inputs, dtype)
    if parameters:
        dtypes |= {name: parameters for name in ("position_bias", "value_mixing") if name in inputs}
    rounded, rounded_gradient = {name: x.to(dtypes[name]) for name, x in inputs.items()}, gradient.to(dtype)
    inputs = {name: tensor.double() for name, tensor in rounded.items()}
    gradient = rounded_gradient.double()
    output, expected = defined(inputs, gradient, mask, network, score_norm, scaling, dropout, seed)
    expected = {"output": output.detach(), **expected}
    if isinstance(tolerances, dict):
        allowed = tolerances
    elif tolerances:
        allowed = dict.fromkeys(expected, tolerances[1]) | {"output": tolerances[0]}
    else:
        usual, usual_gradients = defined(rounded, rounded_gradient, mask, network, score_norm, scaling, dropout, seed)
        usual = {"output": usual.detach(), **usual_gradients}
        allowed = {name: 1.5 * error_of_all(usual[name], x) + torch.finfo(dtype).eps for name, x in expected.items()}

    leaves = {name: tensor.to(device, dtypes[name]).requires_grad_() for name, tensor in inputs.items()}
    mask, seed = (None if tensor is None else tensor.to(device) for tensor in (mask, seed))
    result = fused(leaves, mask, network, score_norm, scaling, dropout, seed)
    assert result.dtype == dtype and result.is_contiguous()
    gradients = torch.autograd.grad(result, list(leaves.values()), gradient.to(device, dtype))
    assert {name: got.dtype for name, got in zip(leaves, gradients, strict=True)} == dtypes
    found = {"output": result.detach(), **dict(zip(leaves, gradients, strict=True))}
    for name, tolerance in allowed.items():
        off = (error if tolerances else error_of_all)(found[name], expected[name])
        assert off <= tolerance, f"{name}: {off:.1e}, where {tolerance:.1e} is allowed"


def error(found, expected):
    return (found.cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)


def error_of_all(found, expected):
    return (found.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-6)


# batch, heads, queries, keys, head_dim, value_head_dim
SIZES = [
    (1, 3, 17, 20, 4, 2),
    (1, 8, 33, 9, 16, 4),
    (2, 3, 1, 17, 2, 16),
    (2, 4, 18, 1, 20, 5),
    (1, 2, 9, 33, 3, 20),
]
COMBINATIONS = [(norm, network) for network in NETWORKS for norm in ("rms_head", "none", "softmax")]
MASKS = ["padding", "pairs", None, "causal"]
CASES = [
    # Sizes, masks, bias and dropout go round beside the combinations, all of which occur.
    (*combination, SIZES[i % 5], MASKS[i % 4], i % 3 > 0, 0.25 * (i % 7 in (1, 3)))
    for i, combination in enumerate(COMBINATIONS)
]


@interpreted
@pytest.mark.parametrize("norm, network, size, mask, bias, dropout", CASES)
def test_output_and_gradients_equal_the_definition_in_double_precision(norm, network, size, mask, bias, dropout):
    torch.manual_seed(0)
    if NETWORKS[network][2]:
        size = (*size[:5], min(size[5], 16))  # wider ones are refused in double precision
    inputs, gradient = problem(*size, NETWORKS[network][2], bias)
    mask = masks(mask, size[0], *size[2:4])
    compare(inputs, gradient, mask, network, norm, torch.float64, (1e-12, 1e-11), dropout)


@interpreted
@pytest.mark.parametrize("norm, network, mask", [("rms_head", "hyla", "pairs"), ("softmax", "hyla+", "padding")])
@pytest.mark.parametrize(
    "dtype, tolerances",
    [(torch.float32, (1e-5, 1e-4)), (torch.bfloat16, (1e-2, 1e-2)), (torch.float16, (2e-3, 2e-3))],
)
def test_output_and_gradients_equal_the_definition_in_lower_precision(dtype, tolerances, norm, network, mask):
    torch.manual_seed(0)
    inputs, gradient = problem(1, 3, 9, 20, 4, 6, network == "hyla+", bias=True, scale=1.0)
    compare(inputs, gradient, masks(mask, 1, 9, 20), network, norm, dtype, tolerances, dropout=0.1)


@interpreted
@pytest.mark.parametrize(
    "dtype, norm, network, mask, size",
    [
        (torch.bfloat16, "rms_head", "hyla+", "padding", (1, 3, 9, 20, 4, 6)),
        (torch.bfloat16, "none", "hyla", "pairs", (2, 3, 1, 17, 2, 16)),
        (torch.bfloat16, "softmax", "mixed", "causal", (1, 8, 17, 17, 16, 4)),
        (torch.float16, "rms_head", "hyla+", "pairs", (2, 4, 18, 1, 20, 5)),
        (torch.float16, "none", "hyla", "padding", (1, 2, 9, 33, 3, 20)),
        (torch.float16, "softmax", "hyla+", None, (1, 5, 17, 20, 1, 1)),
    ],
    ids=str,
)
def test_parameters_and_their_gradients_stay_in_single_precision_beside_half_precision_inputs(
    dtype, norm, network, mask, size
):
    """
    As under autocast. The interpreter multiplies in float32, so only results are rounded: by half of eps at most, but bfloat16 by
    eps, since the interpreter cuts it off. Gradients of parameters are as exact as in float32.
    """
    torch.manual_seed(0)
    inputs, gradient = problem(*size, network == "hyla+", bias=True, scale=1.0)
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    exact = {"output": 1e-5, **dict.fromkeys(inputs, 1e-4)}
    tolerances = {
        name: off if name in ("position_bias", "value_mixing") else off + rounding for name, off in exact.items()
    }
    attends = masks(mask, size[0], *size[2:4])
    compare(inputs, gradient, attends, network, norm, dtype, tolerances, dropout=0.1, parameters=torch.float32)


@interpreted
@pytest.mark.parametrize("network", ["hyla", "mixed with relu"])
def test_wide_heads_are_processed_in_chunks(network):
    torch.manual_seed(0)
    inputs, gradient = problem(1, 17, 17, 5, 40, 24, False, bias=False)
    compare(inputs, gradient, None, network, "rms_head", torch.float64, (1e-12, 1e-11))


@interpreted
@pytest.mark.parametrize("norm", ["rms_head", "none", "softmax"])
def test_a_request_without_any_attending_pair_equals_the_definition(norm):
    torch.manual_seed(0)
    inputs, gradient = problem(1, 3, 5, 18, 4, 4, False, bias=True)
    nothing = torch.zeros(1, 1, 5, 18, dtype=torch.bool)
    compare(inputs, gradient, nothing, "hyla", norm, torch.float64, (1e-12, 1e-11))


def example(batch=1, keys=8):
    torch.manual_seed(0)
    inputs, _ = problem(batch, 3, 5, keys, 4, 4, mixing=True, bias=True)
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


@interpreted
def test_strides_do_not_matter():
    inputs = {name: tensor.detach() for name, tensor in example(batch=2, keys=9).items()}
    strided = {
        "query": inputs["query"].transpose(0, 2).contiguous().transpose(0, 2),
        "key": torch.stack([inputs["key"]] * 2, -1)[..., 1],
        "value": inputs["value"].flip(3).contiguous().flip(3).transpose(1, 2).contiguous().transpose(1, 2),
        "position_bias": inputs["position_bias"].T.contiguous().T,
        "value_mixing": inputs["value_mixing"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    mask = torch.rand(2, 1, 9, 5).gt(0.3).transpose(2, 3)
    weights = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    results = []
    for tensors, attends, gradient in [
        (inputs, mask.contiguous(), weights),
        (strided, mask, weights.transpose(0, 3).contiguous().transpose(0, 3)),
    ]:
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        output = fused(leaves, attends, "hyla+", "softmax", 0.5)
        results.append([output, *torch.autograd.grad(output, list(leaves.values()), gradient)])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("only", ["query", "key", "value", "position_bias", "value_mixing"])
def test_a_single_gradient_is_the_same_as_among_all(only):
    leaves = example()
    together = torch.autograd.grad(fused(leaves, None, "hyla+", "rms_head", 0.5).square().sum(), leaves[only])[0]
    alone = {name: tensor.detach().requires_grad_(name == only) for name, tensor in leaves.items()}
    fused(alone, None, "hyla+", "rms_head", 0.5).square().sum().backward()
    assert torch.equal(alone[only].grad, together)


def as_module(**settings):
    module = torch.nn.Module()
    module.forward = lambda query, key, value, bias: kernels.triton_attention(
        query,
        key,
        value,
        position_bias=bias,
        scaling=0.5,
        activation="relu",
        generated=True,
        dropout=0.0,
        **settings,
    )
    return module


@interpreted
def test_operators_pass_torchs_opcheck():
    leaves = example()
    inputs = (*(leaves[name] for name in ("query", "key", "value")), None, leaves["position_bias"])
    arguments = (*inputs, None, None, 0.5, "softmax", "relu", True, 0.0)
    torch.library.opcheck(torch.ops.hyla.triton_forward.default, arguments)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{"value_depth": 2, "qk_norm": True}, {"attention_type": "softmax"}], ids=str)
def test_a_model_under_autocast_is_computed_by_the_kernels(settings, dtype, monkeypatch):
    calls = []
    of_kernel = torch.ops.hyla.triton_forward
    monkeypatch.setattr(torch.ops.hyla, "triton_forward", lambda *args: calls.append(args) or of_kernel(*args))
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    config = HylaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=3, attention_dropout=0.1, **settings)
    model = HylaForSequenceClassification(config).train()
    ids = torch.randint(0, 8, (2, 12))
    gradients = {}
    for backend in ("hyla_triton", "hyla_chunked"):
        model.set_attn_implementation(backend)
        model.zero_grad()
        torch.manual_seed(1)  # of dropout
        with torch.autocast("cpu", dtype):
            model(input_ids=ids, labels=ids[:, :4]).loss.backward()
        gradients[backend] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert len(calls) == 2
    for query, key, value, _, bias, mixing, *_ in calls:
        assert {query.dtype, key.dtype, value.dtype} == {dtype}
        assert {x.dtype for x in (bias, mixing) if x is not None} == {torch.float32}
    off = (gradients["hyla_triton"] - gradients["hyla_chunked"]).norm() / gradients["hyla_chunked"].norm()
    assert off < 8 * torch.finfo(dtype).eps


@interpreted
def test_compile_and_export_see_one_node():
    leaves = example()
    arguments = tuple(leaves[name] for name in ("query", "key", "value", "position_bias"))
    module = as_module(score_norm="softmax")
    expected = module(*arguments)
    result = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    for got, want in zip(
        torch.autograd.grad(result.square().sum(), arguments),
        torch.autograd.grad(expected.square().sum(), arguments),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    exported = torch.export.export(module, tuple(tensor.detach() for tensor in arguments))
    calls = [node for node in exported.graph.nodes if node.op == "call_function" and "hyla" in str(node.target)]
    assert [str(node.target) for node in calls] == ["hyla.triton_forward.default"]
    torch.testing.assert_close(exported.module()(*arguments), expected)


def test_importing_the_file_twice_prints_nothing():
    spec = importlib.util.spec_from_file_location("hf_hyla.model.second_copy", kernels.__file__)
    second = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec.loader.exec_module(second)
    assert second.triton_problem is not kernels.triton_problem


def test_a_request_that_cannot_run_is_refused_in_one_sentence(monkeypatch):
    query = torch.zeros(1, 8, 3, 4)
    if not kernels.INTERPRETED:
        assert "not on cpu" in kernels.triton_problem(query)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert kernels.triton_problem(query) is None
    assert "torch.int64" in kernels.triton_problem(query.long())
    assert "65" in kernels.triton_problem(torch.zeros(1, 65, 3, 4))
    assert "not 40" in kernels.triton_problem(query, value_mixing=torch.zeros(8, 40, 40))
    monkeypatch.setattr(kernels, "triton", None)
    assert "not installed" in kernels.triton_problem(query)


GPUS = {  # compute capability, bytes of shared memory that a program can have
    "T4": ((7, 5), 64 * 1024),
    "A10": ((8, 6), 99 * 1024),
    "A100": ((8, 0), 163 * 1024),
    "H100": ((9, 0), SHARED_MEMORY),
}


@pytest.mark.parametrize(
    ("gpu", "dtype", "heads", "widest", "problem"),
    [
        ("T4", torch.float16, 8, 16, "compute capability 8.0, not 7.5"),
        ("A10", torch.bfloat16, 16, 32, None),
        ("A10", torch.float32, 16, 16, None),
        ("A10", torch.float32, 17, 8, "17 heads in torch.float32 .* 99 KiB"),
        ("A100", torch.bfloat16, 16, 64, None),
        ("A100", torch.float32, 16, 16, None),
        ("H100", torch.bfloat16, 64, 16, None),
        ("H100", torch.float32, 16, 32, None),
        ("H100", torch.float32, 64, 8, "64 heads in torch.float32 .* 227 KiB"),
    ],
)
def test_a_gpu_without_the_shared_memory_is_given_a_smaller_tile_or_none(
    monkeypatch, gpu, dtype, heads, widest, problem
):
    (major, minor), shared = GPUS[gpu]
    properties = SimpleNamespace(
        major=major, minor=minor, shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=shared
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    with FakeTensorMode():
        query = torch.empty(1, heads, 5, 64, dtype=dtype, device="cuda:0")
        assert kernels._widest_chunk(query) == widest
        found = kernels.triton_problem(query)
    assert found is None if problem is None else re.search(problem, found)


def test_offsets_into_a_mask_of_very_many_pairs_are_of_64_bits():
    def index(length):
        tensor = torch.empty(1, 2, length, 4, device="meta")
        mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")
        return kernels._constants(tensor, tensor, tensor, mask, 0.5, "none", "relu", True, 0.0).index

    tl = triton.language
    assert (index(46_340), index(46_341)) == (tl.int32, tl.int64)


HOPPER, AMPERE = 90, 80
# capability, dtype, that of parameters, heads, width, score_norm, network, kernels (all where none is named)
COMPILED = [
    (HOPPER, torch.bfloat16, torch.bfloat16, 16, 64, "rms_head", "hyla", ("forward_kernel", "key_gradient_kernel")),
    (HOPPER, torch.float32, torch.float32, 16, 64, "rms_head", "hyla", ("key_gradient_kernel",)),
    (HOPPER, torch.float32, torch.float32, 16, 32, "rms_head", "hyla+", ("key_gradient_kernel",)),
    (HOPPER, torch.float32, torch.float32, 16, 4, "rms_head", "hyla", ("forward_kernel", "query_gradient_kernel")),
    (HOPPER, torch.bfloat16, torch.bfloat16, 8, 16, "softmax", "hyla+", ("softmax_statistics_kernel", "value_gradient_kernel")),
    # As under autocast.
    (HOPPER, torch.bfloat16, torch.float32, 16, 64, "rms_head", "hyla+", ()),
    (HOPPER, torch.float16, torch.float32, 8, 16, "softmax", "hyla+", ("softmax_statistics_kernel", "value_gradient_kernel")),
    (AMPERE, torch.bfloat16, torch.float32, 16, 16, "rms_head", "hyla+", ()),
    (AMPERE, torch.float16, torch.float32, 16, 4, "none", "mixed", ()),
]  # fmt: skip


@compiled
@pytest.mark.skipif(
    not any(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")), reason="Triton came without ptxas"
)
@pytest.mark.parametrize("capability, dtype, parameters, heads, width, norm, network, names", COMPILED)
def test_kernels_compile_within_the_shared_memory_of_the_gpu(
    monkeypatch, capability, dtype, parameters, heads, width, norm, network, names
):
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    compiled_kernels, tiles = {}, []

    def compile_only(kernel, programs, chunks, const, *arguments):
        name = kernel.fn.__name__
        if not names or name in names:
            options = {"num_warps": kernels.NUM_WARPS, "num_stages": kernels.NUM_STAGES}
            compiled_kernels[name] = kernel.warmup(*arguments, const=const, grid=(programs, chunks), **options)
            tiles.append(const.head_block.value * max(const.head_dim_block.value, const.value_block.value))

    monkeypatch.setattr(kernels, "_launch", compile_only)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns
    target = GPUTarget("cuda", capability, 32)
    # Triton keeps kernels by the number of the device. No GPU of this machine has this one, so nothing that was compiled here runs.
    number = 1000 + capability
    gpu = SimpleNamespace(
        get_current_device=lambda: number, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    generated, activation, mixing = NETWORKS[network]
    tensors = [torch.zeros(2, 100, heads, width, dtype=dtype).transpose(1, 2) for _ in range(3)]
    mixing = torch.zeros(heads, width, width, dtype=parameters) if mixing else None
    tensors += [None, torch.zeros(heads, 199, dtype=parameters), mixing, torch.zeros(2, dtype=torch.int64)]
    options = (0.5, norm, activation, generated, 0.1)
    monkeypatch.setattr(driver, "_active", gpu)
    output, *statistics = kernels._forward(*tensors, *options)
    kernels._backward(output, *tensors, *statistics, [True] * 4 + [mixing is not None], *options)
    assert set(compiled_kernels) == set(names) if names else len(compiled_kernels) == 5
    expected = tiles[0] * kernels.SHARED_BYTES[dtype]
    assert expected <= {HOPPER: SHARED_MEMORY, AMPERE: GPUS["A100"][1]}[capability]
    for name, kernel in compiled_kernels.items():
        assert kernel.metadata.shared <= expected, f"{name}: {kernel.metadata.shared} bytes"
        if dtype != torch.float32:
            assert "mma" in kernel.asm["ptx"], f"{name} does not use tensor cores"


@on_gpu
@pytest.mark.parametrize("norm", ["rms_head", "none", "softmax"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "size", [(2, 8, 63, 129, 16, 16), (2, 16, 36, 36, 4, 4), (2, 3, 1, 2, 2, 5), (1, 12, 300, 300, 20, 20)], ids=str
)
def test_output_and_gradients_equal_the_definition_on_a_gpu_in_single_precision(norm, network, size):
    torch.manual_seed(0)
    inputs, gradient = problem(*size, NETWORKS[network][2], bias=True, scale=1.0)
    mask = masks("pairs", size[0], *size[2:4])
    compare(inputs, gradient, mask, network, norm, torch.float32, (1e-5, 1e-4), dropout=0.1, device="cuda")


@on_gpu
@pytest.mark.parametrize(
    "dtype, tolerances", [(torch.bfloat16, None), (torch.float16, None), (torch.float32, (1e-4, 1e-4))]
)
@pytest.mark.parametrize("norm, network", [("rms_head", "hyla"), ("none", "mixed"), ("softmax", "hyla")])
def test_output_and_gradients_equal_the_definition_on_a_gpu_with_wide_heads(norm, network, dtype, tolerances):
    torch.manual_seed(0)
    inputs, gradient = problem(2, 16, 129, 200, 64, 64, False, bias=True, scale=1.0)
    compare(inputs, gradient, None, network, norm, dtype, tolerances, dropout=0.1, device="cuda")


@on_gpu
def test_a_gpu_gives_the_same_bits_twice():
    torch.manual_seed(0)
    inputs, _ = problem(2, 8, 130, 130, 16, 16, mixing=True, bias=True)
    leaves = {name: tensor.to("cuda", torch.float32).requires_grad_() for name, tensor in inputs.items()}

    def run():
        output = fused(leaves, None, "hyla+", "rms_head", 0.5)
        return [output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@on_gpu
def test_memory_on_a_gpu_grows_linearly_with_the_length():
    peaks = []
    for length in (1024, 4096):
        shape = (1, 8, length, 16)
        leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        as_module(score_norm="rms_head").forward(*leaves, None).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 5 * peaks[0]

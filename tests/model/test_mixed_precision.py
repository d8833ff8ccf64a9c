"""
Half precision, under autocast and in models of that dtype: every implementation against float64, and which one is taken.

What is expected is computed in float64 from the very tensors that the implementation is given, rounded as they are. So an
implementation that adds up in float32 may differ by one rounding of its result and by what float32 itself differs by.
"""

import dataclasses
from collections import Counter

import numba
import numpy as np
import pytest
import torch
from model_helpers import HYLA, HYLA_PLUS, ROW_IDS, ROWS, SOFTMAX, Case, Layer, filled_with_nan, loop, masks
from torch._subclasses import FakeTensorMode

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.model import backends_hyla, chunked_hyla, vectors_cpu_hyla
from hf_hyla.model.attention_hyla import attention_codes, by_pair, eager_attention_forward
from hf_hyla.model.backends_hyla import BACKENDS, IMPLEMENTATIONS


HALVES = [torch.bfloat16, torch.float16]
PARAMETERS = ("position_bias", "value_mixing")
# What float32 may be off by, relative to the largest element: the bounds of its own tests.
OUTPUT, GRADIENT = 1e-5, 1e-4
half = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
pytestmark = pytest.mark.usefixtures("one_size_of_tiles")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_hyla, "CHUNK_ELEMENTS", 1200)


def given(row, case, dtype, parameters=torch.float32):
    """The tensors of the case: queries, keys and values in half precision, parameters in float32 or as said."""
    tensors = case.tensors(row, torch.float64)
    return {name: tensor.to(parameters if name in PARAMETERS else dtype) for name, tensor in tensors.items()}


def differentiate(backend, row, case, tensors, autocast=None):
    """Output and gradients by name, in the dtypes in which they come."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    layer = Layer(*row[:3], leaves.get("value_mixing"))
    torch.manual_seed(7)  # from which dropout is drawn
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output, _ = backend(
            layer,
            leaves["query"],
            leaves["key"],
            leaves["value"],
            case.masked(),
            scaling=case.width**-0.5,
            dropout=case.dropout,
            position_bias=leaves["position_bias"],
        )
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def expected_of(row, case, tensors):
    return differentiate(
        eager_attention_forward, row, case, {name: tensor.double() for name, tensor in tensors.items()}
    )


def assert_rounded(found, expected, roundings=0.0):
    """
    `found` is `expected` rounded once to its dtype, but for what float32 is off by. `roundings` more of them, relative to the
    largest element, are allowed where an implementation rounds on the way.
    """
    for name, tensor in expected.items():
        got, scale = found[name], tensor.abs().max()
        unit = torch.finfo(got.dtype).eps / 2 if got.dtype in HALVES else 0.0
        smallest = torch.finfo(got.dtype).smallest_normal * unit  # below the normal numbers steps shrink no more
        allowed = unit * tensor.abs() + smallest + ((OUTPUT if name == "output" else GRADIENT) + roundings) * scale
        off = (got.double() - tensor).abs()
        assert torch.all(off <= allowed), (
            f"{name}: {(off / scale).max():.1e} of the largest, {(off / allowed).max():.2f} times what is allowed"
        )


CASES = {
    "none": [Case(), Case(queries=5)],
    "causal": [Case(mask="causal"), Case(queries=5, mask="causal")],
    "padding": [Case(mask="padding"), Case(queries=5, mask="padding")],
    # In a row that sees nothing all probabilities are equal, and values of half precision may add up to exactly 0, where the
    # derivative of ReLU is left to rounding. With these numbers of queries none do.
    "random": [Case(mask="random", dropout=0.3), Case(queries=7, mask="random")],
    # One row of the batch, which both workers share; several tiles of keys.
    "long": [Case(batch=1, queries=20, keys=150), Case(batch=2, queries=150, keys=17)],
}


def sized(case, dtype):
    """The case with heads as narrow as SRAVEN's in float16. Each dtype has one width, since a kernel takes seconds to compile."""
    return dataclasses.replace(case, width=4, value_width=3) if dtype == torch.float16 else case


@half
@pytest.mark.parametrize("backend", ["hyla_cpu", "hyla_chunked"])
@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_under_autocast_only_results_are_rounded(row, cases, backend, dtype, small_chunks, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", filled_with_nan(torch.Tensor.new_empty))
    for case in (sized(case, dtype) for case in cases):
        tensors = given(row, case, dtype)
        found = differentiate(BACKENDS[backend], row, case, tensors, autocast=dtype)
        assert {name: x.dtype for name, x in found.items()} == {
            "output": dtype,
            **{n: x.dtype for n, x in tensors.items()},
        }
        assert_rounded(found, expected_of(row, case, tensors))


@half
@pytest.mark.parametrize("backend", ["hyla_cpu", "hyla_chunked"])
@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_in_a_model_of_half_precision_only_results_are_rounded(row, backend, dtype, small_chunks):
    case = sized(Case(mask="padding", dropout=0.3), dtype)
    tensors = given(row, case, dtype, parameters=dtype)
    found = differentiate(BACKENDS[backend], row, case, tensors)
    assert {x.dtype for x in found.values()} == {dtype}
    assert_rounded(found, expected_of(row, case, tensors))


@half
@pytest.mark.parametrize("row", [row for row in ROWS if row[3] == 1], ids=[i for i in ROW_IDS if i.endswith("1")])
def test_the_definition_takes_half_precision_beside_position_biases_in_float32(row, dtype):
    case = Case(mask="padding", dropout=0.3)
    tensors = given(row, case, dtype)
    found = differentiate(eager_attention_forward, row, case, tensors)
    assert {name: x.dtype for name, x in found.items()} == {
        "output": dtype,
        **{n: x.dtype for n, x in tensors.items()},
    }
    # It rounds its intermediate results too.
    for name, tensor in expected_of(row, case, tensors).items():
        assert (found[name].double() - tensor).norm() < 8 * torch.finfo(dtype).eps * tensor.norm(), name
    query, key = tensors["query"], tensors["key"]
    codes = attention_codes(query, key, 0.5, row[1], position_bias=tensors["position_bias"])
    assert codes.dtype == dtype


@half
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "random"])
def test_sdpa_under_autocast_also_rounds_probabilities_and_biases(mask, dtype):
    for case in (Case(mask=mask), Case(queries=5, mask=mask)):
        tensors = given(SOFTMAX, case, dtype)
        found = differentiate(BACKENDS["hyla_sdpa"], SOFTMAX, case, tensors, autocast=dtype)
        assert found["output"].dtype == dtype and found["position_bias"].dtype == torch.float32
        assert_rounded(found, expected_of(SOFTMAX, case, tensors), roundings=torch.finfo(dtype).eps)


@half
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_under_autocast_attention_equals_a_plain_loop(row, mask, dtype):
    torch.manual_seed(0)
    attends = masks()[mask][:, :, :2]
    batch, _, queries, keys = attends.shape
    heads, width, value_width = 3, 5, 5
    shapes = {
        "query": (batch, heads, queries, width),
        "key": (batch, heads, keys, width),
        "value": (batch, heads, keys, value_width),
        "position_bias": (heads, queries + keys - 1),
        "value_mixing": (heads, value_width, value_width),
    }
    leaves = {
        name: (3 * torch.randn(shape)).to(torch.float32 if name in PARAMETERS else dtype).requires_grad_()
        for name, shape in shapes.items()
        if name != "value_mixing" or row[3] == 2
    }
    cotangent = torch.randn(batch, queries, heads, value_width).to(dtype)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    bias = by_pair(wide["position_bias"], queries, keys)[None]
    output = loop(row, wide["query"], wide["key"], wide["value"], wide.get("value_mixing"), attends, bias)
    gradients = torch.autograd.grad(output, list(wide.values()), cotangent.double())
    expected = {"output": output.detach(), **dict(zip(wide, gradients, strict=True))}
    for backend in ("hyla_cpu", "hyla_chunked"):
        with torch.autocast("cpu", dtype):
            output, _ = BACKENDS[backend](
                Layer(*row[:3], leaves.get("value_mixing")),
                *(leaves[name] for name in ("query", "key", "value")),
                attends,
                scaling=width**-0.5,
                position_bias=leaves["position_bias"],
            )
        gradients = torch.autograd.grad(output, list(leaves.values()), cotangent)
        assert_rounded({"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}, expected)


@pytest.mark.parametrize("threads", [1, 2])
@half
def test_the_cpu_kernel_in_half_precision_gives_the_same_bits_twice(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in (sized(case, dtype) for case in (Case(batch=1, queries=63, keys=129), Case(batch=9, dropout=0.2))):
            tensors = given(HYLA_PLUS, case, dtype)
            first, second = (differentiate(BACKENDS["hyla_cpu"], HYLA_PLUS, case, tensors) for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first)
            assert_rounded(first, expected_of(HYLA_PLUS, case, tensors))
    finally:
        torch.set_num_threads(before)


@half
def test_float32_queries_after_qk_norm_are_rounded_to_the_autocast_dtype(dtype):
    """qk_norm leaves queries and keys in float32, beside values in half precision; their gradients come in float32."""
    case = Case(mask="padding")
    mixed = given(HYLA, case, dtype) | {name: case.tensors(HYLA, torch.float32)[name] for name in ("query", "key")}
    halves = {name: tensor if name in PARAMETERS else tensor.to(dtype) for name, tensor in mixed.items()}
    expected = differentiate(BACKENDS["hyla_cpu"], HYLA, case, halves)
    for backend in ("hyla_cpu", "hyla_chunked"):
        found = differentiate(BACKENDS[backend], HYLA, case, mixed, autocast=dtype)
        assert {name: x.dtype for name, x in found.items() if x.dtype != torch.float32} == {
            "output": dtype,
            "value": dtype,
        }
        unit = torch.finfo(dtype).eps / 2
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name].to(tensor.dtype), tensor, rtol=2 * unit, atol=1e-4 * tensor.abs().max().item()
            )


def test_float64_stays_float64_under_autocast():
    case = Case()
    tensors = case.tensors(HYLA, torch.float64)
    for backend in ("hyla_cpu", "hyla_chunked"):
        found = differentiate(BACKENDS[backend], HYLA, case, tensors, autocast=torch.bfloat16)
        for name, tensor in expected_of(HYLA, case, tensors).items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("backend", ["hyla_cpu", "hyla_triton"])
def test_parameters_of_an_unsupported_dtype_are_refused_by_name(backend, name):
    tensors = given(HYLA_PLUS, Case(), torch.bfloat16)
    tensors[name] = tensors[name].half()
    with pytest.raises(
        ValueError, match=r"in the dtype of the queries, torch.bfloat16 or torch.float32, not torch.float16"
    ):
        differentiate(BACKENDS[backend], HYLA_PLUS, Case(), tensors)


# Formats of the CPU kernel.


@numba.njit
def _widen_all(stored, out):
    for i in range(stored.shape[0]):
        out[i] = vectors_cpu_hyla.widened(stored[i])


@numba.njit
def _round_all(x, out):
    for i in range(x.shape[0]):
        out[i] = vectors_cpu_hyla.rounded(x[i], out)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, np.int16), (torch.float16, np.uint16)])
def test_the_kernel_reads_and_writes_half_precision_as_torch_does(dtype, bits):
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    expected = torch.from_numpy(every.view(np.int16)).view(dtype).float()
    found = np.empty(2**16, np.float32)
    _widen_all(every.view(bits), found)
    assert np.array_equal(found, expected.numpy(), equal_nan=True)

    # Every number of the format, those between it and the next, and any.
    near = expected[expected.isfinite()].view(torch.int32)
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    steps = [
        torch.tensor(step, dtype=torch.int32) for step in (-1, 0, 1, 2**12 - 1, 2**12, 2**12 + 1, 2**15, 2**15 + 1)
    ]
    wide = torch.cat([*(near + step for step in steps), anything]).view(torch.float32)
    rounded = np.empty(wide.numel(), bits)
    _round_all(wide.numpy(), rounded)
    found = torch.from_numpy(rounded.view(np.int16)).view(dtype)
    torch.testing.assert_close(found, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


# Which implementation a layer is computed by.


@pytest.fixture
def taken(monkeypatch):
    """Names of the implementations that computed, in order; how often each was asked whether it can."""
    names, asked = [], Counter()

    def noted(name, row):
        def problem(call):
            asked[name] += 1
            return row.problem(call)

        def compute(call):
            names.append(name)
            return row.compute(call)

        return row._replace(problem=problem, compute=compute)

    for name, row in list(IMPLEMENTATIONS.items()):
        monkeypatch.setitem(IMPLEMENTATIONS, name, noted(name, row))
    monkeypatch.setattr(backends_hyla, "_EAGER_ELEMENTS", 0)
    names_and_asked = dataclasses.make_dataclass("Taken", ["names", "asked"])(names, asked)
    return names_and_asked


# Two layers whose heads are those of `Case`, so that the kernel is compiled once for all tests of a dtype.
HEADS_OF_CASE = {"num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 5, "value_head_dim": 7}
MODELS = {
    "-".join(map(str, row)): {
        "attention_type": row[0],
        "score_norm": row[1],
        "value_activation": row[2],
        "value_depth": row[3],
    }
    for row in ROWS
}
MODELS |= {
    "qk_norm": {"qk_norm": True},
    "no positions": {"position_type": "none"},
    "causal, rms_norm": {"is_causal": True, "norm_type": "rms_norm", "qk_norm": True},
    "gelu": {"value_activation": "gelu"},
}


@half
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_a_layer_is_computed_by_the_same_implementation_in_every_precision(settings, dtype, taken):
    torch.manual_seed(0)
    model = HylaForSequenceClassification(
        HylaConfig(**HEADS_OF_CASE, hidden_size=32, intermediate_size=32, **settings)
    )
    ids = torch.randint(0, 8, (3, 24))
    padding = (torch.arange(24)[None, :] >= torch.tensor([0, 5, 20])[:, None]).long()

    def implementations(model, autocast):
        names = []
        for training in (True, False):
            taken.names.clear()
            taken.asked.clear()
            with torch.autocast("cpu", dtype, enabled=autocast), torch.set_grad_enabled(training):
                loss = model.train(training)(input_ids=ids, attention_mask=padding, labels=ids[:, :4]).loss
            if training:
                model.zero_grad()
                loss.backward()
                assert all(parameter.grad.dtype == parameter.dtype for parameter in model.parameters())
                assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
            assert max(taken.asked.values()) <= len(taken.names)
            names += taken.names
        return names

    in_single_precision = implementations(model, autocast=False)
    training, evaluation = in_single_precision[:2], in_single_precision[2:]
    assert training == 2 * ["eager" if "gelu" in settings.values() else "hyla_cpu"]
    assert evaluation == (2 * ["hyla_sdpa"] if settings.get("attention_type") == "softmax" else training)
    assert implementations(model, autocast=True) == in_single_precision
    assert implementations(model.to(dtype), autocast=False) == in_single_precision


@pytest.mark.parametrize("backend", ["hyla", "hyla_cpu", "hyla_chunked"])
def test_an_implementation_is_checked_once_per_call(backend, taken):
    tensors = torch.randn(3, 1, 3, 19, 5).unbind()
    BACKENDS[backend](Layer(*HYLA[:3], None), *tensors, None, 0.5)
    name = "hyla_cpu" if backend == "hyla" else backend
    assert (taken.names, taken.asked[name]) == ([name], 1)


def test_the_former_name_of_the_chunked_implementation_still_works(taken, caplog):
    model = HylaForSequenceClassification(HylaConfig(num_hidden_layers=1, attn_implementation="hyla_lean")).eval()
    model(input_ids=torch.randint(0, 8, (1, 36)))
    assert taken.names == ["hyla_chunked"]
    assert "'hyla_lean' is deprecated: write 'hyla_chunked'" in caplog.text


@half
def test_a_model_under_autocast_learns_as_in_single_precision(dtype, monkeypatch):
    monkeypatch.setattr(backends_hyla, "_EAGER_ELEMENTS", 0)
    torch.manual_seed(1)
    config = HylaConfig(**HEADS_OF_CASE, qk_norm=True, attention_dropout=0.0)
    model = HylaForSequenceClassification(config).train()
    ids = torch.randint(0, 8, (3, 24))

    def gradients(autocast):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=autocast):
            model(input_ids=ids, labels=ids[:, :4]).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    single, found = gradients(autocast=False), gradients(autocast=True)
    flat = [torch.cat([gradient.flatten() for gradient in of.values()]) for of in (single, found)]
    # Some tens of roundings lie between an input and a gradient.
    assert (flat[0] - flat[1]).norm() < 16 * torch.finfo(dtype).eps * flat[0].norm()


@half
def test_the_kernel_under_autocast_is_the_same_in_a_compiled_model(dtype, monkeypatch):
    monkeypatch.setattr(backends_hyla, "_EAGER_ELEMENTS", 0)
    torch.manual_seed(0)
    config = HylaConfig(**HEADS_OF_CASE, qk_norm=True, value_depth=2, attn_implementation="hyla_cpu")
    model = HylaForSequenceClassification(config).train()
    ids = torch.randint(0, 8, (3, 24))
    found = []
    for run in (torch.compile(model, backend="aot_eager"), model):
        torch.manual_seed(1)  # of dropout
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = run(input_ids=ids, labels=ids[:, :4]).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.compiler.reset()
    for compiled, eager in zip(*found, strict=True):
        assert (compiled - eager).norm() <= 2 * torch.finfo(dtype).eps * eager.norm() + 1e-6


@half
def test_the_operators_pass_torchs_opcheck_in_half_precision(dtype):
    case = sized(Case(batch=2), dtype)
    tensors = {name: x.detach().requires_grad_() for name, x in given(HYLA_PLUS, case, dtype).items()}
    query, key, value, bias, mixing = tensors.values()
    arguments = (query, key, value, None, bias, mixing, None, 0.5, "softmax", "relu", True, 0.0)
    torch.library.opcheck(
        torch.ops.hyla.cpu_forward,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    output, statistics = torch.ops.hyla.cpu_forward(*arguments)
    inputs = [x.detach() if torch.is_tensor(x) else x for x in (statistics, *arguments)]
    cotangent = torch.randn(output.shape).to(dtype)
    gradients = torch.ops.hyla.cpu_backward(cotangent, *inputs)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if torch.is_tensor(x) else x for x in (cotangent, *inputs)]
        told = torch.ops.hyla.cpu_backward(*fake)
    assert [(x.dtype, x.stride()) for x in gradients] == [(x.dtype, x.stride()) for x in told]

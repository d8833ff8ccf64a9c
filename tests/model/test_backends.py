"""Every way to compute attention against the eager implementation in float64: output and gradients, by name."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from model_helpers import (
    ATTENTION_TYPES,
    HYLA,
    HYLA_PLUS,
    LINEAR,
    ROW_IDS,
    ROWS,
    SOFTMAX,
    Case,
    Layer,
    filled_with_nan,
    ids,
    make,
)
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.model import backends_hyla, chunked_hyla, kernels_cpu_hyla, ops_cpu_hyla, tiles_cpu_hyla
from hf_hyla.model.attention_hyla import (
    by_pair,
    dropout_seed,
    eager_attention_forward,
    largest_intermediate,
    pair_dropout,
)
from hf_hyla.model.backends_hyla import BACKENDS, Call, fastest_implementation


numba = pytest.importorskip("numba", reason="the fused CPU kernel is compiled by numba")


def differentiate(backend, row, case, dtype):
    """Output and gradients by name, all in float64."""
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(row, dtype).items()}
    layer = Layer(*row[:3], leaves.get("value_mixing"))
    torch.manual_seed(7)  # from which the backend draws its dropout
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
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent.to(dtype))
    return {"output": output.detach().double()} | {
        name: gradient.double() for name, gradient in zip(leaves, gradients, strict=True)
    }


def assert_equal(got, expected, forward, backward):
    for name, tensor in expected.items():
        scale = tensor.abs().max()
        error = (got[name] - tensor).abs().max()
        assert error <= (forward if name == "output" else backward) * scale + 1e-12, f"{name}: {error / scale:.1e}"


def compare(backend, row, case, dtype=torch.float64):
    expected = differentiate(eager_attention_forward, row, case, torch.float64)
    bounds = (1e-12, 1e-11) if dtype == torch.float64 else (1e-5, 1e-4)
    assert_equal(differentiate(BACKENDS[backend], row, case, dtype), expected, *bounds)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of the chunked implementation of three queries or so, the last of them shorter."""
    monkeypatch.setattr(chunked_hyla, "CHUNK_ELEMENTS", 1200)


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "random"])
@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_chunked_implementation_equals_the_definition(row, mask, small_chunks):
    compare("hyla_chunked", row, Case(mask=mask, dropout=0.3 if mask == "random" else 0.0))
    compare("hyla_chunked", row, Case(queries=5, keys=19, mask=mask))


@pytest.mark.usefixtures("one_size_of_tiles")
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "random"])
@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_cpu_kernel_equals_the_definition(row, mask):
    compare("hyla_cpu", row, Case(mask=mask, dropout=0.3 if mask == "random" else 0.0))
    compare("hyla_cpu", row, Case(queries=5, keys=19, mask=mask))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("row", [HYLA, LINEAR], ids=["hyla", "linear"])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1), (2, 2, 37), (1, 36, 36), (2, 63, 63), (1, 17, 129), (1, 129, 13), (1, 20, 1000)],
    ids=lambda size: "x".join(map(str, size)),
)
def test_cpu_kernel_equals_the_definition_in_single_precision_at_odd_sizes(row, size, threads, monkeypatch):
    # Fresh memory that holds NaN shows what was never written, and what is read before it was.
    monkeypatch.setattr(torch.Tensor, "new_empty", filled_with_nan(torch.Tensor.new_empty))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch, queries, keys = size
        compare("hyla_cpu", row, Case(batch, 5, queries, keys, 4, 3, dropout=0.1), torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "lowest"), [("float32", -87.0), ("float64", -708.0)])
def test_exponentials_of_the_cpu_kernel_are_accurate_over_their_whole_range(dtype, lowest):
    normal = np.linspace(lowest, 0.0, 10_001).astype(dtype)
    below = np.array([np.nextafter(normal[0], normal[0] - 1), -1e4, np.finfo(dtype).min, -np.inf], dtype)
    got = np.concatenate([normal, below, np.array([np.nan], dtype)])
    exponentiate = numba.njit(lambda values, maximum: tiles_cpu_hyla._exponentiate(values, maximum))
    exponentiate(got, np.dtype(dtype).type(0))
    expected = np.exp(normal.astype(np.longdouble))
    assert np.max(np.abs(got[: normal.size] - expected) / expected) < 2 * np.finfo(dtype).eps
    assert np.all(got[normal.size : -1] == 0) and np.isnan(got[-1])


@pytest.mark.parametrize("keys", [39, 150])  # one tile, and several
@pytest.mark.parametrize("row", [HYLA, LINEAR, SOFTMAX], ids=["hyla", "linear", "softmax"])
def test_cpu_kernel_hides_no_nan(row, keys):
    query, key, value = torch.randn(3, 1, 5, keys, 4).unbind()
    query[0, 2, 7, 1] = torch.nan
    output, _ = BACKENDS["hyla_cpu"](Layer(*row[:3], None), query, key, value, None, 0.5)
    broken = output.isnan().any(-1)  # (batch, query, heads)
    assert broken[0, 7, 2] and not broken[0, :7].any() and not broken[0, 8:].any()


@pytest.mark.parametrize("row", [HYLA, LINEAR], ids=["hyla", "linear"])
def test_what_a_query_without_a_partner_adds_does_not_depend_on_the_queries_before_it(row):
    query, key, value, gradient = torch.randn(4, 1, 5, 65, 4, generator=torch.Generator().manual_seed(0))
    # The last key is in a tile that only the last query sees, and the query before that one is broken.
    gradient[:, :, 63] = query[:, :, 63] = torch.nan
    for x in (query, key, value):
        x.requires_grad_()
    mask = torch.ones(65, 65).tril().bool()[None, None]
    output, _ = BACKENDS["hyla_cpu"](Layer(*row[:3], None), query, key, value, mask, 0.5)
    output.backward(gradient.transpose(1, 2))
    for x in (key, value):
        assert x.grad[:, :, :64].isnan().any() and x.grad[:, :, 64].isfinite().all()


def test_cpu_kernel_gives_the_same_bits_twice_and_stores_nothing_of_size_query_times_key():
    case = Case(batch=2, queries=300, keys=300, heads=5, width=4, value_width=3, dropout=0.2)
    first, second = (differentiate(BACKENDS["hyla_cpu"], HYLA, case, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

    saved = []
    leaves = case.tensors(HYLA, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        for tensor in leaves.values():
            tensor.requires_grad_()
        BACKENDS["hyla_cpu"](Layer("hyla", "rms_head", "relu", None), *list(leaves.values())[:3], None, 0.5)
    assert sum(saved) < 300 * 300


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "random"])
def test_sdpa_equals_the_definition(mask):
    compare("hyla_sdpa", SOFTMAX, Case(mask=mask))
    compare("hyla_sdpa", SOFTMAX, Case(queries=5, keys=19, mask=mask))


def test_a_backend_refuses_what_it_cannot_compute_with_the_reason():
    query = torch.randn(1, 2, 3, 4)
    calls = {
        (
            "hyla_sdpa",
            ("hyla", "rms_head", "relu"),
            0.0,
        ): "only mixes values by softmax scores, without a value activation",
        ("hyla_sdpa", ("softmax", "softmax", "none"), 0.5): "cannot drop the same pairs for the whole batch",
        ("hyla_cpu", ("hyla", "rms_head", "gelu"), 0.0): "value activation is relu or none, not GELU",
    }
    for (backend, row, dropout), message in calls.items():
        with pytest.raises(ValueError, match=message):
            BACKENDS[backend](Layer(*row, None), query, query, query, None, 0.5, dropout=dropout)
    with pytest.raises(ValueError, match="position biases of shape"):
        BACKENDS["hyla_cpu"](
            Layer("hyla", "rms_head", "relu", None),
            query,
            query,
            query,
            None,
            0.5,
            position_bias=torch.zeros(1, 2, 3, 3),
        )
    with pytest.raises(ValueError, match=r"computes in torch.float16, .*, torch.float64, not in torch.int64"):
        whole = query.long()
        BACKENDS["hyla_cpu"](Layer("hyla", "rms_head", "relu", None), whole, whole, whole, None, 0.5)


@pytest.mark.parametrize(
    ("row", "shape", "dropout", "expected"),
    [
        (("hyla", "rms_head", "relu"), (1, 5, 8, 4), 0.0, "eager"),  # too small to be worth compiling for
        (("hyla", "rms_head", "relu"), (8, 5, 129, 4), 0.1, "hyla_cpu"),
        (("linear", "none", "none"), (8, 5, 129, 4), 0.1, "hyla_cpu"),
        (("hyla", "rms_head", "gelu"), (8, 5, 129, 4), 0.1, "eager"),
        (("hyla", "rms_head", "gelu"), (8, 5, 900, 4), 0.1, "hyla_chunked"),
        (("softmax", "softmax", "none"), (8, 5, 129, 4), 0.0, "hyla_sdpa"),
        (("softmax", "softmax", "none"), (8, 5, 129, 4), 0.1, "hyla_cpu"),
    ],
)
def test_the_default_takes_the_fastest_implementation_that_can_serve(row, shape, dropout, expected):
    query = torch.randn(shape)
    assert fastest_implementation(Call(Layer(*row, None), query, query, query, None, 0.5, dropout=dropout)) == expected


@pytest.mark.parametrize(
    ("kind", "heads", "width", "length"),
    [("hyla", 1, 128, 512), ("hyla", 1, 128, 2048), ("hyla+", 4, 16, 400), ("hyla", 8, 16, 800)],
)
def test_without_a_kernel_wide_values_do_not_fill_the_memory(kind, heads, width, length):
    mixing = torch.empty(heads, width, width, device="meta") if kind == "hyla+" else None
    layer = Layer("hyla", "rms_head", "relu", mixing)
    tensor = torch.empty(1, heads, length, width, device="meta")
    largest = length**2 * (heads * width if kind == "hyla+" else max(heads, width))
    assert largest_intermediate(layer, tensor, tensor, tensor) == largest
    assert fastest_implementation(Call(layer, tensor, tensor, tensor, None, 0.5)) == "hyla_chunked"


def test_chunks_of_the_chunked_implementation_hold_the_hidden_layers_of_every_head(monkeypatch):
    monkeypatch.setattr(chunked_hyla, "CHUNK_ELEMENTS", 1200)
    lengths = []

    def noted(module, query, *args, **kwargs):
        lengths.append(query.shape[2])
        return eager_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setattr(chunked_hyla, "eager_attention_forward", noted)
    tensors = torch.randn(3, 1, 3, 20, 5).unbind()
    BACKENDS["hyla_chunked"](Layer("hyla", "rms_head", "relu", torch.randn(3, 5, 5)), *tensors, None, 0.5)
    assert lengths == [4] * 5  # of 20 keys x 3 heads x 5 elements each


@pytest.mark.parametrize("row", [LINEAR, HYLA_PLUS], ids=["linear", "hyla+"])
def test_chunked_implementation_in_half_precision_adds_its_chunks_up_without_rounding(row, monkeypatch):
    case = Case(batch=1, heads=4, queries=256, keys=32, width=8, value_width=8)
    expected = differentiate(eager_attention_forward, row, case, torch.float64)
    monkeypatch.setattr(chunked_hyla, "CHUNK_ELEMENTS", 1)  # a chunk for every query

    def errors(backend):
        found = differentiate(backend, row, case, torch.bfloat16)
        return {name: (found[name] - tensor).norm() / tensor.norm() for name, tensor in expected.items()}

    chunked, eager = errors(BACKENDS["hyla_chunked"]), errors(eager_attention_forward)
    for name in expected:
        assert chunked[name] <= 1.2 * eager[name], (
            f"{name}: {chunked[name]:.2e}, where the eager implementation has {eager[name]:.2e}"
        )


@pytest.mark.parametrize("shape", [(3, 19 + 19 - 1), (1, 3, 19, 19), (3, 1, 1, 19), (3, 3, 19, 1)])
def test_chunked_implementation_takes_biases_of_every_shape(shape, small_chunks):
    tensors = Case().tensors(HYLA, torch.float64)
    tensors["position_bias"] = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layer = Layer(*HYLA[:3], None)
    found = []
    for backend in (BACKENDS["hyla_chunked"], eager_attention_forward):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        output, _ = backend(layer, attention_mask=None, scaling=0.5, **leaves)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))])
    for chunked, eager in zip(*found, strict=True):
        torch.testing.assert_close(chunked, eager, rtol=1e-10, atol=1e-10)


def test_chunked_implementation_trains_an_activation_that_has_parameters(small_chunks):
    tensors = Case().tensors(HYLA, torch.float64)
    slopes = []
    for backend in (BACKENDS["hyla_chunked"], eager_attention_forward):
        layer = Layer("hyla", "rms_head", "prelu", None)
        layer.value_activation.double()
        backend(layer, attention_mask=None, scaling=0.5, **tensors)[0].square().sum().backward()
        slopes.append(layer.value_activation.weight.grad)
    torch.testing.assert_close(*slopes)


def test_chunked_implementation_takes_memory_that_grows_with_the_length_and_not_with_its_square():
    # In a process of its own, where no memory has been used and kept before.
    script = (
        "import torch\n"
        "from types import SimpleNamespace\n"
        "from hf_hyla.benchmark.meter import Meter\n"
        "from hf_hyla.model import backends_hyla, chunked_hyla\n"
        "chunked_hyla.CHUNK_ELEMENTS = 2**20\n"
        "torch.set_num_threads(1)\n"
        "layer = SimpleNamespace(attention_type='hyla', score_norm='rms_head', value_activation=torch.nn.ReLU(),\n"
        "                        value_mixing=None)\n"
        "def work(length):\n"
        "    tensors = [torch.randn(1, 8, length, 16, requires_grad=True) for _ in range(3)]\n"
        "    backends_hyla.BACKENDS['hyla_chunked'](layer, *tensors, None, 0.25)[0].sum().backward()\n"
        "meter = Meter(torch.device('cpu'), 1, print)\n"
        "print(*(meter._peak_bytes(lambda: work(length)) for length in (512, 1536)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    short, long = map(int, result.stdout.split())
    assert long < 2 * short


def test_chunked_implementation_is_computed_between_the_graphs_of_a_compiled_model(monkeypatch):
    monkeypatch.setattr(chunked_hyla, "CHUNK_ELEMENTS", 20_000)
    torch.manual_seed(0)
    model = HylaForSequenceClassification(HylaConfig(num_hidden_layers=2, attn_implementation="hyla_chunked")).train()
    ids = torch.randint(0, 8, (3, 36))
    found = []
    for run in (torch.compile(model, backend="eager"), model):
        torch.manual_seed(1)  # of dropout
        model.zero_grad()
        run(input_ids=ids, labels=ids[:, :4]).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found)
    torch.compiler.reset()


def test_chunked_implementation_computes_shapes_of_meta_tensors():
    tensor = torch.empty(2, 3, 3000, 5, device="meta", requires_grad=True)
    output, _ = BACKENDS["hyla_chunked"](Layer(*HYLA[:3], None), tensor, tensor, tensor, None, 0.5)
    output.sum().backward()
    assert output.shape == (2, 3000, 3, 5) and tensor.grad.shape == tensor.shape


def test_another_implementation_takes_over_with_a_warning_if_numba_is_missing_or_fails(monkeypatch, caplog):
    layer, query = Layer("hyla", "rms_head", "relu", None), torch.randn(8, 5, 129, 4)
    monkeypatch.setattr(ops_cpu_hyla, "numba", None)
    backends_hyla.logger.warning_once.__func__.cache_clear()
    for _ in range(2):
        assert fastest_implementation(Call(layer, query, query, query, None, 0.5)) == "eager"
    assert [record.getMessage() for record in caplog.records] == [
        "Attention is computed without a fused kernel: numba is not installed (pip install hf-hyla[cpu])."
    ]
    with pytest.raises(ValueError, match=r"numba is not installed \(pip install hf-hyla\[cpu\]\)"):
        BACKENDS["hyla_cpu"](layer, query, query, query, None, 0.5)
    monkeypatch.undo()

    def broken(*sizes):
        raise RuntimeError("no code generator for this machine")

    monkeypatch.setattr(ops_cpu_hyla, "compiled_backward", broken)
    ops_cpu_hyla._compile_problem.cache_clear()
    assert fastest_implementation(Call(layer, query, query, query, None, 0.5)) == "hyla_cpu"
    assert fastest_implementation(Call(layer, query.clone().requires_grad_(), query, query, None, 0.5)) == "eager"
    monkeypatch.setattr(ops_cpu_hyla, "compiled_forward", broken)
    ops_cpu_hyla._compile_problem.cache_clear()
    assert fastest_implementation(Call(layer, query, query, query, None, 0.5)) == "eager"
    assert "no code generator for this machine" in ops_cpu_hyla.cpu_problem(query, query, query)
    ops_cpu_hyla._compile_problem.cache_clear()


def test_without_numba_the_package_imports_and_trains():
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch, hf_hyla\n"
        "model = hf_hyla.HylaForSequenceClassification(hf_hyla.HylaConfig(num_hidden_layers=1)).train()\n"
        "ids = torch.randint(0, 8, (512, 36))\n"
        "model(input_ids=ids, labels=ids[:, :4]).loss.backward()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    line = "Attention is computed without a fused kernel: numba is not installed (pip install hf-hyla[cpu]).\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, "", line)


def test_the_kernel_is_compiled_even_if_it_cannot_be_cached(monkeypatch):
    def nowhere(*_, **__):
        raise RuntimeError("cannot cache function 'forward': no locator available")

    monkeypatch.setattr("numba.core.dispatcher.FunctionCache", nowhere)
    compile_anew = kernels_cpu_hyla.compiled_forward.__wrapped__
    monkeypatch.setattr(ops_cpu_hyla, "compiled_forward", compile_anew)
    query = torch.randn(1, 2, 5, 4)
    layer = Layer("linear", "none", "none", None)
    expected, _ = eager_attention_forward(layer, query, query, query, None, 0.5)
    torch.testing.assert_close(BACKENDS["hyla_cpu"](layer, query, query, query, None, 0.5)[0], expected)


MISFITS = {
    "fewer values than keys": {"value": (2, 4, 8, 3)},
    "wider keys": {"key": (2, 4, 9, 6)},
    "one key for all rows": {"key": (1, 4, 9, 5)},
    "one key for all heads": {"key": (2, 1, 9, 5)},
    "one bias for all pairs": {"position_bias": (4, 1)},
    "a bias for every pair": {"position_bias": (1, 4, 9, 9)},
    "narrower mixing": {"value_mixing": (4, 2, 2)},
    "a mask for every head": {"mask": (2, 4, 9, 9)},
}


@pytest.mark.parametrize("backend", ["hyla_cpu", "hyla"])
@pytest.mark.parametrize("shapes", MISFITS.values(), ids=MISFITS)
def test_the_kernel_refuses_shapes_that_broadcast_and_the_default_computes_them(monkeypatch, backend, shapes):
    monkeypatch.setattr(backends_hyla, "_EAGER_ELEMENTS", 0)
    shapes = {"query": (2, 4, 9, 5), "key": (2, 4, 9, 5), "value": (2, 4, 9, 3), "position_bias": (4, 17)} | shapes
    mask = torch.rand(shapes.pop("mask")) < 0.5 if "mask" in shapes else None
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    layer = Layer(*HYLA[:3], tensors.pop("value_mixing", None))
    bias = tensors.pop("position_bias")

    def compute(function):
        return function(layer, *tensors.values(), mask, 0.5, position_bias=bias)[0]

    if backend == "hyla_cpu":
        with pytest.raises(ValueError, match="hyla_cpu cannot compute this layer: it takes"):
            compute(BACKENDS[backend])
        return
    try:
        expected = compute(eager_attention_forward)
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error)):
            compute(BACKENDS[backend])
    else:
        torch.testing.assert_close(compute(BACKENDS[backend]), expected)


def test_the_kernel_refuses_dtypes_that_differ():
    query = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"values in the dtype of the queries, .*32, not .*64"):
        BACKENDS["hyla_cpu"](Layer(*HYLA[:3], None), query, query, query.double(), None, 0.5)


FORWARD_MODE = {
    "hyla_cpu": Layer(*HYLA[:3], None),
    "hyla_chunked": Layer("hyla", "rms_head", "gelu", None),
    "hyla_sdpa": Layer(*SOFTMAX[:3], None),
}


@pytest.mark.usefixtures("one_size_of_tiles")
@pytest.mark.parametrize("transform", ["dual", "jvp"])
@pytest.mark.parametrize("fastest", FORWARD_MODE)
def test_forward_mode_gradients_are_those_of_the_eager_implementation(monkeypatch, fastest, transform):
    monkeypatch.setattr(backends_hyla, "_EAGER_ELEMENTS", 0)
    monkeypatch.setattr(backends_hyla, "CHUNK_ELEMENTS", 0)
    layer, (query, key, value, tangent) = FORWARD_MODE[fastest], torch.randn(4, 2, 3, 9, 5, dtype=torch.float64)
    assert fastest_implementation(Call(layer, query, key, value, None, 0.5)) == fastest

    def along(backend):
        def attend(query):
            return BACKENDS[backend](layer, query, key, value, None, 0.5)[0]

        if transform == "jvp":
            return torch.func.jvp(attend, (query,), (tangent,))[1]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(attend(forward_ad.make_dual(query, tangent))).tangent

    assert along("eager").norm() > 0.1
    torch.testing.assert_close(along("hyla"), along("eager"))
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        along(fastest)


@pytest.mark.parametrize("mask_shape", [(40, 40), (1, 40, 40)])
def test_the_chunked_implementation_takes_masks_and_biases_of_fewer_axes(small_chunks, mask_shape):
    query, key, value = torch.randn(3, 2, 3, 40, 5)
    bias, mask = torch.randn(3, 40, 40), torch.rand(mask_shape) < 0.5
    layer = Layer(*HYLA[:3], None)
    expected, _ = eager_attention_forward(layer, query, key, value, mask, 0.5, position_bias=bias)
    output, _ = BACKENDS["hyla_chunked"](layer, query, key, value, mask, 0.5, position_bias=bias)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("length", [1, 2])
def test_gradients_of_a_single_head_do_not_cancel_out(length):
    """
    RMSHead makes a sign of it, whose gradient is what epsilon leaves. Of more pairs some score is so small that its own rounding
    counts.
    """
    case = Case(batch=8, heads=1, queries=length, keys=length)
    compare("hyla_cpu", HYLA, case, torch.float32)


def test_the_shortcut_of_the_last_layer_drops_the_same_pairs(monkeypatch):
    monkeypatch.setattr(backends_hyla, "_EAGER_ELEMENTS", 0)
    torch.manual_seed(0)
    model = HylaForSequenceClassification(HylaConfig(num_hidden_layers=2, attention_dropout=0.5)).train()
    ids = torch.randint(0, 8, (4, 36))
    logits = {}
    for backend in ("eager", "hyla", "hyla_cpu", "hyla_chunked"):
        model.set_attn_implementation(backend)
        torch.manual_seed(1)
        logits[backend] = model(input_ids=ids).logits
    for backend in logits:
        torch.testing.assert_close(logits[backend], logits["eager"], rtol=1e-4, atol=1e-5)


def test_pairs_are_dropped_at_the_stated_rate_and_anew_for_every_seed():
    torch.manual_seed(0)
    positions = torch.arange(1000)
    masks = [pair_dropout(positions, positions, dropout_seed("cpu"), 0.3) for _ in range(3)]
    for mask in masks:
        assert abs((mask == 0).double().mean() - 0.3) < 0.002
        torch.testing.assert_close(mask[mask > 0], torch.full_like(mask[mask > 0], 1 / 0.7))
        assert ((mask == 0).double().mean(dim=0) - 0.3).abs().max() < 0.07  # no row or column of one kind
        assert ((mask == 0).double().mean(dim=1) - 0.3).abs().max() < 0.07
    both = ((masks[0] == 0) & (masks[1] == 0)).double().mean()
    assert abs(both - 0.09) < 0.003  # of two seeds independent
    part = pair_dropout(positions[10:20], positions, torch.tensor([5, 6]), 0.3)
    assert torch.equal(part, pair_dropout(positions, positions, torch.tensor([5, 6]), 0.3)[10:20])


def test_values_by_diagonal_belong_to_pairs_of_one_distance():
    by_diagonal = torch.arange(7.0)[None]
    expected = [[key - query + 3 for key in range(4)] for query in range(4)]
    assert by_pair(by_diagonal, 4, 4)[0].tolist() == expected


def test_a_model_gives_the_same_answers_and_codes_by_every_backend():
    torch.manual_seed(0)
    config = HylaConfig(num_hidden_layers=2, num_attention_heads=5, attention_dropout=0.0)
    model = HylaForSequenceClassification(config).eval()
    ids = torch.randint(0, 8, (3, 36))
    padding = (torch.arange(36)[None, :] >= torch.tensor([0, 5, 20])[:, None]).long()
    assert model.config._attn_implementation == "hyla"
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, attention_mask=padding, output_attentions=True)
    for backend in ("hyla", "hyla_cpu", "hyla_chunked"):
        model.set_attn_implementation(backend)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=padding).logits, expected.logits)
        codes = model(input_ids=ids, attention_mask=padding, output_attentions=True).attentions
        torch.testing.assert_close(codes, expected.attentions)
    model.set_attn_implementation("hyla_sdpa")
    with pytest.raises(ValueError, match="cannot compute this layer"):
        model(input_ids=ids)


EMPTY = [
    *(
        ({"attention_type": name}, backend)
        for name in ATTENTION_TYPES
        for backend in ("hyla", "eager", "hyla_chunked", "hyla_cpu")
    ),
    ({"attention_type": "softmax", "attention_dropout": 0.0}, "hyla_sdpa"),
    ({"value_depth": 2}, "hyla_cpu"),
    ({"num_answers": 1, "qk_norm": True}, "hyla"),
    ({"ffn_type": "moe", "output_router_logits": True}, "hyla"),
]


@pytest.mark.usefixtures("one_size_of_tiles")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("settings", "backend"), EMPTY)
def test_an_empty_batch_gives_empty_logits_and_gradients_of_zero(settings, backend, masked):
    model = make(num_attention_heads=5, head_dim=4, value_head_dim=4, **settings).train()
    model.set_attn_implementation(backend)
    answers = () if model.config.num_answers == 1 else (4,)
    labels = torch.zeros(0, *answers, dtype=torch.long)
    mask = torch.ones(0, 8, dtype=torch.long) if masked else None
    out = model(ids(0, 8), attention_mask=mask, labels=labels, num_items_in_batch=4)
    assert out.logits.shape == (0, *answers, 8) and out.loss == 0
    out.loss.backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_the_operators_of_the_kernel_pass_torchs_opcheck():
    case = Case(batch=2, heads=5, queries=9, keys=9, width=4, value_width=3)
    tensors = [tensor.requires_grad_() for tensor in case.tensors(HYLA, torch.float32).values()]
    arguments = (*tensors[:3], None, tensors[3], None, None, 0.5, "rms_head", "relu", True, 0.0)
    torch.library.opcheck(
        torch.ops.hyla.cpu_forward,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    # What a compiler is told of the gradients, their strides included, must be so.
    output, statistics = torch.ops.hyla.cpu_forward(*arguments)
    inputs = [None if x is None else x.detach() if torch.is_tensor(x) else x for x in (statistics, *arguments)]
    gradients = torch.ops.hyla.cpu_backward(torch.randn(output.shape), *inputs)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if torch.is_tensor(x) else x for x in (torch.randn(output.shape), *inputs)]
        told = torch.ops.hyla.cpu_backward(*fake)
    assert [x.stride() for x in gradients] == [x.stride() for x in told]

"""Tests of the functions that are faster than torch's own on a CPU: products by oneDNN and GELU by numba."""

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.activations import ACT2FN

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.model import function_kernels_cpu_hyla, vectors_cpu_hyla
from hf_hyla.model import functions_cpu_hyla as functions
from hf_hyla.model.functions_cpu_hyla import activated_linear, cpu_functions
from hf_hyla.model.layers_hyla import HylaMoE


linear, gelu = nn.functional.linear, nn.functional.gelu
TANH_GELU = ACT2FN["gelu_pytorch_tanh"]


@pytest.fixture(autouse=True)
def everything_is_served(monkeypatch):
    """On any processor that has the operator, and however small the work."""
    if not functions.onednn_is_available():
        pytest.skip("this build of torch lacks oneDNN's operator")
    pytest.importorskip("numba")
    monkeypatch.setattr(functions, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(functions, "onednn_fuses_gelu", lambda: True)
    monkeypatch.setattr(functions, "_SMALLEST_PRODUCT", 1)
    monkeypatch.setattr(functions, "_SMALLEST_ACTIVATION", 1)
    monkeypatch.setattr(functions, "_SMALLEST_STATES", 1)


@pytest.fixture
def served(monkeypatch):
    """Names of the functions that were served, in order."""
    names = []
    for name in ("_Linear", "_Gelu"):
        function = getattr(functions, name)
        apply = function.apply
        monkeypatch.setattr(
            function, "apply", lambda *args, name=name, apply=apply: names.append(name) or apply(*args)
        )
    fused = functions.onednn_gelu
    monkeypatch.setattr(functions, "onednn_gelu", lambda *args: names.append("gelu of product") or fused(*args))
    return names


def products_by_loop(input, weight, bias, cotangent):
    """The output and all gradients of a linear layer, one sum at a time, in float64."""
    rows, cotangents = input.double().reshape(-1, input.shape[-1]), cotangent.double().reshape(-1, weight.shape[0])
    weight = weight.double()
    output, grad_rows = torch.zeros_like(cotangents), torch.zeros_like(rows)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros(len(weight), dtype=torch.float64)
    for i, (row, grad) in enumerate(zip(rows, cotangents, strict=True)):
        for o in range(len(weight)):
            output[i, o] = sum(x * w for x, w in zip(row.tolist(), weight[o].tolist(), strict=True))
            grad_rows[i] += grad[o] * weight[o]
            grad_weight[o] += grad[o] * row
        grad_bias += grad
    if bias is not None:
        output += bias.double()
    shape = input.shape[:-1]
    return output.view(*shape, -1), grad_rows.view(*shape, -1), grad_weight, grad_bias


@pytest.mark.parametrize("shape, outputs", [((3, 5, 7), 4), ((17, 6), 9), ((2, 33, 16), 48), ((1, 1), 1)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_and_their_gradients_equal_plain_sums(shape, outputs, biased, served):
    generator = torch.Generator().manual_seed(0)
    input, weight, bias, cotangent = (
        30 * torch.randn(size, generator=generator)
        for size in (shape, (outputs, shape[-1]), (outputs,), (*shape[:-1], outputs))
    )
    leaves = [tensor.requires_grad_() for tensor in ((input, weight, bias) if biased else (input, weight))]
    with cpu_functions(input):
        output = linear(*leaves)
    found = [output, *torch.autograd.grad(output, leaves, cotangent)]
    assert served == ["_Linear"]
    expected = products_by_loop(input.detach(), weight.detach(), bias.detach() if biased else None, cotangent)
    for got, right in zip(found, expected, strict=False):
        torch.testing.assert_close(got.double(), right, rtol=0, atol=2e-6 * right.abs().max().item())


def test_frozen_tensors_get_no_gradient():
    input, weight, bias = torch.randn(9, 8), torch.randn(4, 8), torch.randn(4)
    for trained in range(3):
        leaves = [x.clone().requires_grad_(n == trained) for n, x in enumerate((input, weight, bias))]
        with cpu_functions(input):
            linear(*leaves).square().sum().backward()
        expected = [x.clone().requires_grad_(n == trained) for n, x in enumerate((input, weight, bias))]
        linear(*expected).square().sum().backward()
        for got, right in zip(leaves, expected, strict=True):
            assert (got.grad is None) == (right.grad is None)
            if right.grad is not None:
                torch.testing.assert_close(got.grad, right.grad)


def test_gelu_and_its_gradient_equal_the_formula_at_all_magnitudes(served):
    special = [
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        5.5,
        -5.5,
        30.0,
        -30.0,
        1e20,
        -1e20,
        float("inf"),
        float("-inf"),
        float("nan"),
    ]
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor(special)]).requires_grad_()
    with cpu_functions(x):
        y = gelu(x, approximate="tanh")
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(x, 3.0))
    assert served == ["_Gelu"]
    double = x.detach().double()[:-3]
    inner = (2 / torch.pi) ** 0.5 * (double + 0.044715 * double**3)
    slope = (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * double**2)
    # By exponentials, so that nothing cancels: (1 + tanh u) / 2 = σ(2u).
    sigma = torch.sigmoid(2 * inner)
    bend = torch.where(sigma * (1 - sigma) > 0, double * sigma * torch.sigmoid(-2 * inner) * 2 * slope, 0.0)
    # An exponential is off by as many roundings as its exponent is large.
    torch.testing.assert_close(y.detach().double()[:-3], double * sigma, rtol=6e-6, atol=1e-12)
    torch.testing.assert_close(gradient.double()[:-3], 3 * (sigma + bend), rtol=2e-6, atol=3e-6)
    assert y[-3] == float("inf") and y[-1].isnan() and gradient[-1].isnan()


def block(x, weight, bias):
    return gelu(linear(x, weight, bias), approximate="tanh").square().mean()


def served_block(x, weight, bias):
    with cpu_functions(x):
        return block(x, weight, bias)


def given():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size in ((6, 10, 8), (12, 8), (12,))]


def test_gradients_can_be_differentiated(served):
    def twice(function):
        leaves = [x.requires_grad_() for x in given()]
        gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    for got, right in zip(twice(served_block), twice(block), strict=True):
        torch.testing.assert_close(got, right)
    assert served == ["_Linear", "_Gelu"]


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(f, argnums=(0, 1, 2)),
        lambda f: torch.func.hessian(f, argnums=2),
        lambda f: lambda x, w, b: torch.func.jvp(f, (x, w, b), (x + 1, w + 1, b + 1)),
        lambda f: lambda x, w, b: torch.func.jvp(lambda x: f(x, w, b), (x,), (x + 1,)),
        lambda f: torch.vmap(f, in_dims=(0, None, None)),
        lambda f: torch.vmap(f, in_dims=(None, 0, 0)),
        lambda f: torch.vmap(torch.func.grad(f, argnums=1), in_dims=(0, None, None)),
        lambda f: torch.func.jacrev(f, argnums=1),
        lambda f: lambda *tensors: torch.autograd.functional.jacobian(f, tensors, vectorize=True),
    ],
    ids=[
        "grad",
        "hessian",
        "jvp",
        "jvp of one",
        "vmap",
        "vmap of weights",
        "gradients of every sample",
        "jacrev",
        "jacobian",
    ],
)
def test_function_transforms_give_what_torch_gives(transform, request):
    x, weight, bias = given()
    if request.node.callspec.id == "vmap of weights":
        weight, bias = torch.stack([weight, weight + 1]), torch.stack([bias, bias + 1])
    torch.testing.assert_close(transform(served_block)(x, weight, bias), transform(block)(x, weight, bias))


@pytest.mark.parametrize("graph", [torch.no_grad, torch.enable_grad])
def test_a_batch_of_gradients_is_computed(graph, served):
    def batch(function):
        leaves = [x.requires_grad_() for x in given()]
        hidden = function(*leaves)
        return torch.autograd.grad(hidden, leaves, torch.tensor([1.0, -2.0, 3.0]), is_grads_batched=True)

    def rows(context):
        def function(x, weight, bias):
            with context(x):
                return gelu(linear(x, weight, bias), approximate="tanh").square().sum()

        return function

    with graph():
        jacobian = torch.func.jacrev(rows(cpu_functions), argnums=(0, 1, 2))(*given())
        expected = torch.func.jacrev(rows(lambda x: contextlib.nullcontext()), argnums=(0, 1, 2))(*given())
    torch.testing.assert_close(jacobian, expected)
    torch.testing.assert_close(batch(rows(cpu_functions)), batch(rows(lambda x: contextlib.nullcontext())))
    assert "_Linear" in served and "_Gelu" in served


def test_a_traced_graph_holds_torchs_own_operators():
    x, weight, bias = given()
    graph = make_fx(served_block)(x, weight, bias)
    torch.testing.assert_close(graph(x + 1, weight, bias), block(x + 1, weight, bias))


@pytest.mark.parametrize("shape", [(1,), (1, 12)])
def test_torch_computes_products_with_a_bias_that_it_broadcasts(shape, served):
    x, weight, _ = given()
    bias = torch.randn(shape)
    with cpu_functions(x):
        torch.testing.assert_close(linear(x, weight, bias), x @ weight.mT + bias)
    assert served == []


@pytest.mark.parametrize("bias", [torch.arange(24.0)[::2], torch.ones(1).expand(12)], ids=["strided", "expanded"])
def test_torch_computes_products_with_a_bias_that_is_not_contiguous(bias, served):
    x, weight, _ = given()
    layer = nn.Linear(8, 12)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    with torch.no_grad(), cpu_functions(x):
        torch.testing.assert_close(linear(x, weight, layer.bias), x @ weight.mT + bias)
        found = activated_linear(layer, TANH_GELU, x)
    torch.testing.assert_close(found, TANH_GELU(x @ weight.mT + bias))
    assert not {"_Linear", "gelu of product"} & set(served)


def test_torch_computes_what_numba_cannot_compile(monkeypatch, served):
    def broken(*args):
        raise ValueError("LLVM does not know this processor")

    for name in ("compiled_gelu", "compiled_gelu_backward", "compiled_transpose"):
        monkeypatch.setattr(functions, name, broken)
    kernels = (functions._kernels_of_gelu, functions._kernel_of_transpose)
    for cached in kernels:
        cached.cache_clear()
    leaves = [x.requires_grad_() for x in given()]
    gradients = torch.autograd.grad(served_block(*leaves), leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(block(*leaves), leaves))
    assert served == ["_Linear"]
    for cached in kernels:
        cached.cache_clear()


CONFIG = HylaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize("shape, outputs", [((3, 5, 7), 4), ((17, 6), 9), ((2, 33, 16), 48), ((1, 1), 1)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_with_its_gelu_equals_the_formula(shape, outputs, biased, served):
    torch.manual_seed(0)
    layer = nn.Linear(shape[-1], outputs, bias=biased)
    x = 30 * torch.randn(shape)
    with torch.no_grad():
        layer.weight.normal_()
        found = activated_linear(layer, TANH_GELU, x)
    expected, *_ = products_by_loop(x, layer.weight.detach(), layer.bias, torch.zeros(*shape[:-1], outputs))
    expected = expected.detach()
    expected *= torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (expected + 0.044715 * expected**3))
    assert served == ["gelu of product"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def patched_linear():
    layer = nn.Linear(8, 12)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return layer


def hooked(module, hook=lambda module, args, output: 2 * output):
    module.register_forward_hook(hook)
    return module


def half_of_the_input(module, args):
    return args[0] / 2


def hooked_before():
    layer = nn.Linear(8, 12)
    layer.register_forward_pre_hook(half_of_the_input)
    return layer


@pytest.mark.parametrize(
    "make_layer, activation",
    [
        (lambda: hooked(nn.Linear(8, 12)), TANH_GELU),
        (hooked_before, TANH_GELU),
        (patched_linear, TANH_GELU),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 12)), TANH_GELU),
        (lambda: nn.Linear(8, 12).bfloat16(), TANH_GELU),
        (lambda: nn.Linear(8, 12).double(), TANH_GELU),
        (lambda: nn.Linear(8, 12), nn.GELU()),
        (lambda: nn.Linear(8, 12), ACT2FN["relu"]),
        (lambda: nn.Linear(8, 12), hooked(ACT2FN["gelu_pytorch_tanh"])),
    ],
    ids=[
        "hook",
        "hook before",
        "forward",
        "parametrization",
        "bfloat16",
        "float64",
        "other GELU",
        "ReLU",
        "hooked GELU",
    ],
)
def test_other_layers_and_activations_are_called_one_after_the_other(make_layer, activation, served):
    layer = make_layer()
    x = given()[0].to(next(layer.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(activated_linear(layer, activation, x), activation(layer(x)))
    assert "gelu of product" not in served


def test_a_hook_on_all_modules_is_called(served):
    seen, layer = [], nn.Linear(8, 12)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    with torch.no_grad():
        activated_linear(layer, TANH_GELU, given()[0])
    hook.remove()
    assert seen[0] is nn.Linear and not served


@pytest.mark.parametrize(
    "around",
    [
        lambda f, x: f(x),
        lambda f, x: torch.no_grad()(torch.vmap(f))(x),
        lambda f, x: torch.no_grad()(torch.func.jvp)(f, (x,), (x + 1,)),
        lambda f, x: torch.no_grad()(dual)(f, x),
        lambda f, x: torch.autocast("cpu", torch.bfloat16)(torch.no_grad()(f))(x),
        lambda f, x: make_fx(torch.no_grad()(f))(x)(x),
    ],
    ids=["gradients", "vmap", "jvp", "dual", "autocast", "make_fx"],
)
def test_under_transforms_layer_and_activation_are_called_one_after_the_other(around, served):
    layer, x = nn.Linear(8, 12), given()[0]
    found = around(lambda x: activated_linear(layer, TANH_GELU, x), x)
    torch.testing.assert_close(found, around(lambda x: TANH_GELU(layer(x)), x))
    assert not served


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x + 1)))


def model_and_ids():
    torch.manual_seed(0)
    return HylaForSequenceClassification(CONFIG).eval(), torch.randint(0, 9, (4, 36))


def without(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(functions, "_REPLACEMENTS", {})
        return function()


def test_linear_layers_use_our_products_and_stay_plain_modules(served, monkeypatch):
    model, ids = model_and_ids()
    logits = model(ids).logits
    assert served.count("_Linear") == 6 * 2 and served.count("_Gelu") == 2
    assert {type(module) for name, module in model.named_modules() if name.endswith("_proj")} == {nn.Linear}
    torch.testing.assert_close(logits, without(monkeypatch, lambda: model(ids).logits))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_products_and_gelu_are_one(context, served, monkeypatch):
    model, ids = model_and_ids()
    with context():
        logits = model(ids).logits
    assert served.count("gelu of product") == 2 and "_Gelu" not in served
    monkeypatch.setattr(functions, "onednn_fuses_gelu", lambda: False)
    torch.testing.assert_close(logits, without(monkeypatch, lambda: model(ids).logits))


def test_a_mixture_of_experts_uses_our_products_in_both_of_its_layers(served, monkeypatch):
    torch.manual_seed(0)
    experts, x = HylaMoE(HylaConfig(ffn_type="moe", hidden_size=16, intermediate_size=24)), torch.randn(3, 5, 16)

    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    leaves = [x.requires_grad_(), *experts.parameters()]

    def computed():
        output = experts(x)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    found = computed()
    assert served == ["_Linear", "_Gelu", "_Linear"]
    for ours, torchs in zip(found, without(monkeypatch, computed), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def test_hooks_and_replaced_layers_are_called_as_usual(monkeypatch):
    model, ids = model_and_ids()
    layer, seen = model.model.layers[0].mlp, []
    layer.up_proj.register_forward_hook(lambda module, args, output: seen.append(output) or 2 * output)
    layer.down_proj.register_full_backward_hook(lambda module, grad_input, grad_output: (3 * grad_input[0],))

    def gradient():
        model.zero_grad()
        model(ids, labels=ids[:, :4] % 8).loss.backward()
        return layer.up_proj.weight.grad.clone()

    torch.testing.assert_close(gradient(), without(monkeypatch, gradient))
    assert len(seen) == 2


def test_quantised_layers_use_their_own_products(monkeypatch):
    model, ids = model_and_ids()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.model.layers[0].mlp.up_proj, nn.Linear)
    torch.testing.assert_close(quantised(ids).logits, without(monkeypatch, lambda: quantised(ids).logits))


def test_adapters_have_the_gradients_of_torchs_products(monkeypatch):
    peft = pytest.importorskip("peft")
    model, ids = model_and_ids()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))

    def gradients():
        model.zero_grad()
        model(ids, labels=ids[:, :4] % 8).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    got, right = gradients(), without(monkeypatch, gradients)
    assert got and got.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(got[name], right[name])


def test_compiled_and_exported_graphs_hold_torchs_own_products():
    model, ids = model_and_ids()
    program = torch.export.export(model, (ids,), strict=False)
    assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(ids).logits, model(ids).logits)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.testing.assert_close(torch.compile(model, backend=backend)(ids).logits, model(ids).logits)
    assert graphs and not any("mkldnn" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_torch_computes_products_in_double_precision(served):
    x, weight, bias = (tensor.double() for tensor in given())
    assert torch.equal(served_block(x, weight, bias), block(x, weight, bias)) and not served


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_in_half_precision_is_rounded_once(dtype, served):
    x = torch.linspace(-9, 9, 1003).to(dtype).requires_grad_()
    with cpu_functions(x):
        y = gelu(x, approximate="tanh")
    cotangent = torch.linspace(-3, 2, 1003).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, cotangent)
    assert served == ["_Gelu"] and y.dtype == gradient.dtype == dtype
    double = x.detach().double().requires_grad_()
    right = gelu(double, approximate="tanh")
    (right_gradient,) = torch.autograd.grad(right, double, cotangent.double())
    half_a_step = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), right, rtol=half_a_step, atol=6e-8)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=half_a_step, atol=1e-6)


def test_torch_computes_products_under_autocast(served):
    with torch.autocast("cpu", torch.bfloat16), cpu_functions(given()[0]):
        assert linear(*given()).dtype == torch.bfloat16
    assert not served


def test_torchs_products_are_used_where_onednn_is_not_faster(monkeypatch, served):
    monkeypatch.setattr(functions, "onednn_is_faster", lambda: False)
    x, weight, bias = given()
    with cpu_functions(x):
        output = linear(x, weight, bias)
    assert torch.equal(output, linear(x, weight, bias)) and not served


@pytest.mark.parametrize(
    "vendor, capability, faster",
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : GenuineIntel", "AVX512", False),
        ("vendor_id : AuthenticAMD", "AVX2", False),
    ],
)
def test_onednn_is_chosen_by_vendor_and_capability(vendor, capability, faster, monkeypatch):
    monkeypatch.undo()
    if not torch.backends.mkl.is_available():
        pytest.skip("this build of torch has no MKL to compare with")
    monkeypatch.setattr(functions, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert functions.onednn_is_faster.__wrapped__() == faster


def test_a_build_of_torch_without_the_operator_keeps_torchs_products(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not functions.onednn_is_available() and not functions.onednn_is_faster.__wrapped__()


def test_kernels_are_compiled_again_when_an_imported_file_changes(monkeypatch):
    compile_anew = function_kernels_cpu_hyla.compiled_gelu.__wrapped__
    before = compile_anew("float32").py_func.__qualname__  # by which numba names what it keeps on disk
    assert compile_anew("float32").py_func.__qualname__ == before
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "tiles_cpu_hyla.py"))
    monkeypatch.setattr(vectors_cpu_hyla, "_sources", vectors_cpu_hyla._sources.__wrapped__)
    assert compile_anew("float32").py_func.__qualname__ != before


@pytest.mark.parametrize("shape", [(40, 16), (64, 33), (17, 5), (1, 1)])
def test_transposed_copies_equal_the_transpose_and_are_contiguous(shape):
    matrix = torch.randn(shape)
    copied = functions._transposed(matrix)
    assert torch.equal(copied, matrix.mT) and copied.is_contiguous()

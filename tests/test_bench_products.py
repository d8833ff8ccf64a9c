"""Tests of the floor of a training step: its products are counted, and every path computes them."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_hyla.benchmark import products, steps
from hf_hyla.training import load_recipe


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {
    "model.num_hidden_layers": "1",
    "model.hidden_size": "16",
    "model.intermediate_size": "16",
}


def test_the_matrix_products_of_the_sraven_step_are_those_that_it_computes(tmp_path):
    step = steps._TrainingStep(load_recipe("recipes/sraven/hyla.yaml"), "hyla", folder=str(tmp_path), batch_size=128)
    shapes = step.linear_shapes()
    # Of the last of four layers all tokens need keys and values, 64 wide, and the answers the rest.
    rows = [shape.rows for shape in shapes]
    assert rows == 3 * 6 * [128 * 36] + [128 * 4, 128 * 36, 128 * 36] + 4 * [128 * 4]
    assert [shape[1:3] for shape in shapes[-7:-3]] == [(128, 64)] * 3 + [(64, 128)]
    assert sum(shape.flop for shape in shapes) < step.flop_of_all_tokens()
    assert step.flop_of_all_tokens() == pytest.approx(10.8e9, rel=0.01)  # the reference's


def test_the_products_of_experts_are_counted(tmp_path):
    experts = TINY | {"model.ffn_type": "moe", "model.num_experts": "3"}
    step = steps._TrainingStep(
        load_recipe("recipes/logic/hyla.yaml", experts), "hyla", folder=str(tmp_path), batch_size=4
    )
    with FlopCounterMode(display=False) as counted:
        step()
    # Products between tokens are those of whole batches.
    found = counted.get_flop_counts()["Global"]
    with_weights = sum(flop for name, flop in found.items() if "mm" in str(name) and "bmm" not in str(name))
    assert sum(shape.flop for shape in step.linear_shapes()) == with_weights
    assert sum(shape.outputs == 3 * 16 for shape in step.linear_shapes()) == 1


def test_inputs_that_are_data_need_no_product_for_a_gradient(tmp_path):
    step = steps._TrainingStep(
        load_recipe("recipes/logic/hyla.yaml", TINY), "hyla", folder=str(tmp_path), batch_size=4
    )
    first, *others = step.linear_shapes()
    assert not first.input_gradient and all(shape.input_gradient for shape in others)
    assert first.flop == 2 * 2 * first.rows * first.inputs * first.outputs


@pytest.mark.parametrize("input_gradient", [True, False])
def test_every_path_computes_the_products_of_a_linear_layer(input_gradient):
    shape = products.LinearShape(rows=37, inputs=12, outputs=5, input_gradient=input_gradient)
    factors = shape.factors(torch.Generator().manual_seed(1), DEVICE)
    (x, weight), (gradient, _), *_ = factors
    layer = torch.nn.Linear(12, 5, bias=False, device=DEVICE)
    layer.weight.data, x = weight, x.clone().requires_grad_(input_gradient)
    output = layer(x)
    output.backward(gradient.mT)
    expected = [output.detach(), layer.weight.grad] + ([x.grad] if input_gradient else [])
    for (a, b), right in zip(factors, expected, strict=True):
        for paths in products._paths(DEVICE).values():
            for path in paths:
                torch.testing.assert_close(path(a, b), right)


def test_the_floor_uses_the_faster_product_of_each_shape(monkeypatch):
    def slow(a, b):
        time.sleep(0.01)
        return torch.mm(a, b.mT)

    called = []
    paths = {"slow": [slow], "fast": [lambda a, b: called.append(a.shape)]}
    monkeypatch.setattr(products, "_paths", lambda device: paths)
    work, implementations = products.fastest_products([products.LinearShape(8, 4, 2, True)] * 3, DEVICE)
    assert implementations == {"fast": 9}
    called.clear()
    work()
    assert called == 3 * [(8, 4)] + 3 * [(2, 8)] + 3 * [(8, 2)]

"""Tests of collected codes: they are the model's own, for the right queries and keys, and no other tensor is kept."""

import gc

import numpy as np
import pytest
import torch
from torch import nn

from hf_hyla import HylaConfig, HylaForCausalLM
from hf_hyla.analysis import collect_codes, task_batches


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("attention_type", ["hyla", "softmax", "linear"])
def test_codes_are_those_that_the_model_returns(build, sraven, attention_type):
    model = build(sraven, attention_type=attention_type)
    samples = next(task_batches(sraven, "ood", 40))
    model(input_ids=samples["input_ids"], output_attentions=True)  # transformers installs hooks of its own, once
    before = hooks_of(model)
    collected = collect_codes(model, task_batches(sraven, "ood", 40, batch_size=16), sraven.answer_keys)
    assert collected.codes.shape == (40, 2, 2, 2, 4) and collected.codes.dtype == np.float32
    with torch.no_grad():
        returned = model(input_ids=samples["input_ids"], output_attentions=True).attentions
    for sample in range(40):
        _, second_column, answers = (samples["permutations"][sample, column].tolist() for column in range(3))
        first_column = samples["permutations"][sample, 0].tolist()
        for answer in range(2):
            keys = [12 + first_column.index(answers[answer]), 14 + second_column.index(answers[answer])]
            for layer, codes in enumerate(returned):
                for number, key in enumerate(keys):
                    expected = codes[sample, :, 16 + answer, key].numpy()
                    np.testing.assert_allclose(collected.codes[sample, layer, answer, number], expected, atol=1e-5)
    assert hooks_of(model) == before
    assert collected.columns["rules"].shape == (40, 2) and "input_ids" not in collected.columns


def test_codes_of_other_queries_than_the_answers_are_those_asked_for(build, sraven):
    model, batch = build(sraven), next(task_batches(sraven, "ood", 6))
    queries = torch.tensor([[3, 0, 11]]).expand(6, -1)
    keys = torch.stack([queries, (queries + 5) % 12], dim=-1)
    collected = collect_codes(model, [batch], lambda batch: keys, queries=lambda batch: queries)
    assert collected.codes.shape == (6, 2, 3, 2, 4)
    with torch.no_grad():
        returned = model(input_ids=batch["input_ids"], output_attentions=True).attentions
    for layer, codes in enumerate(returned):
        for answer, query in enumerate([3, 0, 11]):
            for number, key in enumerate([query, (query + 5) % 12]):
                np.testing.assert_allclose(
                    collected.codes[:, layer, answer, number], codes[:, :, query, key], atol=1e-5
                )


def test_features_keep_answers_apart_and_layers_in_order(build, sraven):
    collected = collect_codes(build(sraven), task_batches(sraven, "ood", 5), sraven.answer_keys)
    features = collected.features()
    assert features.shape == (10, 2 * 2 * 4)
    np.testing.assert_array_equal(features[7, 8:], collected.codes[3, 1, 1].ravel())
    np.testing.assert_array_equal(collected.features(1), features[:, 8:])


def test_codes_of_a_module_that_holds_a_model_are_the_models_and_frozen_parts_stay_frozen(build, logic):
    class Held(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            return self.model(**inputs)

    model = build(logic).model.train()
    model.layers[0].eval()
    batches = [{"input_values": torch.rand(3, 6, 4)}]
    held = collect_codes(Held(model), batches)
    assert model.training and model.layers[1].mlp.training and not model.layers[0].self_attn.training
    np.testing.assert_array_equal(held.codes, collect_codes(model, batches).codes)


def test_codes_of_a_padded_batch_in_training_mode_are_those_without_dropout(build, logic):
    model = build(logic, attention_dropout=0.5).model.train()
    values = torch.rand(3, 6, 4)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    collected = collect_codes(model, [{"input_values": values, "attention_mask": mask, "name": torch.arange(3)}])
    assert model.training
    model.eval()
    with torch.no_grad():
        codes = model(input_values=values, attention_mask=mask, output_attentions=True).attentions[1]
    expected = torch.stack([codes[0, :, 5, 5], codes[1, :, 3, 3], codes[2, :, 5, 5]])
    np.testing.assert_allclose(collected.codes[:, 1, 0, 0], expected.numpy(), atol=1e-6)
    assert collected.columns["name"].tolist() == [0, 1, 2]


def test_no_attention_tensor_outlives_its_layer(build, logic):
    model = build(logic)
    pairs = 32 * 4 * 6 * 6  # a layer's codes of a batch

    def largest() -> int:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.device.type == "cpu"]
        return sum(tensor.untyped_storage().nbytes() >= 4 * pairs for tensor in tensors)

    before, alive = largest(), []

    def batches():
        for batch in task_batches(logic, "train", 64, batch_size=32):
            alive.append(largest())
            yield batch

    collected = collect_codes(model, batches())
    assert alive == [before] * 2
    assert collected.codes.nbytes == 4 * 64 * 2 * 1 * 1 * 4


def test_hooks_are_removed_when_a_batch_fails(build, logic):
    model = build(logic)
    batch = next(task_batches(logic, "ood", 2))
    collect_codes(model, [batch])
    before = hooks_of(model)
    with pytest.raises(ValueError, match="input_values must have the shape"):
        collect_codes(model, [{"input_values": batch["input_values"][..., :2]}])
    assert hooks_of(model) == before


@pytest.mark.parametrize(
    ("batches", "message"), [([], "hold no samples"), ([{"labels": torch.zeros(2)}], "must hold input_ids")]
)
def test_batches_that_cannot_be_read_are_refused(build, logic, batches, message):
    with pytest.raises(ValueError, match=message):
        collect_codes(build(logic), batches)


def test_a_model_of_another_family_is_refused():
    model = nn.Linear(2, 2)
    model.config = type("Config", (), {"num_answers": 1, "pad_token_id": None})()
    with pytest.raises(ValueError, match="Linear has no latent codes"):
        collect_codes(model, [{"input_values": torch.zeros(1, 2, 2)}])


def test_columns_keep_the_widest_type_and_refuse_another_shape(build, logic):
    batches = list(task_batches(logic, "test", 6, 2))
    for batch, values in zip(batches, (["a", "b"], ["long", "longer"], ["c", "d"]), strict=True):
        batch["words"], batch["numbers"] = (
            values,
            torch.tensor([1, 2]) if values[0] == "a" else torch.tensor([1.75, 2.5]),
        )
    columns = collect_codes(build(logic), batches).columns
    assert columns["words"].tolist() == ["a", "b", "long", "longer", "c", "d"]
    assert columns["numbers"].tolist() == [1, 2, 1.75, 2.5, 1.75, 2.5]
    for rows in (torch.zeros(2, 6), torch.zeros(2, 3)):
        batches[0]["padded"], batches[1]["padded"] = torch.zeros(2, 4), rows
        with pytest.raises(ValueError, match=r"rows of different shapes in the column padded, \(4,\) and"):
            collect_codes(build(logic), batches[:2])


def test_positions_reach_the_model_so_codes_of_packed_rows_cross_no_sequence():
    torch.manual_seed(0)
    config = HylaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, position_type="rotary")
    model = HylaForCausalLM(config).eval()
    packed = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with torch.no_grad():
        expected = torch.stack(model(**packed, output_attentions=True).attentions)[:, 0, :, 5]  # (layers, heads, keys)
    found = collect_codes(
        model, [packed], queries=lambda batch: torch.tensor([[5]]), keys=lambda batch: torch.arange(6)[None, None]
    )
    np.testing.assert_allclose(found.codes[0, :, 0], expected.transpose(1, 2).numpy(), atol=1e-6)
    assert not found.codes[0, :, 0, :3].any() and found.codes[0, :, 0, 3:].any()

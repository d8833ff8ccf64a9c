"""Tests of ablation, in which the code of a head is replaced by its mean."""

import numpy as np
import pytest
import torch

from hf_hyla.analysis import ablate_heads, ablated, mean_codes, task_batches
from hf_hyla.analysis.ablation import corrected_p_values
from hf_hyla.model.attention_hyla import eager_attention_forward


SETTINGS = [
    {"attention_type": "hyla"},
    {"attention_type": "hyla", "value_depth": 2},
    {"attention_type": "softmax"},
    {"attention_type": "linear"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_replacing_a_code_gives_what_the_definition_gives_with_that_code(build, logic, monkeypatch, settings):
    model = build(logic, **settings).double()
    batch = next(task_batches(logic, "ood", 8))
    mean = torch.randn(4, 6, 6, dtype=torch.float64)
    inputs = batch["input_values"].double()
    with torch.no_grad(), ablated(model, 1, [2], mean):
        logits = model(input_values=inputs).logits

    from hf_hyla.model import attention_hyla

    original, layers = attention_hyla.attention_codes, []

    def replaced(*args, **kwargs):
        codes = original(*args, **kwargs)
        layers.append(len(layers))
        if layers[-1] == 1:
            codes[:, 2] = mean[2]
        return codes

    monkeypatch.setattr(attention_hyla, "attention_codes", replaced)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_values=inputs).logits
    assert eager_attention_forward.__globals__["attention_codes"] is replaced and layers == [0, 1]
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_replacing_no_head_changes_nothing_and_the_model_is_restored(build, logic, settings):
    model = build(logic, **settings)
    inputs = next(task_batches(logic, "ood", 8))["input_values"]
    mean = torch.zeros(4, 6, 6)
    with torch.no_grad():
        before = model(input_values=inputs).logits
        with ablated(model, 0, [], mean):
            torch.testing.assert_close(model(input_values=inputs).logits, before)
        with pytest.raises(RuntimeError, match="stop"), ablated(model, 0, [1], mean):
            assert not torch.equal(model(input_values=inputs).logits, before)
            raise RuntimeError("stop")
        assert torch.equal(model(input_values=inputs).logits, before)


def test_the_mean_code_does_not_depend_on_the_batches(build, logic):
    model = build(logic)
    whole = next(task_batches(logic, "train", 50))
    with torch.no_grad():
        returned = model(input_values=whole["input_values"], output_attentions=True).attentions
    means = mean_codes(model, task_batches(logic, "train", 50, batch_size=20))
    for mean, codes in zip(means, returned, strict=True):
        torch.testing.assert_close(mean, codes.double().mean(dim=0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="hold no samples"):
        mean_codes(model, [])
    with pytest.raises(ValueError, match="sequences of one length"):
        mean_codes(model, [whole, {"input_values": whole["input_values"][:, 1:]}])


def test_ablating_a_head_that_nothing_reads_changes_nothing(build, logic):
    model = build(logic, num_hidden_layers=1, attention_type="linear")
    weight = model.model.layers[0].self_attn.o_proj.weight
    with torch.no_grad():
        weight.view(16, 4, -1)[:, 1:] = 0.0  # linear attention keeps heads apart
        weight *= 20
    batch = next(task_batches(logic, "ood", 100))

    def score():
        with torch.no_grad():
            return model(input_values=batch["input_values"]).logits.numpy()

    whole, without = ablate_heads(model, mean_codes(model, [batch]), score)
    np.testing.assert_allclose(without[0, 1:], np.stack([whole] * 3), atol=1e-5)
    assert np.abs(without[0, 0] - whole).max() > 0.01 * np.abs(whole).max()


def test_without_its_only_head_a_model_with_constant_values_cannot_distinguish_samples(build, sraven):
    model = build(sraven, num_hidden_layers=1, num_attention_heads=1, attention_type="linear")
    attention, batch = model.model.layers[0].self_attn, next(task_batches(sraven, "ood", 30))
    with torch.no_grad():
        attention.v_proj.weight.zero_()  # every token says the same; how much it is read depends on the code alone
        mean = mean_codes(model, [batch])[0]
        before = model(input_ids=batch["input_ids"]).logits
        with ablated(model, 0, [0], mean):
            logits = model(input_ids=batch["input_ids"]).logits
    assert before.std(dim=0).max() > 0.01
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))  # answer slots look alike in every sample


def test_p_values_are_those_of_t_tests_multiplied_by_the_number_of_larger_ones():
    # Two-sided probabilities of Student's t with 45 degrees of freedom, from tables: 3.2815 is 0.2 %, 2.0141 is 5 %.
    differences = np.array([[2.0141, -3.2815], [0.0, 2.6896]])
    p_values = corrected_p_values(differences, np.array([[1.0, 1.0], [0.0, 1.0]]), 45)
    np.testing.assert_allclose(p_values, [[2 * 0.05, 4 * 0.002], [1, 3 * 0.01]], rtol=1e-3)
    # A larger one is never less probable than a smaller one.
    tied = corrected_p_values(np.array([3.0, 2.999]), np.ones(2), 45)
    assert tied[0] == tied[1]

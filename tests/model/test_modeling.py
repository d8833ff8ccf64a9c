import os
import subprocess
import sys

import pytest
import torch
from model_helpers import ATTENTION_TYPES, ids, make
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_hyla import HylaConfig, HylaForSequenceClassification, HylaModel
from hf_hyla.model.losses_hyla import classification_loss


def test_the_papers_models_have_the_papers_parameter_counts():
    assert HylaForSequenceClassification(HylaConfig()).num_parameters() == 402_952  # 402,824 and a row of 128 zeros
    logic = HylaConfig(
        vocab_size=None, input_size=5, num_answers=1, num_labels=1, num_hidden_layers=2, num_attention_heads=8,
        head_dim=2, value_head_dim=2, relative_attention_num_buckets=16,
    )  # fmt: skip
    assert HylaForSequenceClassification(logic).num_parameters() == 151_009


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_saved_models_load_bit_equal_through_the_auto_classes(tmp_path, attention_type):
    model = make(attention_type=attention_type)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is HylaForSequenceClassification and type(base) is HylaModel
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert torch.equal(base(ids()).last_hidden_state, model.model(ids()).last_hidden_state)


def test_a_saved_folder_loads_without_the_package_and_saves_itself_again(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "first")
    torch.save(model(ids()).logits, tmp_path / "expected.pt")
    script = f"""
import sys, torch
sys.modules["hf_hyla"] = None  # any import of the package fails
from transformers import AutoModelForSequenceClassification
x, expected = torch.load(r"{tmp_path}/x.pt"), torch.load(r"{tmp_path}/expected.pt")
for folder in ("first", "second"):
    model = AutoModelForSequenceClassification.from_pretrained(rf"{tmp_path}/{{folder}}", trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__, type(model)
    assert torch.equal(model(x).logits, expected)
    model.save_pretrained(r"{tmp_path}/second")
"""
    torch.save(ids(), tmp_path / "x.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment, timeout=300)
    assert {p.name for p in (tmp_path / "first").iterdir()} == {p.name for p in (tmp_path / "second").iterdir()}


def test_nothing_is_uninitialised_after_loading_a_checkpoint_with_missing_keys(tmp_path):
    model = make(value_depth=2)
    model.save_pretrained(tmp_path, state_dict={"classifier.bias": model.classifier.bias.detach()})
    loaded = HylaForSequenceClassification.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 10, name
    attention = loaded.model.layers[0].self_attn
    assert attention.relative_attention_bias.std() > 0 and attention.value_mixing.std() > 0
    assert (loaded.model.embed_tokens.weight[8] == 0).all() and (loaded.model.embed_bias == 0).all()


def test_weights_are_initialised_as_in_the_reference():
    torch.manual_seed(0)
    config = HylaConfig(hidden_size=400, vocab_size=65, answer_token_id=64, num_attention_heads=20, head_dim=10,
                        value_head_dim=8, value_depth=2, relative_attention_num_buckets=64, intermediate_size=500)  # fmt: skip
    model = HylaForSequenceClassification(config)
    layer = model.model.layers[0]

    def check(tensor, fan_in, truncated):
        assert abs(tensor.std().item() * fan_in**0.5 - 1) < 0.06
        limit = 2 / 0.87962566103423978 / fan_in**0.5
        assert (tensor.abs().max() <= limit * 1.0001) == truncated

    for projection, fan_in in (
        (layer.self_attn.q_proj, 400),
        (layer.self_attn.o_proj, 160),
        (layer.mlp.down_proj, 500),
    ):
        check(projection.weight, fan_in, truncated=True)
        assert (projection.bias == 0).all()
    check(model.model.embed_tokens.weight[:64], fan_in=64, truncated=True)
    check(layer.self_attn.value_mixing, fan_in=8, truncated=True)
    check(layer.self_attn.relative_attention_bias, fan_in=64, truncated=False)
    text = HylaModel(HylaConfig(vocab_size=500, answer_token_id=None, embedding_bias=False, hidden_size=100))
    check(text.embed_tokens.weight, fan_in=100, truncated=False)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_the_last_layers_position_biases_learn_even_if_nothing_before_them_does(attention_type):
    model = make(num_answers=1, attention_type=attention_type).double().requires_grad_(False)
    bias = model.model.layers[-1].self_attn.relative_attention_bias.requires_grad_()
    gradients = []
    for implementation in ("hyla", "eager"):
        model.set_attn_implementation(implementation)
        logits = model(ids(64, 20)).logits
        gradients += torch.autograd.grad(logits.square().sum(), bias)
    assert gradients[1].norm() > 0.1
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_the_output_of_attention_is_multiplied_before_it_is_added(attention_type):
    plain = make(attention_type=attention_type, scale=2.0).double().eval()
    multiplied = make(attention_type=attention_type, attention_out_multiplier=0.3).double().eval()
    multiplied.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.o_proj.weight *= 0.3
            layer.self_attn.o_proj.bias *= 0.3
    logits = [model(input_ids=ids(3)).logits for model in (plain, multiplied)]
    torch.testing.assert_close(*logits)
    torch.autograd.backward([x.square().sum() for x in logits])
    gradients = [model.model.layers[0].self_attn.o_proj.weight.grad for model in (plain, multiplied)]
    torch.testing.assert_close(0.3 * gradients[0], gradients[1])


def test_hylas_attention_starts_tens_of_times_as_large_as_softmax_attention_and_with_the_multiplier_about_equal():
    sizes = {}
    for attention_type in ("hyla", "softmax"):
        torch.manual_seed(0)
        model = HylaForSequenceClassification(HylaConfig(attention_type=attention_type)).eval()
        found = sizes[attention_type] = []
        for layer in model.model.layers[:-1]:  # the last one computes few tokens
            layer.self_attn.register_forward_hook(
                lambda *call, found=found: found.append(call[2][0].square().mean().sqrt())
            )
        with torch.no_grad():
            model(input_ids=ids(64, 36, 8))
    ratio = sum(sizes["hyla"]) / sum(sizes["softmax"])
    assert 20 < ratio < 100 and 0.5 < ratio / 32 < 3


def test_inputs_embeds_equal_input_ids():
    model = make()
    embeds = model.get_input_embeddings()(ids())
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids()).logits)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_padding_changes_no_answer_on_either_side(attention_type):
    model = make(attention_type=attention_type, pad_token_id=7)
    x = ids(batch=2, length=9, vocab=7)
    expected = model(x).logits
    for side in ("left", "right"):
        for junk in (7, 3):  # what stands in the padding does not matter
            pad = torch.full((2, 4), junk)
            padded = torch.cat([pad, x] if side == "left" else [x, pad], dim=1)
            ones, zeros = torch.ones_like(x), torch.zeros_like(pad)
            mask = torch.cat([zeros, ones] if side == "left" else [ones, zeros], dim=1)
            torch.testing.assert_close(model(padded, attention_mask=mask).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_four_dimensional_mask_means_the_same_in_every_dtype_and_never_lifts_causality(attention_type, is_causal):
    model = make(attention_type=attention_type, is_causal=is_causal)
    padding = torch.ones(3, 10, dtype=torch.long)
    padding[1, :4] = 0
    attends = padding.bool()[:, None, None, :].expand(3, 1, 10, 10)
    expected = model(ids(), attention_mask=padding).logits
    assert (expected - model(ids()).logits).abs().max() > 1e-2
    additive = torch.zeros(attends.shape).masked_fill(~attends, torch.finfo(torch.float32).min)
    for mask in (attends, attends.long(), attends.to(torch.uint8), additive):
        torch.testing.assert_close(model(ids(), attention_mask=mask).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_token_that_may_attend_to_nothing_gives_no_nan(attention_type, dtype):
    model = make(scale=0.5, attention_type=attention_type).to(dtype)
    attends = torch.ones(3, 1, 10, 10, dtype=torch.bool)
    attends[0, :, 9] = attends[1] = False
    out = model(ids(), attention_mask=attends, labels=ids(length=4, vocab=8))
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_causal_models_do_not_see_the_future(attention_type):
    model = make(attention_type=attention_type, is_causal=True)
    x = ids(length=12)
    changed = x.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 8
    before, after = model.model(x).last_hidden_state, model.model(changed).last_hidden_state
    torch.testing.assert_close(before[:, :8], after[:, :8], atol=1e-5, rtol=1e-5)
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-2


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_an_unknown_attn_implementation_is_refused(attention_type):
    with pytest.raises(ValueError, match="no attn_implementation 'sdpa'"):
        HylaForSequenceClassification._from_config(
            HylaConfig(attention_type=attention_type), attn_implementation="sdpa"
        )


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_codes_and_hidden_states_are_returned_on_request(attention_type):
    model = make(attention_type=attention_type)
    out = model(ids(), output_attentions=True, output_hidden_states=True)
    assert [codes.shape for codes in out.attentions] == [(3, 4, 10, 10)] * 2
    assert len(out.hidden_states) == 3
    if attention_type == "hyla":
        torch.testing.assert_close(out.attentions[0].square().mean(dim=1), torch.ones(3, 10, 10), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("settings", "labels", "reference"),
    [
        ({"num_labels": 5, "num_answers": 2}, torch.tensor([[0, 4], [2, -100], [1, 1]]),
         lambda logits, y: nn.functional.cross_entropy(logits.reshape(-1, 5), y.reshape(-1))),
        ({"num_labels": 5, "num_answers": 1}, torch.tensor([0, 4, 2]), nn.functional.cross_entropy),
        ({"num_labels": 1, "num_answers": 1}, torch.tensor([0.5, -1.0, 2.0]),
         lambda logits, y: ((logits[:, 0] - y) ** 2).mean()),
        ({"num_labels": 1, "num_answers": 1}, torch.tensor([[0.5], [-1.0], [2.0]]),
         lambda logits, y: ((logits - y) ** 2).mean()),
        ({"num_labels": 1, "num_answers": 3}, torch.randn(3, 3), lambda logits, y: ((logits[..., 0] - y) ** 2).mean()),
        ({"num_labels": 3, "num_answers": 1, "problem_type": "regression"}, torch.randn(3, 3),
         lambda logits, y: ((logits - y) ** 2).mean()),
        ({"num_labels": 3, "num_answers": 2, "problem_type": "multi_label_classification"},
         torch.randint(0, 2, (3, 2, 3)).float(), nn.functional.binary_cross_entropy_with_logits),
    ],
)  # fmt: skip
def test_the_loss_equals_torchs_and_is_divided_by_num_items_in_batch(settings, labels, reference):
    model = make(**settings)
    expected = reference(model(ids()).logits, labels)
    torch.testing.assert_close(model(ids(), labels=labels).loss, expected)
    count = int((labels != -100).sum())
    # An update made of four such batches divides by the labels of all of them.
    torch.testing.assert_close(model(ids(), labels=labels, num_items_in_batch=4 * count).loss, expected / 4)
    assert model.config.problem_type == settings.get("problem_type")  # computing a loss writes nothing


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_labels_of_several_classes_that_are_no_floats_are_refused_with_what_to_set(dtype):
    with pytest.raises(ValueError, match="set problem_type='multi_label_classification' in the config"):
        make(num_labels=3, num_answers=1)(ids(), labels=torch.ones(3, 3).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification", "single_label_classification"])
def test_losses_are_computed_in_float32_at_least(problem_type, dtype):
    config = HylaConfig(num_labels=8, problem_type=problem_type)
    generator = torch.Generator().manual_seed(0)
    # The squares of 128 such labels are more than float16 can hold.
    logits, labels = (8 * torch.randn(128, 8, generator=generator)).to(dtype), torch.full((128, 8), 30.0)
    if problem_type == "single_label_classification":
        labels = torch.arange(128) % 8
    elif problem_type == "multi_label_classification":
        labels = (labels.cumsum(1) % 60) / 30
    for count in (None, 128):
        expected = classification_loss(config, logits.double(), labels, count)
        loss = classification_loss(config, logits, labels, count)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got none of them"),
        ({"input_ids": ids(), "inputs_embeds": torch.zeros(3, 10, 24)}, "input_ids and inputs_embeds"),
        ({"input_values": torch.zeros(3, 10, 5)}, "reads exactly one of input_ids"),
        ({"input_ids": ids() + 8}, "input_ids must lie in 0 to 8"),
        ({"input_ids": ids() - 9}, "input_ids must lie in 0 to 8"),
        ({"input_ids": ids(length=3)}, "the sequences have 3"),
        ({"input_ids": ids()[0]}, r"int32 of the shape \(batch, sequence\), got torch.int64 of the shape \(10,\)"),
        ({"input_ids": ids().float()}, "got torch.float32"),
        ({"input_ids": ids().to(torch.uint8)}, "input_ids must be int64 or int32 .* got torch.uint8"),
        ({"inputs_embeds": torch.zeros(3, 10, 23)}, r"\(batch, sequence, 24\), got \(3, 10, 23\)"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 9)}, r"the shape \(3, 10\) of the inputs, got \(3, 9\)"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 10, 10)}, r"or \(3, 1, 10, 10\), got \(3, 10, 10\)"),
        ({"input_ids": ids(), "attention_mask": torch.zeros(2, 1, 10, 10)}, r"\(3, 1, 10, 10\), got \(2, 1, 10, 10\)"),
        ({"input_ids": ids(), "attention_mask": torch.zeros(3, 4, 10, 10)}, r"\(3, 1, 10, 10\), got \(3, 4, 10, 10\)"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 1, 10, 10)}, "this one has positive numbers"),
        ({"input_ids": ids(), "attention_mask": torch.eye(10)[:3].long()}, "a row has only 1"),
        (
            {"input_ids": ids(), "attention_mask": torch.arange(10).expand(3, 10) // 5 + 1},
            "but this one holds 2: pass one seq",
        ),
        ({"input_ids": ids(), "attention_mask": torch.eye(10)[:3] * -1e9}, r"but this one holds -1e\+09"),
        ({"input_ids": ids(), "position_ids": torch.arange(10)}, r"the shape \(3, 10\) or \(1, 10\) of the tokens"),
        ({"input_ids": ids(), "position_ids": torch.arange(9)[None]}, r"position_ids must .* got \(1, 9\)"),
        ({"input_ids": ids(), "position_ids": torch.zeros(2, 10).long()}, r"position_ids must .* got \(2, 10\)"),
        ({"input_ids": ids(), "labels": torch.zeros(3, 2).long()}, r"must have the shape \(3, 4\)"),
        ({"input_ids": ids(), "labels": torch.zeros(3, 4)}, r"must have the shape \(3, 4, 8\)"),
        ({"input_ids": ids(), "labels": torch.zeros(3).long()}, "has num_answers=4: set num_answers=1 for one answer"),
    ],
)
def test_bad_inputs_are_refused_with_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(**arguments)


def test_continuous_inputs_of_the_wrong_width_are_refused():
    model = make(vocab_size=None, input_size=5, num_answers=1, num_labels=1)
    assert model(input_values=torch.zeros(2, 6, 5)).logits.shape == (2, 1)
    with pytest.raises(ValueError, match=r"\(batch, sequence, 5\), got \(2, 6, 4\)"):
        model(input_values=torch.zeros(2, 6, 4))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_packed_rows_are_refused_and_consecutive_positions_accepted(attention_type):
    model = make(attention_type=attention_type)
    expected = model(ids()).logits
    count = torch.arange(10).expand(3, 10)
    assert torch.equal(model(ids(), position_ids=count).logits, expected)
    assert torch.equal(model(ids(), position_ids=count + 5).logits, expected)
    padding = torch.ones(3, 10, dtype=torch.long)
    padding[1, :4] = 0
    by_mask = (padding.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(
        model(ids(), attention_mask=padding, position_ids=by_mask).logits, model(ids(), attention_mask=padding).logits
    )
    packed = torch.cat([torch.arange(6), torch.arange(4)])[None].expand(3, 10)
    for arguments in (
        {"position_ids": packed},
        {"position_ids": packed, "attention_mask": torch.ones(3, 10).long()},
        {"cu_seq_lens_q": torch.tensor([0, 6, 10])},
        {"seq_idx": torch.tensor([[0] * 6 + [1] * 4])},
    ):
        with pytest.raises(ValueError, match="several sequences from one row"):
            model(ids(), **arguments)


@pytest.mark.parametrize("settings", [{}, {"vocab_size": None, "input_size": 5, "num_answers": 1, "num_labels": 1}])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_model_with_integer_weights_computes_in_the_dtype_of_its_other_weights(attention_type, settings):
    model = make(scale=1.0, attention_type=attention_type, **settings)
    inputs = {"input_values": torch.rand(3, 10, 5)} if settings else {"input_ids": ids()}
    expected = model(**inputs).logits
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert (quantised(**inputs).logits - expected).norm() < 0.2 * expected.norm()
    if settings:

        class Int8(nn.Linear):
            def forward(self, x):
                return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

        projection = model.model.input_proj
        scale = projection.weight.detach().abs().max() / 127
        whole = (projection.weight.detach() / scale).round().to(torch.int8)
        projection.__class__, projection.scale = Int8, scale
        projection.weight = nn.Parameter(whole, requires_grad=False)
        assert (model(**inputs).logits - expected).norm() < 0.05 * expected.norm()

"""The language model: a cache changes nothing, whatever the attention, the positions and the way in which tokens arrive."""

import copy
import itertools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_helpers import ATTENTION_TYPES, HYLA_PLUS, LINEAR, ROW_IDS, ROWS, cache_of, ids
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    QuantizedCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from hf_hyla import HylaConfig, HylaForCausalLM, HylaForSequenceClassification, HylaModel
from hf_hyla.model.attention_hyla import rotated


VOCAB = 23
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6,
    "value_head_dim": 5, "intermediate_size": 32, "relative_attention_num_buckets": 6, "answer_token_id": None,
    "attention_dropout": 0.0, "is_causal": True,
}  # fmt: skip
POSITIONS = ["relative", "rotary", "none"]
SCALINGS = {
    "default": {"rope_theta": 100.0},
    "partial": {"partial_rotary_factor": 0.7},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},
    "longrope": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0],
                 "original_max_position_embeddings": 32},
    "llama3": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8},
}  # fmt: skip


def make(scale: float = 3.0, **settings) -> HylaForCausalLM:
    """A model in float64 of which every parameter is large and random, so that none can be without effect."""
    torch.manual_seed(0)
    model = HylaForCausalLM(HylaConfig(**{**SMALL, **settings})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * scale / max(parameter.shape[-1], 4) ** 0.5)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


def of_row(row) -> dict:
    return dict(zip(("attention_type", "score_norm", "value_activation", "value_depth"), row, strict=True))


@torch.no_grad()
def in_steps(model, tokens, steps, cache=None, **inputs) -> torch.Tensor:
    """The logits of all tokens, so many of which the model reads at a time."""
    logits, first = [], 0
    for count in steps:
        out = model(tokens[:, first : first + count], cache=cache, use_cache=True, **inputs)
        cache, first = cache_of(out), first + count
        logits.append(out.logits)
    assert first == tokens.shape[1]
    return torch.cat(logits, dim=1)


def close(ours, theirs, tolerance: float = 1e-10):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("position_type", POSITIONS)
@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_a_token_at_a_time_gives_the_logits_of_all_at_once(row, position_type):
    model, tokens = make(position_type=position_type, **of_row(row)), ids(3, 11, VOCAB)
    with torch.no_grad():
        close(in_steps(model, tokens, [1] * 11), model(tokens).logits)


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("position_type", POSITIONS)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_chunks_of_any_length_and_every_cache_give_the_logits_of_all_at_once(attention_type, position_type, window):
    model = make(attention_type=attention_type, position_type=position_type, sliding_window=window)
    tokens = ids(3, 13, VOCAB)
    expected = model(tokens, use_cache=False)
    assert cache_of(expected) is None
    # The last one keeps all tokens, whatever the window.
    static = StaticCache(config=model.config, max_cache_len=17)
    for cache in (None, DynamicCache(config=model.config), static, DynamicCache()):
        close(in_steps(model, tokens, [5, 1, 1, 3, 1, 2], cache), expected.logits)


def test_a_window_hides_all_but_the_last_tokens_and_the_cache_keeps_no_more():
    model, tokens = make(sliding_window=3, num_hidden_layers=1), ids(2, 9, VOCAB)
    changed = tokens.clone()
    changed[:, :6] = (changed[:, :6] + 1) % VOCAB
    with torch.no_grad():
        out, other = model(tokens), model(changed)
    close(out.logits[:, 8], other.logits[:, 8])
    assert not torch.allclose(out.logits[:, 7], other.logits[:, 7])
    assert cache_of(out).layers[0].keys.shape[2] == 2


@pytest.mark.parametrize("position_type", POSITIONS)
def test_padding_on_the_left_changes_nothing_with_and_without_a_cache(position_type):
    model, tokens = make(position_type=position_type), ids(2, 9, VOCAB)
    tolerance = 1e-5 if position_type == "rotary" else 1e-10  # angles are computed in float32
    with torch.no_grad():
        alone = model(tokens[1:, 4:]).logits
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, :4] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        close(model(tokens, attention_mask=mask).logits[1:, 4:], alone, tolerance)
        close(model(tokens, attention_mask=mask, position_ids=positions).logits[1:, 4:], alone, tolerance)
        for cache in (None, StaticCache(config=model.config, max_cache_len=12)):
            logits, first = [], 0
            for count in (6, 1, 2):
                last = first + count
                out = model(
                    tokens[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
                    cache=cache, use_cache=True,
                )  # fmt: skip
                cache, first = cache_of(out), last
                logits.append(out.logits)
            close(torch.cat(logits, dim=1)[1:, 4:], alone, tolerance)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_cache_can_be_reordered_cropped_copied_and_go_on(attention_type):
    model, tokens = make(attention_type=attention_type, position_type="rotary"), ids(3, 12, VOCAB)
    with torch.no_grad():
        past = cache_of(model(tokens[:, :7]))
        order = torch.tensor([2, 0, 0])
        reordered = copy.deepcopy(past)
        reordered.reorder_cache(order)
        expected = model(torch.cat([tokens[order, :7], tokens[:, 7:]], dim=1)).logits[:, 7:]
        close(in_steps(model, tokens[:, 7:], [2, 3], reordered), expected)
        past.crop(-3)
        expected = model(torch.cat([tokens[:, :4], tokens[:, 7:]], dim=1)).logits[:, 4:]
        close(in_steps(model, tokens[:, 7:], [1, 4], past), expected)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_quantised_cache_answers_within_the_error_of_its_bits(attention_type):
    pytest.importorskip("optimum.quanto")
    model, tokens = make(attention_type=attention_type).float(), ids(2, 20, VOCAB)
    steps, errors = [5] + 15 * [1], {}
    exact = in_steps(model, tokens, steps)
    for bits in (4, 2):
        cache = QuantizedCache("quanto", model.config, nbits=bits, q_group_size=4, residual_length=2)
        errors[bits] = float((in_steps(model, tokens, steps, cache) - exact).norm() / exact.norm())
    assert 0 < errors[4] < 0.1 < errors[2] < 0.5


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_positions_of_every_scaling_type_are_transformers_own(tmp_path, scaling):
    model, tokens = make(position_type="rotary", rope_parameters=SCALINGS[scaling]), ids(2, 11, VOCAB)
    with torch.no_grad():
        logits = model(tokens).logits
        close(in_steps(model, tokens, [4, 1, 6]), logits)
    assert not torch.allclose(logits, make(position_type="none")(tokens).logits)
    cos, sin = model.model.rotary_emb(logits, torch.arange(11)[None])
    assert cos.shape == sin.shape == (1, 11, 4 if scaling == "partial" else 6)
    # Frequencies are saved nowhere: loading computes them.
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    close(loaded(tokens).logits, logits)


def test_rotation_turns_pairs_of_elements_by_the_angle_of_their_position():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 5, 8, generator=generator, dtype=torch.float64)
    rotary = make(position_type="rotary", head_dim=8, rope_parameters={"rope_theta": 50.0}).model.rotary_emb
    angles = rotary(query, torch.arange(5)[None])
    turned_query, turned_key = rotated(query, angles), rotated(key, angles)
    for q, k in itertools.product(range(5), range(5)):
        expected = 0.0
        for i in range(4):
            # As complex numbers; of their product with the conjugate, only the distance turns.
            left = torch.complex(query[0, 0, q, i], query[0, 0, q, i + 4])
            right = torch.complex(key[0, 0, k, i], key[0, 0, k, i + 4])
            turn = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor((q - k) * 50.0 ** (-i / 4)).double())
            expected += (left * right.conj() * turn).real.item()
        assert abs((turned_query[0, 0, q] @ turned_key[0, 0, k]).item() - expected) < 1e-5


def test_scaled_positions_grow_more_slowly_and_dynamic_ones_beyond_the_length_only():
    tokens = torch.arange(20)[None]
    x = torch.zeros((), dtype=torch.float64)

    def cosines(length, **parameters):
        model = make(position_type="rotary", max_position_embeddings=8, rope_parameters=parameters)
        return model.model.rotary_emb(x, tokens[:, :length])[0]

    close(cosines(10, rope_type="linear", factor=2.0)[:, 8], cosines(10)[:, 4])
    close(cosines(8, rope_type="dynamic", factor=2.0), cosines(8))
    assert not torch.allclose(cosines(16, rope_type="dynamic", factor=2.0), cosines(16))


@pytest.mark.parametrize("position_type", POSITIONS)
def test_sequences_packed_into_a_row_do_not_see_each_other(position_type):
    model, tokens = make(position_type=position_type), ids(1, 11, VOCAB)
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    for use_cache in (True, False):
        packed = model(tokens, position_ids=positions, use_cache=use_cache).logits
        close(packed[:, :4], model(tokens[:, :4]).logits, 1e-5)
        close(packed[:, 4:], model(tokens[:, 4:]).logits, 1e-5)
    with pytest.raises(ValueError, match="position_ids must count up by one"):
        model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens))


def test_the_loss_is_of_the_next_tokens_and_shares_an_update_with_other_batches():
    model, tokens = make(), ids(3, 9, VOCAB)
    labels = tokens.clone()
    labels[0, :5] = -100
    out = model(tokens, labels=labels)
    terms = []
    for row, position in itertools.product(range(3), range(8)):
        if labels[row, position + 1] != -100:
            terms.append(-out.logits[row, position].log_softmax(-1)[labels[row, position + 1]])
    torch.testing.assert_close(out.loss.double(), torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)
    parts = [model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=len(terms)).loss for i in range(3)]
    torch.testing.assert_close(sum(parts), out.loss, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"labels must have the shape \(3, 9\)"):
        model(tokens, labels=labels[:, 1:])


def test_a_trainer_that_smooths_labels_smooths_those_of_the_next_tokens(tmp_path):
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.3, report_to="none", use_cpu=True)
    model, tokens = make(), ids(3, 9, VOCAB)
    labels = tokens.clone()
    labels[0, :5] = -100
    loss = Trainer(model, args).compute_loss(model, {"input_ids": tokens, "labels": labels})
    logits, targets = model(tokens).logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].flatten()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.3))


@pytest.mark.parametrize("attn_implementation", ["eager", "hyla"])
def test_logits_to_keep_are_those_of_the_tokens_asked_for(attn_implementation):
    model, tokens = make(), ids(2, 9, VOCAB)
    model.set_attn_implementation(attn_implementation)
    with torch.no_grad():
        full = model(tokens)
        for kept, expected in (
            (1, full.logits[:, -1:]),
            (4, full.logits[:, -4:]),
            (torch.tensor([0, 5]), full.logits[:, [0, 5]]),
        ):
            out = model(tokens, logits_to_keep=kept)
            close(out.logits, expected)
            # The last layer, too, keeps the keys and values of all tokens.
            for layer, whole in zip(cache_of(out).layers, cache_of(full).layers, strict=True):
                close(layer.keys, whole.keys)
                close(layer.values, whole.values)


def test_a_head_is_tied_to_the_table_or_has_weights_and_a_bias_of_its_own(tmp_path):
    tokens = ids(2, 9, VOCAB)
    for settings, divided in (
        ({}, True),
        ({"scale_logits": False}, False),
        ({"tie_word_embeddings": False, "lm_head_bias": True}, False),
        ({"tie_word_embeddings": False, "scale_logits": True}, True),
    ):
        model = make(**settings)
        states = model.model(tokens).last_hidden_state
        tied = settings.get("tie_word_embeddings", True)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        expected = (states / 24**0.5 if divided else states) @ model.lm_head.weight.T
        close(model(tokens).logits, expected + (0 if model.lm_head.bias is None else model.lm_head.bias))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is HylaForCausalLM
        close(loaded(tokens).logits, model(tokens).logits)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        model.resize_token_embeddings(VOCAB + 5)
        assert model(tokens).logits.shape[-1] == model.config.vocab_size == VOCAB + 5


@pytest.mark.parametrize("replaced", ["embed_tokens", "lm_head"])
def test_a_tied_head_that_peft_unties_gives_the_same_logits(tmp_path, replaced):
    peft = pytest.importorskip("peft")
    model, tokens = make(), ids(2, 9, VOCAB)
    expected = model(tokens).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[replaced]))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    for untied in (merged, HylaForCausalLM.from_pretrained(tmp_path)):
        assert not untied.config.tie_word_embeddings and untied.lm_head.weight is not untied.model.embed_tokens.weight
        close(untied(tokens).logits, expected)


def test_a_language_model_is_causal_and_reads_every_id_whatever_its_config_was_made_for():
    config = HylaConfig()  # of SRAVEN: not causal, with an answer slot and a bias of embeddings
    model = HylaForCausalLM(config).eval()
    assert (config.is_causal, config.answer_token_id, config.embedding_bias) == (False, 8, True)
    assert (model.config.is_causal, model.config.answer_token_id, model.config.embedding_bias) == (True, None, False)
    assert model.model.embed_tokens.padding_idx is None and model.model.embed_bias is None
    tokens = ids(1, 9)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 9
    torch.testing.assert_close(model(tokens).logits[:, :5], model(changed).logits[:, :5])


def test_embeddings_and_a_fresh_heads_weights_are_initialised_as_in_the_reference():
    torch.manual_seed(0)
    tied = HylaForCausalLM(HylaConfig(**SMALL | {"vocab_size": 500, "hidden_size": 400}))
    assert abs(tied.lm_head.weight.std().item() * 20 - 1) < 0.05
    untied = HylaForCausalLM(
        HylaConfig(**SMALL | {"hidden_size": 400, "tie_word_embeddings": False, "lm_head_bias": True})
    )
    assert abs(untied.lm_head.weight.std().item() * 20 - 1) < 0.05 and (untied.lm_head.bias == 0).all()


def test_a_causal_model_without_a_head_returns_a_cache_but_not_in_training(tmp_path):
    make().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is HylaModel and cache_of(model(ids())).get_seq_length() == 10
    assert cache_of(model.train()(ids())) is None
    with pytest.raises(ValueError, match="A cache belongs to a causal model"):
        HylaModel(HylaConfig())(ids(), cache=DynamicCache())


def test_the_cache_has_two_names_of_which_one_is_given():
    model, tokens = make(), ids()
    expected = model(tokens).logits[:, 7:]
    with torch.no_grad():
        for name in ("cache", "past_key_values"):
            past = cache_of(model(tokens[:, :7]))
            torch.testing.assert_close(model(tokens[:, 7:], **{name: past}).logits, expected)
    with pytest.raises(ValueError, match="two names of one input"):
        model(tokens, cache=DynamicCache(), past_key_values=DynamicCache())


def test_a_cache_and_gradient_checkpointing_exclude_each_other():
    model = make().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="add its tokens to the cache twice"):
        model(ids(), cache=DynamicCache())
    with torch.no_grad():
        model(ids(), cache=DynamicCache())
    classifier = HylaForSequenceClassification(HylaConfig(is_causal=True, position_type="rotary"))
    assert classifier(ids()).logits.shape == (3, 4, 8)


@pytest.mark.parametrize("row", [HYLA_PLUS, LINEAR])
def test_the_balancing_loss_of_experts_is_part_of_a_language_models_loss(row):
    model = make(
        ffn_type="moe", num_experts=3, output_router_logits=True, router_aux_loss_coef=0.5, **of_row(row)
    ).train()
    tokens = ids(2, 9, VOCAB)
    out = model(tokens, labels=tokens)
    plain = model(tokens, labels=tokens, output_router_logits=False).loss
    assert out.aux_loss > 0
    torch.testing.assert_close(out.loss, plain + 0.5 * out.aux_loss)
    half = model(tokens, labels=tokens, num_items_in_batch=32).loss
    torch.testing.assert_close(half, out.loss / 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(3, 1), r"shape \(3, 6\) of all tokens, of which 5 are in the cache, got \(3, 1\)"),
        (torch.ones(3, 7), r"of which 5 are in the cache, got \(3, 7\)"),
        (torch.ones(2, 6), r"got \(2, 6\)"),
        (torch.ones(3, 1, 1, 5), r"shape \(3, 6\) or \(3, 1, 1, 6\), got \(3, 1, 1, 5\)"),
    ],
)
def test_a_mask_that_does_not_cover_the_cache_is_refused(given, message):
    model, tokens = make(), ids(3, 6, VOCAB)
    past = cache_of(model(tokens[:, :5]))
    with pytest.raises(ValueError, match=message):
        model(tokens[:, 5:], attention_mask=given.long(), cache=past)


def test_a_mask_of_pairs_never_lifts_causality_with_a_cache():
    model, tokens = make(), ids(3, 9, VOCAB)
    with torch.no_grad():
        expected = model(tokens).logits[:, 5:]
        past = cache_of(model(tokens[:, :5]))
        close(model(tokens[:, 5:], attention_mask=torch.ones(3, 1, 4, 9).long(), cache=past).logits, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_parameters": {"rope_theta": 10.0}}, "rope_parameters is for rotary positions"),
        ({"rope_theta": 10.0}, "rope_theta is for rotary positions"),
        ({"position_type": "rotary", "head_dim": 5}, "5 of head_dim=5 are rotated"),
        ({"position_type": "rotary", "rope_parameters": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
        ({"position_type": "rotary", "partial_rotary_factor": 0.2}, "0 of head_dim=4 are rotated"),
        ({"sliding_window": 4}, "sliding_window=4 needs a causal model"),
        ({"sliding_window": 1, "is_causal": True}, "sliding_window must be at least 2"),
    ],
)
def test_positions_that_make_no_sense_are_refused_with_a_reason(settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        HylaConfig(**settings)


def test_a_language_model_without_ids_is_refused():
    with pytest.raises(ValueError, match="reads and writes token ids: set vocab_size"):
        HylaForCausalLM(HylaConfig(vocab_size=None, input_size=5))


def test_a_language_model_becomes_a_classifier_with_one_answer(tmp_path):
    HylaForCausalLM(HylaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3)


def test_labels_beside_the_logits_of_some_tokens_are_refused():
    model = HylaForCausalLM(HylaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1)).eval()
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="index tensor logits_to_keep may leave out: pass a number of last tokens"):
        model(tokens, labels=tokens[:, [0, 4]], logits_to_keep=torch.tensor([0, 4]))
    assert model(tokens, labels=tokens[:, -3:], logits_to_keep=3).loss.isfinite()

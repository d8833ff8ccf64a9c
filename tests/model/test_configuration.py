import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_hyla import HylaConfig


def test_defaults_are_the_sraven_hyla_model():
    config = HylaConfig()
    assert (config.vocab_size, config.answer_token_id, config.num_answers, config.num_labels) == (9, 8, 4, 8)
    assert (config.effective_score_norm, config.effective_value_activation) == ("rms_head", "relu")


@pytest.mark.parametrize(
    ("attention_type", "score_norm", "value_activation"),
    [("hyla", "rms_head", "relu"), ("linear", "none", "none"), ("softmax", "softmax", "none")],
)
def test_what_follows_from_the_type_stays_none_in_config_json(tmp_path, attention_type, score_norm, value_activation):
    config = HylaConfig(attention_type=attention_type)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["score_norm"] is None and written["value_activation"] is None
    assert (config.effective_score_norm, config.effective_value_activation) == (score_norm, value_activation)


@pytest.mark.parametrize("num_labels", [1, 2, 3, 8])
def test_every_number_of_labels_survives_saving(tmp_path, num_labels):
    HylaConfig(num_labels=num_labels).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == num_labels


def test_continuous_inputs_need_no_token_settings():
    config = HylaConfig(vocab_size=None, input_size=5)
    assert config.answer_token_id is None and config.embedding_bias is False


def test_misspelt_field_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="no field 'num_atention_heads'; did you mean 'num_attention_heads'"):
        HylaConfig(num_atention_heads=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zebra": 1}, "no field 'zebra'"),
        (
            {"format_version": 99},
            "saved in format 99, but the code in use, the installed package hf_hyla, reads format 1",
        ),
        ({"vocab_size": 30}, "Token id 8 is the answer slot"),
    ],
)
def test_what_may_be_a_mistake_is_reported(caplog, settings, message):
    HylaConfig(**settings)
    assert message in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": None}, "Exactly one of vocab_size"),
        ({"input_size": 5}, "Exactly one of vocab_size"),
        ({"attention_type": "quadratic"}, "expected one of"),
        ({"num_attention_heads": "many"}, "expected int"),
        ({"num_labels": 0}, "num_labels must be at least 1"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 0"),
        ({"problem_type": "ranking"}, "problem_type"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"relative_attention_num_buckets": 1}, "must be at least 2"),
        ({"hidden_size": 10, "head_dim": None}, "not a multiple of 16"),
        ({"attention_dropout": 1.0}, r"must lie in \[0, 1\)"),
        ({"answer_token_id": 9}, "one of the ids 0 to 8"),
        ({"pad_token_id": 8}, "both 8"),
        ({"value_activation": "rellu"}, "did you mean 'relu'"),
        ({"hidden_act": "gellu"}, "did you mean 'gelu'"),
        ({"attention_type": "linear", "value_depth": 2}, "value_depth=2 needs a generated value network"),
        ({"attention_type": "softmax", "score_norm": "none"}, "does not go with attention_type='softmax'"),
        ({"attention_type": "linear", "score_norm": "softmax"}, "does not go with attention_type='linear'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_a_reason(settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        HylaConfig(**settings)

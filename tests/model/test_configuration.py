import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_hyla import HylaConfig, HylaForSequenceClassification, HylaModel


def test_defaults_are_the_sraven_hyla_model():
    config = HylaConfig()
    assert (config.vocab_size, config.answer_token_id, config.num_answers, config.num_labels) == (9, 8, 4, 8)
    assert (config.effective_score_norm, config.effective_value_activation) == ("rms_head", "relu")


@pytest.mark.parametrize(
    ("attention_type", "score_norm", "value_activation"),
    [("hyla", "rms_head", "relu"), ("linear", "none", "none"), ("softmax", "softmax", "none")],
)
def test_fields_that_follow_from_the_type_stay_none_in_config_json(
    tmp_path, attention_type, score_norm, value_activation
):
    config = HylaConfig(attention_type=attention_type)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["score_norm"] is None and written["value_activation"] is None
    assert (config.effective_score_norm, config.effective_value_activation) == (score_norm, value_activation)


@pytest.mark.parametrize("num_labels", [1, 2, 3, 8])
def test_every_number_of_labels_survives_saving(tmp_path, num_labels):
    HylaConfig(num_labels=num_labels).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == num_labels


def test_fields_that_transformers_stores_load_again(tmp_path, caplog):
    config = HylaConfig()
    config.sep_token_id = 3
    config.d_model = 5
    config.num_hidden_layer = 7  # near a field, which a keyword would be refused for
    config.note = "mine"
    config.save_pretrained(tmp_path)
    for loaded in (AutoConfig.from_pretrained(tmp_path), HylaConfig.from_pretrained(tmp_path)):
        assert (loaded.sep_token_id, loaded.d_model, loaded.num_hidden_layer, loaded.note) == (3, 5, 7, "mine")
    assert "no field 'num_hidden_layer'; did you mean" in caplog.text
    assert AutoConfig.from_pretrained(tmp_path, num_labels=3).num_labels == 3


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("num_heads", "num_attention_heads"),
        ("heads", "num_attention_heads"),
        ("dim_feedforward", "intermediate_size"),
        ("num_layers", "num_hidden_layers"),
        ("head_width", None),
        ("d_model", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("layer_norm_eps", "norm_eps"),
    ],
)
def test_a_part_of_a_fields_name_or_that_of_another_family_is_refused_with_the_name_here(name, field):
    if field is None:
        assert HylaConfig(**{name: 4}).head_width == 4
        return
    with pytest.raises(ValueError, match=f"no field '{name}'; did you mean '{field}'"):
        HylaConfig(**{name: 4})


@pytest.mark.parametrize(
    "name",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "value_head_dim", "intermediate_size",
     "vocab_size", "num_labels", "num_answers", "relative_attention_num_buckets", "num_experts"],
)  # fmt: skip
def test_sizes_beyond_any_memory_are_refused_at_once(tmp_path, name):
    HylaConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text()) | {name: 10**9, "answer_token_id": None, "ffn_type": "moe"}
    if name == "num_labels":
        written.pop("id2label")
    path.write_text(json.dumps(written))
    with pytest.raises((ValueError, StrictDataclassError), match=f"{name} must be at most"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match="weights, more than the 1e\\+11"):
        HylaConfig(hidden_size=10**6, intermediate_size=10**6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"id2label": ["a", "b"]}, "id2label must be an object"),
        ({"label2id": [1]}, "label2id must be an object"),
        ({"auto_map": [1]}, "auto_map must be an object"),
        ({"architectures": {}}, "architectures must be a list"),
        ({"quantization_config": "int8"}, "quantization_config must be an object"),
        ({"to_dict": 1}, "cannot set 'to_dict'"),
        ({"validate_architecture": None}, "cannot set 'validate_architecture'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "128"}, "hidden_size"),
        ({"attention_type": ["hyla"]}, "attention_type"),
    ],
)
def test_a_config_file_with_wrong_types_is_refused_in_a_sentence(tmp_path, entries, message):
    HylaConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_a_config_file_without_an_object_is_refused():
    for config in (None, [], "hyla"):
        with pytest.raises(ValueError, match="must be an object of names and values"):
            HylaConfig.from_dict(config)


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
def test_probable_mistakes_are_reported(caplog, settings, message):
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
        ({"num_labels": 2.5}, "num_labels must be at least 1, and a whole number, got 2.5"),
        ({"id2label": ["a", "b"]}, "id2label must be an object of ids and names|Field 'id2label'"),
        (
            {"id2label": {"a": 0}},
            r"id2label must have ids as its keys, got \['a'\]: does it hold label2id|Field 'id2label'",
        ),
        ({"norm_eps": -1.0}, "norm_eps must be at least 0"),
        ({"norm_eps": float("nan")}, "norm_eps must be at least 0 and finite, got nan"),
        ({"router_aux_loss_coef": float("inf")}, "router_aux_loss_coef must be at least 0 and finite, got inf"),
        ({"head_dim": None, "num_attention_heads": 0}, "not a multiple of 0"),
        ({"problem_type": "ranking"}, "problem_type"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"relative_attention_num_buckets": 1}, "must be at least 2"),
        ({"hidden_size": 10, "head_dim": None}, "not a multiple of 16"),
        ({"attention_dropout": 1.0}, r"must lie in \[0, 1\)"),
        ({"attention_out_multiplier": 0}, "attention_out_multiplier must be positive and finite, got 0"),
        ({"attention_out_multiplier": float("nan")}, "attention_out_multiplier must be positive and finite"),
        ({"attention_out_multiplier": 10**40}, r"multiplier must be at most 1e\+30, got 10+\."),
        ({"norm_eps": 1e308}, r"norm_eps must be at most 1e\+30"),
        ({"position_type": "rotary", "rope_parameters": {"rope_theta": 10**400}}, "a number above 0, at most 1e"),
        ({"dtype": "nonsense"}, "dtype must name a floating-point type of torch, such as 'float32', got 'nonsense'"),
        ({"dtype": "load"}, "dtype must name a floating-point type"),
        ({"dtype": "int8"}, "dtype must name a floating-point type"),
        ({"dtype": -1}, "dtype must name a floating-point type"),
        ({"answer_token_id": 9}, "one of the ids 0 to 8"),
        ({"pad_token_id": 8}, "both 8"),
        ({"value_activation": "rellu"}, "did you mean 'relu'"),
        ({"hidden_act": "gellu"}, "did you mean 'gelu'"),
        ({"attention_type": "linear", "value_depth": 2}, "value_depth=2 needs a generated value network"),
        ({"attention_type": "softmax", "score_norm": "none"}, "does not go with attention_type='softmax'"),
        ({"attention_type": "linear", "score_norm": "softmax"}, "does not go with attention_type='linear'"),
    ],
)
def test_impossible_settings_are_refused_with_a_reason(settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        HylaConfig(**settings)


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factor"])
@pytest.mark.parametrize("value", ["x", 0, None, float("nan")])
def test_a_rotary_parameter_that_is_no_positive_number_is_refused(name, value):
    with pytest.raises(StrictDataclassError, match=f"rope_parameters has {name}={value!r}, expected a number above 0"):
        HylaConfig(position_type="rotary", rope_parameters={name: value})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "yarn"}, "Missing required keys .* {'factor'}: add them"),
        ({"rope_type": "yarn", "factor": "abc"}, "rope_parameters has factor='abc', expected a number above 0"),
        ({"rope_type": "linear", "factor": None}, "rope_parameters has factor=None, expected a number above 0"),
        ({"rope_type": "linear", "factor": 0}, "rope_parameters has factor=0, expected a number above 0"),
        ({"rope_type": "linear", "factor": float("inf")}, "rope_parameters has factor=inf"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 1.0]}, "expected a list of 2 numbers"),
        ({"rope_type": ["yarn"]}, "which transformers does not know"),
        ({"full_attention": {"rope_type": "default"}}, "rope_parameters has full_attention="),
    ],
)
def test_parameters_of_scaled_rotary_positions_that_make_no_sense_are_refused(parameters, message):
    with pytest.raises(StrictDataclassError, match=message):
        HylaConfig(position_type="rotary", rope_parameters=parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 4}, "sliding_window=4 needs a causal model"),
        ({"attention_dropout": 1.5}, "attention_dropout must"),
        ({"num_experts_per_tok": 15}, "num_experts_per_tok"),
        ({"attention_type": "softmax", "value_depth": 2}, "value_depth"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_when_a_model_is_made_and_not_when_it_is_saved(
    tmp_path, changes, message
):
    HylaForSequenceClassification(HylaConfig(hidden_size=16, num_hidden_layers=1, ffn_type="moe")).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=message):
        HylaForSequenceClassification.from_pretrained(tmp_path, **changes)
    config = HylaConfig.from_pretrained(tmp_path)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        HylaModel(config)

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_hyla import HylaForCausalLM
from hf_hyla.convert import SEQUENCE_MIXERS, convert, convert_files


CASE = "var_norm_rms"


@pytest.fixture
def official(golden):
    description = json.loads((golden / f"{CASE}.json").read_text())
    return load_file(golden / f"{CASE}.safetensors"), description


def test_a_converted_folder_loads_and_answers_as_the_official_model(golden, tmp_path):
    convert_files(golden / "logic_params.safetensors", golden / "logic_linear_hypatt.json", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    case = load_file(golden / "logic_linear_hypatt.safetensors")
    torch.testing.assert_close(
        model(input_values=case["input.x"]).logits.double(), case["output64.logits"][:, -1], atol=5e-5, rtol=0
    )
    assert (model.config.problem_type, model.config.num_answers) == ("regression", 1)


@pytest.mark.parametrize("mixer", SEQUENCE_MIXERS)
def test_every_official_attention_converts_to_its_row_of_table_a1(official, mixer):
    tensors, description = official
    fields = {**description["config"], "sequence_mixer": mixer}
    config, state_dict = convert(tensors, fields, loss_fn="SymbolicRavenLoss", num_answers=2)
    assert (config.vocab_size, config.answer_token_id, config.num_answers, config.num_labels) == (9, 8, 2, 8)
    assert ("softmax" in mixer) == (config.effective_score_norm == "softmax")
    assert ("hypatt" in mixer) == (config.attention_type == "hyla")
    assert (state_dict["model.embed_tokens.weight"][8] == 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_type", "reversed"), ("use_absolute_position", True), ("share_params_over_layers", True),
        ("vocab_size", 97), ("dropout_rate", 0.1), ("moe_num", 4), ("sequence_mixer", "swiglu_hypatt"),
        ("state_mixer", "relu_mlp"), ("norm", "batch"),
    ],
)  # fmt: skip
def test_unsupported_fields_are_refused_by_name(official, field, value):
    tensors, description = official
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        convert(tensors, {**description["config"], field: value}, loss_fn=description["loss_fn"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 0, "num_heads=0, but it must be a positive integer"),
        ("num_heads", "4", "num_heads='4', but it must be a positive integer"),
        ("attention_dropout_rate", None, "attention_dropout"),
        ("sequence_mixer", ["linear_hypatt"], "sequence_mixer="),
    ],
)
def test_fields_of_the_wrong_kind_are_refused(official, field, value, message):
    tensors, description = official
    with pytest.raises(ValueError, match=message):
        convert(tensors, {**description["config"], field: value}, loss_fn=description["loss_fn"])


@pytest.mark.parametrize("num_answers", [0, -1])
def test_an_impossible_number_of_answers_is_refused(official, num_answers):
    tensors, description = official
    with pytest.raises(ValueError, match="num_answers must be at least 1"):
        convert(tensors, description["config"], loss_fn=description["loss_fn"], num_answers=num_answers)


def test_tensors_of_the_wrong_number_of_axes_are_refused(official):
    tensors, description = official
    for name in ("params.embedding.kernel", "params.transformer_block_0.sequence_mixer.out.kernel"):
        flat = {**tensors, name: tensors[name].flatten()}
        with pytest.raises(ValueError, match=f"{name} must have"):
            convert(flat, description["config"], loss_fn=description["loss_fn"])


def test_a_model_without_positions_needs_no_distance(official):
    tensors, description = official
    tensors = {name: t for name, t in tensors.items() if "rel_embedding" not in name}
    fields = {**description["config"], "use_relative_position": False, "relative_position_max_dist": None}
    config, _ = convert(tensors, fields, loss_fn=description["loss_fn"])
    assert config.position_type == "none"


def test_heads_that_do_not_divide_are_refused(official):
    tensors, description = official
    with pytest.raises(ValueError, match="qk_dim=30, which does not divide into num_heads=4"):
        convert(tensors, {**description["config"], "qk_dim": 30}, loss_fn=description["loss_fn"])


def test_parameters_and_config_that_do_not_belong_together_are_refused(official):
    tensors, description = official
    fields, loss_fn = description["config"], description["loss_fn"]
    without = {name: t for name, t in tensors.items() if name != "params.transformer_block_1.norm2.scale"}
    with pytest.raises(ValueError, match=r"lack params\.transformer_block_1\.norm2\.scale"):
        convert(without, fields, loss_fn=loss_fn)
    with pytest.raises(ValueError, match=r"no place for the official parameter params\.transformer_block_1"):
        convert(tensors, {**fields, "num_layers": 1}, loss_fn=loss_fn)
    with pytest.raises(ValueError, match="shape"):
        convert(tensors, {**fields, "mlp_dim": 50}, loss_fn=loss_fn)
    with pytest.raises(ValueError, match="lacks the field 'emb_dim'"):
        convert(tensors, {n: v for n, v in fields.items() if n != "emb_dim"}, loss_fn=loss_fn)
    with pytest.raises(ValueError, match="loss_fn='MeanSquaredError' is not supported"):
        convert(tensors, fields, loss_fn="MeanSquaredError")
    with pytest.raises(ValueError, match=r"lack params\.embedding\.embedding, which a model with loss_fn='Autoregr"):
        convert(tensors, fields, loss_fn="AutoregressiveCrossEntropy")


def test_a_file_without_parameters_is_refused_naming_the_one_that_has_them(golden, tmp_path):
    with pytest.raises(ValueError, match=r"they are in logic_params\.safetensors"):
        convert_files(
            golden / "logic_linear_hypatt.safetensors", golden / "logic_linear_hypatt.json", tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(golden, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError):
        convert_files(golden / "logic_params.safetensors", golden / "logic_linear_hypatt.json", tmp_path / "out")


def test_a_converted_language_model_loads_and_generates_what_the_official_one_finds_likeliest(golden, tmp_path):
    convert_files(golden / "lm_params.safetensors", golden / "lm_linear_hypatt.json", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    case = load_file(golden / "lm_linear_hypatt.safetensors")
    generated = model.generate(case["input.net_in"].long(), max_new_tokens=1, do_sample=False)
    assert torch.equal(generated[:, -1], case["output64.logits"][:, -1].argmax(-1))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.generation_config.bos_token_id == 0


def test_a_language_model_with_a_head_of_its_own_keeps_its_bias_and_divides_no_logits(golden):
    description = json.loads((golden / "lm_linear_hypatt.json").read_text())
    tensors, loss_fn = load_file(golden / "lm_params.safetensors"), description["loss_fn"]
    torch.manual_seed(0)
    tensors |= {"params.logitdense.kernel": torch.randn(128, 97), "params.logitdense.bias": torch.randn(97)}
    config, state_dict = convert(tensors, {**description["config"], "output_dim": 97}, loss_fn=loss_fn)
    assert not config.tie_word_embeddings and not config.effective_scale_logits
    model = HylaForCausalLM(config).eval()
    model.load_state_dict(state_dict)
    states = model.model(torch.arange(5)[None]).last_hidden_state
    expected = states @ tensors["params.logitdense.kernel"] + tensors["params.logitdense.bias"]
    torch.testing.assert_close(model(torch.arange(5)[None]).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"no place for the official parameter params\.logitdense"):
        convert(tensors, description["config"], loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": None}, "vocab_size=None, which does not go with"),
        ({"use_causal_mask": False}, "use_causal_mask=False, which does not go with"),
        ({"output_dim": 8}, "output_dim=8 and vocab_size=97"),
        ({"vocab_size": 96}, "model.embed_tokens.weight has the shape"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused(golden, fields, message):
    description = json.loads((golden / "lm_linear_hypatt.json").read_text())
    tensors = load_file(golden / "lm_params.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(tensors, {**description["config"], **fields}, loss_fn=description["loss_fn"])
    with pytest.raises(ValueError, match="num_answers=2 is for puzzles"):
        convert(tensors, description["config"], loss_fn=description["loss_fn"], num_answers=2)


def test_a_json_without_the_config_is_refused(golden, tmp_path):
    save_file({"params.x": torch.zeros(1)}, tmp_path / "p.safetensors")
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'config'"):
        convert_files(tmp_path / "p.safetensors", tmp_path / "c.json", tmp_path / "out")


def test_files_of_another_format_are_refused(golden, tmp_path):
    (tmp_path / "broken").write_text("not a file of that kind")
    with pytest.raises(ValueError, match="is not JSON"):
        convert_files(golden / "logic_params.safetensors", tmp_path / "broken", tmp_path / "out")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        convert_files(tmp_path / "broken", golden / "logic_linear_hypatt.json", tmp_path / "out")

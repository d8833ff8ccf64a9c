"""Tests of the features of transformers besides loading and training: compilers, exporters, adapters, devices, settings."""

import itertools
import shutil

import pytest
import torch
from model_helpers import ATTENTION_TYPES, SMALL, ids, make

from hf_hyla import HylaConfig, HylaForSequenceClassification, HylaModel


FFN_TYPES = ["mlp", "swiglu", "moe"]
CONTINUOUS = {"vocab_size": None, "input_size": 5, "num_answers": 1, "num_labels": 1}
INPUTS = {"input_ids": {}, "input_values": CONTINUOUS}
MASKED = [False, True]
TABLE = list(itertools.product(ATTENTION_TYPES, FFN_TYPES, INPUTS))
# Every pair of two of these and a mask, in a quarter of all combinations: for what takes a second.
PAIRS = [
    ("hyla", "mlp", "input_values", False),
    ("hyla", "swiglu", "input_ids", False),
    ("hyla", "moe", "input_values", True),
    ("linear", "mlp", "input_ids", True),
    ("linear", "swiglu", "input_values", True),
    ("linear", "moe", "input_ids", False),
    ("softmax", "mlp", "input_ids", True),
    ("softmax", "swiglu", "input_values", False),
    ("softmax", "moe", "input_ids", False),
]
# Every attention without and with a mask, and over them every feed-forward and both inputs: for what takes seconds.
SHORT_TABLE = [
    ("hyla", "moe", "input_ids", True),
    ("hyla", "mlp", "input_values", False),
    ("linear", "swiglu", "input_values", True),
    ("linear", "moe", "input_values", False),
    ("softmax", "mlp", "input_ids", True),
    ("softmax", "swiglu", "input_ids", False),
]


def batch_of(size: int, inputs: str, masked: bool) -> dict[str, torch.Tensor]:
    """Arguments of a forward; the first row is padded on the left, all others on the right."""
    draw = torch.Generator().manual_seed(size)
    x = ids(size) if inputs == "input_ids" else torch.randn(size, 10, 5, generator=draw)
    mask = torch.ones(size, 10, dtype=torch.long)
    mask[0, :4] = 0
    mask[1:, 7:] = 0
    return {inputs: x} | ({"attention_mask": mask} if masked else {})


def assert_equal_for_other_batch_sizes(run, model, inputs: str, masked: bool) -> None:
    for size in (7, 2):
        batch = batch_of(size, inputs, masked)
        torch.testing.assert_close(run(**batch), model(**batch).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_equals_eager(model, inputs, masked, backend) -> None:
    batch = batch_of(3, inputs, masked)
    for tensor in batch.values():
        torch._dynamo.mark_dynamic(tensor, 0)  # an error if the graph then holds for one batch size only
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_equal_for_other_batch_sizes(lambda **b: compiled(**b).logits, model, inputs, masked)


@pytest.mark.parametrize(("attention_type", "ffn_type", "inputs", "masked"), PAIRS)
def test_forward_is_one_graph_for_all_batch_sizes(fresh_dynamo, attention_type, ffn_type, inputs, masked):
    model = make(attention_type=attention_type, ffn_type=ffn_type, num_hidden_layers=1, **INPUTS[inputs])
    compiled_equals_eager(model, inputs, masked, backend="eager")  # the graph alone: what may break it is found here


def test_pairs_hold_every_pair():
    def pairs(rows):
        return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}

    assert pairs(PAIRS) == pairs(itertools.product(ATTENTION_TYPES, FFN_TYPES, INPUTS, MASKED))


def test_the_graph_is_whole_where_torch_cannot_ask_in_it_for_autocast(fresh_dynamo, monkeypatch):
    # As in torch 2.11.
    cannot_be_compiled = torch.compiler.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", cannot_be_compiled)
    model, batch = make(num_hidden_layers=1), batch_of(3, "input_ids", masked=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(("attention_type", "ffn_type", "inputs", "masked"), [row for row in SHORT_TABLE if row[3]])
def test_compiled_code_equals_eager(fresh_dynamo, attention_type, ffn_type, inputs, masked):
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("torch.compile needs a C compiler")
    model = make(attention_type=attention_type, ffn_type=ffn_type, num_hidden_layers=1, **INPUTS[inputs])
    # Trusting the compiler with the processor's instructions saves seconds of trying them.
    with torch.no_grad(), torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        compiled_equals_eager(model, inputs, masked, backend="inductor")


def dynamic_batch(batch: dict[str, torch.Tensor]) -> dict:
    return {name: {0: torch.export.Dim.DYNAMIC} for name in batch}


@pytest.mark.parametrize(("attention_type", "ffn_type", "inputs", "masked"), PAIRS)
def test_exported_program_equals_eager_for_other_batch_sizes(attention_type, ffn_type, inputs, masked):
    model = make(attention_type=attention_type, ffn_type=ffn_type, num_hidden_layers=1, **INPUTS[inputs])
    batch = batch_of(3, inputs, masked)
    exported = torch.export.export(model, (), batch, dynamic_shapes=dynamic_batch(batch)).module()
    assert_equal_for_other_batch_sizes(lambda **b: exported(**b).logits, model, inputs, masked)


@pytest.mark.parametrize(("attention_type", "ffn_type", "inputs", "masked"), SHORT_TABLE)
def test_onnx_program_equals_eager_for_other_batch_sizes(tmp_path, attention_type, ffn_type, inputs, masked):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    depth = 2 if attention_type == "hyla" else 1
    model = make(attention_type=attention_type, ffn_type=ffn_type, value_depth=depth, **INPUTS[inputs])
    batch = batch_of(3, inputs, masked)
    program = torch.onnx.export(
        model,
        (),
        kwargs=batch,
        dynamo=True,
        dynamic_shapes=dynamic_batch(batch),
        output_names=["logits"],
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == list(batch)

    def run(**arguments):
        return torch.from_numpy(session.run(["logits"], {name: t.numpy() for name, t in arguments.items()})[0])

    assert_equal_for_other_batch_sizes(run, model, inputs, masked)


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_lora_attaches_trains_and_merges(attention_type, ffn_type):
    peft = pytest.importorskip("peft")
    model = make(scale=1.0, attention_type=attention_type, ffn_type=ffn_type)
    x, labels = ids(), ids(length=4, vocab=8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = model(x).logits.detach()
    settings = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    adapted = peft.get_peft_model(model, settings)
    torch.testing.assert_close(adapted(x).logits, expected)  # a new adapter adds nothing

    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = adapted(input_ids=x, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    adapted.eval()
    trained = adapted(x).logits
    assert (trained - expected).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    assert type(merged) is HylaForSequenceClassification
    torch.testing.assert_close(merged(x).logits, trained, atol=1e-4, rtol=1e-4)
    for name, parameter in merged.named_parameters():
        touched = any(part in name for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
        # peft trains the head as a whole beside its adapters.
        assert torch.equal(parameter, before[name]) != (touched or name.startswith("classifier")), name


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_device_maps_split_between_layers_only_and_change_no_output(tmp_path, ffn_type):
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    def build():
        return make(ffn_type=ffn_type, num_hidden_layers=4, value_depth=2)

    model = build()
    expected = model(ids()).logits
    sizes = compute_module_sizes(model)
    maps = []
    # Sizes at which a layer fits in part: the map has room for two layers, the second of them kept free by accelerate.
    for room in torch.linspace(sizes["model.layers.0"], sizes[""], 9).tolist():
        memory = {"cpu": int(room), "disk": 10**9}
        device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
        inside = [name for name in device_map if ".layers." in name and name.count(".") > 2]
        assert not inside, f"a layer is split: {inside}"
        maps.append(device_map)
    # Without the model's word on it, layers would be split at these sizes.
    free = infer_auto_device_map(model, {"cpu": int(1.5 * sizes["model.layers.0"]), "disk": 10**9})
    assert any(name.count(".") > 2 for name in free)

    split = next(m for m in maps if {m.get(f"model.layers.{i}") for i in range(4)} == {"cpu", "disk"})
    dispatched = dispatch_model(model, split, offload_dir=tmp_path / "offload", main_device="cpu")
    assert any(parameter.is_meta for parameter in dispatched.parameters())
    torch.testing.assert_close(dispatched(ids()).logits, expected)

    build().save_pretrained(tmp_path / "saved")
    for device_map in (split, {"": "disk"}):
        loaded = HylaForSequenceClassification.from_pretrained(
            tmp_path / "saved", device_map=dict(device_map), offload_folder=tmp_path / f"offload_{len(device_map)}"
        )
        assert any(parameter.is_meta for parameter in loaded.parameters())
        torch.testing.assert_close(loaded(ids()).logits, expected)


@pytest.mark.parametrize("answer_token_id", [None, 8])
@pytest.mark.parametrize("mean_resizing", [False, True])
def test_resized_embeddings_keep_old_ids_and_the_answer_slot(tmp_path, answer_token_id, mean_resizing):
    for kept, multiple in ((answer_token_id, None), (answer_token_id - 3, 2)) if answer_token_id else ():
        with pytest.raises(ValueError, match=f"would leave out the token {answer_token_id} that marks the answers"):
            make(answer_token_id=answer_token_id).resize_token_embeddings(kept, pad_to_multiple_of=multiple)
    model = make(answer_token_id=answer_token_id)
    rows = model.get_input_embeddings().weight.detach().clone()
    expected = model(ids()).logits.detach()  # a living graph would keep the old table's shape in autograd
    model.resize_token_embeddings(15, mean_resizing=mean_resizing)
    assert (model.config.vocab_size, model.config.answer_token_id) == (15, answer_token_id)
    table = model.get_input_embeddings()
    assert torch.equal(table.weight[:9], rows) and table.weight.shape == (15, 24)
    assert table.weight[9:].isfinite().all() and table.weight[9:].abs().max() > 0
    assert torch.equal(model(ids()).logits, expected)

    new = ids(vocab=15)
    assert (new > 8).any() and (new == 8).any()
    model(new, labels=ids(length=4, vocab=8)).loss.backward()
    # The answer slot stays the zero it was in training too; an ordinary token's row learns.
    assert (table.weight.grad[8] == 0).all() == (answer_token_id == 8)
    assert (table.weight.grad[new[new > 8]] != 0).any(-1).all()

    model.save_pretrained(tmp_path)
    assert torch.equal(HylaForSequenceClassification.from_pretrained(tmp_path)(new).logits, model(new).logits)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_attention_switches_to_eager_and_refuses_others(tmp_path, attention_type):
    model = make(attention_type=attention_type)
    expected = model(ids()).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids()).logits, expected)
    expected = model(ids()).logits
    model.save_pretrained(tmp_path)
    loaded = HylaForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(ids()).logits, expected)
    for name in ("sdpa", "flex_attention", "flash_attention_2", "elephant"):
        message = f"Flash Attention 2|no attn_implementation '{name}': expected one of eager, hyla, "
        with pytest.raises((ValueError, ImportError), match=message):
            model.set_attn_implementation(name)
        with pytest.raises((ValueError, ImportError), match=message):
            HylaForSequenceClassification.from_pretrained(tmp_path, attn_implementation=name)
        assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids()).logits, expected)  # a refusal leaves the model as it was


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize(("attention_type", "ffn_type", "inputs"), TABLE)
def test_a_row_alone_equals_the_row_in_a_batch(attention_type, ffn_type, inputs, masked, is_causal):
    model = make(attention_type=attention_type, ffn_type=ffn_type, is_causal=is_causal, **INPUTS[inputs])
    batch = batch_of(5, inputs, masked)
    together = model(**batch, output_hidden_states=True, output_attentions=True)
    for row in range(5):
        alone = model(
            **{name: tensor[row : row + 1] for name, tensor in batch.items()},
            output_hidden_states=True,
            output_attentions=True,
        )
        pairs = [(alone.logits, together.logits)]
        pairs += zip(alone.hidden_states + alone.attentions, together.hidden_states + together.attentions, strict=True)
        for single, many in pairs:
            # Of single numbers beside large ones no more can be asked than of the large ones.
            atol = 1e-4 + 1e-5 * many.abs().max().item()
            torch.testing.assert_close(single, many[row : row + 1], atol=atol, rtol=1e-4)


@pytest.fixture
def nan_in_new_memory():
    """Memory that nothing has written to is NaN, so that it cannot pass for a weight by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "settings",
    [
        {"value_depth": 2},
        {"ffn_type": "moe"},
        {"ffn_type": "moe", "value_depth": 2, **CONTINUOUS, "num_labels": 8},  # few numbers deviate by chance
        {"ffn_type": "swiglu", "norm_type": "rms_norm", "qk_norm": True, "attention_type": "softmax"},
        {"attention_type": "linear", "position_type": "none", "answer_token_id": None, "embedding_bias": False},
    ],
    ids=str,
)
def test_models_are_built_on_meta_and_missing_keys_are_initialised(tmp_path, nan_in_new_memory, settings):
    config = HylaConfig(**{**SMALL, **settings})
    with torch.device("meta"):
        hollow = HylaForSequenceClassification(config)
    assert all(tensor.is_meta for tensor in [*hollow.parameters(), *hollow.buffers()])

    torch.manual_seed(0)
    fresh = HylaForSequenceClassification(config)
    fresh.save_pretrained(tmp_path, state_dict={"classifier.bias": torch.full_like(fresh.classifier.bias, 7.0)})
    loaded, report = HylaForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {name for name, _ in fresh.named_parameters()} - {"classifier.bias"}
    assert (loaded.classifier.bias == 7).all()
    for (name, tensor), (_, other) in zip(loaded.named_parameters(), fresh.named_parameters(), strict=True):
        if name == "classifier.bias":
            continue
        if other.unique().numel() == 1:  # zeros and ones
            assert torch.equal(tensor, other), name
        else:
            assert 0.6 < tensor.std() / other.std() < 1.6, name


def test_a_checkpoint_of_the_base_model_is_completed_by_a_new_head(tmp_path, nan_in_new_memory):
    model = make(ffn_type="moe", value_depth=2)
    model.model.save_pretrained(tmp_path)
    loaded, report = HylaForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert loaded.classifier.weight.isfinite().all() and (loaded.classifier.bias == 0).all()
    assert torch.equal(loaded.model(ids()).last_hidden_state, model.model(ids()).last_hidden_state)
    head_off = HylaModel.from_pretrained(tmp_path)
    assert torch.equal(head_off(ids()).last_hidden_state, model.model(ids()).last_hidden_state)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("attention_type", "ffn_type", "inputs"), TABLE)
def test_both_forms_of_gradient_checkpointing_leave_gradients_equal(attention_type, ffn_type, inputs, dropout):
    batch = batch_of(3, inputs, masked=True)
    labels = ids(length=4, vocab=8) if inputs == "input_ids" else torch.randn(3, generator=torch.manual_seed(0))
    gradients = {}
    for form in ("plain", True, False):
        model = make(
            attention_type=attention_type, ffn_type=ffn_type, attention_dropout=dropout, **INPUTS[inputs]
        ).train()
        calls = []
        if form != "plain":
            model.gradient_checkpointing_enable({"use_reentrant": form})
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)  # the same pairs are dropped
        loss = model(**batch, labels=labels).loss
        loss.backward()
        assert len(calls) == (1 if form == "plain" else 2)  # recomputed, or the comparison would say nothing
        gradients[form] = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    for form in (True, False):
        for plain, recomputed in zip(gradients["plain"], gradients[form], strict=True):
            torch.testing.assert_close(recomputed, plain)


def test_checkpointing_without_reentrance_keeps_the_gradient_of_the_balancing_loss():
    gradients = []
    for checkpointing in (False, True):
        model = make(
            ffn_type="moe", output_router_logits=True, router_aux_loss_coef=1.0, attention_dropout=0.0
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(), labels=ids(length=4, vocab=8)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("by_config", [True, False])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_codes_and_hidden_states_are_the_same_by_config_and_by_argument(attention_type, by_config):
    wanted = {"output_attentions": True, "output_hidden_states": True}
    plain, x = make(attention_type=attention_type), ids()
    model = make(attention_type=attention_type, **(wanted if by_config else {}))
    arguments = {} if by_config else wanted
    for ours, reference in ((model, plain), (model.model, plain.model)):
        out, without = ours(x, **arguments), reference(x)
        assert without.attentions is None and without.hidden_states is None
        # To ask changes nothing but, by how many tokens the last layer multiplies at once, the order of its sums.
        torch.testing.assert_close(out[0], without[0])
        assert len(out.attentions) == 2 and len(out.hidden_states) == 3
        assert torch.equal(out.hidden_states[0], plain.get_input_embeddings()(x) + plain.model.embed_bias)
        torch.testing.assert_close(out.hidden_states[-1], plain.model(x).last_hidden_state)
        # An argument has the last word.
        refused = ours(x, output_attentions=False, output_hidden_states=False)
        assert refused.attentions is None and refused.hidden_states is None

        values = ours(x, return_dict=False, **arguments)
        assert isinstance(values, tuple) and len(values) == 3
        for got, expected in zip(values, out.values(), strict=True):
            if isinstance(expected, tuple):
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            else:
                assert torch.equal(got, expected)
    labels = ids(length=4, vocab=8)
    loss, logits = plain(x, labels=labels, return_dict=False)
    assert torch.equal(loss, plain(x, labels=labels).loss) and torch.equal(logits, plain(x).logits)


def test_a_tuple_carries_the_routers_logits_last():
    model = make(ffn_type="moe")
    out = model(ids(), output_router_logits=True)
    logits, aux_loss, router_logits = model(ids(), output_router_logits=True, return_dict=False)
    assert torch.equal(logits, out.logits) and torch.equal(aux_loss, out.aux_loss)
    assert [tensor.shape for tensor in router_logits] == [(30, 4)] * 2


def test_reentrant_checkpointing_refuses_to_lose_the_gradient_of_the_balancing_loss():
    model = make(ffn_type="moe", output_router_logits=True).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(ids(), labels=ids(length=4, vocab=8))


def test_return_dict_of_the_config_makes_the_model_return_tuples():
    model = make(return_dict=False)
    assert [type(model(ids())), type(model.model(ids()))] == [tuple, tuple]
    assert torch.equal(model(ids())[0], model(ids(), return_dict=True).logits)


def test_lora_on_the_embedding_trains():
    peft = pytest.importorskip("peft")
    model = make(scale=1.0)
    expected = model(ids()).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    torch.testing.assert_close(adapted(ids()).logits, expected)
    adapted(ids(), labels=ids(length=4, vocab=8)).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_embedding_B" in name)
    with pytest.raises(ValueError, match="input_ids must lie in 0 to 8"):
        adapted(ids() + 9)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_frozen_models_give_gradients_to_their_inputs_under_checkpointing(inputs, use_reentrant):
    model = make(scale=1.0, attention_dropout=0.0, **INPUTS[inputs]).train().requires_grad_(False)

    def gradient():
        found = []

        def watch(module, arguments, output):
            output.register_hook(lambda gradient: found.append(gradient))

        with torch.random.fork_rng():
            batch = batch_of(3, inputs, masked=True)
            if inputs == "input_values":
                batch[inputs].requires_grad_()
            hook = model.get_input_embeddings().register_forward_hook(watch)
            model(**batch).logits.square().sum().backward()
            hook.remove()
        return [batch[inputs].grad, *found] if inputs == "input_values" else found

    model.enable_input_require_grads()
    expected = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for tensor, other in zip(gradient(), expected, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(tensor, other)

"""Every way of generating gives what a plain loop over uncached forwards gives; then what is built on top of generating."""

import copy
from types import SimpleNamespace

import pytest
import torch
from model_helpers import ATTENTION_TYPES, cache_of, ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.autograd import forward_ad
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from hf_hyla import HylaConfig, HylaForCausalLM
from hf_hyla.model.attention_hyla import eager_attention_forward
from hf_hyla.model.backends_hyla import BACKENDS, Call, fastest_implementation
from hf_hyla.model.inputs_hyla import CACHE_NAME


VOCAB = 23
POSITIONS = ["relative", "rotary"]


def make(seed: int = 0, **settings) -> HylaForCausalLM:
    torch.manual_seed(seed)
    config = HylaConfig(
        **{
            "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6,
            "value_head_dim": 5, "intermediate_size": 32, "relative_attention_num_buckets": 6, "answer_token_id": None,
            "is_causal": True,
        } | settings
    )  # fmt: skip
    model = HylaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 3 / max(parameter.shape[-1], 4) ** 0.5)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


@torch.no_grad()
def likeliest(model, prompt, count) -> torch.Tensor:
    """The prompts with the likeliest next token added so many times, by forwards without a cache."""
    for _ in range(count):
        logits = model(prompt, use_cache=False).logits
        prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("position_type", POSITIONS)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_greedy_generation_takes_the_likeliest_token_at_every_step(attention_type, position_type, cache):
    model, prompt = make(attention_type=attention_type, position_type=position_type), ids(3, 7, VOCAB)
    how = {"use_cache": False} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, **how)
    assert torch.equal(generated, likeliest(model, prompt, 6))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("position_type", POSITIONS)
def test_prompts_padded_on_the_left_generate_what_they_do_alone(position_type, cache):
    model, prompt = make(position_type=position_type), ids(3, 9, VOCAB)
    mask = torch.ones_like(prompt)
    mask[0, :4], mask[2, :8] = 0, 0
    generated = model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
    )
    for row in range(3):
        alone = likeliest(model, prompt[row : row + 1, mask[row].bool()], 5)
        assert torch.equal(generated[row, -5:], alone[0, -5:])


def test_beams_and_samples_are_the_same_with_and_without_a_cache():
    model, prompt = make(position_type="rotary"), ids(2, 7, VOCAB)
    for how in ({"num_beams": 3, "do_sample": False, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            results.append(model.generate(prompt, max_new_tokens=6, use_cache=use_cache, **how))
        assert torch.equal(*results)


@pytest.mark.parametrize("position_type", POSITIONS)
def test_assistants_and_look_ups_change_no_token(position_type):
    model, prompt = make(position_type=position_type), ids(1, 9, VOCAB)
    expected = likeliest(model, prompt, 8)
    assistant = make(seed=3, num_hidden_layers=1, attention_type="linear")
    for how in (
        {"assistant_model": assistant},
        {"assistant_model": copy.deepcopy(model)},
        {"prompt_lookup_num_tokens": 2},
    ):
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, **how), expected)


def test_a_prefix_is_read_once_and_used_again():
    model, prefix = make(), ids(1, 6, VOCAB)
    with torch.no_grad():
        past = cache_of(model(prefix))
    for seed in (2, 3):
        prompt = torch.cat([prefix, ids(1, 4, VOCAB, seed=seed)], dim=1)
        generated = model.generate(prompt, max_new_tokens=4, do_sample=False, **{CACHE_NAME: copy.deepcopy(past)})
        assert torch.equal(generated, likeliest(model, prompt, 4))
    out = model.generate(prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = model.generate(out.sequences, max_new_tokens=3, do_sample=False, **{CACHE_NAME: cache_of(out)})
    assert torch.equal(more, likeliest(model, prompt, 6))


def test_generating_from_embeddings_equals_generating_from_their_ids():
    model, prompt = make(), ids(2, 6, VOCAB)
    embeds = model.get_input_embeddings()(prompt)
    for cache in ("dynamic", "static"):
        generated = model.generate(
            inputs_embeds=embeds, max_new_tokens=4, do_sample=False, cache_implementation=cache, disable_compile=True
        )
        assert torch.equal(generated, likeliest(model, prompt, 4)[:, 6:])


def test_long_prompts_are_read_in_chunks():
    model, prompt = make(), ids(1, 11, VOCAB)
    for cache in ("dynamic", "static"):
        generated = model.generate(
            prompt,
            max_new_tokens=3,
            do_sample=False,
            prefill_chunk_size=4,
            cache_implementation=cache,
            disable_compile=True,
        )
        assert torch.equal(generated, likeliest(model, prompt, 3))


def test_codes_and_states_of_every_step_are_returned_on_request():
    model, prompt = make(), ids(2, 6, VOCAB)
    out = model.generate(
        prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_attentions=True,
        output_hidden_states=True, output_logits=True,
    )  # fmt: skip
    assert [step[0].shape for step in out.attentions] == [(2, 4, 6, 6), (2, 4, 1, 7), (2, 4, 1, 8)]
    assert [step[0].shape for step in out.hidden_states] == [(2, 6, 24), (2, 1, 24), (2, 1, 24)]
    whole = model(out.sequences[:, :-1], output_attentions=True)
    for layer in range(2):
        codes = [step[layer][:, :, -1] for step in out.attentions]
        for position, code in enumerate(codes, start=5):
            torch.testing.assert_close(
                code, whole.attentions[layer][:, :, position, : position + 1], atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("score_norm", "activation"), [("rms_head", nn.ReLU()), ("none", None)])
def test_the_kernel_for_one_query_equals_the_definition(score_norm, activation, dtype):
    pytest.importorskip("numba")
    layer = SimpleNamespace(
        attention_type="hyla", score_norm=score_norm, value_activation=activation, value_mixing=None, training=False
    )
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    # Strides of a model's projections and of a cache; several threads' worth of keys.
    query, key = draw(2, 1, 3, 7).transpose(1, 2), draw(2, 3, 700, 7)
    value, bias = draw(2, 700, 3, 5).transpose(1, 2), draw(3, 700)
    padding = torch.ones(2, 1, 1, 700, dtype=torch.bool)
    padding[1, :, :, :650] = False
    key[1, :, :650], value[1, :, :650] = torch.nan, torch.nan  # what no query sees matters to nobody
    scaling = 7**-0.5
    for mask, of_position in ((padding, bias), (padding.float() - 1, None)):
        call = Call(layer, query, key, value, mask, scaling, 0.0, of_position)
        assert fastest_implementation(call) == "hyla_step"
        ours, _ = BACKENDS["hyla"](*call)
        wide = (x.double().nan_to_num() for x in (query, key, value))
        theirs, _ = eager_attention_forward(
            layer, *wide, padding, scaling, 0.0, None if of_position is None else of_position.double()
        )
        assert ours.shape == (2, 1, 3, 5) and ours.dtype == dtype
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    large = Call(layer, query * 1e15, key * 1e15, value, padding, scaling)
    if score_norm == "rms_head" and dtype == torch.float32:
        assert BACKENDS["hyla"](*large)[0][0].isfinite().all()


STEP = SimpleNamespace(
    attention_type="hyla", score_norm="rms_head", value_activation=nn.ReLU(), value_mixing=None, training=False
)
DIFFERENTIATED = ["query", "key", "value", "position_bias"]


def step_inputs() -> dict[str, torch.Tensor]:
    """What one query needs whose kernel is worth its call."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 1, 7), (2, 3, 700, 7), (2, 3, 700, 5), (3, 700))
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return dict(zip(DIFFERENTIATED, tensors, strict=True))


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_kernel_for_one_query_leaves_gradients_to_the_others(name):
    pytest.importorskip("numba")
    inputs = step_inputs()
    call = Call(STEP, attention_mask=None, scaling=0.4, **inputs)
    assert fastest_implementation(call) == "hyla_step"
    inputs[name].requires_grad_()
    assert fastest_implementation(call) != "hyla_step"
    gradients = [
        torch.autograd.grad(BACKENDS[backend](*call)[0].square().sum(), inputs[name])[0]
        for backend in ("hyla", "eager")
    ]
    assert gradients[1].norm() > 0.1
    torch.testing.assert_close(*gradients)


def dual(attend, tensor, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(attend(forward_ad.make_dual(tensor, tangent))).tangent


TRANSFORMS = {
    "dual": dual,
    "jvp": lambda attend, tensor, tangent: torch.func.jvp(attend, (tensor,), (tangent,))[1],
    "vmap": lambda attend, tensor, tangent: torch.vmap(attend)(torch.stack([tensor, tangent])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_kernel_for_one_query_leaves_transforms_to_the_definition(name, transform):
    inputs = step_inputs()
    tangent = torch.randn_like(inputs[name])

    def along(backend):
        def attend(tensor):
            return BACKENDS[backend](STEP, attention_mask=None, scaling=0.4, **{**inputs, name: tensor})[0]

        return TRANSFORMS[transform](attend, inputs[name], tangent)

    expected = along("eager")
    assert expected.norm() > 0.1
    torch.testing.assert_close(along("hyla"), expected)


@pytest.mark.usefixtures("one_size_of_tiles")
@pytest.mark.parametrize("attn_implementation", ["hyla_chunked", "hyla_cpu"])
def test_a_step_by_any_implementation_equals_the_definition(attn_implementation):
    pytest.importorskip("numba")
    # Sizes that the kernel is compiled for in other tests.
    model, tokens = make(num_attention_heads=3, head_dim=5, value_head_dim=7), ids(2, 19, VOCAB)
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_attn_implementation(attn_implementation)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
            logits, first = [], 0
            for count in (17, 1, 1):
                out = model(tokens[:, first : first + count], cache=cache)
                first += count
                logits.append(out.logits)
            torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("position_type", POSITIONS)
def test_a_compiled_step_is_one_graph_for_all_positions(fresh_dynamo, position_type):
    model, tokens = make(position_type=position_type), ids(2, 9, VOCAB)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(tokens).logits
        cache = StaticCache(config=model.config, max_cache_len=12)
        model(tokens[:, :4], cache=cache)
        for place in range(4, 9):
            given = model.prepare_inputs_for_generation(
                tokens[:, : place + 1],
                next_sequence_length=1,
                cache=cache,
                position_ids=torch.tensor([[place]]),
            )
            with torch._dynamo.config.patch(error_on_recompile=place > 5):
                logits = step(**given).logits
            torch.testing.assert_close(logits[:, 0], expected[:, place], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position_type", POSITIONS)
def test_an_exported_step_generates_what_the_model_does(position_type):
    # transformers' module for export gives keys and values the same width.
    model, prompt = make(position_type=position_type, value_head_dim=6), ids(1, 5, VOCAB)
    expected = likeliest(model, prompt, 4)
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static")
    module = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=16)
    example = {"input_ids": prompt[:, :1], "cache_position": torch.tensor([0])}
    with torch.no_grad():
        program = torch.export.export(module, (), example, strict=True).module()
        for place in range(8):
            logits = program(input_ids=expected[:, place : place + 1], cache_position=torch.tensor([place]))
            if place >= 4:
                assert logits[0, -1].argmax() == expected[0, place + 1]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>", padding_side="left")


def test_the_text_generation_pipeline_knows_the_model(tmp_path, caplog):
    tokenizer, model = byte_tokenizer(), make(vocab_size=257)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(write.model) is HylaForCausalLM and "is not supported for text-generation" not in caplog.text
    texts = ["def f(x):", "x"]
    found = write(texts, max_new_tokens=4, do_sample=False, batch_size=2, return_full_text=False)
    for text, answer in zip(texts, found, strict=True):
        expected = likeliest(model, torch.tensor([tokenizer(text).input_ids]), 4)[0, -4:]
        assert answer[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_lora_learns_to_generate_and_merges(tmp_path, attention_type):
    peft = pytest.importorskip("peft")
    model, tokens = make(attention_type=attention_type, attention_dropout=0.0), ids(2, 9, VOCAB)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    generated = tuned.eval().generate(input_ids=tokens, max_new_tokens=3, do_sample=False)
    merged = tuned.merge_and_unload()
    assert torch.equal(generated, likeliest(merged, tokens, 3))
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, merged(tokens).logits)
    assert any(not torch.equal(before[name], p) for name, p in merged.named_parameters())


def test_a_model_in_half_precision_generates():
    model, prompt = make().to(torch.bfloat16), ids(2, 6, VOCAB)
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (2, 9)
    assert isinstance(model.lm_head, nn.Linear) and model(prompt).logits.dtype == torch.bfloat16

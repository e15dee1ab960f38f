"""RoPE decoder: every backend, padding, packing, caches and generation; that it equals Llama is in test_conversion."""

import inspect

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_tfamily.auto import register_all
from hf_tfamily.hub import export
from hf_tfamily.modeling import modeling_rope_decoder
from hf_tfamily.modeling.configuration_rope_decoder import RoPEDecoderConfig
from hf_tfamily.modeling.modeling_rope_decoder import (
    RoPEDecoder,
    RoPEDecoderForCausalLM,
    RoPEDecoderForSequenceClassification,
    RoPEDecoderForTokenClassification,
    RoPEDecoderModel,
)

register_all()

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PATTERNS = {
    "none": None,
    "layers": [{"type": "local", "window": 4}, {"type": "strided", "stride": 3}],
    "heads": {
        "type": "per_head",
        "patterns": [{"type": "local", "window": 3}, {"type": "fixed", "block": 4, "summary": 1}],
    },
}
BACKENDS = ("eager", "sdpa", "flex_attention", "block_sparse")
patterns = pytest.mark.parametrize("pattern", PATTERNS)


def causal_lm(pattern="none", implementation="sdpa", **fields):
    """The same weights for the same fields, large enough that every key matters."""
    torch.manual_seed(0)
    config = RoPEDecoderConfig(**TINY, attention_patterns=PATTERNS[pattern], initializer_range=0.2, **fields)
    return RoPEDecoderForCausalLM._from_config(config, attn_implementation=implementation).eval()


def ids(*shape):
    return torch.randint(3, TINY["vocab_size"], shape)


@patterns
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_backends_agree(pattern, layout):
    batch = {"input_ids": ids(2, 11), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, 9:] = 0
    expected = causal_lm(pattern, "eager", rotary_layout=layout).double()(**batch)
    for implementation in BACKENDS:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = causal_lm(pattern, implementation, rotary_layout=layout)(**batch)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(output.logits[real].double(), expected.logits[real], atol=1e-5, rtol=1e-5)
        assert output.logits.isfinite().all()


@patterns
def test_gradients_agree_also_under_checkpointing(pattern):
    inputs = ids(2, 9)

    def gradients(implementation, checkpointing=False):
        model = causal_lm(pattern, implementation).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(inputs, labels=inputs).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients("eager")
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    for found in (gradients("sdpa"), gradients("sdpa", checkpointing=True), gradients("block_sparse")):
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@patterns
@torch.no_grad()
def test_padding_does_not_matter(pattern):
    model, tokens = causal_lm(pattern), ids(1, 6)
    alone = model(tokens).logits
    for left, right in ((5, 0), (0, 5), (3, 2)):
        padded = torch.nn.functional.pad(tokens, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right))
        inside = model(padded, attention_mask=mask).logits[:, left : left + 6]
        torch.testing.assert_close(inside, alone, atol=1e-5, rtol=1e-5)


@patterns
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(pattern):
    """With the default use_cache=True too, where stock decoders let them see each other."""
    model, first, second = causal_lm(pattern), ids(1, 5), ids(1, 7)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    packed = model(torch.cat((first, second), dim=1), position_ids=positions).logits
    alone = torch.cat((model(first).logits, model(second).logits), dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@patterns
@pytest.mark.parametrize("new", [1, 3])
@torch.no_grad()
def test_the_last_document_of_a_packed_row_goes_on(pattern, new):
    model, first, second = causal_lm(pattern), ids(1, 5), ids(1, 9)
    positions = torch.cat((torch.arange(5), torch.arange(9)))[None]
    row = torch.cat((first, second), dim=1)
    read = model(row[:, :-new], position_ids=positions[:, :-new], use_cache=True)
    after = model(row[:, -new:], position_ids=positions[:, -new:], past_key_values=read.past_key_values).logits
    torch.testing.assert_close(after, model(second).logits[:, -new:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_4d_mask_says_all_as_in_stock_models():
    """A prefix that sees itself both ways: not causal."""
    inputs, mask = ids(2, 8), torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    mask[..., :4, :4] = True
    llama = LlamaForCausalLM._from_config(LlamaConfig(**TINY), attn_implementation="sdpa").eval()
    for implementation in ("eager", "sdpa"):
        ours = causal_lm("none", implementation)
        ours.load_state_dict(llama.state_dict())
        expected = llama(inputs, attention_mask=mask).logits
        torch.testing.assert_close(ours(inputs, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours(inputs).logits, expected, atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_row_of_padding_alone_gives_no_nan(implementation):
    mask = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])
    model = causal_lm("none", implementation)
    hidden = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    seen = []
    assert model(ids(2, 4), attention_mask=mask).logits.isfinite().all()
    hidden.remove()
    assert not seen[0][0].any()


@patterns
@torch.no_grad()
def test_token_by_token_equals_at_once(pattern):
    model, inputs = causal_lm(pattern), ids(2, 10)
    at_once = model(inputs).logits
    cache, steps = None, []
    for start, end in ((0, 4), (4, 7), (7, 8), (8, 9), (9, 10)):
        output = model(inputs[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once, atol=1e-5, rtol=1e-5)


@patterns
@pytest.mark.parametrize("implementation", ["sdpa", "block_sparse"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@torch.no_grad()
def test_generation_with_left_padding(pattern, options, implementation):
    model, prompt = causal_lm(pattern, implementation), ids(1, 5)
    padded = torch.cat((torch.nn.functional.pad(prompt, (4, 0)), ids(1, 9)))
    mask = (padded != 0).long()
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = prompt
    if options.get("num_beams"):
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy, **options)
    else:
        for _ in range(8):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(dim=-1)), dim=1)
    generated = model.generate(padded, attention_mask=mask, **greedy, **options)
    assert torch.equal(generated[:1, 4:], expected)


@pytest.mark.parametrize("pattern", ["none", "layers"])
def test_compiles_without_graph_breaks(pattern):
    model, inputs = causal_lm(pattern), ids(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs, labels=inputs).loss, model(inputs, labels=inputs).loss)


@patterns
@torch.no_grad()
def test_generation_compiles_with_a_static_cache(pattern):
    model, prompt = causal_lm(pattern), ids(1, 5)
    config = CompileConfig(fullgraph=True, backend="eager")
    config._compile_all_devices = True
    mask = torch.ones_like(prompt)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    assert torch.equal(
        model.generate(prompt, cache_implementation="static", compile_config=config, **options), expected
    )


def test_heads_learn():
    inputs = ids(3, 6)
    config = RoPEDecoderConfig(**TINY, num_labels=4, pad_token_id=0)
    for model_class, labels in (
        (RoPEDecoderForSequenceClassification, torch.tensor([0, 3, 1])),
        (RoPEDecoderForTokenClassification, torch.randint(4, (3, 6))),
    ):
        model = model_class(config)
        output = model(inputs, labels=labels)
        assert output.logits.shape == (*labels.shape, 4)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_embedding_of_the_padding_token_learns():
    """It may be the end token too; stock decoders freeze it."""
    model = causal_lm(pad_token_id=5)
    inputs = torch.tensor([[4, 5, 6, 7]])
    model(inputs, labels=inputs).loss.backward()
    assert model.model.embed_tokens.weight.grad[5].any()


def test_labels_and_shifted_labels_agree_and_count_items():
    model, inputs = causal_lm(), ids(2, 7)
    loss = model(inputs, labels=inputs).loss
    shifted = torch.nn.functional.pad(inputs[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(inputs, shift_labels=shifted).loss, loss)
    torch.testing.assert_close(model(inputs, labels=inputs, num_items_in_batch=24).loss, loss / 2)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    for tied in (False, True):
        model = causal_lm("layers", tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / str(tied))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        inputs = ids(1, 9)
        assert again.config._attn_implementation == "block_sparse"  # what a model with patterns runs by default
        torch.testing.assert_close(again(inputs).logits, model(inputs).logits)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_auto_classes():
    config = RoPEDecoderConfig(**TINY)
    assert type(AutoModel.from_config(config)) is RoPEDecoderModel is RoPEDecoder
    assert type(AutoModelForCausalLM.from_config(config)) is RoPEDecoderForCausalLM
    assert type(AutoModelForSequenceClassification.from_config(config)) is RoPEDecoderForSequenceClassification
    assert type(AutoModelForTokenClassification.from_config(config)) is RoPEDecoderForTokenClassification


def test_conditions_of_the_vllm_transformers_backend(tmp_path, monkeypatch):
    """Those of vLLM's documentation, each by inspection."""
    model = causal_lm()
    export(model, tmp_path)
    auto_map = RoPEDecoderConfig.from_pretrained(tmp_path).auto_map
    assert auto_map["AutoModel"] == "modeling_rope_decoder.RoPEDecoderModel"
    assert auto_map["AutoModelForCausalLM"] == "modeling_rope_decoder.RoPEDecoderForCausalLM"
    assert RoPEDecoderModel._supports_attention_backend
    assert RoPEDecoderModel.is_backend_compatible()
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(modeling_rope_decoder)
    decoder = model.get_decoder()
    assert type(decoder) is RoPEDecoderModel
    for module in (decoder, decoder.layers[0], decoder.layers[0].self_attn):
        parameters = inspect.signature(type(module).forward).parameters.values()
        assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    assert all(layer.self_attn.is_causal for layer in decoder.layers)
    for plan in ("base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan"):
        assert getattr(RoPEDecoderConfig, plan) == getattr(LlamaConfig, plan)
    for plan in ("_tp_plan", "_pp_plan", "_fsdp_plan"):
        assert getattr(RoPEDecoderForCausalLM, plan) == getattr(LlamaForCausalLM, plan)
    names = {name for name, _ in decoder.named_modules()}
    assert names == {name for name, _ in LlamaModel(LlamaConfig(**TINY)).named_modules()}

    # What vLLM does: a backend without masks, one flat row of requests told apart by the backend's own arguments.
    seen = []

    def backend(module, query, key, value, attention_mask, instances=None, **kwargs):
        seen.append((instances[module.layer_idx], attention_mask, kwargs["position_ids"].tolist()))
        return value.repeat_interleave(2, dim=1).transpose(1, 2), None

    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "elsewhere", backend)
    decoder.set_attn_implementation("elsewhere")
    positions = torch.tensor([[0, 1, 2, 5]])
    decoder(ids(1, 4), position_ids=positions, use_cache=False, instances=["first", "second"], return_dict=False)
    assert seen == [("first", None, positions.tolist()), ("second", None, positions.tolist())]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_attention_heads": 3}, "hidden_size=256 is not a multiple of num_attention_heads=3"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1, got 0"),
        ({"head_dim": 5}, "even rotary dimension, but got `head_dim`=5|head_dim=5 .* must be even"),
        ({"attention_dropout": 1.5}, "attention_dropout must be at least 0 and below 1, got 1.5"),
        ({"rotary_layout": "halves"}, "rotary_layout='halves' is unknown; did you mean 'half'"),
        ({"rope_parameters": {"rope_type": "jarn"}}, "rope_type='jarn'; did you mean 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5, but it must be at least 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.0}}, "turns 0 dimensions"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "lacks factor, low_freq_factor, high_freq_factor"),
        ({"rope_theta": 0}, "rope_theta=0, but it must be a number above 0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0, but it must be a number above 0"),
        ({"rope_theta": "a"}, "rope_theta='a', but it must be a number above 0"),
        ({"hidden_act": "silo"}, "hidden_act='silo' is unknown; did you mean 'silu'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be at least 0, got -1.0"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                    "original_max_position_embeddings": 1024,
                }
            },
            "1 values of short_factor; it needs 32",
        ),
        ({"attention_patterns": {"type": "lokal", "window": 3}}, "did you mean 'local'"),
        ({"layer_types": ["full_attention"] * 6}, "say which keys each layer sees with attention_patterns"),
        ({"sliding_window": 4}, "say which keys each layer sees with attention_patterns"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(Exception, match=message):
        RoPEDecoderConfig(**fields)


def test_bad_inputs():
    model = causal_lm()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 39\]"):
        model(torch.tensor([[40]]))
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* = \[2, 4\]"):
        model(ids(2, 4), attention_mask=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"position_ids must have shape \[2 or 1, 4\]"):
        model(ids(2, 4), position_ids=torch.arange(3)[None])
    with_patterns = causal_lm("layers")
    with_patterns.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot run attention patterns"):
        with_patterns(ids(2, 4))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_other_processes_heads_are_refused(implementation):
    """Two of four heads, as tensor parallelism leaves them, under a pattern that differs between heads."""
    pattern = {"type": "fixed", "block": 6, "summary": 1, "sub_blocks": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = RoPEDecoderConfig(**{**TINY, **heads}, attention_patterns=pattern)
    model = RoPEDecoderForCausalLM._from_config(config, attn_implementation=implementation)
    attention = model.model.layers[0].self_attn
    half = attention.head_dim * 2
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.weight = torch.nn.Parameter(linear.weight[:half].detach())
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :half].detach())
    with pytest.raises(ValueError, match=r"Masks of 4 heads.* for the 2 heads that a process holds under tensor"):
        model(ids(1, 12))

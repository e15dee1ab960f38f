"""Stock models under block_sparse without a pattern: their own rule, held to their own eager attention."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from hf_tfamily import Full, Local, Strided, set_attention_patterns
from hf_tfamily.block_sparse import interface

LENGTH, WINDOW = 40, 6
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"vocab_size": 50, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
TEXT = {"num_key_value_heads": 2, "initializer_range": 0.3, **SIZES, **IDS}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
LLAMA4 = {**TEXT, "num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 8}
LOCAL_AND_FULL = ["sliding_attention", "full_attention"]

DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TEXT)),
    "mistral": (MistralForCausalLM, MistralConfig(**TEXT, sliding_window=WINDOW)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**TEXT, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=None),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=WINDOW, layer_types=LOCAL_AND_FULL),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**TEXT, **SLIDING)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**TEXT, **SLIDING, head_dim=8)),
    "qwen2 moe, windows off": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**TEXT, **MOE)),
    "qwen2 moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**TEXT, **MOE, **SLIDING)),
    "llama4": (Llama4ForCausalLM, Llama4TextConfig(**LLAMA4)),
    "gpt oss": (
        GptOssForCausalLM,
        GptOssConfig(**TEXT, head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1),
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config(**TEXT, sliding_window=WINDOW)),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config(**TEXT, sliding_window=WINDOW)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            **IDS, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
    ),
}
each_decoder = pytest.mark.parametrize("name", DECODERS)


def pair(model_class, config):
    """A model under block_sparse and its copy under eager."""
    torch.manual_seed(0)
    ours = model_class(copy.deepcopy(config)).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    twin = copy.deepcopy(ours)
    ours.set_attn_implementation("block_sparse")
    twin.set_attn_implementation("eager")
    return ours, twin


def assert_equal(ours, twin, valid=None, **inputs):
    """Outputs of tokens, and the gradient of every parameter."""
    outputs = []
    for model in (ours, twin):
        model.zero_grad()
        output = model(**inputs)[0]
        output = output if valid is None else output[valid.bool()]
        torch.manual_seed(1)
        (output * torch.randn_like(output)).sum().backward()
        outputs.append(output.detach())
    close(*outputs)
    largest = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    for (name, p), q in zip(ours.named_parameters(), twin.parameters()):
        if q.grad is not None:
            close(p.grad, q.grad, name, floor=1e-2 * largest)


def close(actual, expected, name="", floor=0.0):
    scale = max(float(expected.abs().max()), floor)
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * scale, msg=lambda text: f"{name}: {text}")


def tokens(batch=2):
    return torch.randint(3, 50, (batch, LENGTH))


def padding(side):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(0, 7) if side == "left" else slice(LENGTH - 7, LENGTH)] = 0
    return mask


@each_decoder
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_decoders(name, side):
    ours, twin = pair(*DECODERS[name])
    valid = None if side == "none" else padding(side)
    assert_equal(ours, twin, valid, input_ids=tokens(), attention_mask=valid)


def skip_old_chunks(name):
    """Transformers 5.17 chunks packed rows by slots, which is refused, and fails at masks of static caches."""
    if name == "llama4" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("chunks of an older Transformers")


@each_decoder
def test_packed_rows(name):
    skip_old_chunks(name)
    ours, twin = pair(*DECODERS[name])
    positions = torch.tensor([[*range(25), *range(15)]])
    assert_equal(ours, twin, input_ids=tokens(1), position_ids=positions, use_cache=False)


@each_decoder
def test_gradient_checkpointing(name):
    ours, twin = pair(*DECODERS[name])
    ours.train().gradient_checkpointing_enable()
    assert_equal(ours, twin.train(), input_ids=tokens(), use_cache=False)


@each_decoder
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_generation(name, how):
    if "cache_implementation" in how:
        skip_old_chunks(name)
    ours, twin = pair(*DECODERS[name])
    inputs = {"input_ids": tokens(), "attention_mask": padding("left"), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **how), twin.generate(**inputs, **how))


def modernbert():
    config = ModernBertConfig(
        **{**SIZES, **IDS, "cls_token_id": 3, "sep_token_id": 4, "initializer_range": 0.3},
        local_attention=2 * WINDOW,
        layer_types=LOCAL_AND_FULL,
    )
    return ModernBertForMaskedLM, config


def bert():
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM, BertConfig(vocab_size=50, initializer_range=0.3, **SIZES, **no_dropout)


@pytest.mark.parametrize("build", [bert, modernbert])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_encoders(build, side):
    ours, twin = pair(*build())
    valid = None if side == "none" else padding(side)
    assert_equal(ours, twin, valid, input_ids=tokens(), attention_mask=valid)


def test_vit():
    ours, twin = pair(ViTModel, ViTConfig(image_size=20, patch_size=4, initializer_range=0.3, **SIZES))
    assert_equal(ours, twin, pixel_values=torch.randn(2, 3, 20, 20))


@pytest.mark.parametrize("target_length", [13, 55])
def test_bart(target_length):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = BartConfig(
        vocab_size=50, init_std=0.3, dropout=0.0, encoder_attention_heads=4, decoder_attention_heads=4, **sizes
    )
    ours, twin = pair(BartForConditionalGeneration, config)
    target = torch.randint(3, 50, (2, target_length))
    assert_equal(ours, twin, input_ids=tokens(), attention_mask=padding("right"), decoder_input_ids=target)
    inputs = {"input_ids": tokens(), "attention_mask": padding("right"), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**inputs), twin.generate(**inputs))


def test_windows_and_chunks_cost_what_they_show(monkeypatch):
    """The engine is asked for the window, not for all pairs."""
    asked = []
    engine = interface.block_sparse_attention

    def counted(query, key, value, pattern, **how):
        asked.append(pattern)
        return engine(query, key, value, pattern, **how)

    monkeypatch.setattr(interface, "block_sparse_attention", counted)
    for name, kinds in (("gemma3", ["local", "full"]), ("llama4", ["fixed_block"] * 3 + ["full"])):
        asked.clear()
        pair(*DECODERS[name])[0](tokens())
        assert [pattern.type for pattern in asked] == kinds


@pytest.mark.parametrize("name", ["gemma3", "llama4"])
def test_a_pattern_comes_on_top_of_the_models_own_rule(name):
    """Under a pattern that shows all, nothing changes; under another, every backend's tokens are hidden as well."""
    ours, twin = pair(*DECODERS[name])
    set_attention_patterns(ours, Full())
    ids = tokens()
    close(ours(ids).logits, twin(ids).logits.detach())
    set_attention_patterns(ours, Local(1))  # a token sees itself alone, so that order matters to nobody else
    alone = ours(ids).logits
    changed = ids.clone()
    changed[:, 0] = 3
    close(ours(changed).logits[:, 1:], alone[:, 1:].detach())
    set_attention_patterns(ours, Strided(3))
    assert not torch.allclose(ours(ids).logits, alone)


def t5():
    return T5ForConditionalGeneration, T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)


def capped():
    return Gemma2ForCausalLM, Gemma2Config(**TEXT, head_dim=8)


def doge():
    return DogeForCausalLM, DogeConfig(**TEXT)


REFUSED = {
    capped: "does not support softcap; set attn_logit_softcapping to None",
    t5: "does not support a position_bias that is a tensor; use 'eager' or 'sdpa'",
    doge: "makes no mask tensor, but this model reads",
}


@pytest.mark.parametrize("build", REFUSED)
def test_what_cannot_be_is_refused_by_name(build):
    ours, _ = pair(*build())
    if getattr(ours, "encoder", ours).config._attn_implementation != "block_sparse":
        pytest.skip("an older Transformers leaves T5's stacks under sdpa")
    inputs = {"decoder_input_ids": tokens()} if ours.config.is_encoder_decoder else {}
    with pytest.raises((ValueError, AttributeError), match=REFUSED[build]):
        ours(input_ids=tokens(), **inputs)


def test_a_model_with_attention_of_its_own_is_refused_by_name():
    config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(AttributeError, match="this model reads 'values' of its mask: it cannot run under it"):
        BloomForCausalLM._from_config(config, attn_implementation="block_sparse")(tokens())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_window_of_no_size_is_refused_by_name(compiled):
    """Also in a graph, where no mask is evaluated."""
    ours, _ = pair(*DECODERS["mistral"])
    ours.config.sliding_window = -3
    call = torch.compile(ours, backend="eager") if compiled else ours
    with pytest.raises(Exception, match=r"Local\.window must be an integer of at least 1, got -3"):
        call(tokens())

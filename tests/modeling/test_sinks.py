"""Sinks in models: every document has its own first keys, whatever the row, the backend and the cache."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_tfamily import set_attention_patterns
from hf_tfamily.modeling.attention_patterns import Local, PerHead, Sink, Union
from hf_tfamily.modeling.cache_patterns import PatternCache
from hf_tfamily.modeling.configuration_rope_decoder import RoPEDecoderConfig
from hf_tfamily.modeling.modeling_rope_decoder import RoPEDecoderForCausalLM

PATTERN = Union([Local(5), Sink(2)])
PATTERNS = [PATTERN, PerHead([PATTERN, Union([Local(3), Sink(4)])])]
SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = (17, 6, 20)


def stock(pattern):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    set_attention_patterns(model, pattern)
    return model


def ours(pattern):
    torch.manual_seed(0)
    return RoPEDecoderForCausalLM(RoPEDecoderConfig(**SIZES, **HEADS, attention_patterns=pattern.to_dict())).eval()


models = pytest.mark.parametrize("make", [stock, ours])


@models
@pytest.mark.parametrize("pattern", PATTERNS, ids=["all heads", "per head"])
@torch.no_grad()
def test_packed_and_padded_documents_are_as_if_alone(make, pattern):
    model, documents = make(pattern), [torch.randint(3, 40, (1, length)) for length in LENGTHS]
    alone = [model(ids).logits[0] for ids in documents]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-5, rtol=2e-5)
    longest = max(LENGTHS)
    padded = torch.cat([torch.nn.functional.pad(ids, (longest - ids.shape[1], 0)) for ids in documents])
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in LENGTHS])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = model(padded, attention_mask=mask, position_ids=positions).logits
    for row, expected, length in zip(rows, alone, LENGTHS):
        torch.testing.assert_close(row[longest - length :], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["all heads", "per head"])
@torch.no_grad()
def test_every_backend_shows_the_same(pattern):
    model, ids = ours(pattern), torch.randint(3, 40, (2, 30))
    expected = model(ids).logits
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-5)


@models
def test_every_cache_writes_the_same(make):
    model, ids = make(PATTERN), torch.randint(3, 40, (2, 9))
    arguments = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **arguments)
    for cache in (None, "dynamic", "static"):
        assert torch.equal(model.generate(ids, cache_implementation=cache, **arguments), expected), cache


def test_a_cache_keeps_window_and_sinks_for_ever():
    cache = PatternCache.from_config(ours(PATTERN).config)
    model, ids, kept = ours(PATTERN), torch.randint(3, 40, (2, 60)), set()
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            model(token, past_key_values=cache)
            kept.add(sum(buffer.shape[2] * buffer.shape[3] for buffer in cache.layers[0].buffers))
    assert kept == {7}


@torch.no_grad()
def test_a_models_own_window_hides_sinks_too():
    """What is seen is the pattern and the model's own rule."""
    torch.manual_seed(0)
    model, ids = (
        MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=8)).eval(),
        torch.randint(3, 40, (1, 30)),
    )
    set_attention_patterns(model, PATTERN)
    found = model(ids).logits
    set_attention_patterns(model, Local(5))
    changed = (model(ids).logits - found).abs().amax(-1)[0]
    assert (changed[:5] < 1e-5).all()
    assert changed[6] > 1e-3
    model.config.sliding_window = None
    set_attention_patterns(model, PATTERN)
    assert not torch.allclose(model(ids).logits[:, 20:], found[:, 20:], atol=1e-3)


def test_counts_are_checked():
    for count in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"Sink.count must be an integer of at least 1"):
            Sink(count)

"""Every way of generating gives what greedy search without a cache gives, or is refused in words that say what to use:
our decoders and a stock one, under patterns."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_tfamily.modeling.cache_patterns import PatternCache
from hf_tfamily.modeling.configuration_rope_decoder import RoPEDecoderConfig
from hf_tfamily.modeling.configuration_sparse_transformer import SparseTransformerConfig
from hf_tfamily.modeling.modeling_rope_decoder import RoPEDecoderForCausalLM
from hf_tfamily.modeling.modeling_sparse_transformer import SparseTransformerForCausalLM

LOCAL, STRIDED = {"type": "local", "window": 5}, {"type": "strided", "stride": 4}
HEADS = {"type": "per_head", "patterns": [LOCAL, STRIDED]}
PATTERNS = {
    "local": LOCAL,
    "strided": STRIDED,
    "fixed": [
        {"type": "fixed", "block": 8, "summary": 2, "sub_blocks": 2},
        {"type": "fixed", "block": 4, "summary": 1},
    ],
    "per head": HEADS,
    "with full": [LOCAL, {"type": "full"}],
}
SIZES = {"vocab_size": 23, "hidden_size": 32, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
TOKENS = {"eos_token_id": None, "pad_token_id": 0}
REPEATING = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5]])
NEW = 16


def sparse(pattern, layers=2):
    config = SparseTransformerConfig(
        **SIZES, num_hidden_layers=layers, position_shape=[8, 8], attention_patterns=PATTERNS[pattern]
    )
    return SparseTransformerForCausalLM(config)


def rope(pattern, layers=2):
    config = RoPEDecoderConfig(**SIZES, **GROUPED, num_hidden_layers=layers, attention_patterns=PATTERNS[pattern])
    return RoPEDecoderForCausalLM(config)


def llama(pattern, layers=2):
    config = LlamaConfig(
        **SIZES, **GROUPED, **TOKENS, bos_token_id=None, num_hidden_layers=layers, attention_patterns=PATTERNS[pattern]
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="block_sparse")


MODELS = [
    *[(sparse, pattern) for pattern in ("local", "strided", "fixed", "per head")],
    *[(rope, pattern) for pattern in ("with full", "per head")],
    *[(llama, pattern) for pattern in ("local", "per head")],
]
every_model, ours = (
    pytest.mark.parametrize(("make", "pattern"), models, ids=lambda x: getattr(x, "__name__", x))
    for models in (MODELS, [(sparse, "fixed"), (rope, "per head")])
)


def model_of(make, pattern, layers=2):
    """Every weight large, so that what is seen decides."""
    torch.manual_seed(5)
    model = make(pattern, layers).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    for name, value in TOKENS.items():
        setattr(model.generation_config, name, value)
    return model


@torch.no_grad()
def greedy(model, ids, mask=None, new=NEW):
    """One pass over everything for each token."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(new):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def generate(model, ids, new=NEW, **arguments):
    return model.generate(ids, max_new_tokens=new, do_sample=False, **arguments)


def prompts(padded=False):
    mask = torch.ones(2, 11, dtype=torch.long)
    if padded:
        mask[0, :4] = mask[1, :1] = 0
    return torch.randint(1, 23, (2, 11)), mask


@every_model
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}]
    + [{"cache_implementation": name} for name in ("dynamic", "static")],
    ids=str,
)
def test_caches_and_chunked_prompts(make, pattern, padded, how):
    model, (ids, mask) = model_of(make, pattern), prompts(padded)
    how = {**how, "disable_compile": True} if "static" in how.values() else how
    assert torch.equal(generate(model, ids, attention_mask=mask, **how), greedy(model, ids, mask))


@every_model
@pytest.mark.parametrize("padded", [False, True])
def test_assisted_decoding(make, pattern, padded):
    """Prompt lookup, a smaller model, and the model's own first layer propose tokens; many are taken back."""
    model, mask = model_of(make, pattern), torch.ones_like(REPEATING)
    mask[:, : 3 * padded] = 0
    expected = greedy(model, REPEATING, mask)
    for how in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": model_of(make, pattern, layers=1)},
        {"assistant_model": copy.deepcopy(model)},
        {"assistant_early_exit": 1},
    ):
        assert torch.equal(generate(model, REPEATING, attention_mask=mask, **how), expected), how
    assert torch.equal(generate(model, REPEATING, attention_mask=mask), expected)


@every_model
def test_beams_and_returned_sequences(make, pattern):
    model, (ids, mask) = model_of(make, pattern), prompts(padded=True)
    for how in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}):
        plain = generate(model, ids, attention_mask=mask, use_cache=False, **how)
        for cache in ({}, {"prefill_chunk_size": 4}):
            assert torch.equal(generate(model, ids, attention_mask=mask, **how, **cache), plain)
    drawn = []
    for cache in ({}, {"use_cache": False}):
        torch.manual_seed(0)
        drawn.append(model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=NEW, **cache))
    assert torch.equal(*drawn)


@every_model
@pytest.mark.parametrize("padded", [False, True])
def test_going_on_from_what_was_returned(make, pattern, padded):
    """A conversation: more comes than the past holds; and two endings of one prompt."""
    model, (ids, mask) = model_of(make, pattern), prompts(padded)
    first = generate(model, ids, attention_mask=mask, new=7, return_dict_in_generate=True)
    for more in ([], [[1, 2, 9], [4, 5, 6]], [[7], [8]]):
        longer = torch.cat([first.sequences, torch.tensor(more, dtype=torch.long).view(2, -1)], dim=1)
        longer_mask = torch.cat([mask, mask.new_ones(2, longer.shape[1] - 11)], dim=1)
        past = copy.deepcopy(first.past_key_values)
        found = generate(model, longer, attention_mask=longer_mask, past_key_values=past, new=9)
        assert torch.equal(found, greedy(model, longer, longer_mask, new=9))


@every_model
@torch.no_grad()
def test_bfloat16(make, pattern):
    """Steps are as near to float32 as one pass is."""
    model = model_of(make, pattern)
    ids = greedy(model, prompts()[0])
    exact = model(ids).logits
    model = model.bfloat16()
    cache = DynamicCache() if make is llama else PatternCache.from_config(model.config)
    steps = [model(part, past_key_values=cache).logits for part in ids.split([11] + [1] * NEW, dim=1)]
    error, allowed = ((logits - exact).abs().max() for logits in (torch.cat(steps, dim=1), model(ids).logits))
    assert error <= 2 * allowed


@ours
def test_what_generate_cannot_do_is_refused(make, pattern):
    model, (ids, _) = model_of(make, pattern), prompts()
    first = generate(model, REPEATING, new=3, return_dict_in_generate=True)
    for message, how in {
        "Assisted decoding reads the whole prompt, .* pass no past_key_values": {
            "past_key_values": first.past_key_values,
            "prompt_lookup_num_tokens": 3,
        },
        "prefill_chunk_size cuts input_ids, not inputs_embeds": {
            "inputs_embeds": model.get_input_embeddings()(REPEATING).detach(),
            "prefill_chunk_size": 3,
        },
        "cache_implementation='offloaded' moves keys from a GPU": {"cache_implementation": "offloaded"},
        "cache_implementation='offloaded_static' moves keys from a GPU": {"cache_implementation": "offloaded_static"},
    }.items():
        with pytest.raises(ValueError, match=message):
            generate(model, first.sequences, **how)
    stock = model_of(llama, "local")
    with pytest.raises(ValueError, match=r"come unannounced.*give other models a DynamicCache"):
        generate(stock, ids, past_key_values=PatternCache.from_config(stock.config))

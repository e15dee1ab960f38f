"""The pattern-aware cache: same results as the full forward pass, from fewer keys kept and fewer read."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from hf_tfamily.modeling.attention_patterns import (
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Local,
    PerHead,
    Sink,
    Strided,
    Union,
    pattern_from_dict,
)
from hf_tfamily.modeling.cache_patterns import PatternCache
from hf_tfamily.modeling.configuration_rope_decoder import RoPEDecoderConfig
from hf_tfamily.modeling.configuration_sparse_transformer import SparseTransformerConfig
from hf_tfamily.modeling.modeling_sparse_transformer import SparseTransformerForCausalLM
from tests.modeling.test_attention_patterns import PATTERNS

LENGTH = 30
LEFT_PADDED = torch.tensor([[0] * 5 + [1] * 25, [0] * 2 + [1] * 28])


def causal_lm(*patterns, heads=8):
    config = SparseTransformerConfig(
        vocab_size=27,
        hidden_size=32,
        num_hidden_layers=len(patterns),
        num_attention_heads=heads,
        position_shape=[8, 8],
        attention_patterns=[pattern.to_dict() for pattern in patterns],
    )
    model = SparseTransformerForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight)  # the paper's is 0, which would make every comparison pass
    return model


@torch.no_grad()
def logits_in_steps(model, ids, mask, sizes):
    cache, logits, start = PatternCache.from_config(model.config), [], 0
    for size in sizes:
        end = start + size
        step_mask = None if mask is None else mask[:, :end]
        logits.append(model(ids[:, start:end], attention_mask=step_mask, past_key_values=cache).logits)
        start = end
        assert cache.get_seq_length() == end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_any_steps_equal_the_full_forward_pass(pattern, padded):
    """Token by token, a prompt first, and chunks after a past; eager, sdpa and block_sparse."""
    model = causal_lm(pattern)
    ids = torch.randint(0, 27, (2, LENGTH))
    mask = LEFT_PADDED if padded else None
    tokens = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    for implementation in ("eager", "sdpa", "block_sparse"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits
        for sizes in ([7] + [1] * 23, [11, 9, 1, 1, 8]):
            found = logits_in_steps(model, ids, mask, sizes)
            torch.testing.assert_close(found[tokens], expected[tokens], atol=2e-5, rtol=2e-5)


def test_a_prompt_of_one_token():
    model = causal_lm(Fixed(4, 1), Strided(3))
    ids = torch.randint(0, 27, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(logits_in_steps(model, ids, None, [1] * 12), model(ids).logits, atol=2e-5, rtol=2e-5)


MIXED = (
    Strided(8),
    Fixed(8, 2, sub_blocks=2),
    PerHead((Local(5), Strided(4))),
    Union((Local(6), Strided(6))),
    Union((Local(5), Sink(2))),
)


def test_generate_uses_it_and_equals_generation_without_a_cache():
    model = causal_lm(*MIXED)
    ids = torch.randint(0, 27, (2, 5))
    for arguments in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "dynamic"}):
            torch.manual_seed(0)
            output = model.generate(ids, max_new_tokens=30, return_dict_in_generate=True, **arguments, **cache)
            found.append(output.sequences)
            if not cache:
                assert isinstance(output.past_key_values, PatternCache)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_left_padding_changes_no_token():
    model = causal_lm(*MIXED)
    ids = torch.randint(0, 27, (2, 5))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(8) >= 3).long().expand(2, 8)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    found = model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(found[:, 8:], expected[:, 5:])


def decode_once(cache, length, heads=8, dim=2):
    """Fill the cache to `length` tokens by one prompt, decode one more, and return the keys [1, heads, S, dim] read."""
    cache.announce(torch.zeros(1, length, 1))
    keys = torch.arange(float(length)).view(1, 1, length, 1).expand(1, heads, length, dim)
    for layer in range(len(cache.layers)):
        cache.update(keys, keys, layer)
    seen = cache.announce(torch.zeros(1, 1, 1))
    new = torch.full((1, heads, 1, dim), float(length))
    read = [cache.update(new, new, layer)[0] for layer in range(len(cache.layers))]
    return read, seen


@pytest.mark.parametrize(
    ("pattern", "kept", "read"),
    [
        # kernels.md's arithmetic for N = 12,288: what a head keeps, and what one step reads
        (Local(128), 128, 128),
        (Strided(128), 128 * 128, 96),
        (FixedBlock(128), 128, 128),
        (Fixed(128, 32), 128 + 128 * 32, 128 + 95 * 32),
        (Fixed(128, 8, sub_blocks=4), 128 + 128 * 8, 128 + 95 * 8),
        (FixedSummary(128, 32), 128 * 32, 96 * 32),
        (Union((Local(128), Strided(128))), 128 * 128, 128 + 95),
        (Union((Local(124), Sink(4))), 128, 128),
        (Union((FixedBlock(128), Sink(4))), 132, 132),
        (Full(), 16384, 12288),
    ],
    ids=str,
)
def test_keys_kept_and_read_at_12288(pattern, kept, read):
    """Rooms that grow do so in powers of two, so 96 columns or blocks have room for 128."""
    cache = PatternCache([pattern], num_heads=8)
    (keys,), seen = decode_once(cache, 12_287)
    assert keys.shape[2] == read
    assert cache.nbytes == kept * 8 * 4 * 4  # heads, key and value widths of 2 each, bytes
    mask = seen[pattern].dense(keys.device)
    positions = keys[..., 0].long()
    for head in range(8):
        shown = positions[0, head][mask[0, head % mask.shape[1], 0]]
        expected = [key for key in range(12_288) if pattern.visible(head, 12_287, key)]
        assert sorted(shown.tolist()) == expected


def test_heads_keep_only_what_they_need():
    """Half of the heads keep a window, half everything; neither pays for the other's memory."""
    cache = PatternCache([PerHead((Local(128), Strided(128)))], num_heads=8)
    decode_once(cache, 12_287)
    assert cache.nbytes == (4 * 128 + 4 * 128 * 128) * 4 * 4


def test_a_mix_of_one_strided_and_three_local_layers_keeps_a_quarter():
    layers = [Strided(96), Local(96), Local(96), Local(96)]
    cache, dense = PatternCache(layers, num_heads=2), PatternCache([Full()] * 4, num_heads=2)
    decode_once(cache, 3_071, heads=2)
    decode_once(dense, 3_071, heads=2)
    assert cache.nbytes / dense.nbytes < 0.28


class Copied(TorchDispatchMode):
    """Elements of the tensors of numbers that operators make anew: of all together, of the largest."""

    total = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            known = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            made = 0 if output.untyped_storage().data_ptr() in known else output.numel()
            self.total, self.largest = self.total + made, max(self.largest, made)
        return output


@pytest.mark.parametrize("pattern", [Local(64), Strided(64), Fixed(64, 4)], ids=str)
@torch.no_grad()
def test_a_step_copies_nothing_that_was_stored(pattern):
    """No step makes a tensor anywhere near as large as the past (a `cat` per token would)."""
    heads, dim, length = 2, 4, 4_000
    cache = PatternCache([pattern], num_heads=heads)
    decode_once(cache, length, heads=heads, dim=dim)
    buffers = [buffer.data_ptr() for buffer in cache.layers[0].buffers]
    with Copied() as copied:
        for _ in range(3):
            cache.announce(torch.zeros(1, 1, 1))
            cache.update(torch.zeros(1, heads, 1, dim), torch.zeros(1, heads, 1, dim), 0)
    assert [buffer.data_ptr() for buffer in cache.layers[0].buffers] == buffers
    assert 0 < copied.largest <= heads * 2 * dim * (64 + 4 * 63)  # what one step of `fixed` reads


@pytest.mark.parametrize(
    ("pattern", "keys", "growths"),
    [
        (Local(16), 256 * (1 + 16) + 16, 0),  # a ring is not in the order of its keys
        (Strided(16), 2 * 256 + 1168, 2),  # a column is read where it lies
        (Fixed(16, 2), 9_000, 2),
        (Full(), 2 * 256 + 1168, 2),
    ],
    ids=str,
)
@torch.no_grad()
def test_256_tokens_are_written_into_their_place(pattern, keys, growths):
    """So many keys and values are copied by all steps from 65 to 320 together; a cat for each token copies 49,536."""
    heads, dim = 2, 4
    cache, new = PatternCache([pattern], num_heads=heads), torch.zeros(1, heads, 1, dim)
    decode_once(cache, 64, heads=heads, dim=dim)
    places = set()
    with Copied() as copied:
        for _ in range(256):
            cache.announce(torch.zeros(1, 1, 1))
            cache.update(new, new, 0)
            places.update((number, buffer.shape) for number, buffer in enumerate(cache.layers[0].buffers))
    assert copied.total <= keys * 2 * heads * dim
    assert len(places) == len(cache.layers[0].buffers) + growths
    cat, past = DynamicCache(), torch.zeros(1, heads, 65, dim)
    cat.update(past, past, 0)
    with Copied() as copied:
        for _ in range(256):
            cat.update(new, new, 0)
    assert copied.total == 49_536 * 2 * heads * dim


def gradients(model, ids, mask, sizes, cache):
    """Of all weights by name, of some weighted sum of the logits of tokens, computed in such steps."""
    model.zero_grad()
    total, start = 0.0, 0
    for size in sizes:
        end = start + size
        step_mask = None if mask is None else mask[:, :end]
        logits = model(ids[:, start:end], attention_mask=step_mask, past_key_values=cache).logits
        weights = torch.linspace(-1, 1, LENGTH)[start:end, None] * torch.arange(27).sin()
        total = total + (logits * weights * (1 if mask is None else step_mask[:, start:, None])).sum()
        start = end
    total.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "block_sparse"])
def test_gradients_flow_through_the_past(padded, implementation):
    """As through Transformers' own DynamicCache; every weight's equals that of one pass over all tokens."""
    model = causal_lm(*MIXED, FixedSummary(4, 1), Full()).double()
    model.set_attn_implementation(implementation)
    ids, mask = torch.randint(0, 27, (2, LENGTH)), LEFT_PADDED if padded else None
    expected = gradients(model, ids, mask, [LENGTH], None)
    for sizes in ([15, 15], [9, 1, 1, 12, 1, 6]):
        found = gradients(model, ids, mask, sizes, PatternCache.from_config(model.config))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


def test_a_past_without_gradients_and_one_with_them_keep_out_of_each_others_way():
    """A frozen prompt, steps to learn from, steps of inference in between: no step writes over what others read."""
    model = causal_lm(*MIXED)
    ids = torch.randint(0, 27, (2, 16))
    cache = PatternCache.from_config(model.config)
    with torch.inference_mode():
        model(ids[:, :8], past_key_values=cache)
    learnt = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]
    with torch.no_grad():
        after = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 16)]
    torch.cat(learnt).square().sum().backward()
    with torch.no_grad():
        expected = model(ids).logits[:, 8:]
    torch.testing.assert_close(torch.cat(learnt + after, dim=1), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_recorded_tokens_can_be_taken_back(pattern, padded):
    """As assisted decoding does: wrong tokens come, some at a time, and go again."""
    model = causal_lm(pattern)
    ids, mask = torch.randint(0, 27, (2, LENGTH)), LEFT_PADDED if padded else torch.ones_like(LEFT_PADDED)
    cache = PatternCache.from_config(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        start = 0
        for right, wrong in (([9], []), ([1], [3]), ([2, 1], [9, 2, 1]), ([], [7]), ([1, 1, 1, 10], [2])):
            found = []
            for size in right:
                step = slice(start, start + size)
                found.append(model(ids[:, step], attention_mask=mask[:, : step.stop], past_key_values=cache).logits)
                start += size
            seen = mask[:, :start]
            for size in wrong:
                seen = torch.cat([seen, seen.new_ones(2, size)], dim=1)
                model(torch.randint(0, 27, (2, size)), attention_mask=seen, past_key_values=cache)
            cache.crop(-sum(wrong))
            assert cache.get_seq_length() == start
            if found:
                found = torch.cat(found, dim=1)
                where = slice(start - found.shape[1], start)
                tokens = mask[:, where].bool()
                torch.testing.assert_close(found[tokens], expected[:, where][tokens], atol=2e-5, rtol=2e-5)


def test_part_of_a_step_can_be_taken_back():
    model = causal_lm(*MIXED)
    ids = torch.randint(0, 27, (2, 26))
    cache = PatternCache.from_config(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        cache.crop(-7)
        model(ids[:, [13, 14, 0, 0, 0, 0, 0, 0, 0, 0, 0]], past_key_values=cache)
        cache.crop(-9)
        found = model(ids[:, 15:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids).logits[:, 15:], atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match=r"takes back only tokens .* after activate_past_recording"):
        cache.crop(-12)
    assert cache.get_seq_length() == 26


def test_a_row_that_ended_does_not_move_what_others_stored():
    """Rows of 20 and 6 tokens; while the shorter goes on alone, the longer gets padding."""
    model = causal_lm(Strided(4), Union((Local(3), Strided(4))))
    ids = torch.randint(0, 27, (2, 24))
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 6:20] = 0
    mask[0, 20:23] = 0
    expected = model(ids, attention_mask=mask).logits
    found = logits_in_steps(model, ids, mask, [20, 1, 1, 1, 1])
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)


def test_reset_forgets_and_starts_anew():
    model = causal_lm(*MIXED)
    ids = torch.randint(0, 27, (2, 9))
    cache = PatternCache.from_config(model.config)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        assert cache.nbytes > 0
        cache.reset()
        assert cache.get_seq_length() == cache.nbytes == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, first)


def test_rows_can_be_reordered_repeated_and_chosen():
    model = causal_lm(*MIXED)
    ids, more = torch.randint(0, 27, (2, 9)), torch.randint(0, 27, (2, 1))

    def next_logits(change, rows):
        cache = PatternCache.from_config(model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            change(cache)
            return model(more[rows], past_key_values=cache).logits

    plain = next_logits(lambda cache: None, [0, 1])
    with torch.no_grad():
        swapped = model(torch.cat([ids[[1, 0]], more], dim=1)).logits[:, -1:]
    torch.testing.assert_close(
        next_logits(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [0, 1]), swapped, atol=2e-5, rtol=2e-5
    )
    repeated = next_logits(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])
    torch.testing.assert_close(repeated, plain.repeat_interleave(2, dim=0))
    for indices in (torch.tensor([1]), torch.tensor([False, True])):
        chosen = next_logits(lambda cache, indices=indices: cache.batch_select_indices(indices), [1])
        torch.testing.assert_close(chosen, plain[1:])


def test_keys_and_values_can_be_looked_at():
    """As tools do with any cache: all of them while nothing is forgotten, a window's afterwards; reordered rows too."""
    model = causal_lm(*MIXED, Full())
    ids, mask = torch.randint(0, 27, (2, 12)), LEFT_PADDED[:, 2:14]
    for length, given in ((4, None), (4, torch.ones(2, 4)), (12, mask)):
        cache, dense = PatternCache.from_config(model.config), DynamicCache()
        assert cache.layers[0].keys is None
        with torch.no_grad():
            for past in (cache, dense):
                model(ids[:, :length], attention_mask=given, past_key_values=past)
        for past in (cache, dense):
            past.reorder_cache(torch.tensor([1, 0]))
        for layer, expected in zip(cache.layers, dense.layers):
            if length == 4:
                torch.testing.assert_close((layer.keys, layer.values), (expected.keys, expected.values))
            assert layer.keys.shape[2] <= 12
        if length == 12:  # a row of 12 tokens, and one of 9 behind padding, which is not stored
            torch.testing.assert_close(layer.keys[0], expected.keys[0])
            torch.testing.assert_close(layer.keys[1, :, :9], expected.keys[1, :, 3:])
    local = PatternCache([Local(5)], num_heads=2)
    decode_once(local, 11, heads=2)
    assert local.layers[0].keys[0, 0, :, 0].tolist() == [8, 9, 10, 11]


def test_grouped_heads_share_what_any_of_them_needs():
    """Four query heads read two key heads: the first pair windows, the second a window and a column."""
    pattern = PerHead((Local(3), Local(5), Local(2), Strided(4)))
    cache = PatternCache([pattern], num_heads=4, num_key_value_heads=2)
    (keys,), seen = decode_once(cache, 11, heads=2)
    mask = seen[pattern].dense(keys.device)
    for head in range(4):
        shown = keys[0, head // 2, :, 0][mask[0, head, 0]]
        assert sorted(shown.tolist()) == [key for key in range(12) if pattern.visible(head, 11, key)]


def test_half_precision_sampling_multiplies_in_float32():
    """Products that overflow float16 (the largest is 65,504) do no harm."""
    model = causal_lm(*MIXED).half()
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(300)
        layer.self_attn.k_proj.weight.data.mul_(300)
    ids = torch.randint(0, 27, (2, 9))
    cache = PatternCache.from_config(model.config)
    with torch.no_grad():
        for step in range(9):
            assert torch.isfinite(model(ids[:, step : step + 1], past_key_values=cache).logits).all()
        model.config.upcast_sampling = False
        cache.reset()
        overflowing = [model(ids[:, step : step + 1], past_key_values=cache).logits for step in range(9)]
    assert not torch.isfinite(torch.cat(overflowing)).all()


@torch.no_grad()
def test_what_it_cannot_do_is_refused():
    model = causal_lm(*MIXED)
    ids = torch.randint(0, 27, (2, 6))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    cache = PatternCache.from_config(model.config)
    with pytest.raises(ValueError, match=r"one document a row.*DynamicCache"):
        model(ids, position_ids=packed, past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask of shape .*\[2, 6\], got \[2, 1, 6, 6\]"):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool), past_key_values=cache)
    model(ids, past_key_values=cache)
    for tokens in (2, -2):
        with pytest.raises(ValueError, match="DynamicCache"):
            cache.crop(tokens)
    with pytest.raises(ValueError, match=r"holds 2 rows of torch.float32, got keys of 1 rows"):
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"rows of torch.float32, got keys of 2 rows of torch.float16"):
        copy.deepcopy(model).half()(ids[:, :1], past_key_values=copy.deepcopy(cache))
    half = copy.deepcopy(cache)
    half.announce(torch.zeros(2, 1, 1))
    half.update(torch.zeros(2, 8, 1, 4), torch.zeros(2, 8, 1, 4), 0)
    with pytest.raises(ValueError, match="half updated"):
        model(ids[:, :1], past_key_values=half)
    with pytest.raises(ValueError, match="attention_patterns is not set"):
        PatternCache.from_config(RoPEDecoderConfig())
    with pytest.raises(ValueError, match="come unannounced"):
        cache.update(torch.zeros(2, 8, 1, 4), torch.zeros(2, 8, 1, 4), 0)


def test_a_plain_cache_still_works():
    model = causal_lm(*MIXED)
    ids = torch.randint(0, 27, (2, 12))
    cache = DynamicCache()
    with torch.no_grad():
        steps = [model(ids[:, i : i + 3], past_key_values=cache).logits for i in range(0, 12, 3)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(ids).logits, atol=2e-5, rtol=2e-5)


def test_every_pattern_of_a_config_gets_a_store():
    config = SparseTransformerConfig(num_hidden_layers=4)
    cache = PatternCache.from_config(config)
    assert [layer.past.pattern for layer in cache.layers] == [
        pattern_from_dict(p) for p in config.attention_patterns
    ] * 2

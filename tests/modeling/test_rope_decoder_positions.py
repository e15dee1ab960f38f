"""The RoPE decoder with positions that are no rotations: ALiBi, T5's buckets, and none."""

import pytest
import torch
from transformers import DynamicCache

from hf_tfamily.auto import register_all
from hf_tfamily.modeling.cache_patterns import PatternCache
from hf_tfamily.modeling.configuration_rope_decoder import POSITION_ENCODINGS, RoPEDecoderConfig
from hf_tfamily.modeling.modeling_rope_decoder import RoPEDecoderForCausalLM
from hf_tfamily.modeling.positions import alibi_slopes, t5_buckets
from tests.modeling.test_rope_decoder import BACKENDS, TINY, ids
from tests.modeling.test_rope_decoder import PATTERNS as SEEING
from tests.reference.vanilla_transformer import bucket, slope

register_all()

PATTERNS = {**SEEING, "summaries": {"type": "fixed_summary", "block": 4, "summary": 1}}
ENCODINGS = ("alibi", "t5", "none")
SCORED = ("alibi", "t5")
encodings = pytest.mark.parametrize("encoding", ENCODINGS)
scored = pytest.mark.parametrize("encoding", SCORED)
patterns = pytest.mark.parametrize("pattern", SEEING)


def causal_lm(encoding, pattern="none", implementation="eager", **fields):
    """The same weights for the same fields, large enough that every key and every distance matters."""
    torch.manual_seed(0)
    config = RoPEDecoderConfig(
        **TINY,
        position_encoding=encoding,
        attention_patterns=PATTERNS[pattern],
        initializer_range=0.2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        **fields,
    )
    return RoPEDecoderForCausalLM._from_config(config, attn_implementation=implementation).eval()


def padded_batch():
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 17:] = 0
    return {"input_ids": ids(2, 21), "attention_mask": mask}


@scored
@torch.no_grad()
def test_the_bias_restated_in_loops(encoding):
    """What all layers get is the papers' bias for each head, query and key; after a past too."""
    model, told = causal_lm(encoding).double(), []
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs["position_bias"]), with_kwargs=True)
    cache, inputs = DynamicCache(), ids(1, 30)
    for start, end in ((0, 25), (25, 30)):
        model(inputs[:, start:end], past_key_values=cache, use_cache=True)
        for i in range(start, end):
            for j in range(i + 1):
                for head in range(4):
                    expected = -slope(head + 1, 4) * (i - j)
                    if encoding == "t5":
                        expected = model.model.positions.numbers.weight[bucket(i, j, True, model.config), head]
                    assert abs(told[-1][0, head, i - start, j] - expected) < 1e-12


@patterns
@encodings
def test_backends_agree(encoding, pattern):
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    expected = causal_lm(encoding, pattern).double()(**batch).logits
    for implementation in BACKENDS:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found = causal_lm(encoding, pattern, implementation)(**batch).logits
        torch.testing.assert_close(found[real].double(), expected[real], atol=1e-5, rtol=1e-5)
        assert found.isfinite().all()


@patterns
@encodings
def test_gradients_agree_also_under_checkpointing(encoding, pattern):
    batch = padded_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][0, 4] = -100  # which padding would predict, that sees nothing

    def gradients(implementation, **checkpointing):
        model = causal_lm(encoding, pattern, implementation).train()
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        model(**batch).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients("eager")
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    for found in (gradients("sdpa"), gradients("block_sparse"), gradients("block_sparse", use_reentrant=False)):
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@patterns
@encodings
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "block_sparse"])
@torch.no_grad()
def test_caches_and_packed_rows(encoding, pattern, implementation):
    """In steps of several tokens and of one; two documents in a row, of which the last goes on."""
    model, first, second = causal_lm(encoding, pattern, implementation), ids(1, 5), ids(1, 19)
    whole = model(second).logits
    cache, steps = DynamicCache(), []
    for start, end in ((0, 9), (9, 13), (13, 14), (14, 15), (15, 19)):
        steps.append(model(second[:, start:end], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)

    positions = torch.cat((torch.arange(5), torch.arange(19)))[None]
    row = torch.cat((first, second), dim=1)
    packed = model(row, position_ids=positions).logits
    torch.testing.assert_close(packed[:, 5:], whole, atol=1e-5, rtol=1e-5)
    for new in (1, 3):
        read = model(row[:, :-new], position_ids=positions[:, :-new], use_cache=True)
        after = model(row[:, -new:], position_ids=positions[:, -new:], past_key_values=read.past_key_values).logits
        torch.testing.assert_close(after, whole[:, -new:], atol=1e-5, rtol=1e-5)


@patterns
@encodings
@pytest.mark.parametrize("implementation", ["sdpa", "block_sparse"])
@torch.no_grad()
def test_generates_as_without_a_cache(encoding, pattern, implementation):
    """Greedily from prompts padded on the left, with the cache of the model's choice and with a static one."""
    model = causal_lm(encoding, pattern, implementation, pad_token_id=0)
    prompts, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    slowly = model.generate(prompts, **how, use_cache=False)
    for more in ({}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 1}):
        assert torch.equal(model.generate(prompts, **how, **more), slowly)


@encodings
@torch.no_grad()
def test_queries_that_see_nothing_give_nothing(encoding):
    """The first positions of a block see no summary yet; whatever the backend, their heads give 0."""
    for implementation in BACKENDS:
        model, seen = causal_lm(encoding, "summaries", implementation), []
        layer = model.model.layers[0].self_attn.o_proj
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.compiler.set_stance("force_eager"):
            model(ids(2, 7))
        assert not seen[0][:, :3].any(), implementation
        assert seen[0][:, 3:].any(dim=-1).all()


@pytest.mark.parametrize("pattern", ["none", "layers"])
@pytest.mark.parametrize("implementation", ["sdpa", "block_sparse"])
@scored
def test_compiles_without_graph_breaks(encoding, implementation, pattern):
    torch._dynamo.reset()
    model, inputs = causal_lm(encoding, pattern, implementation), ids(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs, labels=inputs).loss, model(inputs, labels=inputs).loss)


@pytest.mark.parametrize("implementation", BACKENDS)
@scored
@torch.no_grad()
def test_autocast_and_half_precision(encoding, implementation):
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    expected = causal_lm(encoding, "layers").double()(**batch).logits[real]
    with torch.compiler.set_stance("force_eager"):
        with torch.autocast("cpu", torch.bfloat16):
            found = causal_lm(encoding, "layers", implementation)(**batch).logits[real]
        halved = causal_lm(encoding, "layers", implementation).bfloat16()(**batch).logits[real]
    scale = expected.abs().max()
    assert (found.double() - expected).abs().max() < 0.05 * scale
    assert (halved.double() - expected).abs().max() < 0.05 * scale


def test_parameters():
    """ALiBi learns nothing, T5 a number for each head and bucket."""
    counts = {encoding: causal_lm(encoding).num_parameters() for encoding in POSITION_ENCODINGS}
    assert counts["rotary"] == counts["alibi"] == counts["none"] == counts["t5"] - 8 * TINY["num_attention_heads"]


def test_what_cannot_be_is_refused():
    with pytest.raises(Exception, match="position_encoding='rotery' is unknown; did you mean 'rotary'"):
        RoPEDecoderConfig(**TINY, position_encoding="rotery")
    for wrong in (2, 7, 0):
        with pytest.raises(Exception, match=f"num_buckets must be even and at least 4, got {wrong}"):
            RoPEDecoderConfig(**TINY, relative_attention_num_buckets=wrong)
    with pytest.raises(Exception, match="relative_attention_max_distance=16 must be more than half of"):
        RoPEDecoderConfig(**TINY, relative_attention_max_distance=16)
    for encoding in SCORED:
        model = causal_lm(encoding, "layers", "sdpa")
        with pytest.raises(ValueError, match="which a pattern-aware cache does not keep"):
            model(ids(1, 4), past_key_values=PatternCache.from_config(model.config))
        with pytest.raises(ValueError, match="Continuous batching keeps no distances"):
            model.init_continuous_batching()
        model = causal_lm(encoding)
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="'flash_attention_2' adds no bias to the scores"):
            model(ids(1, 4))


def test_slopes_are_blooms():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (*range(1, 34), 112):
        blooms = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]  # of the position 1
        torch.testing.assert_close(alibi_slopes(heads), blooms, rtol=1e-6, atol=0)


def test_buckets_are_t5s():
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 301)
    for causal in (True, False):
        for sizes in ((32, 128), (8, 16), (4, 20), (64, 300)):
            theirs = T5Attention._relative_position_bucket(-distances, not causal, *sizes)
            mine = t5_buckets(distances, causal, *sizes)
            seen = distances >= 0 if causal else distances == distances
            assert torch.equal(mine[seen], theirs[seen])


@pytest.mark.parametrize("implementation", ["sdpa", "block_sparse"])
@scored
@torch.no_grad()
def test_exports_leave_batch_and_length_open(encoding, implementation):
    model, inputs = causal_lm(encoding, "layers", implementation), ids(2, 11)
    mask = (torch.arange(11) >= torch.tensor([[3], [0]])).long()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    given = {"input_ids": inputs, "attention_mask": mask, "use_cache": False}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    exported = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()
    given |= {"input_ids": ids(3, 17), "attention_mask": (torch.arange(17) >= torch.tensor([[0], [4], [0]])).long()}
    real = given["attention_mask"].bool()
    torch.testing.assert_close(exported(**given).logits[real], model(**given).logits[real])

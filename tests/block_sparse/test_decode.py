"""One new token over a static buffer: equal to dense attention, without a look at values and without recompiling."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from hf_tfamily.block_sparse.decode import attend_one, reachable
from hf_tfamily.block_sparse.interface import attend_seen
from hf_tfamily.modeling.attention import VisibleKeys, visible_keys
from hf_tfamily.modeling.attention_patterns import (
    Block1D,
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Intersection,
    Local,
    PerHead,
    Sink,
    Strided,
    Union,
)
from hf_tfamily.modeling.configuration_rope_decoder import RoPEDecoderConfig
from hf_tfamily.modeling.modeling_rope_decoder import RoPEDecoderForCausalLM
from tests.pattern_examples import EXAMPLES

BATCH, HEADS, ROOM, DIM = 2, 4, 40, 8
PATTERNS = [
    *EXAMPLES,
    Full(),
    Local(5),
    Strided(7),
    FixedBlock(8),
    FixedSummary(8, 2, sub_blocks=2),
    Fixed(8, 2, sub_blocks=4),
    Block1D(8, 5),
    Union([Local(5), Strided(5)]),
    Intersection([Local(20), Strided(3)]),
    Intersection([Union([Intersection([Strided(2), FixedSummary(2, 1)]), Local(1)])]),
    Intersection([Union([Local(3), Strided(5)]), Local(30)]),  # what both parts of the union show is read once
    PerHead([Local(5), Strided(5)]),
    PerHead([Local(3), Full()]),
]
LOOKS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.item, torch.ops.aten.is_nonzero}


class NoLook(TorchDispatchMode):
    """Fails where the host would wait for a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in LOOKS, f"{function} looks at a value"
        return function(*args, **(kwargs or {}))


def tensors(key_heads=2):
    query = torch.randn(BATCH, 1, HEADS, DIM)
    return query, *(torch.randn(BATCH, ROOM, key_heads, DIM) for _ in range(2))


def dense(seen, query, key, value):
    """Under the boolean mask; a query that sees nothing gets 0."""
    key, value = (x.repeat_interleave(HEADS // x.shape[2], 2) for x in (key, value))
    mask = seen.dense_rows(query.device, slice(None))
    scores = torch.einsum("bthd,bshd->bhts", query, key).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~mask, 0)
    return torch.einsum("bhts,bshd->bthd", weights, value)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_dense(pattern):
    """Wherever the token stands; left and right padding; positions that are not places."""
    hidden = torch.empty(BATCH, 1, 1)
    for place in (0, 1, 17, 39):
        offset = torch.tensor(place)
        mask = torch.ones(BATCH, ROOM, dtype=torch.long)
        mask[1, : min(place, 4)] = 0
        mask[0, 9:12] = int(place < 12)
        mask[:, place + 1 :] = 0
        shifted = torch.tensor([[place + 3], [place + 5]])
        for given in ({}, {"attention_mask": mask}, {"position_ids": shifted}):
            seen = visible_keys(pattern, HEADS, hidden, past_length=offset, key_length=ROOM, **given)
            inputs = tensors()
            with NoLook():
                ours = attend_seen(seen, *inputs, 1.0)[0]
            torch.testing.assert_close(ours, dense(seen, *inputs), atol=1e-5, rtol=1e-5)


def test_gradients_and_lengths_of_a_growing_cache():
    """An integer offset, as on a GPU with a cache that grows."""
    for pattern in PATTERNS:
        seen = VisibleKeys(pattern, HEADS, True, BATCH, 1, 23, query_offset=22, all_places=True)
        inputs = [x[:, :23].clone().requires_grad_() for x in tensors(key_heads=HEADS)]
        ours, theirs = (run(seen, *inputs) for run in (lambda *x: attend_one(*x, 1.0)[0], dense))
        for one, other in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (ours, theirs))):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "reads"),
    [
        (Local(64), 64),
        (Strided(128), 32),
        (Union([Local(128), Strided(128)]), 128 + 32),
        (Fixed(128, 8), 128 + 33 * 8),
        (Union([Local(128), Sink(4)]), 128 + 4),
        (Intersection([Full(), Local(64)]), 64),
    ],
    ids=str,
)
def test_only_what_can_be_seen_is_read(pattern, reads):
    for position in (0, 1000, 4095):
        places, _ = reachable(pattern, HEADS, torch.tensor([[position]]), 4096)
        assert places.shape == (1, 1, reads)


def test_a_query_that_sees_nothing_gets_0():
    for pattern in (FixedSummary(8, 2), Local(3)):
        mask = torch.zeros(BATCH, ROOM, dtype=torch.long)
        mask[0, :1] = 1
        seen = visible_keys(pattern, HEADS, torch.empty(BATCH, 1, 1), mask, None, torch.tensor(1), ROOM)
        inputs = tensors()
        output, _ = attend_seen(seen, *inputs, 1.0)
        assert (output[1] == 0).all()
        torch.testing.assert_close(output, dense(seen, *inputs))


def test_one_graph_for_all_places():
    counts = CompileCounter()
    torch._dynamo.reset()

    @torch.compile(backend=counts, fullgraph=True)
    def step(offset, query, key, value):
        where = {"past_length": offset, "key_length": ROOM}
        seen = (visible_keys(pattern, HEADS, query[..., 0], **where) for pattern in PATTERNS)
        return [attend_seen(one, query, key, value, 1.0)[0] for one in seen]

    inputs = tensors()
    for place in (3, 4, 30):
        for output, pattern in zip(step(torch.tensor(place), *inputs), PATTERNS):
            seen = visible_keys(pattern, HEADS, inputs[0][..., 0], past_length=place, key_length=ROOM)
            torch.testing.assert_close(output, dense(seen, *inputs), atol=1e-5, rtol=1e-5)
    assert counts.frame_count == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_model_decodes_in_one_graph_with_a_static_cache():
    patterns = [{"type": "local", "window": 4}, {"type": "fixed", "block": 4, "summary": 1}]
    sizes = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = RoPEDecoderForCausalLM(RoPEDecoderConfig(**sizes, attention_patterns=patterns)).eval()
    assert model.config._attn_implementation == "block_sparse"
    ids = torch.randint(11, (2, 20))
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits = [model(ids[:, :8], past_key_values=cache).logits]
    counts = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(model, backend=counts, fullgraph=True)
    for place in range(8, 20):
        positions = torch.tensor([[place]])
        logits.append(step(ids[:, place : place + 1], position_ids=positions, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=1e-5, rtol=1e-4)
    assert counts.frame_count == 1

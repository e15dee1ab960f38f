"""Patterns drawn at random, through the engine: outputs, log-sum-exps and gradients of dense attention under `visible`.

How to draw others: tests/fuzzing.py.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st

from hf_tfamily.block_sparse import attend, attend_varlen
from hf_tfamily.block_sparse.plan import plan_attention
from hf_tfamily.block_sparse.relative import relative_attention
from hf_tfamily.modeling.attention_patterns import Pattern, pattern_from_dict
from hf_tfamily.modeling.positions import DistanceBias
from tests.block_sparse.test_attend import BATCH, HEADS, assert_equal, dense, make_inputs
from tests.block_sparse.test_plan import times_seen
from tests.fuzzed_patterns import pictures, sequences
from tests.fuzzing import fuzz
from tests.reference.attention import dense_mask

pytestmark = pytest.mark.slow


class Call(NamedTuple):
    """Where queries and keys stand, and what is given beside them."""

    queries: int
    keys: int
    query_offset: int
    key_offset: int
    causal: bool
    key_heads: int
    valid: bool
    sinks: bool
    bias: bool


@st.composite
def calls(draw, positions: int = 200) -> Call:
    """Odd lengths, single queries, chunks behind a past, keys that begin late; within so many positions."""
    keys = draw(st.integers(1, min(75, positions)))
    queries = draw(st.one_of(st.just(keys), st.just(1), st.integers(1, min(75, positions))))
    places = [draw(st.one_of(st.just(0), st.integers(0, min(60, positions - length)))) for length in (queries, keys)]
    flags = [draw(st.booleans()) for _ in range(4)]
    return Call(queries, keys, *places, flags[0], draw(st.sampled_from([1, 2, 4])), *flags[1:])


def check(pattern: Pattern, call: Call, seed: int) -> None:
    torch.manual_seed(seed)
    where = {"query_offset": call.query_offset, "key_offset": call.key_offset}
    mask = dense_mask(
        pattern, HEADS, call.queries, call.keys, causal=call.causal, q_offset=call.query_offset,
        kv_offset=call.key_offset,
    )  # fmt: skip
    plan = plan_attention(
        pattern, call.queries, call.keys, num_heads=HEADS, causal=call.causal, first_query=call.query_offset,
        first_key=call.key_offset,
    )  # fmt: skip
    assert torch.equal(times_seen(plan, call.queries, call.keys), mask.long()), "each visible key once"
    *inputs, sinks = make_inputs(call.queries, call.keys, key_heads=call.key_heads)
    given, learned, mask = {}, list(inputs), mask[None].expand(BATCH, -1, -1, -1)
    if call.valid:
        given["key_valid"] = torch.rand(BATCH, call.keys) > 0.3
        mask = mask & given["key_valid"][:, None, None]
    if call.sinks:
        given["sinks"] = sinks
        learned.append(sinks)
    added = 0.0
    if call.bias:
        apart = torch.arange(call.queries)[:, None] + call.query_offset - torch.arange(call.keys) - call.key_offset
        first, last = 0 if call.causal else int(apart.min()), max(0, int(apart.max()))
        distances = torch.arange(first, max(first, last) + 1)
        table = torch.randn(HEADS, len(distances), dtype=torch.float64, requires_grad=True)
        given["bias"] = table if call.causal else DistanceBias(table, distances)
        added = table[:, (apart - first).clamp(min=0)]
        learned.append(table)
    ours = attend(*inputs, pattern, causal=call.causal, return_lse=True, **where, **given)
    assert_equal(ours, dense(*inputs, given.get("sinks"), mask=mask, bias=added), learned)


def check_relative(pattern: Pattern, length: int, past: int, first: int, seed: int) -> None:
    """Scores of queries and distances, as Transformer-XL has them; queries behind a past that begins at `first`."""
    torch.manual_seed(seed)
    keys, dim = past + length, 4
    shapes = [(length, HEADS, dim), (length, HEADS, dim), (keys, HEADS, dim), (keys, HEADS, dim)]
    inputs = [torch.randn(BATCH, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    relative_key = torch.randn(HEADS, keys, dim, dtype=torch.float64, requires_grad=True)
    distances = torch.arange(keys - 1, -1, -1)
    scores = (relative_key, distances)
    ours = relative_attention(*inputs, *scores, pattern, scale=0.5, q_offset=first + past, kv_offset=first)
    query, position_query, key, value = (x.transpose(1, 2) for x in inputs)
    apart = past + torch.arange(length)[:, None] - torch.arange(keys)
    rows = (keys - 1 - apart).clamp(0, keys - 1)
    bias = torch.einsum("bhtd,htsd->bhts", position_query, relative_key[:, rows]) * 0.5
    mask = dense_mask(pattern, HEADS, length, keys, causal=True, q_offset=first + past, kv_offset=first)[None]
    expected = dense(query, key, value, mask=mask, scale=0.5, bias=bias)[0].transpose(1, 2)
    torch.testing.assert_close(ours, expected)
    weights = ours.detach().cos()
    learned = [*inputs, relative_key]
    found, wanted = (torch.autograd.grad((output * weights).sum(), learned) for output in (ours, expected))
    torch.testing.assert_close(found, wanted)


def check_packed(pattern: Pattern, lengths: list[int], causal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make_inputs(sum(lengths), batch=1)
    mask = torch.zeros(1, HEADS, sum(lengths), sum(lengths), dtype=torch.bool)
    for start, length in zip(ends.tolist(), lengths):
        places = slice(start, start + length)
        mask[:, :, places, places] = dense_mask(pattern, HEADS, length, length, causal=causal)
    packed = [x[0].transpose(0, 1) for x in inputs[:3]]
    output, lse = attend_varlen(*packed, pattern, ends, causal=causal, return_lse=True)
    assert_equal((output.transpose(0, 1)[None], lse[None]), dense(*inputs[:3], mask=mask), inputs[:3])


SEEDS = st.integers(0, 9)


def test_rows():
    fuzz(check, 250, pattern=sequences(), call=calls(), seed=SEEDS)


def test_pictures():
    """No position lies behind the end of the picture."""

    def check_inside(pattern, data, seed):
        check(pattern, data.draw(calls(pattern.num_positions or 4)), seed)

    fuzz(check_inside, 120, pattern=pictures(), data=st.data(), seed=SEEDS)


def test_distances():
    place = st.one_of(st.just(0), st.integers(1, 40))
    sizes = {"length": st.integers(1, 60), "past": place, "first": place}
    fuzz(check_relative, 100, pattern=sequences(), **sizes, seed=SEEDS)


def test_packed_rows():
    lengths = st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any)
    fuzz(check_packed, 80, pattern=sequences(), lengths=lengths, causal=st.booleans(), seed=SEEDS)


def test_dicts():
    def there_and_back(pattern):
        assert pattern_from_dict(pattern.to_dict()) == pattern

    fuzz(there_and_back, 200, pattern=sequences())

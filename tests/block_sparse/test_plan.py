"""Plans: they show exactly the pattern, each key once, at the cost they promise; and what decoding reads and keeps."""

import pytest
import torch

from hf_tfamily.block_sparse.plan import plan_attention
from hf_tfamily.modeling.attention_patterns import (
    Block1D,
    Block2D,
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Local,
    PerHead,
    RandomBlocks,
    Sink,
    Strided,
    Union,
)
from tests.pattern_examples import EXAMPLES
from tests.reference.attention import dense_mask

HEADS = 4
PATTERNS = [
    *EXAMPLES,
    Full(),
    Local(5),
    Local(40),
    Strided(4),
    FixedBlock(8),
    FixedSummary(8, 2),
    FixedSummary(8, 2, sub_blocks=4),
    Fixed(8, 2),
    Fixed(7, 2, sub_blocks=2, shift=1),
    Fixed(64, 32, sub_blocks=2),  # several groups of blocks
    Union([Local(5), Strided(5)]),
    Union([Local(1), Strided(4), Local(2)]),
    Union([Local(9), FixedBlock(8)]),
    Union([Local(9), FixedSummary(8, 2, sub_blocks=4)]),
    Union([Local(9), Fixed(8, 2, sub_blocks=4)]),
    Union([Strided(3), FixedBlock(4)]),
    Union([Strided(3), Strided(4)]),
    Union([Strided(3), Fixed(8, 2, sub_blocks=4)]),
    Union([FixedBlock(6), FixedBlock(4)]),
    PerHead([Local(5), Strided(5)]),
    PerHead([Local(3), Fixed(8, 2, sub_blocks=4), Local(3), Strided(4)]),
    PerHead([Local(3), Local(3), Strided(4), Full()]),
    Union([PerHead([Local(5), Strided(5)]), FixedSummary(8, 1)]),
    Block1D(8, 8),
    Block1D(7, 3),
    Block1D(8, 0),
    Block2D(2, 3, 1, 2).bind((7, 8, 2)),
    Block2D(4, 4, 4, 4).bind((8, 8, 2)),
    Union([Local(5), Block2D(2, 3, 1, 2).bind((7, 8, 2))]),
    Union([Local(9), Sink(20)]),
    Union([Local(9), FixedBlock(8), Sink(3)]),
    Union([Sink(2), Local(3), Sink(5)]),
    Union([Strided(3), Sink(2)]),
    Union([Fixed(8, 2), Sink(2)]),
]
# (queries, keys, first query, first key)
EXTENTS = [
    (1, 1, 0, 0),
    (3, 3, 0, 0),
    (64, 64, 0, 0),
    (101, 101, 0, 0),
    (1, 37, 36, 0),  # decoding
    (9, 40, 31, 0),  # a chunk of a prefill
    (20, 64, 10, 0),  # a static cache: keys that are not there yet
    (9, 30, 50, 29),  # a sliding cache
    (10, 5, 0, 0),  # fewer keys than queries
    (6, 4, 3, 9),  # keys after the queries
]


def times_seen(plan, num_queries, num_keys):
    """[H, T, S]: how many parts show a key to a query, tile by tile."""
    seen = torch.zeros(HEADS, num_queries, num_keys, dtype=torch.long)
    for group in plan.groups:
        for part in group.parts:
            rule = torch.ones(1, 1, part.queries.count, part.keys.count, dtype=torch.bool)
            rule = rule.tril() if part.causal else rule if part.mask is None else part.mask
            rule = rule.expand(part.tiles, len(group.heads), -1, -1)
            for tile, (queries, keys) in enumerate(
                zip(part.queries.indices(part.tiles), part.keys.indices(part.tiles))
            ):
                for place, head in enumerate(group.heads):
                    shown, key = rule[tile, place], keys
                    if group.index is not None:
                        key = group.index.view(len(group.index), -1).expand(-1, len(group.heads))[keys, place]
                    if group.absent is not None:
                        shown = (
                            shown & ~group.absent.view(len(group.absent), -1).expand(-1, len(group.heads))[keys, place]
                        )
                    seen[head].index_put_((queries[:, None], key), shown.long(), accumulate=True)
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_visible_key_once(pattern, causal):
    extents = [*EXTENTS, (530, 530, 70, 0)] if pattern == Fixed(64, 32, sub_blocks=2) else EXTENTS
    for num_queries, num_keys, first_query, first_key in extents:
        where = {"causal": causal, "first_query": first_query, "first_key": first_key}
        plan = plan_attention(pattern, num_queries, num_keys, num_heads=HEADS, **where)
        expected = dense_mask(
            pattern, HEADS, num_queries, num_keys, causal=causal, q_offset=first_query, kv_offset=first_key
        )
        assert torch.equal(times_seen(plan, num_queries, num_keys), expected.long()), where


def causal_plans(pattern):
    """The plan of every extent, with its number of queries and of keys."""
    for num_queries, num_keys, first_query, first_key in EXTENTS:
        where = {"num_heads": HEADS, "causal": True, "first_query": first_query, "first_key": first_key}
        yield plan_attention(pattern, num_queries, num_keys, **where), num_queries, num_keys


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_writes(pattern):
    """A part writes only queries that no part had before; in a complete plan every query is written."""
    for plan, num_queries, _ in causal_plans(pattern):
        written = torch.zeros(HEADS, num_queries, dtype=torch.bool)
        touched = torch.zeros_like(written)
        for group in plan.groups:
            for part in group.parts:
                places = part.queries.indices(part.tiles).flatten()
                for head in group.heads:
                    if part.writes:
                        assert not touched[head, places].any()
                        written[head, places] = True
                    touched[head, places] = True
        assert not plan.complete or written.all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_writes_keys(pattern):
    """A part writes only keys that no part had before and none of its tiles shares; its fresh keys, which end it, no
    part had either, but all others; if complete, every key is written or fresh."""
    for plan, _, num_keys in causal_plans(pattern):
        written = torch.zeros(HEADS, num_keys, dtype=torch.bool)
        touched = torch.zeros_like(written)
        for group in plan.groups:
            for part in group.parts:
                places = part.keys.indices(part.tiles).flatten()
                places = places if group.index is None else group.index.view(len(group.index), -1)[places].flatten()
                for head in group.heads:
                    if part.writes_keys:
                        assert group.index is None
                        assert len(places.unique()) == len(places)
                        assert not touched[head, places].any()
                        written[head, places] = True
                    if part.fresh_keys:
                        fresh = torch.tensor(part.fresh_keys)
                        assert group.index is None
                        assert not touched[head, fresh].any()
                        assert fresh[-1] == places.max()
                        assert touched[head, places[places < fresh[0]]].all()
                        written[head, fresh] = True
                    touched[head, places] = True
        assert not plan.complete_keys or written.all()


def test_a_band_starts_the_gradients_of_its_keys():
    """What the windows of a long sequence have is written once, and only added to where windows share it."""
    plan = plan_attention(Local(128), 1024, 1024, num_heads=HEADS, causal=True)
    assert plan.complete_keys
    assert [part.fresh_keys for part in plan.groups[0].parts] == [range(0), range(128, 1024)]


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (Full(), 1.0),
        (Local(128), 1.3),
        (Strided(128), 1.0),
        (FixedBlock(128), 1.0),
        (Union([Local(128), Strided(128)]), 1.3),
        (Fixed(128, 8, sub_blocks=4), 1.15),
        (Fixed(128, 32, sub_blocks=4), 1.15),
        (PerHead([Local(128), Strided(128)]), 1.3),
        (Union([Local(128), Sink(4)]), 1.3),
        (Union([FixedBlock(128), Sink(64)]), 1.05),
        (Sink(4), 1.0),
    ],
    ids=str,
)
def test_scores_computed(pattern, most):
    """Scores computed over those needed; in a causal tile a kernel computes about half."""
    length = 4096
    plan = plan_attention(pattern, length, length, num_heads=HEADS, causal=True)
    computed = 0
    for group in plan.groups:
        for part in group.parts:
            rows, columns = part.queries.count, part.keys.count
            scores = sum(min(row + 1, columns) for row in range(rows)) if part.causal else rows * columns
            computed += len(group.heads) * part.tiles * scores
    needed = sum(
        int(pattern.visible(head, query, torch.arange(query + 1)).sum())
        for head in range(HEADS)
        for query in range(length)
    )
    assert needed <= computed <= most * needed


def test_few_parts():
    """The number of parts, each a few kernel calls, does not grow with the length."""
    window = Local(128)
    unions = (Union([window, Strided(128)]), PerHead([window, Strided(128)]), Union([window, Sink(4)]))
    for pattern in (window, Strided(128), *unions):
        counts = []
        for length in (1 << 13, 1 << 15):
            plan = plan_attention(pattern, length, length, num_heads=HEADS, causal=True)
            assert all(group.index is None for group in plan.groups)
            counts.append(sum(len(group.parts) for group in plan.groups))
        assert counts[0] == counts[1] < 20


def test_heads_that_agree_are_planned_together():
    plan = plan_attention(PerHead([Local(3), FixedBlock(4)]), 16, 16, num_heads=8, causal=True)
    assert [group.heads for group in plan.groups] == [range(0, 7, 2), range(1, 8, 2)]
    plan = plan_attention(Fixed(16, 2, sub_blocks=4), 64, 64, num_heads=8, causal=True)
    assert {group.heads for group in plan.groups} == {range(8)}


@pytest.mark.parametrize(
    "pattern",
    [
        Local(256, dilation=4),
        Local(64, dilation=8),
        RandomBlocks(64, 3),
        RandomBlocks(128, 2),
        RandomBlocks(64, 3, length=2048),
    ],
    ids=str,
)
def test_little_more_is_computed_than_seen(pattern):
    """Causal tiles count half: kernels leave out what lies above their diagonal."""
    length = 2048
    plan = plan_attention(pattern, length, length, num_heads=1, causal=True)
    parts = [part for group in plan.groups for part in group.parts]
    computed = sum(part.tiles * part.queries.count * part.keys.count // (1 + part.causal) for part in parts)
    seen = int(dense_mask(pattern, 1, length, length, causal=True).sum())
    assert computed <= 1.5 * seen


def test_heads_are_checked():
    with pytest.raises(ValueError, match="num_attention_heads=4"):
        plan_attention(PerHead([Local(3), Local(4), Local(5)]), 8, 8, num_heads=4, causal=True)

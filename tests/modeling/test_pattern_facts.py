"""Every fact that a pattern tells is held to what it shows, for patterns drawn at random."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_tfamily.modeling.attention_patterns as patterns_module
from hf_tfamily.modeling.attention_patterns import (
    FAR,
    Block1D,
    Block2D,
    BlockTable,
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Intersection,
    Local,
    Pattern,
    PerHead,
    RandomBlocks,
    Sink,
    Strided,
    Union,
    contains,
    distances_met,
    intersect,
)
from hf_tfamily.modeling.cache_patterns import PatternCache

LENGTH = 60
MOST = 150  # examples, the same in every run
small = st.integers(1, 9)


@st.composite
def fixed(draw, kind):
    summary, sub_blocks, shift = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    block = (shift + sub_blocks) * summary + draw(st.integers(0, 4))
    return kind(block, summary, sub_blocks, shift)


leaves = st.one_of(
    st.just(Full()),
    st.builds(Local, st.integers(1, 12), st.integers(1, 4)),
    st.builds(Strided, small),
    st.builds(Sink, small),
    st.builds(FixedBlock, small),
    fixed(FixedSummary),
    fixed(Fixed),
    st.builds(Block1D, small, st.integers(0, 9), st.integers(0, 9)),
    st.builds(
        BlockTable,
        st.integers(1, 6),
        st.lists(
            st.lists(st.lists(st.integers(0, 12), max_size=3, unique=True), min_size=1, max_size=9),
            min_size=1,
            max_size=2,
        ),
    ),
    st.builds(RandomBlocks, st.integers(1, 6), st.integers(1, 3), st.integers(0, 99), st.none() | st.just(LENGTH)),
    st.builds(Block2D, *[st.integers(1, 3)] * 2, *[st.integers(0, 3)] * 2).map(lambda p: p.bind((5, 4, 3))),
)
kinds = st.sampled_from([Union, Intersection, PerHead])
patterns = st.recursive(
    leaves, lambda inner: st.builds(lambda kind, some: kind(some), kinds, st.lists(inner, min_size=1, max_size=3))
)
heads = st.integers(0, 5)


def table(pattern: Pattern, length: int = LENGTH) -> torch.Tensor:
    """[queries, keys] bool, without causality."""
    return pattern.visible(0, torch.arange(length)[:, None], torch.arange(length)).expand(length, length)


def held(test):
    """For the pattern of one head: facts hold for patterns that are the same for all."""

    @settings(max_examples=MOST, deadline=None, derandomize=True)
    @given(patterns, heads)
    def on_random_patterns(pattern, head):
        test(pattern.for_head(head))

    on_random_patterns.__name__ = test.__name__
    return on_random_patterns


@held
def test_integers_and_tensors_agree(pattern):
    seen = table(pattern)
    for query, key in ((0, 0), (17, 5), (59, 0), (31, 31), (8, 40)):
        assert bool(pattern.visible(0, query, key)) == bool(seen[query, key])


@held
def test_interval_and_step(pattern):
    if (interval := pattern.interval(torch.arange(LENGTH))) is None:
        return
    low, high = interval
    assert bool((low.diff() >= 0).all())
    assert bool((high.diff() >= 0).all())
    assert tuple(int(end) for end in pattern.interval(7)) == (int(low[7]), int(high[7]))
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    expected = (key >= low[:, None]) & (key < high[:, None]) & ((query - key) % pattern.key_step == 0)
    assert torch.equal(expected, table(pattern))


@held
def test_is_full(pattern):
    if pattern.is_full:
        assert bool(table(pattern).all())


@held
def test_in_columns(pattern):
    if pattern.in_columns is None:
        return
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    same = (query - key) % pattern.key_step == 0
    inside = pattern.in_columns.visible(0, query // pattern.key_step, key // pattern.key_step)
    assert torch.equal(same & inside, table(pattern))


@held
def test_picks(pattern):
    starts = torch.tensor([start for start in range(LENGTH) if (pattern.block_span(start) or (-1,))[0] == start])
    if (keys := pattern.picks(starts)) is None:
        return
    for start, row in zip(starts.tolist(), keys):
        real = row[(row >= 0) & (row < LENGTH)]
        assert len(real.unique()) == len(real)
        assert torch.equal(real.sort().values, table(pattern)[start].nonzero()[:, 0])


@held
def test_summary_keys(pattern):
    if pattern.summary_keys is None:
        return
    block, first, count = pattern.summary_keys
    column = torch.arange(LENGTH) % block
    assert torch.equal(((column >= first) & (column < first + count)).expand(LENGTH, -1), table(pattern))


@held
def test_block_span(pattern):
    if pattern.block_span(0) is None:
        return
    seen, start = table(pattern), 0
    while start < LENGTH:
        span = pattern.block_span(start)
        assert span[0] == start < span[1]
        assert all(pattern.block_span(query) == span for query in range(start, min(span[1], LENGTH)))
        assert bool((seen[start : span[1]] == seen[start]).all())
        start = span[1]


@held
def test_candidates_hold_all_that_is_seen(pattern):
    seen = table(pattern)
    for start, end, stop in ((0, 1, 60), (0, 16, 16), (13, 29, 29), (13, 29, 60), (41, 42, 42), (20, 60, 60)):
        found = pattern.candidates(start, end, stop)
        assert bool((found.diff() > 0).all())
        assert set(seen[start:end, :stop].any(0).nonzero()[:, 0].tolist()) <= set(found.tolist()) <= set(range(stop))


@held
def test_reads_hold_the_past(pattern):
    seen = table(pattern)
    for first, count in ((0, LENGTH), (7, 30)):
        query = torch.arange(first, first + count)[:, None]
        if (found := pattern.reads(query, first, count)) is None:
            return
        assert found.shape[0] == count
        for row, places in zip(query[:, 0].tolist(), found.tolist()):
            inside = [place for place in places if place >= 0]
            assert len(inside) == len(set(inside))
            assert set(seen[row, first : row + 1].nonzero()[:, 0].add(first).tolist()) <= set(places)


@held
def test_period(pattern):
    if (period := pattern.period) is None or period > LENGTH // 2:
        return
    seen = table(pattern)
    assert torch.equal(seen[period:, period:], seen[:-period, :-period])


@held
def test_reach_and_distances_met(pattern):
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH))[table(pattern).tril()]
    assert distance.numel() == 0 or int(distance.max()) <= pattern.reach
    assert set(distance.tolist()) <= set(distances_met(pattern, LENGTH).tolist())


@held
def test_first_key_and_last_query(pattern):
    seen = table(pattern)
    first = [pattern.first_key(query) for query in range(LENGTH)]
    assert first == pattern.first_key(torch.arange(LENGTH)).tolist()
    last = pattern.last_query(torch.arange(LENGTH)).tolist()
    assert last == [pattern.last_query(key) for key in range(LENGTH)]
    for query, key in seen.nonzero().tolist():
        assert first[query] <= key
        assert query <= last[key]
    assert first == sorted(first)


@held
def test_within(pattern):
    for window in (1, 5, 100):
        past = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) < window
        assert torch.equal(table(pattern.within(window)).tril(), (table(pattern) & past).tril())


@settings(max_examples=MOST, deadline=None, derandomize=True)
@given(leaves, leaves)
def test_contains_and_intersect(outer, inner):
    outer, inner = outer.for_head(0), inner.for_head(0)
    both = table(outer) & table(inner)
    if contains(outer, inner):
        assert torch.equal(both, table(inner))
    assert torch.equal(table(intersect(outer, inner)), both)


def test_what_is_known_exactly():
    """Facts that say nothing would pass the tests above."""
    assert Local(5, 3).reach == Local(13).reach == 12
    assert FixedBlock(8).reach == 7
    assert Union([Local(5), FixedBlock(8)]).reach == 7
    assert Intersection([Local(5), Strided(2)]).reach == 4
    assert Strided(3).reach == math.inf
    assert Union([Local(5), FixedBlock(8)]).period == 8
    assert RandomBlocks(4, 2).period is None
    assert Local(3).last_query(4) == 6
    assert FixedSummary(4, 1).last_query(3) == FAR
    assert FixedSummary(4, 1).last_query(2) == 0
    assert contains(Strided(2), Strided(6))
    assert contains(FixedBlock(8), FixedBlock(4))
    assert contains(FixedBlock(8), Local(1))
    assert contains(Sink(4), Sink(3))
    assert not contains(Sink(3), Sink(4))
    assert not contains(FixedSummary(4, 2, sub_blocks=2), FixedSummary(4, 1))
    assert Sink(3).last_query(2) == FAR
    assert Sink(3).last_query(3) == 0
    assert len(Sink(3).candidates(40, 41, 40)) == 3
    assert contains(Block1D(4, 4), FixedBlock(4))
    assert not contains(FixedBlock(8), Local(2))
    assert distances_met(Union([Local(2), Strided(4)]), 10).tolist() == [8, 4, 1, 0]
    assert len(RandomBlocks(4, 2).candidates(40, 41, 40)) == 8


@pytest.mark.parametrize(("block", "count"), [(4, 2), (16, 3)])
def test_random_blocks_are_drawn_among_earlier_ones_without_repetition(block, count):
    pattern = RandomBlocks(block, count, seed=1)
    for number in range(40):
        seen = [key for key in range(40) if pattern.visible(0, number * block, key * block)]
        assert len(seen) == min(number, count)
        assert all(key < number for key in seen)
    other = RandomBlocks(block, count, seed=2)
    assert any(
        other.visible(0, 39 * block, key * block) != pattern.visible(0, 39 * block, key * block) for key in range(40)
    )


def test_a_pattern_that_tells_its_reach_alone(monkeypatch):
    """What follows from it is right, and a cache that keeps so many keys hands out no others."""
    monkeypatch.setattr(patterns_module, "PATTERN_TYPES", dict(patterns_module.PATTERN_TYPES))

    @dataclass(frozen=True)
    class Odd(Pattern):
        type: ClassVar[str] = "odd"
        reach = 7

        def visible(self, head, query, key):
            return (abs(query - key) < 8) & ((query + key) % 2 == 0)

    pattern, cache = Odd(), PatternCache([Odd()], 1)
    assert pattern.first_key(20) == 13
    assert pattern.last_query(20) == 27
    for position in range(30):
        seen = cache.announce(torch.zeros(1, 1, 1))[pattern]
        keys, _ = cache.update(torch.full((1, 1, 1, 2), float(position)), torch.zeros(1, 1, 1, 2), 0)
        if position:
            shown = keys[0, 0, :, 0][seen.dense(keys.device)[0, 0, 0]]
            assert sorted(shown.tolist()) == [key for key in range(position + 1) if pattern.visible(0, position, key)]


def test_a_taken_type_is_refused():
    with pytest.raises(TypeError, match=r"Pattern type 'local' is taken by .*Local; give Other another"):
        type("Other", (Pattern,), {"type": "local"})

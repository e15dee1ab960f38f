"""The cache of local attention in images: nothing that is still needed is overwritten, and nothing else is kept."""

import pytest
import torch

from hf_tfamily.modeling.attention_patterns import Block1D, Block2D, Full, PerHead
from hf_tfamily.modeling.cache_patterns import PatternCache

PATTERNS = [
    Block1D(6, 6),
    Block1D(5, 2),
    Block1D(4, 0),
    Block2D(2, 3, 1, 2).bind((5, 7, 2)),
    Block2D(4, 4, 4, 4).bind((8, 8, 1)),
    Block2D(2, 2, 0, 0).bind((6, 8, 1)),
]


def numbered_keys(start, end, heads):
    """Keys [1, heads, T, 2] that say their position."""
    return torch.arange(float(start), end).view(1, 1, -1, 1).expand(1, heads, -1, 2)


def read_in_steps(pattern, sizes, heads=4):
    """(first position of a step, positions of the keys it read [S])."""
    cache, start = PatternCache([pattern], heads), 0
    for size in sizes:
        cache.announce(torch.zeros(1, size, 1))
        keys = numbered_keys(start, start + size, heads)
        read, _ = cache.update(keys, keys, 0)
        yield start, read[0, :, :, 0].clone()  # a view, which later steps write over
        start += size


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("prompt", [1, 9, 17])
def test_one_query_reads_just_what_it_sees(pattern, prompt):
    for start, read in list(read_in_steps(pattern, [prompt] + [1] * (46 - prompt)))[1:]:
        expected = [key for key in range(start + 1) if pattern.visible(0, start, key)]
        assert sorted(read[0].tolist()) == expected  # in any order: attention has none


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_several_queries_find_all_they_see(pattern):
    for start, read in list(read_in_steps(pattern, [7, 9, 1, 1, 11, 4, 13]))[1:]:
        needed = {key for query in range(start, 46) for key in range(start) if pattern.visible(0, query, key)}
        now = {key for key in range(start) if pattern.visible(0, start, key)}
        assert now <= set(read[0].tolist())
        assert {key for key in read[0].tolist() if key < start} <= needed


def stored(pattern, length):
    cache = PatternCache([pattern], 1)
    for start in range(length):
        cache.announce(torch.zeros(1, 1, 1))
        cache.update(numbered_keys(start, start + 1, 1), numbered_keys(start, start + 1, 1), 0)
    return cache.nbytes // (4 * 4)  # keys and values of two floats


def test_room_follows_the_block_and_not_the_image():
    assert stored(Block1D(8, 8), 16) == stored(Block1D(8, 8), 200) == 16
    heights = [stored(Block2D(4, 4, 4, 4).bind((height, 16, 1)), height * 16) for height in (16, 32, 64)]
    assert heights[0] == heights[1] == heights[2] <= 2 * 4 * 16 + 4 * 4
    assert stored(Block2D(4, 4, 0, 4).bind((32, 16, 1)), 512) == 2 * 4 * 4


def test_heads_of_other_patterns_keep_their_own():
    pattern = PerHead((Block1D(4, 0), Full()))
    _, (_, read) = read_in_steps(pattern, [10, 1])
    assert sorted(set(read[1].tolist())) == list(range(11))
    assert set(read[0].tolist()) - {0.0} == {8.0, 9.0, 10.0}

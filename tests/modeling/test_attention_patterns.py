"""Patterns: what they show, their dict form, and what they refuse."""

import json

import pytest
import torch

from hf_tfamily.modeling.attention_patterns import (
    PATTERN_TYPES,
    Block1D,
    Block2D,
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Intersection,
    Local,
    PerHead,
    Strided,
    Union,
    Window2D,
    pattern_from_dict,
    patterns_for_layers,
    walk,
)
from tests.pattern_examples import EXAMPLES
from tests.reference.image_transformer import block_order

PATTERNS = [
    Full(),
    Local(3),
    Strided(4),
    FixedBlock(4),
    FixedSummary(4, 1),
    FixedSummary(6, 2, sub_blocks=2, shift=1),
    Fixed(4, 2),
    Fixed(6, 1, sub_blocks=4),
    Union((Local(3), Strided(4))),
    PerHead((Local(3), Strided(4))),
    Union((PerHead((Full(), Fixed(4, 1, sub_blocks=2))), Local(2))),
    Intersection((Local(6), Strided(2))),
    Union((Intersection((Fixed(6, 1, sub_blocks=4), Local(9))), Local(2))),
    PerHead((Union((Local(2), Strided(5))), FixedSummary(5, 2, sub_blocks=2))),
    Block1D(4, 3),
    *EXAMPLES,
]
# Patterns of pictures need a grid, which no config says.
GRID_PATTERNS = [
    Window2D(2, 1).bind((5, 3)),
    Union((Local(2), Window2D(3))).bind((4, 4)),
    Block2D(2, 2, 1, 1).bind((5, 3, 1)),
    Union((Local(2), Block2D(1, 2, 2, 0))).bind((2, 5, 3)),
]


def seen_keys(pattern, query, length=12, head=0):
    """Causally visible keys, as a reader of the paper would list them."""
    return {key for key in range(length) if key <= query and pattern.visible(head, query, key)}


def grid_of(pattern):
    """The grid that a pattern of pictures is bound to, which its dict leaves out."""
    return next((p.grid for p in walk(pattern) if getattr(p, "grid", None)), None)


def test_every_pattern_type_is_tested():
    of_one_system = {"big_bird_blocks"}  # a draw of BlockTables, in test_long_encoder.py
    tested = {p.type for pattern in PATTERNS + GRID_PATTERNS for p in walk(pattern)}
    assert tested == set(PATTERN_TYPES) - of_one_system


def test_strided_attention_is_the_papers():
    """Section 4.3: the previous l positions (as the authors' code counts them) and every l-th position."""
    assert seen_keys(Local(4), 9) == {6, 7, 8, 9}
    assert seen_keys(Strided(4), 9) == {1, 5, 9}


def test_fixed_attention_is_the_papers():
    """Section 4.3: floor(j / l) = floor(i / l), and j mod l in {l - c, ..., l - 1}."""
    assert seen_keys(FixedBlock(4), 9) == {8, 9}
    assert seen_keys(FixedSummary(4, 1), 9) == {3, 7}
    assert seen_keys(Fixed(4, 1), 9) == {3, 7, 8, 9}


def test_distinct_sub_blocks_for_distinct_heads_count_from_the_blocks_end():
    pattern = FixedSummary(6, 2, sub_blocks=3)
    assert [seen_keys(pattern, 5, head=h) for h in range(4)] == [{4, 5}, {2, 3}, {0, 1}, {4, 5}]


def test_windows_are_the_papers():
    """Figure 2: 2 x 2 windows of an 8 x 8 grid, and moved by 2, which makes 3 x 3 of them."""
    window, moved = Window2D(4).bind((8, 8)), Window2D(4, shift=2).bind((8, 8))

    def seen(pattern, row, column):
        return sum(pattern.visible(0, 8 * row + column, key) for key in range(64))

    assert [seen(window, row, column) for row, column in ((0, 0), (3, 4), (7, 7))] == [16, 16, 16]
    assert [seen(moved, row, column) for row, column in ((0, 0), (0, 2), (3, 3), (7, 7))] == [4, 8, 16, 4]


def test_windows_need_a_grid():
    with pytest.raises(ValueError, match=r"bind\(\(rows, columns\)\)"):
        Window2D(4).visible(0, 1, 2)


def test_local_attention_in_one_dimension_is_the_papers():
    """Figure 1, left: the query's block and the positions before it."""
    assert seen_keys(Block1D(4, 4), 6) == {0, 1, 2, 3, 4, 5, 6}
    assert seen_keys(Block1D(4, 2), 9) == {6, 7, 8, 9}
    assert {key for key in range(12) if Block1D(4, 2).visible(0, 5, key)} == {2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("grid", [(4, 6, 1), (5, 7, 3), (3, 2, 2)], ids=str)
def test_local_attention_in_two_dimensions_is_the_papers(grid):
    """Figure 1, right: blocks in raster order, pixels in raster order inside; the block and a flange on three sides."""
    pattern = Block2D(2, 3, 1, 2).bind(grid)
    order = block_order(*grid, 2, 3)
    for query, (row, column, _) in enumerate(order):
        assert pattern.place(query) == (row, column)
        block_row, block_column = row // 2, column // 3
        span = [i for i, (r, c, _) in enumerate(order) if (r // 2, c // 3) == (block_row, block_column)]
        assert pattern.block_span(query) == (span[0], span[-1] + 1)
        expected = set()
        for key, (key_row, key_column, _) in enumerate(order):
            above = 2 * block_row - 1 <= key_row < 2 * block_row + 2
            beside = 3 * block_column - 2 <= key_column < 3 * block_column + 3 + 2
            if above and beside:
                expected.add(key)
        assert {key for key in range(len(order)) if pattern.visible(0, query, key)} == expected
        assert min(expected) >= pattern.first_key(query)


@pytest.mark.parametrize("pattern", [Block1D(4, 3), Block1D(3, 0), Block2D(2, 3, 1, 2).bind((5, 7, 2))], ids=str)
def test_what_is_said_of_keys_fits_what_queries_see(pattern):
    keys = range(70)
    for key in keys:
        readers = [query for query in keys if query >= key and pattern.visible(0, query, key)]
        assert min(pattern.last_query(key), 69) == readers[-1]
    assert pattern.last_query(torch.arange(70)).tolist() == [pattern.last_query(key) for key in keys]


def test_blocks_need_a_grid():
    with pytest.raises(ValueError, match=r"bind\(\(rows, columns, channels\)\)"):
        Block2D(2, 2, 1, 1).visible(0, 1, 2)


@pytest.mark.parametrize("pattern", PATTERNS + GRID_PATTERNS, ids=str)
def test_tensors_and_integers_agree_and_heads_repeat(pattern):
    heads, length = 2 * pattern.head_period, 13
    h, q, k = torch.arange(heads)[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    table = pattern.visible(h, q, k).expand(heads, length, length)
    for head in range(heads):
        alone = pattern.for_head(head)
        assert alone.head_period == 1
        for i in range(length):
            for j in range(length):
                expected = bool(pattern.visible(head, i, j))
                assert table[head, i, j] == expected == bool(alone.visible(0, i, j))
                assert expected == any(bool(part.visible(head, i, j)) for part in pattern.parts)
                assert expected == bool(pattern.visible(head + pattern.head_period, i, j))


@pytest.mark.parametrize("pattern", PATTERNS + GRID_PATTERNS, ids=str)
def test_some_heads_see_what_they_see_among_all(pattern):
    positions = torch.arange(25)
    for first, count in ((0, 1), (0, 4), (2, 2), (1, 3), (3, 4), (4, 8)):
        heads = torch.arange(count)[:, None, None]
        some = pattern.of_heads(first, count)
        some.check_heads(count)
        expected = pattern.visible(heads + first, positions[:, None], positions).expand(count, -1, -1)
        assert torch.equal(some.visible(heads, positions[:, None], positions).expand(count, -1, -1), expected)
        assert some.to_dict() == pattern_from_dict(some.to_dict()).to_dict()
    assert pattern.of_heads(0, pattern.head_period) is pattern


@pytest.mark.parametrize("pattern", PATTERNS + GRID_PATTERNS, ids=str)
def test_dict_round_trip_and_hash(pattern):
    again = pattern_from_dict(json.loads(json.dumps(pattern.to_dict())))
    again = again.bind(grid_of(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)
    with pytest.raises(AttributeError):
        pattern.window = 5


def test_dict_form_is_plain():
    assert Strided(96).to_dict() == {"type": "strided", "stride": 96}
    assert pattern_from_dict({"type": "union", "patterns": [{"type": "full"}]}) == Union((Full(),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Strided(0), r"Strided.stride must be an integer of at least 1, got 0"),
        (lambda: Local(2.5), r"Local.window .* got 2.5"),
        (lambda: Local(True), r"Local.window .* got True"),
        (lambda: FixedBlock("8"), r"FixedBlock.block .* got '8'"),
        (lambda: Fixed(4, 5), r"\(shift \+ sub_blocks\) \* summary <= block, got .* 5 > 4"),
        (lambda: FixedSummary(8, 2, sub_blocks=4, shift=1), r"10 > 8"),
        (lambda: FixedSummary(8, 2, shift=-1), r"shift must be an integer of at least 0, got -1"),
        (lambda: Window2D(4, 4), r"Window2D.shift must be an integer from 0 to size - 1, got 4"),
        (lambda: Block1D(0, 3), r"Block1D.block must be an integer of at least 1, got 0"),
        (lambda: Block1D(4, -1), r"Block1D.flange must be an integer of at least 0, got -1"),
        (lambda: Block2D(2, 0, 1, 1), r"Block2D.width must be .* got 0"),
        (lambda: Block2D(2, 2, 1, 1).bind((4, 4)), r"Block2D.grid must be \(rows, columns, channels\).* got \[4, 4\]"),
        (lambda: Union(()), r"Union.patterns is empty"),
        (lambda: Union(Local(2)), r"Union.patterns must be a list of patterns"),
        (lambda: PerHead((Local(2), 3)), r"holds 3, which is no pattern"),
        (lambda: PerHead((Local(2), Full())).check_heads(3), r"2 patterns.* num_attention_heads=3"),
        (
            lambda: pattern_from_dict({"type": "stride", "stride": 4}),
            r"'stride'; did you mean 'strided'.*Allowed: big_bird_blocks, block_1d",
        ),
        (lambda: pattern_from_dict({"type": "local", "windw": 4}), r"no key 'windw'; did you mean 'window'"),
        (lambda: pattern_from_dict({"type": "local"}), r"'local' needs 'window'"),
        (lambda: pattern_from_dict({"window": 4}), r"Unknown pattern type None"),
        (lambda: pattern_from_dict("local"), r"must be a dict"),
        (lambda: patterns_for_layers([], 2), r"empty list"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patterns_cycle_over_layers():
    assert patterns_for_layers([{"type": "full"}, Local(2)], 3) == [Full(), Local(2), Full()]
    assert patterns_for_layers({"type": "full"}, 2) == [Full(), Full()]

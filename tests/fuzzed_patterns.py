"""Patterns drawn at random, nested, for four heads: what fuzzing tests of attention and of caches share."""

from hypothesis import strategies as st

from hf_tfamily.modeling.attention_patterns import (
    Block1D,
    Block2D,
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
    Window2D,
)

HEADS = 4


@st.composite
def _fixed(draw, kind):
    """(shift + sub_blocks) * summary <= block."""
    summary, sub_blocks, shift = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 2))
    return kind((shift + sub_blocks) * summary + draw(st.integers(0, 4)), summary, sub_blocks, shift)


LEAVES = st.one_of(
    st.just(Full()),
    st.builds(Local, st.integers(1, 12), st.integers(1, 4)),
    st.builds(Strided, st.integers(1, 9)),
    st.builds(FixedBlock, st.integers(1, 12)),
    _fixed(Fixed),
    _fixed(FixedSummary),
    st.builds(Sink, st.integers(1, 9)),
    st.builds(RandomBlocks, st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.sampled_from([None, 64])),
    st.builds(Block1D, st.integers(1, 9), st.integers(0, 9)),
)
WINDOWS = st.integers(1, 5).flatmap(lambda size: st.builds(Window2D, st.just(size), st.integers(0, size - 1)))
BLOCKS = st.builds(Block2D, st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))


def nested(leaves: st.SearchStrategy) -> st.SearchStrategy:
    """Unions, intersections and patterns of single heads of `leaves`, and of such."""

    def around(inner):
        some = st.lists(inner, min_size=1, max_size=3)
        heads = st.sampled_from([1, 2, 4]).flatmap(lambda count: st.lists(inner, min_size=count, max_size=count))
        return st.one_of(some.map(Union), some.map(Intersection), heads.map(PerHead))

    return st.recursive(leaves, around, max_leaves=6)


def sequences() -> st.SearchStrategy[Pattern]:
    """Patterns of rows of any length."""
    return nested(LEAVES)


@st.composite
def pictures(draw) -> Pattern:
    """Patterns of pictures, of one grid, beside those of rows."""
    rows, columns, channels = draw(st.integers(2, 9)), draw(st.integers(2, 9)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        return draw(nested(st.one_of(WINDOWS, LEAVES))).bind((rows, columns))
    return draw(nested(st.one_of(BLOCKS, LEAVES))).bind((rows, columns, channels))

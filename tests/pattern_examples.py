"""A row for each kind of pattern: what plans, masks, caches, kernels, decoding and facts are tested with."""

from hf_tfamily.modeling.attention_patterns import (
    Block1D,
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
)

EXAMPLES: list[Pattern] = [  # for sequences, with 4 heads
    Full(),
    Local(5),
    Local(4, dilation=3),
    Strided(4),
    FixedBlock(8),
    FixedSummary(8, 2, sub_blocks=4),
    Fixed(7, 2, sub_blocks=2, shift=1),
    RandomBlocks(4, 2),
    RandomBlocks(3, 2, seed=5, length=50),
    Block1D(7, 3),
    Block1D(5, 5, 5),
    BlockTable(4, [[[0, 2], [1], [], [0, 4, 7], [9, 1]], [[1], [5, 2]]]),
    Union([Block1D(4, 4, 4), BlockTable(4, [[[0, 2], [1], [], [0, 4, 7], [9, 1]], [[1], [5, 2]]])]),
    Union(
        [
            Block1D(4, 0, 4),
            RandomBlocks(4, 2, length=50),
            BlockTable(4, [[[0, 2], [1], [], [0, 4, 7], [9, 1]], [[1], [5, 2]]]),
        ]
    ),
    Sink(3),
    Union([Local(5), Sink(2)]),
    Union([FixedBlock(6), Sink(9)]),
    Union([Local(5), Strided(5)]),
    Union([Local(3), Local(4, dilation=3)]),
    Union([Local(3), RandomBlocks(4, 2), FixedSummary(8, 1)]),
    Union([Local(3), RandomBlocks(4, 2), Sink(2)]),
    Intersection([Local(9), Strided(2)]),
    PerHead([Union([Local(5), Sink(1)]), Union([Local(4), Sink(4)])]),
    PerHead([Local(5), Local(3, dilation=4), Strided(5), RandomBlocks(5, 1)]),
]

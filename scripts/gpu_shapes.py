"""What gpu_check.py measures: shapes with their goals, sweeps, and small patterns for its checks."""

from dataclasses import dataclass
from typing import ClassVar

from hf_tfamily.modeling.attention_patterns import Fixed, FixedBlock, FixedSummary, Full, Local, Pattern, Strided, Union

Goals = tuple[tuple[float, float] | None, tuple[float, float] | None]  # (must, stretch) of forward, and with backward
_PRIME = 1009


@dataclass(frozen=True)
class ScatteredBlocks(Pattern):
    """Blocks of `block` x `block` that are seen or not by a hash of their numbers; the diagonal always is."""

    type: ClassVar[str] = "scattered_blocks"
    block: int
    density: float

    def visible(self, head, query, key):
        row, column = query // self.block, key // self.block
        drawn = (31 * row * row + 17 * column * column + 131 * row * column + 419 * row + 57 * column) % _PRIME
        return (drawn < self.density * _PRIME) | (row == column)


@dataclass(frozen=True)
class Shape:
    """A row: lengths and heads, and how many times faster than each peer it is to be. `sinks`: learned ones."""

    name: str
    pattern: Pattern
    batch: int
    heads: int
    length: int
    dims: tuple[int, int]
    key_heads: int | None = None
    sinks: bool = False
    against_flex: Goals = (None, None)
    against_dense: Goals = (None, None)


_A = {"batch": 4, "heads": 16, "length": 8192, "against_flex": ((1.0, 1.15), (0.95, 1.15))}
_C = {"batch": 4, "heads": 8, "length": 12288, "dims": (64, 64)}
_H = {"batch": 16, "heads": 2, "length": 3072, "dims": (64, 128)}
_K = {"batch": 1, "heads": 32, "key_heads": 8, "dims": (128, 128)}
_M = {"batch": 1, "length": 32768, "dims": (256, 256)}
_J = {"batch": 1, "heads": 16, "length": 65536, "dims": (64, 64)}


def _goals(flex: Goals, dense: Goals = (None, None)) -> dict[str, Goals]:
    return {"against_flex": flex, "against_dense": dense}


SHAPES = [
    Shape("A dense causal, D 128", Full(), dims=(128, 128), **_A, against_dense=((0.6, 0.75),) * 2),
    Shape("A dense causal, D 64", Full(), dims=(64, 64), **_A, against_dense=((0.6, 0.75),) * 2),
    Shape(
        "B window 1024",
        Local(1024),
        4,
        16,
        16384,
        (128, 128),
        **_goals(((1.05, 1.3), (1.0, 1.2)), ((4.5, 6), (4, 5.5))),
    ),
    Shape("C local 128", Local(128), **_C, **_goals(((1.1, 1.4), (1.0, 1.3)), ((10, 16), (8, 14)))),
    Shape("D strided column", Strided(128), **_C, **_goals(((15, 25), (12, 20)), ((13, 22), (10, 18)))),
    Shape("E strided merged", Union([Local(128), Strided(128)]), **_C, **_goals(((8, 12), (6, 10)), ((7, 10), (5, 8)))),
    Shape(
        "F fixed merged, c=32",
        Fixed(128, 32, sub_blocks=4),
        **_C,
        **_goals(((2.5, 3.5), (2.0, 3.0)), ((2.0, 3.0), (1.8, 2.7))),
    ),
    Shape("G fixed merged, c=8", Fixed(128, 8, sub_blocks=4), **_C, **_goals(((5, 9), (4, 7)), ((4, 7), (3, 6)))),
    Shape("H CIFAR column, Dqk 64, Dv 128", Strided(96), **_H, **_goals(((3, 6), None), ((2.5, 5), None))),
    Shape("H CIFAR local, Dqk 64, Dv 128", Local(96), **_H),
    Shape(
        "I random 64-blocks, 10 %",
        ScatteredBlocks(64, 0.1),
        2,
        16,
        16384,
        (128, 128),
        **_goals(((1.1, 1.3), None), ((4, 6), None)),
    ),
    Shape("J 64k, window 1024", Local(1024), **_J, **_goals(((1.05, 1.3), None), ((18, 25), None))),
    Shape("J 64k, strided 256", Strided(256), **_J, **_goals(((30, 60), None), ((40, 90), None))),
    Shape("K Mistral 32k, window 4096", Local(4096), length=32768, **_K),
    Shape("K Mistral 32k, window 1024", Local(1024), length=32768, **_K),
    Shape("K Mistral 128k, window 4096", Local(4096), length=131072, **_K),
    Shape("K Mistral 128k, window 1024", Local(1024), length=131072, **_K),
    Shape("L gpt-oss 32k, window 128, sinks", Local(128), 1, 64, 32768, (64, 64), 8, sinks=True),
    Shape("M Gemma 32k, D 256, window 1024", Local(1024), heads=8, key_heads=4, **_M),
    Shape("M Gemma 32k, D 256, window 512", Local(512), heads=4, key_heads=1, **_M),
]


def sweeps() -> dict[str, list[Shape]]:
    """32k tokens a call: along length, head dimension, density; grouped heads; a length that 128 does not divide."""
    merged, fixed, window = Union([Local(128), Strided(128)]), Fixed(128, 32, sub_blocks=4), Local(1024)
    patterns = {"strided merged": merged, "fixed merged": fixed, "window 1024": window}

    def shape(name: str, pattern: Pattern, length: int = 8192, dims: tuple[int, int] = (64, 64), **rest) -> Shape:
        return Shape(name, pattern, max(1, 32768 // length), rest.pop("heads", 8), length, dims, **rest)

    lengths = [2048, 4096, 8192, 16384, 32768, 65536]
    all_dims = [(32, 32), (64, 64), (128, 128), (64, 128)]
    densities = [0.01, 0.05, 0.1, 0.2, 0.5]
    few = {"strided merged": merged, "fixed merged": fixed}
    return {
        "length": [shape(f"{name}, N {n}", pattern, n) for n in lengths for name, pattern in patterns.items()],
        "head dimension": [shape(f"{name}, D {d}", pattern, dims=d) for d in all_dims for name, pattern in few.items()],
        "density": [
            shape(f"random blocks of {block}, {density:.0%}", ScatteredBlocks(block, density))
            for block in (16, 32, 64, 128)
            for density in densities
        ],
        "grouped heads": [shape(f"{name}, 16 on 2", pattern, heads=16, key_heads=2) for name, pattern in few.items()],
        "odd length": [shape(f"{name}, N 8232", pattern, 8232) for name, pattern in few.items()],
    }


# One for each way to run a pattern.
PATTERNS = {
    "full": Full(),
    "local": Local(40),
    "column": Strided(16),
    "own block": FixedBlock(32),
    "strided merged": Union([Local(33), Strided(16)]),
    "fixed merged": Fixed(32, 8, sub_blocks=2),
    "summary": FixedSummary(32, 8),  # the first block sees nothing
    "by table": ScatteredBlocks(16, 0.3),
}

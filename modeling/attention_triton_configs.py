"""Sizes of tiles for the Triton kernels: chosen by table, never tuned at run time.

For head dimensions 64 and 128 entries compile without register spills for compute capabilities 8.0 and 9.0 and fit
their shared memory (those for tables with a bias are yet to be compiled). With triton 3.6.0 some entries take 8 to 48
bytes of stack at 16, 32, 96 and (64, 128). `python -m tests.modeling.compile_kernels` compiles all of them without a
GPU and prints what they take.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of a tile, warps, and stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


FORWARD, QUERY_GRAD, KEY_GRAD = "forward", "query_grad", "key_grad"
# How a pass walks: many keys for each query, few keys, few queries, over a table; the last two with a bias.
WIDE, NARROW, FEW, TABLE, BIASED, BIASED_TABLE = "wide", "narrow", "few", "table", "biased", "biased table"
HEAD_DIMS = (16, 32, 64, 128)  # others are padded to the next

# (kernel, walk) -> tile for head dimensions up to 32, 64 and 128; float16 and bfloat16. Tables take square ones.
HALF = {
    (FORWARD, WIDE): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
    (FORWARD, NARROW): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    (FORWARD, FEW): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2)),
    (FORWARD, TABLE): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    (FORWARD, BIASED): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
    (FORWARD, BIASED_TABLE): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    (QUERY_GRAD, WIDE): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    (QUERY_GRAD, NARROW): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
    (QUERY_GRAD, FEW): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2)),
    (QUERY_GRAD, TABLE): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    (QUERY_GRAD, BIASED): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 8, 1)),
    (QUERY_GRAD, BIASED_TABLE): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    (KEY_GRAD, WIDE): ((64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2)),
    (KEY_GRAD, NARROW): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (KEY_GRAD, FEW): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 8, 2)),
    (KEY_GRAD, TABLE): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
    (KEY_GRAD, BIASED): ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1)),
    (KEY_GRAD, BIASED_TABLE): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}
# Where compute capability 8 needs smaller ones.
HALF_OLDER = {
    (FORWARD, WIDE): ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2)),
    (FORWARD, NARROW): ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2)),
    (FORWARD, TABLE): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2)),
    (FORWARD, FEW): ((16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
    (QUERY_GRAD, WIDE): ((64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2)),
    (QUERY_GRAD, NARROW): ((64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2)),
    (QUERY_GRAD, FEW): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
    (KEY_GRAD, WIDE): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 64, 8, 2)),
    (KEY_GRAD, NARROW): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 64, 8, 2)),
    (KEY_GRAD, TABLE): ((32, 32, 4, 2), (32, 32, 4, 2), (64, 64, 8, 2)),
    (FORWARD, BIASED): ((32, 32, 2, 1), (32, 32, 2, 1), (32, 32, 4, 1)),
    (QUERY_GRAD, BIASED): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1)),
    (KEY_GRAD, BIASED): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}
# float32 products need small tiles.
_FLOAT32 = ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1))
_FLOAT32_TABLE = {FORWARD: ((16, 16, 2, 2), (16, 16, 2, 2), (16, 16, 8, 1))}
_FLOAT32_OLDER = {QUERY_GRAD: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))}


def tile_for(kernel: str, walk: str, head_dim: int, is_float32: bool, older: bool = False) -> Tile:
    """The tile of a kernel whose larger head dimension is `head_dim`, one of HEAD_DIMS, on the GPU's generation."""
    tiles = HALF_OLDER.get((kernel, walk), HALF[kernel, walk]) if older else HALF[kernel, walk]
    if is_float32:
        special = _FLOAT32_TABLE if walk in (TABLE, BIASED_TABLE) else _FLOAT32_OLDER if older else {}
        tiles = special.get(kernel, _FLOAT32)
    return Tile(*tiles[(head_dim > 32) + (head_dim > 64)])

"""Sizes of tiles for the Triton kernels: chosen by table, never tuned at run time.

Entries are chosen so that they compile without register spills for compute capabilities 8.0 and 9.0, with Triton 3.6
and 3.9, and fit their shared memory. `python -m tests.block_sparse.compile_kernels` compiles all of them without a GPU
and prints what they take (benchmarks/triton_compile.md).
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of a tile, warps, stages of the software pipeline, registers of a thread (None: ptxas chooses).

    ptxas may rather spill a few bytes than let fewer blocks run side by side; an upper bound of 255 keeps it from that.
    `precision` is of float32 products: three TF32 products, or one where that is allowed; or multiply-adds ("ieee").
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    precision: str = "tf32x3"

    @property
    def options(self) -> dict[str, int]:
        """What a kernel is compiled with."""
        bound = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **bound}


FORWARD, QUERY_GRAD, KEY_GRAD = "forward", "query_grad", "key_grad"
# How a pass walks: many keys for each query, few keys, few queries, over a table; the last two with a bias.
WIDE, NARROW, FEW, TABLE, BIASED, BIASED_TABLE = "wide", "narrow", "few", "table", "biased", "biased table"
HEAD_DIMS = (16, 32, 64, 128, 256)  # others are padded to the next

# (kernel, walk) -> tile for head dimensions up to 32, 64, 128 and 256; float16 and bfloat16. Tables take square ones,
# of the same side for both kernels whose rows are queries.
HALF = {
    (FORWARD, WIDE): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (32, 64, 8, 2, 255)),
    (FORWARD, NARROW): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3), (32, 64, 8, 2, 255)),
    (FORWARD, FEW): ((16, 64, 2, 3), (16, 64, 4, 2), (16, 64, 4, 2, 255), (16, 64, 8, 2, 255)),
    (FORWARD, TABLE): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2), (32, 32, 8, 2, 255)),
    (FORWARD, BIASED): ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 1, 255), (16, 32, 8, 1, 255)),
    (FORWARD, BIASED_TABLE): ((32, 32, 4, 1, 255), (32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 2, 255)),
    (QUERY_GRAD, WIDE): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 2, 255)),
    (QUERY_GRAD, NARROW): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2, 255)),
    (QUERY_GRAD, FEW): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2, 255), (16, 64, 8, 2, 255)),
    (QUERY_GRAD, TABLE): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2, 255)),
    (QUERY_GRAD, BIASED): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 8, 1), (16, 16, 8, 1, 255)),
    (QUERY_GRAD, BIASED_TABLE): ((32, 32, 4, 1, 255), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 2, 255)),
    (KEY_GRAD, WIDE): ((64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2), (64, 32, 8, 1)),
    (KEY_GRAD, NARROW): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    (KEY_GRAD, FEW): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 8, 2), (16, 32, 8, 2)),
    (KEY_GRAD, TABLE): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    (KEY_GRAD, BIASED): ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1), (32, 32, 8, 1)),
    (KEY_GRAD, BIASED_TABLE): ((32, 32, 4, 2), (32, 32, 4, 1, 255), (32, 32, 4, 1), (32, 32, 8, 2)),
}
# Where compute capabilities 8 and 12 need smaller ones.
HALF_OLDER = {
    (FORWARD, WIDE): ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 1, 255)),
    (FORWARD, NARROW): ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 1, 255)),
    (FORWARD, TABLE): ((64, 64, 4, 3, 255), (64, 64, 4, 3), (32, 32, 8, 2), (32, 32, 8, 2, 255)),
    (FORWARD, FEW): ((16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3), (16, 64, 8, 2, 255)),
    (QUERY_GRAD, WIDE): ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    (QUERY_GRAD, NARROW): ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    (QUERY_GRAD, FEW): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 64, 8, 1)),
    (QUERY_GRAD, TABLE): ((64, 64, 8, 2, 255), (64, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    (KEY_GRAD, WIDE): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2, 255), (32, 32, 8, 2)),
    (KEY_GRAD, NARROW): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2, 255), (32, 32, 8, 2)),
    (KEY_GRAD, FEW): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 8, 2), (16, 64, 8, 2)),
    (KEY_GRAD, TABLE): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2, 255), (32, 32, 8, 2)),
    (FORWARD, BIASED): ((32, 32, 4, 2), (32, 32, 2, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
    (FORWARD, BIASED_TABLE): ((32, 32, 4, 1, 255), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 2, 192)),
    (QUERY_GRAD, BIASED): ((32, 32, 8, 2, 255), (32, 32, 8, 1), (32, 32, 4, 1, 255), (32, 32, 8, 1)),
    (QUERY_GRAD, BIASED_TABLE): ((32, 32, 4, 1, 255), (32, 32, 4, 1, 255), (32, 32, 8, 1), (32, 32, 8, 2)),
    (KEY_GRAD, BIASED): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
    (KEY_GRAD, BIASED_TABLE): ((32, 32, 8, 2, 255), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 2)),
}
# float32 by multiply-adds: two operands of 256 columns that stay for a walk, as two TF32 numbers each, would leave no
# registers for it, nor two of 128 columns for a bias.
_ADDS = (16, 16, 8, 2, 224, "ieee")
_ADDS_FREELY = (16, 16, 8, 2, None, "ieee")
# float32, whose products take three times the registers; walks that are not named go as wide ones.
FLOAT32 = {
    (FORWARD, WIDE): ((64, 32, 4, 2), (64, 32, 4, 2), (16, 16, 4, 2), _ADDS),
    (FORWARD, FEW): ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 2), _ADDS),
    (FORWARD, TABLE): ((32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 1), _ADDS),
    (FORWARD, BIASED): ((64, 16, 4, 1), (64, 16, 4, 1), (16, 16, 4, 2), _ADDS),
    (FORWARD, BIASED_TABLE): ((16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1), _ADDS),
    (QUERY_GRAD, WIDE): ((64, 32, 4, 2), (64, 32, 4, 2), (16, 16, 8, 2), _ADDS),
    (QUERY_GRAD, FEW): ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 2), _ADDS),
    (QUERY_GRAD, TABLE): ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1), _ADDS),
    (QUERY_GRAD, BIASED): ((64, 16, 4, 1), (16, 16, 8, 1), _ADDS, _ADDS),
    (QUERY_GRAD, BIASED_TABLE): ((16, 16, 8, 2), (16, 16, 8, 2), _ADDS, _ADDS),
    (KEY_GRAD, WIDE): ((16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 8, 1), _ADDS_FREELY),
    (KEY_GRAD, TABLE): ((16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1), _ADDS_FREELY),
    (KEY_GRAD, BIASED): ((16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 8, 1), _ADDS_FREELY),
    (KEY_GRAD, BIASED_TABLE): ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1), _ADDS_FREELY),
}
FLOAT32_OLDER = {
    (FORWARD, WIDE): ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 2), _ADDS),
    (FORWARD, BIASED): ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 2), _ADDS),
    (QUERY_GRAD, WIDE): ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 2), _ADDS),
    (KEY_GRAD, WIDE): ((16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 8, 1), _ADDS),
}


def tile_for(kernel: str, walk: str, head_dim: int, is_float32: bool, older: bool = False) -> Tile:
    """The tile of a kernel whose larger head dimension is `head_dim`, one of HEAD_DIMS, on the GPU's generation."""
    table, smaller = (FLOAT32, FLOAT32_OLDER) if is_float32 else (HALF, HALF_OLDER)
    if (kernel, walk) not in table:
        walk = WIDE
    tiles = smaller.get((kernel, walk), table[kernel, walk]) if older else table[kernel, walk]
    return Tile(*tiles[sum(head_dim > largest for largest in (32, 64, 128))])


def sum_warps(head_dim: int, keys: int) -> int:
    """Warps of the kernel that adds up what several programs found for a tile of so many keys."""
    return 8 if head_dim > 128 or (head_dim > 64 and keys >= 64) else 4

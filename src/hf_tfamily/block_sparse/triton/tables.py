"""Tables for patterns that are no union of intervals: which granules of columns each tile of rows sees, and their bits.

A granule is 16, 32 or 64 neighbouring columns; the kernels pack granules from anywhere into one tile of columns. A
granule that all rows of a tile see whole needs no mask; every other has a bit mask, and equal masks are kept once.
Built from `visible` in chunks of rows, on any device, so never rows x columns at once.

Legend: R rows of a tile, G columns of a granule.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...modeling.attention_patterns import Pattern
from ..parts import Extent
from .layout import FIELDS

_SPARE = 1.1  # a coarser granule may cost this much more
_AT_ONCE = 1 << 24  # elements of `visible` evaluated together


@dataclass(frozen=True, eq=False)
class Table:
    """What a kernel reads. `listed` and `slots` [entries]: granule (-1: none) and bit mask of each entry.

    `bits` [masks, R, words of 32 bits]. `items` [n, FIELDS] as in layout.py: the entries of an item
    begin at its `start`; `full` tiles without and then `right` tiles with masks.
    """

    items: Tensor
    listed: Tensor
    slots: Tensor
    bits: Tensor
    granule: int


@dataclass(frozen=True, eq=False)
class TablePass:
    """The heads `first + n * period`, for each `first` of `heads`, by tables: rows are queries, and rows are keys."""

    extent: Extent
    heads: tuple[int, ...]
    period: int
    by_query: Table
    by_key: Table


@lru_cache(maxsize=16)
def table_pass(
    pattern: Pattern, extent: Extent, heads: tuple[int, ...], sides: tuple[int, int], device: torch.device
) -> TablePass:
    """Tables of the given heads, for square tiles of these sides: by query and by key; every pattern has them."""

    def seen_by(head: int, transposed: bool) -> Callable[[Tensor, Tensor], Tensor]:
        def seen(row: Tensor, column: Tensor) -> Tensor:
            query, key = (column, row) if transposed else (row, column)
            query, key = query + extent.first_query, key + extent.first_key
            shown = pattern.visible(head, query, key)
            return shown & (key <= query) if extent.causal else shown

        return seen

    sizes = (extent.num_queries, extent.num_keys)
    by_query = build_table([seen_by(head, False) for head in heads], heads, *sizes, sides[0], device)
    by_key = build_table([seen_by(head, True) for head in heads], heads, *reversed(sizes), sides[1], device)
    return TablePass(extent, heads, pattern.head_period, by_query, by_key)


def build_table(
    variants: list[Callable[[Tensor, Tensor], Tensor]],
    heads: tuple[int, ...],
    num_rows: int,
    num_columns: int,
    side: int,
    device: torch.device,
) -> Table:
    """The table of `variants`, functions of rows [R, 1] and columns [J] that say what is seen, one for each head."""
    canvas = _Canvas(num_rows, num_columns, side, device)
    some, every = zip(*(canvas.occupied(seen) for seen in variants))
    some, every = torch.stack(some), torch.stack(every)  # [V, tiles, granules of 16]
    granule = _granule(some, side)
    some, every = some.unflatten(-1, (-1, granule // 16)).any(-1), every.unflatten(-1, (-1, granule // 16)).all(-1)
    per_tile = side // granule
    surplus = every & (every.cumsum(-1) > every.sum(-1, keepdim=True) // per_tile * per_tile)
    every &= ~surplus  # full tiles hold full granules only, so what is left over goes with the masked ones
    masked = some & ~every
    masks = [canvas.bits(seen, chosen, granule) for seen, chosen in zip(variants, masked)]
    bits, slots = torch.unique(torch.cat(masks), dim=0, return_inverse=True)

    full, partly = every.sum(-1), masked.sum(-1)
    tiles = torch.stack([full // per_tile, -(-partly // per_tile)], -1).flatten(0, 1)  # [V * tiles, 2]
    entries = tiles.sum(-1) * per_tile
    start = entries.cumsum(0) - entries
    listed = torch.full((int(entries.sum()) + per_tile,), -1, device=device)
    slot = torch.zeros_like(listed)
    for chosen, offset in ((every, start), (masked, start + full.flatten())):
        variant, tile, number = chosen.nonzero(as_tuple=True)
        place = offset.view(chosen.shape[:2])[variant, tile] + chosen.cumsum(-1)[variant, tile, number] - 1
        listed[place] = number
        if chosen is masked:
            slot[place] = slots
    items = _items(heads, tiles, start, canvas)
    bits = bits.unflatten(-1, (side, -1)) if len(bits) else bits.new_zeros(1, side, 2)
    return Table(items, listed.int(), slot.int(), bits.contiguous(), granule)


@dataclass(frozen=True)
class _Canvas:
    """What is to be evaluated: rows x columns, in tiles of `side` rows."""

    num_rows: int
    num_columns: int
    side: int
    device: torch.device

    def evaluate(self, seen: Callable[[Tensor, Tensor], Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """In chunks of rows: (tiles, rows [tiles, R, 1], what is seen [tiles, R, columns]).

        Columns are rounded up to whole tiles; nothing is seen beyond the last row and column.
        """
        columns = torch.arange(-(-self.num_columns // self.side) * self.side, device=self.device)
        tiles = -(-self.num_rows // self.side)
        at_once = max(1, _AT_ONCE // (self.side * len(columns)))
        for first in range(0, tiles, at_once):
            last = min(first + at_once, tiles)
            rows = torch.arange(first * self.side, last * self.side, device=self.device)[:, None]
            inside = (rows < self.num_rows) & (columns < self.num_columns)
            shown = seen(rows, columns).expand(inside.shape) & inside
            yield slice(first, last), rows.unflatten(0, (-1, self.side)), shown.unflatten(0, (-1, self.side))

    def occupied(self, seen: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Whether a tile of rows sees any, and all, of a granule of 16: bool [tiles, granules]."""
        some, every = [], []
        for _, rows, shown in self.evaluate(seen):
            some.append(shown.any(1).unflatten(-1, (-1, 16)).any(-1))
            every.append((shown | (rows >= self.num_rows)).all(1).unflatten(-1, (-1, 16)).all(-1))
        return torch.cat(some), torch.cat(every)

    def bits(self, seen: Callable[[Tensor, Tensor], Tensor], chosen: Tensor, granule: int) -> Tensor:
        """The bit masks of the chosen granules [tiles, granules], in order: int32 [chosen, R * words]."""
        found = []
        weights = 1 << torch.arange(min(granule, 32), device=self.device)
        for tiles, _, shown in self.evaluate(seen):
            shown = shown.unflatten(-1, (-1, granule)).transpose(1, 2)[chosen[tiles]]  # [n, R, G]
            words = (shown.unflatten(-1, (-1, len(weights))) * weights).sum(-1)
            found.append(torch.where(words >= 1 << 31, words - (1 << 32), words).int().flatten(1))
        return torch.cat(found)


def _granule(some: Tensor, side: int) -> int:
    """The coarsest granule that adds little to the columns of granules of 16."""
    finest = int(some.sum()) * 16
    for granule in (64, 32, 16):
        if granule <= side:
            coarse = some.unflatten(-1, (-1, granule // 16)).any(-1)
            if int(coarse.sum()) * granule <= _SPARE * finest:
                return granule
    return 16


def _items(heads: tuple[int, ...], tiles: Tensor, start: Tensor, canvas: _Canvas) -> Tensor:
    per_variant = len(tiles) // len(heads)
    items = torch.zeros(len(tiles), FIELDS, dtype=torch.long, device=tiles.device)
    items[:, 0] = torch.tensor(heads, device=tiles.device).repeat_interleave(per_variant)
    items[:, 1] = torch.arange(len(heads), device=tiles.device).repeat_interleave(per_variant)
    items[:, 4] = torch.arange(per_variant, device=tiles.device).repeat(len(heads)) * canvas.side
    items[:, 5], items[:, 6], items[:, 7] = canvas.num_rows, canvas.num_columns, start
    items[:, 9], items[:, 10] = tiles.unbind(-1)
    return items[tiles.sum(-1).argsort(descending=True, stable=True)].int()

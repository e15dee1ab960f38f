"""The tiles of each kind of pattern, in order of their queries; attention_plan.py says which patterns have which.

Legend: H heads; I queries and J keys of one tile.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention_parts import ALIGNED, Extent, Group, Part, Tile, Tokens, aligned, parts_of
from .attention_patterns import FixedBlock, FixedSummary, Local, Strided
from .attention_patterns_base import Pattern
from .attention_patterns_images import Block1D, Block2D

_CHUNK = 32  # queries of a tile in a band: a window of w keys costs w + 31
_EDGE = 256  # queries of the tile before the first whole window of a band
_SUMMARY_QUERIES, _SUMMARY_KEYS = 1024, 256  # of a group of blocks; flash kernels are fastest from 768 queries on
_SUMMARIES_AT_ONCE = 1 << 12  # keys that are picked together
MAX_MASK = 1 << 22  # elements of a mask shared by tiles; beyond it a table is cheaper
_TABLE_ROWS = 64  # queries that share one list of keys
_TABLE_KEYS = 1 << 13  # keys gathered at once


class Layout(NamedTuple):
    """A union that falls apart into views: at most one far leaf, and the near ones."""

    far: Strided | FixedSummary | None
    block: FixedBlock | None
    local: Local | None

    def far_sees(self, causal: bool, head, query, key):
        """What the far part shows. Causal summaries leave the query's own block to the near part."""
        seen = self.far.visible(head, query, key)
        if causal and isinstance(self.far, FixedSummary):
            seen = seen & (query // self.far.block != key // self.far.block)
        return seen


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of the sequence itself


def column_tiles(stride: int, extent: Extent) -> Iterator[Tile]:
    """Tokens whose positions agree modulo `stride` attend to each other (Child et al. 2019, section 4.3)."""
    for first in range(min(stride, extent.num_queries)):
        distance = extent.first_query + first - extent.first_key
        queries = range(first, extent.num_queries, stride)
        keys = range(distance % stride, extent.num_keys, stride)
        yield from _dense(queries, keys, distance // stride, extent.causal)


def block_tiles(block: int, extent: Extent) -> Iterator[Tile]:
    """Tokens of the same block attend to each other."""
    for start in range(extent.first_query // block * block, extent.end_query, block):
        queries, keys = extent.queries(start, start + block), extent.keys(start, start + block)
        earlier = queries.start + extent.first_query - keys.start - extent.first_key
        yield from _dense(queries, keys, earlier, extent.causal)


def _dense(queries: range, keys: range, earlier: int, causal: bool) -> Iterator[Tile]:
    """All `queries` to all `keys`, or if causal up to their own; `earlier` keys come before the first query's own."""
    if not causal:
        yield Tile(queries, keys)
        return
    if earlier < 0:
        queries, earlier = queries[-earlier:], 0
    if len(queries) == 1:
        yield Tile(queries, keys[: earlier + 1])
        return
    yield Tile(queries, keys[:earlier])
    yield Tile(queries, keys[earlier : earlier + len(queries)], causal=True)


def local_block_groups(pattern: Block1D | Block2D, heads: range, extent: Extent) -> list[Group]:
    """Each block and its own tokens, and each block and the keys around it, which all its queries see alike.

    Around a block in 1-D lies one run of keys before it. In 2-D, in the order of generation, it is many runs: those
    keys are picked into one list, block after block.
    """
    own, around, picked = [], [], []
    position = extent.first_query
    while position < extent.end_query:
        start, end = pattern.block_span(position)
        queries, keys = extent.queries(start, end), extent.keys(start, end)
        earlier = queries.start + extent.first_query - keys.start - extent.first_key
        own += _dense(queries, keys, earlier, extent.causal)
        if isinstance(pattern, Block1D):
            around.append(Tile(queries, extent.keys(start - pattern.flange, start)))
        else:
            flange = _flange(pattern, start, end, extent)
            around.append(Tile(queries, range(len(picked), len(picked) + len(flange))))
            picked += flange
        position = end
    if isinstance(pattern, Block1D):
        return [Group(heads, parts_of(own + around))]
    flanges = parts_of(around)
    return [Group(heads, parts_of(own)), Group(heads, flanges, torch.tensor(picked, dtype=torch.long))]


def _flange(pattern: Block2D, start: int, end: int, extent: Extent) -> list[int]:
    """The keys that the block's queries see outside it, if causal only those of earlier blocks."""
    last = start if extent.causal else extent.end_key
    keys = extent.keys(pattern.first_key(start), last)
    positions = torch.tensor(keys, dtype=torch.long) + extent.first_key
    seen = pattern.visible(0, start, positions) & ((positions < start) | (positions >= end))
    return (positions[seen] - extent.first_key).tolist()


def window_of(layout: Layout, causal: bool) -> tuple[int, int, int]:
    """(chunk, low, high): queries [start, start + chunk) see no near key outside [start + low, start + high).

    The pattern repeats from chunk to chunk, so `chunk` is a multiple of its period.
    """
    far, block, local = layout
    period = block.block if block else far.block if isinstance(far, FixedSummary) else 1
    chunk = period * math.ceil(_CHUNK / period)
    around = aligned(local.window - 1) if local else 0
    return chunk, -around, chunk if causal else chunk + around


@lru_cache(maxsize=64)
def _near_mask(
    pattern: Pattern, layout: Layout, heads: range, causal: bool, queries: range, keys: range
) -> torch.Tensor:
    """What queries see of keys, by their positions, less what the far part shows: bool [heads, queries, keys]."""
    head, query, key = torch.tensor(heads)[:, None, None], torch.tensor(queries)[:, None], torch.tensor(keys)
    mask = pattern.visible(head, query, key).expand(len(heads), len(queries), len(keys))
    if layout.far:
        mask = mask & ~layout.far_sees(causal, head, query, key)
    return mask & (key <= query) if causal else mask


def band_tiles(pattern: Pattern, layout: Layout, heads: range, extent: Extent) -> Iterator[Tile]:
    """Chunks of queries, each with its window of keys; those whose windows the first key cuts short are one tile."""
    chunk, low, high = window_of(layout, extent.causal)
    only_local = layout.block is None and not isinstance(layout.far, FixedSummary)
    origin = extent.first_query if only_local else extent.first_query // chunk * chunk
    short = math.ceil((extent.first_key - low - origin) / chunk) * chunk
    if extent.causal and only_local and chunk < short <= _EDGE:
        edge = range(origin, min(origin + short, extent.end_query))
        keys = range(extent.first_key, min(edge.stop, extent.end_key))
        mask = _near_mask(pattern, layout, heads, True, edge, keys)
        yield from _cutter(mask)(extent.queries(origin, edge.stop), extent.keys(extent.first_key, edge.stop), 0, 0)
        origin = edge.stop
    whole = math.ceil(-low / chunk) * chunk
    mask = _near_mask(
        pattern, layout, heads, extent.causal, range(whole, whole + chunk), range(whole + low, whole + high)
    )
    cut = _cutter(mask)
    for start in range(origin, extent.end_query, chunk):
        queries, keys = extent.queries(start, start + chunk), extent.keys(start + low, start + high)
        row, column = queries.start + extent.first_query - start, keys.start + extent.first_key - start - low
        yield from cut(queries, keys, row, column)


def _cutter(mask: torch.Tensor) -> Callable[[range, range, int, int], Iterator[Tile]]:
    """A function that lays queries and keys on a mask [heads, rows, columns] and gives the tile, if they see anything.

    Equal cuts share one mask, so that their tiles are alike.
    """

    @cache
    def trimmed(row: int, rows: int, column: int, columns: int):
        return _trim(mask[:, row : row + rows, column : column + columns])

    def cut(queries: range, keys: range, row: int, column: int) -> Iterator[Tile]:
        rule = trimmed(row, len(queries), column, len(keys)) if queries and keys else None
        if rule:
            rows, columns, causal, small = rule
            yield Tile(queries[rows], keys[columns], causal, small)

    return cut


def _trim(mask: torch.Tensor) -> tuple[slice, slice, bool, torch.Tensor | None] | None:
    """The rows and columns of a mask where anything is seen, whether it is causal, and else a mask, None for all."""
    rows, columns = mask.any(0).any(1).nonzero(), mask.any(0).any(0).nonzero()
    if not len(rows):
        return None
    rows, columns = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    small = mask[:, rows, columns]
    if small.all():
        return rows, columns, False, None
    if torch.equal(small, torch.ones_like(small).tril()):
        return rows, columns, True, None
    columns = slice(columns.start // ALIGNED * ALIGNED, aligned(columns.stop))
    return rows, columns, False, mask[None, :, rows, columns]


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of compact keys


def summary_groups(pattern: FixedSummary, heads: range, extent: Extent) -> Iterator[Group]:
    """Queries and the summary positions of all blocks, or if causal of the blocks before their own."""
    end = (extent.end_query - 1) // pattern.block if extent.causal else math.ceil(extent.end_key / pattern.block)
    blocks = range(extent.first_key // pattern.block, min(end, math.ceil(extent.end_key / pattern.block)))
    columns = pattern.first_column(torch.tensor(heads if pattern.head_period > 1 else heads[:1]))
    starts = torch.tensor(blocks, dtype=torch.long) * pattern.block - extent.first_key
    index = (starts[:, None] + torch.arange(pattern.summary)).view(-1, 1) + columns
    if pattern.head_period == 1:
        index = index[:, 0]
    absent = (index < 0) | (index >= extent.num_keys)
    if extent.causal:
        tiles = list(_earlier_summaries(pattern, blocks, extent))
    else:
        tiles = [Tile(range(extent.num_queries), range(len(index)))]
    together = _blocks_together(pattern)  # what is masked lies inside them
    at_once = max(1, _SUMMARIES_AT_ONCE // (pattern.summary * together)) * together
    for first in range(blocks.start // at_once * at_once, blocks.stop, at_once):
        start, end = (max(block - blocks.start, 0) * pattern.summary for block in (first, first + at_once))
        picked, missing = index[start:end], absent[start:end]
        some = (tile._replace(keys=_within(tile.keys, range(start, start + len(picked)))) for tile in tiles)
        yield Group(heads, parts_of(some), picked.masked_fill(missing, 0), missing if missing.any() else None)


def _within(some: range, whole: range) -> range:
    """The part of a range that lies in another, counted from its start."""
    start, stop = (min(max(end, whole.start), whole.stop) - whole.start for end in (some.start, some.stop))
    return range(start, stop)


def _blocks_together(pattern: FixedSummary) -> int:
    return max(1, min(_SUMMARY_QUERIES // pattern.block, _SUMMARY_KEYS // pattern.summary))


def _earlier_summaries(pattern: FixedSummary, blocks: range, extent: Extent) -> Iterator[Tile]:
    """In a group of blocks all queries see every summary before the group, and later ones some summaries inside it."""
    block, width = pattern.block, pattern.summary
    group = _blocks_together(pattern)
    stairs = torch.ones(group - 1, group, dtype=torch.bool).tril()  # the last, seen by nobody, makes widths even
    cut = _cutter(stairs.repeat_interleave(block, 0).repeat_interleave(width, 1)[None])

    def summaries(first: int, end: int) -> range:
        inside = range(max(first, blocks.start), min(end, blocks.stop))
        return range((inside.start - blocks.start) * width, (inside.stop - blocks.start) * width)

    for first in range(extent.first_query // block // group * group, math.ceil(extent.end_query / block), group):
        start, end = first * block, (first + group) * block
        yield Tile(extent.queries(start, end), summaries(blocks.start, first))
        queries, keys = extent.queries(start + block, end), summaries(first, first + group)
        row = queries.start + extent.first_query - start - block
        yield from cut(queries, keys, row, max(blocks.start - first, 0) * width)


def table_groups(pattern: Pattern, heads: range, extent: Extent) -> list[Group]:
    """Rows of queries, each with the list of keys that any of its queries sees. Exact for every pattern."""
    groups = []
    for (_, num_keys), alike in groupby(_table_rows(pattern, heads.start, extent), key=lambda row: row.mask.shape):
        rows = list(alike)
        at_once = max(1, _TABLE_KEYS // max(1, num_keys))
        if num_keys:
            groups += [_table_group(heads, rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
    return groups


class _Row(NamedTuple):
    queries: range
    index: torch.Tensor  # [J]: the keys, and then key 0 up to a round number
    mask: torch.Tensor  # bool [I, J]


def _table_rows(pattern: Pattern, head: int, extent: Extent) -> Iterator[_Row]:
    for start in range(0, extent.num_queries, _TABLE_ROWS):
        queries = range(start, min(start + _TABLE_ROWS, extent.num_queries))
        query = extent.first_query + torch.tensor(queries)[:, None]
        keys = extent.keys(extent.first_key, int(query[-1]) + 1 if extent.causal else extent.end_key)
        key = extent.first_key + torch.arange(len(keys))
        mask = pattern.visible(head, query, key)
        if extent.causal:
            mask = mask & (key <= query)
        index = mask.any(0).nonzero()[:, 0]
        spare = -len(index) % _TABLE_ROWS  # rounding up makes rows alike
        yield _Row(queries, F.pad(index, (0, spare)), F.pad(mask[:, index], (0, spare)))


def _table_group(heads: range, rows: list[_Row]) -> Group:
    """One part of neighbouring rows."""
    num_queries, num_keys = rows[0].mask.shape
    return Group(
        heads,
        parts=(
            Part(
                tiles=len(rows),
                queries=Tokens(rows[0].queries.start, num_queries, 1, _TABLE_ROWS),
                keys=Tokens(0, num_keys, 1, num_keys),
                mask=torch.stack([row.mask for row in rows])[:, None],
            ),
        ),
        index=torch.cat([row.index for row in rows]),
    )

"""How to compute a pattern cheaply: a few disjoint parts, each a view of the sequence and a simple rule.

Planning knows positions and lengths only: no tensors of a model, no device, no kernel. `plan_attention` says what an
executor runs (attention_torch.py); `decode_keys` and `kept_keys` say what decoding reads and what a cache must keep.

    part        what it covers                                   queries of a tile     keys of a tile
    columns     Strided(l), and Full as l = 1                    every l-th            every l-th
    blocks      FixedBlock with nothing taken out                one block             the same block
    band        Local, FixedBlock, summaries of the own block    a chunk               a window around the chunk
    summaries   FixedSummary in blocks other than the own        some blocks           compact: summary positions only
    flanges     Block1D, Block2D: keys around the own block      one block             before it; in 2-D compact
    table       any other union                                  64 queries            compact: the keys they see

A *tile* is a rectangle of queries and keys under one rule: everything, causal, or a small mask. Alike tiles at even
distances make one *part*. No two parts show the same key to the same query, so their outputs are merged by log-sum-exp.
Legend: H heads, T queries, S keys; I queries and J keys of one tile.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention_patterns import FixedBlock, FixedSummary, Full, Local, Strided
from .attention_patterns_base import Pattern
from .attention_patterns_images import Block1D, Block2D

_CHUNK = 32  # queries of a tile in a band: a window of w keys costs w + 31
_ALIGNED = 16  # products are faster where tiles are multiples of this wide
_EDGE = 256  # queries of the tile before the first whole window of a band
_SUMMARY_QUERIES, _SUMMARY_KEYS = 1024, 256  # of a group of blocks; flash kernels are fastest from 768 queries on
_SUMMARIES_AT_ONCE = 1 << 12  # keys that are picked together
_MAX_MASK = 1 << 22  # elements of a mask shared by tiles; beyond it a table is cheaper
_TABLE_ROWS = 64  # queries that share one list of keys
_TABLE_KEYS = 1 << 13  # keys gathered at once


@dataclass(frozen=True)
class Tokens:
    """Which tokens each tile holds: tile t has the `count` tokens `start + t * step + i * stride`."""

    start: int
    count: int
    stride: int
    step: int

    def places(self, tiles: int) -> torch.Tensor:
        """The tokens of `tiles` tiles, [tiles, count]."""
        return self.start + torch.arange(tiles)[:, None] * self.step + torch.arange(self.count) * self.stride


@dataclass(frozen=True, eq=False)
class Part:
    """Tiles that differ only in where they lie.

    `mask` is a bool tensor [tiles or 1, heads or 1, I, J], True where a query sees a key. `causal` means that the i-th
    query of a tile sees the first i + 1 keys of the tile. `writes` means that no earlier part covers these queries.
    """

    tiles: int
    queries: Tokens
    keys: Tokens
    causal: bool = False
    mask: torch.Tensor | None = None
    writes: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """Parts over the same heads and the same keys: the sequence itself, or keys picked from it by `index`.

    `index` is [keys] or [keys, heads]; `absent`, of the same shape, is True for keys that are not there.
    """

    heads: range
    parts: tuple[Part, ...]
    index: torch.Tensor | None = None
    absent: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What an executor runs, in order. `complete`: each query of every head lies in a part that `writes`."""

    groups: tuple[Group, ...]
    complete: bool


@lru_cache(maxsize=64)
def plan_attention(
    pattern: Pattern,
    num_queries: int,
    num_keys: int,
    *,
    num_heads: int,
    causal: bool,
    first_query: int = 0,
    first_key: int = 0,
) -> Plan:
    """The parts by which `num_queries` queries attend to `num_keys` keys under `pattern`.

    Query i stands at position `first_query + i`, key j at `first_key + j`. Cached, so that layers share one plan.
    Raises ValueError if the pattern cannot be dealt out to `num_heads` heads.
    """
    pattern.check_heads(num_heads)
    extent = _Extent(num_queries, num_keys, first_query, first_key, causal)
    groups, complete = [], True
    for alike in _groups(pattern, range(num_heads), extent):
        alike, written = _mark_writes(alike, num_queries)
        groups += alike
        complete &= written
    return Plan(tuple(groups), complete)


def decode_keys(pattern: Pattern, head: int, position: int) -> torch.Tensor:
    """Positions, ascending, of the keys up to `position` that a query at `position` reads in `head`."""
    keys = torch.arange(position + 1)
    return keys[pattern.visible(head, position, keys)]


def kept_keys(pattern: Pattern, head: int, position: int) -> torch.Tensor:
    """Positions, ascending, of the keys before `position` that a query at `position` or later can still read in `head`.

    A cache that has taken in `position` tokens may forget all others.
    """
    keys = torch.arange(position)
    kept = torch.zeros(position, dtype=torch.bool)
    for part in pattern.for_head(head).parts:
        if isinstance(part, (Block1D, Block2D)):
            kept |= part.last_query(keys) >= position
        elif isinstance(part, (Local, FixedBlock, FixedSummary)):  # what these show of the past never grows again
            kept |= part.visible(head, position, keys)
        else:  # may come back to any key
            kept |= True
    return keys[kept]


# ---------------------------------------------------------------------------------------------------------------------
# From a pattern to groups of parts


@dataclass(frozen=True)
class _Extent:
    """The positions at hand, and whether a query sees keys after itself."""

    num_queries: int
    num_keys: int
    first_query: int
    first_key: int
    causal: bool

    @property
    def end_query(self) -> int:
        return self.first_query + self.num_queries

    @property
    def end_key(self) -> int:
        return self.first_key + self.num_keys

    @property
    def reach(self) -> int:
        """The largest distance between a query and a key that it may see."""
        back = self.end_query - 1 - self.first_key
        return back if self.causal else max(back, self.end_key - 1 - self.first_query)

    def queries(self, start: int, end: int) -> range:
        """Which queries stand at the positions from `start` to before `end`."""
        return range(max(start - self.first_query, 0), min(end - self.first_query, self.num_queries))

    def keys(self, start: int, end: int) -> range:
        """Which keys stand at the positions from `start` to before `end`."""
        return range(max(start - self.first_key, 0), min(end - self.first_key, self.num_keys))


class _Layout(NamedTuple):
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


def _groups(pattern: Pattern, heads: range, extent: _Extent) -> Iterator[list[Group]]:
    """The groups of all heads: a list for each set of heads that is planned together."""
    groups = _view_groups(pattern, heads, extent)
    if groups is not None:
        yield groups
    elif pattern.head_period == 1:
        yield _table(pattern, heads, extent)
    else:
        for head_pattern, alike in _heads_alike(pattern, heads):
            yield from _groups(head_pattern, alike, extent)


def _heads_alike(pattern: Pattern, heads: range) -> Iterator[tuple[Pattern, range]]:
    """Evenly spaced heads that follow one and the same pattern."""
    period = pattern.head_period
    firsts: dict[Pattern, list[int]] = {}
    for head in heads[:period]:
        firsts.setdefault(pattern.for_head(head), []).append(head)
    for head_pattern, starts in firsts.items():
        members = sorted(head for start in starts for head in heads[start::period])
        step = members[1] - members[0] if len(members) > 1 else 1
        evenly = range(members[0], members[-1] + 1, step)
        for alike in [evenly] if list(evenly) == members else [heads[start::period] for start in starts]:
            yield head_pattern, alike


def _view_groups(pattern: Pattern, heads: range, extent: _Extent) -> list[Group] | None:
    """The groups of a pattern made of views, or None if some leaf has none."""
    if isinstance(pattern, (Block1D, Block2D)):
        return _local_blocks(pattern, heads, extent)
    layout = _layout(pattern, extent)
    if layout is None:
        return None
    far, block, local = layout
    own_summaries = extent.causal and isinstance(far, FixedSummary)
    groups = []
    if isinstance(far, Strided):
        groups.append(Group(heads, _parts(_columns(far.stride, extent))))
    if block and not local and (own_summaries or not far):
        groups.append(Group(heads, _parts(_blocks(block.block, extent))))
    elif block or local or own_summaries:
        mask_heads = heads if pattern.head_period > 1 else heads[:1]
        chunk, low, high = _window(layout, extent.causal)
        if len(mask_heads) * chunk * (high - low) > _MAX_MASK:
            return None
        groups.append(Group(heads, _parts(_band(pattern, layout, mask_heads, extent))))
    if isinstance(far, FixedSummary):
        groups += _summaries(far, heads, extent)
    return groups


def _layout(pattern: Pattern, extent: _Extent) -> _Layout | None:
    """How the union falls apart into views, or None if it does not."""
    leaves = _simplify(pattern.parts, extent)
    kinds = {type(leaf): leaf for leaf in leaves}
    strided, summary, block, local = (kinds.get(kind) for kind in (Strided, FixedSummary, FixedBlock, Local))
    known = sum(leaf is not None for leaf in (strided, summary, block, local))
    if known < len(leaves) or (strided and summary) or (summary and block and summary.block != block.block):
        return None
    return _Layout(strided or summary, block, local)


def _simplify(leaves: Iterable[Pattern], extent: _Extent) -> list[Pattern]:
    """The leaves of a union without those that another one contains; what shows everything becomes Strided(1)."""
    leaves = dict.fromkeys(Strided(1) if _is_full(leaf, extent) else leaf for leaf in leaves)
    return [leaf for leaf in leaves if not any(other != leaf and _contains(other, leaf) for other in leaves)]


def _is_full(leaf: Pattern, extent: _Extent) -> bool:
    return isinstance(leaf, Full) or (isinstance(leaf, Local) and leaf.window > extent.reach)


def _contains(outer: Pattern, inner: Pattern) -> bool:
    """Does `outer` show whatever `inner` shows? False also where it is not known."""
    match outer, inner:
        case Strided(1), _:
            return True
        case Strided() | FixedBlock(), Local(1):
            return True
        case Local(), Local():
            return outer.window >= inner.window
        case Strided(), Strided():
            return inner.stride % outer.stride == 0
        case FixedBlock(), FixedBlock():
            return outer.block % inner.block == 0
    return False


def _parts(tiles: Iterable["_Tile"]) -> tuple[Part, ...]:
    """Alike tiles at even distances become one part; tiles without queries or keys are left out."""
    alike: dict[tuple, list[_Tile]] = {}
    for tile in tiles:
        if tile.queries and tile.keys:
            alike.setdefault(tile.shape, []).append(tile)
    return tuple(_part(run) for tiles in alike.values() for run in _even_runs(tiles))


def _even_runs(tiles: list["_Tile"]) -> Iterator[list["_Tile"]]:
    """Cut a list of tiles where the distance from one to the next changes, or the keys do not advance."""
    run = [tiles[0]]
    for tile in tiles[1:]:
        step = tile.distance(run[-1])
        if step[1] > 0 and (len(run) == 1 or step == run[1].distance(run[0])):
            run.append(tile)
        else:
            yield run
            run = [tile]
    yield run


def _part(run: list["_Tile"]) -> Part:
    first = run[0]
    query_step, key_step = run[1].distance(first) if len(run) > 1 else (0, 0)
    return Part(
        tiles=len(run),
        queries=Tokens(first.queries.start, len(first.queries), first.queries.step, query_step),
        keys=Tokens(first.keys.start, len(first.keys), first.keys.step, key_step),
        causal=first.causal,
        mask=first.mask,
    )


def _mark_writes(groups: list[Group], num_queries: int) -> tuple[list[Group], bool]:
    """The groups with `writes` set, without those that have no parts; and whether every query is first written."""
    covered = torch.zeros(num_queries, dtype=torch.bool)
    marked, all_written = [], True
    for group in groups:
        parts = []
        for part in group.parts:
            places = part.queries.places(part.tiles)
            before = covered[places]
            parts.append(replace(part, writes=not bool(before.any())))
            all_written &= parts[-1].writes or bool(before.all())
            covered[places] = True
        if parts:
            marked.append(replace(group, parts=tuple(parts)))
    return marked, all_written and bool(covered.all())


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of the sequence itself


class _Tile(NamedTuple):
    queries: range
    keys: range
    causal: bool = False
    mask: torch.Tensor | None = None  # [1, heads or 1, I, J]

    @property
    def shape(self) -> tuple:
        """Equal for tiles that differ only in where they lie."""
        return len(self.queries), self.queries.step, len(self.keys), self.keys.step, self.causal, id(self.mask)

    def distance(self, other: "_Tile") -> tuple[int, int]:
        return self.queries.start - other.queries.start, self.keys.start - other.keys.start


def _columns(stride: int, extent: _Extent) -> Iterator[_Tile]:
    """Tokens whose positions agree modulo `stride` attend to each other (Child et al. 2019, section 4.3)."""
    for first in range(min(stride, extent.num_queries)):
        distance = extent.first_query + first - extent.first_key
        queries = range(first, extent.num_queries, stride)
        keys = range(distance % stride, extent.num_keys, stride)
        yield from _dense(queries, keys, distance // stride, extent.causal)


def _blocks(block: int, extent: _Extent) -> Iterator[_Tile]:
    """Tokens of the same block attend to each other."""
    for start in range(extent.first_query // block * block, extent.end_query, block):
        queries, keys = extent.queries(start, start + block), extent.keys(start, start + block)
        earlier = queries.start + extent.first_query - keys.start - extent.first_key
        yield from _dense(queries, keys, earlier, extent.causal)


def _dense(queries: range, keys: range, earlier: int, causal: bool) -> Iterator[_Tile]:
    """All `queries` to all `keys`, or if causal up to their own; `earlier` keys come before the first query's own."""
    if not causal:
        yield _Tile(queries, keys)
        return
    if earlier < 0:
        queries, earlier = queries[-earlier:], 0
    if len(queries) == 1:
        yield _Tile(queries, keys[: earlier + 1])
        return
    yield _Tile(queries, keys[:earlier])
    yield _Tile(queries, keys[earlier : earlier + len(queries)], causal=True)


def _local_blocks(pattern: Block1D | Block2D, heads: range, extent: _Extent) -> list[Group]:
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
            around.append(_Tile(queries, extent.keys(start - pattern.flange, start)))
        else:
            flange = _flange(pattern, start, end, extent)
            around.append(_Tile(queries, range(len(picked), len(picked) + len(flange))))
            picked += flange
        position = end
    if isinstance(pattern, Block1D):
        return [Group(heads, _parts(own + around))]
    flanges = _parts(around)
    return [Group(heads, _parts(own)), Group(heads, flanges, torch.tensor(picked, dtype=torch.long))]


def _flange(pattern: Block2D, start: int, end: int, extent: _Extent) -> list[int]:
    """The keys that the block's queries see outside it, if causal only those of earlier blocks."""
    last = start if extent.causal else extent.end_key
    keys = extent.keys(pattern.first_key(start), last)
    positions = torch.tensor(keys, dtype=torch.long) + extent.first_key
    seen = pattern.visible(0, start, positions) & ((positions < start) | (positions >= end))
    return (positions[seen] - extent.first_key).tolist()


def _window(layout: _Layout, causal: bool) -> tuple[int, int, int]:
    """(chunk, low, high): queries [start, start + chunk) see no near key outside [start + low, start + high).

    The pattern repeats from chunk to chunk, so `chunk` is a multiple of its period.
    """
    far, block, local = layout
    period = block.block if block else far.block if isinstance(far, FixedSummary) else 1
    chunk = period * math.ceil(_CHUNK / period)
    around = math.ceil((local.window - 1) / _ALIGNED) * _ALIGNED if local else 0
    return chunk, -around, chunk if causal else chunk + around


@lru_cache(maxsize=64)
def _near_mask(
    pattern: Pattern, layout: _Layout, heads: range, causal: bool, queries: range, keys: range
) -> torch.Tensor:
    """What queries see of keys, by their positions, less what the far part shows: bool [heads, queries, keys]."""
    head, query, key = torch.tensor(heads)[:, None, None], torch.tensor(queries)[:, None], torch.tensor(keys)
    mask = pattern.visible(head, query, key).expand(len(heads), len(queries), len(keys))
    if layout.far:
        mask = mask & ~layout.far_sees(causal, head, query, key)
    return mask & (key <= query) if causal else mask


def _band(pattern: Pattern, layout: _Layout, heads: range, extent: _Extent) -> Iterator[_Tile]:
    """Chunks of queries, each with its window of keys; those whose windows the first key cuts short are one tile."""
    chunk, low, high = _window(layout, extent.causal)
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


def _cutter(mask: torch.Tensor) -> Callable[[range, range, int, int], Iterator[_Tile]]:
    """A function that lays queries and keys on a mask [heads, rows, columns] and gives the tile, if they see anything.

    Equal cuts share one mask, so that their tiles are alike.
    """

    @cache
    def trimmed(row: int, rows: int, column: int, columns: int):
        return _trim(mask[:, row : row + rows, column : column + columns])

    def cut(queries: range, keys: range, row: int, column: int) -> Iterator[_Tile]:
        rule = trimmed(row, len(queries), column, len(keys)) if queries and keys else None
        if rule:
            rows, columns, causal, small = rule
            yield _Tile(queries[rows], keys[columns], causal, small)

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
    columns = slice(columns.start // _ALIGNED * _ALIGNED, math.ceil(columns.stop / _ALIGNED) * _ALIGNED)
    return rows, columns, False, mask[None, :, rows, columns]


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of compact keys


def _summaries(pattern: FixedSummary, heads: range, extent: _Extent) -> Iterator[Group]:
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
        tiles = [_Tile(range(extent.num_queries), range(len(index)))]
    together = _blocks_together(pattern)  # what is masked lies inside them
    at_once = max(1, _SUMMARIES_AT_ONCE // (pattern.summary * together)) * together
    for first in range(blocks.start // at_once * at_once, blocks.stop, at_once):
        start, end = (max(block - blocks.start, 0) * pattern.summary for block in (first, first + at_once))
        picked, missing = index[start:end], absent[start:end]
        some = (tile._replace(keys=_within(tile.keys, range(start, start + len(picked)))) for tile in tiles)
        yield Group(heads, _parts(some), picked.masked_fill(missing, 0), missing if missing.any() else None)


def _within(some: range, whole: range) -> range:
    """The part of a range that lies in another, counted from its start."""
    start, stop = (min(max(end, whole.start), whole.stop) - whole.start for end in (some.start, some.stop))
    return range(start, stop)


def _blocks_together(pattern: FixedSummary) -> int:
    return max(1, min(_SUMMARY_QUERIES // pattern.block, _SUMMARY_KEYS // pattern.summary))


def _earlier_summaries(pattern: FixedSummary, blocks: range, extent: _Extent) -> Iterator[_Tile]:
    """In a group of blocks all queries see every summary before the group, and later ones some summaries inside it."""
    block, width = pattern.block, pattern.summary
    group = _blocks_together(pattern)
    stairs = torch.ones(group - 1, group - 1, dtype=torch.bool).tril()
    cut = _cutter(stairs.repeat_interleave(block, 0).repeat_interleave(width, 1)[None])

    def summaries(first: int, end: int) -> range:
        inside = range(max(first, blocks.start), min(end, blocks.stop))
        return range((inside.start - blocks.start) * width, (inside.stop - blocks.start) * width)

    for first in range(extent.first_query // block // group * group, math.ceil(extent.end_query / block), group):
        start, end = first * block, (first + group) * block
        yield _Tile(extent.queries(start, end), summaries(blocks.start, first))
        queries, keys = extent.queries(start + block, end), summaries(first, first + group - 1)
        row = queries.start + extent.first_query - start - block
        yield from cut(queries, keys, row, max(blocks.start - first, 0) * width)


def _table(pattern: Pattern, heads: range, extent: _Extent) -> list[Group]:
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


def _table_rows(pattern: Pattern, head: int, extent: _Extent) -> Iterator[_Row]:
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

"""How to compute a pattern cheaply: a few disjoint parts, each a view of the sequence and a simple rule.

Planning knows positions, lengths and a pattern's facts: no tensors of a model, no device, no kernel, and no pattern by
its class. `plan_attention` says what an executor runs (cpu.py).

    part        what it covers                                  queries of a tile   keys of a tile
    columns     a step, such as Strided(l); Full is step 1      every l-th          every l-th, or a window of those
    blocks      intervals that are the query's own block        one block           the same block
    band        windows, own blocks, summaries of those         a chunk             a window around the chunk
    summaries   summary keys in blocks other than the own       some blocks         compact: summary positions only
    sinks       the first keys, which all queries see           all after a few     the first keys
    runs        queries that all see the same keys              one run             its own; around it, compact
    picks       runs whose keys a list says                     one run             compact: those of the list
    table       any other union                                 64 queries          compact: the keys they see

A *tile* is a rectangle of queries and keys under one rule: everything, causal, or a small mask. Alike tiles at even
distances make one *part*. No two parts show the same key to the same query, so their outputs are merged by log-sum-exp.
Legend: H heads, T queries, S keys; I queries and J keys of one tile.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..modeling.attention_patterns import FAR, Full, Pattern, Union, contains
from .parts import ALIGNED, Extent, Group, Part, Tile, Tokens, aligned, mark_writes, parts_of

_CHUNK = 32  # queries of a tile in a band: a window of w keys costs w + 31
_EDGE = 256  # queries of the tile before the first whole window of a band
_SUMMARY_QUERIES, _SUMMARY_KEYS = 1024, 256  # of a group of blocks; flash kernels are fastest from 768 queries on
_SUMMARIES_AT_ONCE = 1 << 12  # keys that are picked together
MAX_MASK = 1 << 22  # elements of a mask shared by tiles; beyond it a table is cheaper
_TABLE_ROWS = 64  # queries that share one list of keys
_TABLE_KEYS = 1 << 13  # keys gathered at once


class Layout(NamedTuple):
    """A union that falls apart into views: at most one far leaf (a column, summaries or sinks), and the near ones."""

    column: Pattern | None
    summary: Pattern | None
    sink: Pattern | None
    block: Pattern | None
    local: Pattern | None

    @property
    def near(self) -> Pattern | None:
        """What the near leaves show together."""
        leaves = tuple(leaf for leaf in (self.block, self.local) if leaf)
        return Union(leaves) if len(leaves) > 1 else next(iter(leaves), None)

    def far_sees(self, causal: bool, head, query, key):
        """What the far part shows. Causal summaries leave the query's own block to the near part."""
        if self.summary is None:
            return self.column.visible(head, query, key)
        seen, block = self.summary.visible(head, query, key), self.summary.summary_keys.block
        return seen & (query // block != key // block) if causal else seen


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of the sequence itself


def column_tiles(pattern: Pattern, extent: Extent) -> Iterator[Tile]:
    """Tokens whose positions agree modulo the step attend to each other (Child et al. 2019, section 4.3), all of them
    or as the pattern has it inside a column."""
    step, inner = pattern.key_step, pattern.in_columns
    for first in range(min(step, extent.num_queries)):
        position = extent.first_query + first
        first_key = (position - extent.first_key) % step
        queries, keys = range(first, extent.num_queries, step), range(first_key, extent.num_keys, step)
        where = position // step, (extent.first_key + first_key) // step
        if inner.is_full:
            yield from _dense(queries, keys, where[0] - where[1], extent.causal)
            continue
        column = Extent(len(queries), len(keys), *where, extent.causal)
        for tile in band_tiles(inner, Layout(None, None, None, None, inner), range(1), column):
            yield tile._replace(queries=_every(queries, tile.queries), keys=_every(keys, tile.keys))


def _every(tokens: range, some: range) -> range:
    """Those of the tokens that `some` numbers."""
    return tokens[some.start : some.stop : some.step]


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


def run_groups(pattern: Pattern, heads: range, extent: Extent) -> list[Group] | None:
    """Each run of queries that see the same keys: its own tokens, and the keys around it.

    Where the pattern is an interval they are one run of keys before it. Else those keys are picked into one list, run
    after run. None if a run sees some of its own tokens only.
    """
    own, around, after, picked = [], [], [], [torch.empty(0, dtype=torch.long)]
    position, num_picked, is_interval = extent.first_query, 0, pattern.interval(0) is not None
    while position < extent.end_query:
        start, end = pattern.block_span(position)
        queries, keys = extent.queries(start, end), extent.keys(start, end)
        sees_own = pattern.visible(0, start, torch.arange(start, end))
        if bool(sees_own.all()):
            earlier = queries.start + extent.first_query - keys.start - extent.first_key
            own += _dense(queries, keys, earlier, extent.causal)
        elif bool(sees_own.any()):
            return None
        if is_interval:
            low, high = pattern.interval(start)
            around.append(Tile(queries, extent.keys(low, start)))
            after.append(Tile(queries, range(0) if extent.causal else extent.keys(end, high)))
        else:
            found = _keys_around(pattern, start, end, extent)
            around.append(Tile(queries, range(num_picked, num_picked + len(found))))
            picked.append(found)
            num_picked += len(found)
        position = end
    if is_interval:
        return [Group(heads, parts_of(own + around) + parts_of(after))]  # no part has a query twice
    return [Group(heads, parts_of(own)), Group(heads, parts_of(around), torch.cat(picked))]


def _keys_around(pattern: Pattern, start: int, end: int, extent: Extent) -> torch.Tensor:
    """The keys that the queries [start, end) see outside their run, if causal only those before it."""
    stop = min(start, extent.end_key) if extent.causal else extent.end_key
    positions = pattern.candidates(start, end, stop)
    seen = pattern.visible(0, start, positions) & ((positions < start) | (positions >= end))
    return positions[seen & (positions >= extent.first_key)] - extent.first_key


def window_of(layout: Layout, causal: bool) -> tuple[int, int, int]:
    """(chunk, low, high): queries [start, start + chunk) see no near key outside [start + low, start + high).

    The pattern repeats from chunk to chunk, so `chunk` is a multiple of its period.
    """
    repeating = layout.block or layout.summary
    period = repeating.period if repeating else 1
    chunk = period * math.ceil(_CHUNK / period)
    around = aligned(layout.local.reach) if layout.local else 0
    return chunk, -around, chunk if causal else chunk + around


@lru_cache(maxsize=64)
def _near_mask(
    pattern: Pattern, layout: Layout, heads: range, causal: bool, queries: range, keys: range
) -> torch.Tensor:
    """What queries see of keys, by their positions, less what the far part shows: bool [heads, queries, keys]."""
    head, query, key = torch.tensor(heads)[:, None, None], torch.tensor(queries)[:, None], torch.tensor(keys)
    mask = pattern.visible(head, query, key).expand(len(heads), len(queries), len(keys))
    if layout.column or layout.summary:
        mask = mask & ~layout.far_sees(causal, head, query, key)
    return mask & (key <= query) if causal else mask


def band_tiles(pattern: Pattern, layout: Layout, heads: range, extent: Extent) -> Iterator[Tile]:
    """Chunks of queries, each with its window of keys; those whose windows the first key cuts short are one tile."""
    chunk, low, high = window_of(layout, extent.causal)
    only_local = layout.block is None and layout.summary is None
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


def sees_some_sinks(layout: Layout, causal: bool) -> range:
    """The positions of queries that see some of the sinks and others near, or not at all; all later ones see each."""
    count, near = layout.sink.summary_keys.count, layout.near
    if near is None:
        return range(count - 1 if causal else 0)
    last = near.last_query(torch.arange(count))
    return range(int(last[0]) + 1 if causal else 0, int(last.max()) + 1)


def sink_tiles(layout: Layout, some: range, extent: Extent) -> Iterator[Tile]:
    """The first keys, for the queries that do not see them near: all of them after the `some` that see a few."""
    sinks = range(layout.sink.summary_keys.count)
    keys = extent.keys(sinks.start, sinks.stop)
    query, key = torch.tensor(some, dtype=torch.long)[:, None], torch.tensor(sinks)
    mask = (key <= query) if extent.causal else (key == key).expand(len(some), -1)
    if layout.near:
        mask = mask & ~layout.near.visible(0, query, key)
    queries = extent.queries(some.start, some.stop)
    yield from _cutter(mask[None])(queries, keys, queries.start + extent.first_query - some.start, extent.first_key)
    yield Tile(extent.queries(some.stop, extent.end_query), keys)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of compact keys


def summary_groups(pattern: Pattern, heads: range, extent: Extent) -> Iterator[Group]:
    """Queries and the summary positions of all blocks, or if causal of the blocks before their own."""
    block, _, count = pattern.summary_keys
    end = (extent.end_query - 1) // block if extent.causal else math.ceil(extent.end_key / block)
    blocks = range(extent.first_key // block, min(end, math.ceil(extent.end_key / block)))
    differing = heads if pattern.head_period > 1 else heads[:1]
    columns = torch.tensor([pattern.for_head(head).summary_keys.first for head in differing])
    starts = torch.tensor(blocks, dtype=torch.long) * block - extent.first_key
    index = (starts[:, None] + torch.arange(count)).view(-1, 1) + columns
    if pattern.head_period == 1:
        index = index[:, 0]
    absent = (index < 0) | (index >= extent.num_keys)
    if extent.causal:
        tiles = list(_earlier_summaries(block, count, blocks, extent))
    else:
        tiles = [Tile(range(extent.num_queries), range(len(index)))]
    together = _blocks_together(block, count)  # what is masked lies inside them
    at_once = max(1, _SUMMARIES_AT_ONCE // (count * together)) * together
    for first in range(blocks.start // at_once * at_once, blocks.stop, at_once):
        start, end = (max(number - blocks.start, 0) * count for number in (first, first + at_once))
        picked, missing = index[start:end], absent[start:end]
        some = (tile._replace(keys=_within(tile.keys, range(start, start + len(picked)))) for tile in tiles)
        yield Group(heads, parts_of(some), picked.masked_fill(missing, 0), missing if missing.any() else None)


def _within(some: range, whole: range) -> range:
    """The part of a range that lies in another, counted from its start."""
    start, stop = (min(max(end, whole.start), whole.stop) - whole.start for end in (some.start, some.stop))
    return range(start, stop)


def _blocks_together(block: int, count: int) -> int:
    return max(1, min(_SUMMARY_QUERIES // block, _SUMMARY_KEYS // count))


def _earlier_summaries(block: int, width: int, blocks: range, extent: Extent) -> Iterator[Tile]:
    """In a group of blocks all queries see every summary before the group, and later ones some summaries inside it."""
    group = _blocks_together(block, width)
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


def picked_groups(leaves: list[Pattern], heads: range, extent: Extent) -> list[Group] | None:
    """Runs of queries with lists of keys (random blocks), and at most one interval of the same runs around them.

    None if it is no such union, or if causality cuts through a run that is listed.
    """
    listed = [leaf for leaf in leaves if leaf.for_head(0).picks(torch.zeros(1, dtype=torch.long)) is not None]
    near = [leaf for leaf in leaves if leaf not in listed]
    spans = {leaf.block_span(extent.first_query) for leaf in leaves}
    if not listed or len(near) > 1 or len(spans) > 1 or None in spans:
        return None
    start, end = spans.pop()
    if near and (near[0].interval(0) is None or near[0].key_step > 1 or near[0].period != end - start):
        return None
    if any(leaf.block_span(end) != (end, 2 * end - start) for leaf in leaves):
        return None
    starts = torch.arange(start, extent.end_query, end - start)
    of_heads = [_listed_keys(listed, near, head, starts) for head in heads]
    longest = max(keys.shape[1] for keys in of_heads)
    keys = torch.stack([F.pad(x, (0, longest - x.shape[1]), value=-1) for x in of_heads], dim=-1)  # [R, J, heads]
    if extent.causal:
        later = keys >= starts[:, None, None]
        if bool((later & (keys < starts[:, None, None] + end - start)).any()):
            return None
        keys = keys.masked_fill(later, -1)
    groups = run_groups(near[0], heads, extent) if near else []
    at_once = max(1, _TABLE_KEYS // keys.shape[1])
    for first in range(0, len(starts), at_once):
        some, runs = keys[first : first + at_once], starts[first : first + at_once].tolist()
        absent = ((some < extent.first_key) | (some >= extent.end_key)).flatten(0, 1)
        if bool(absent.all()):
            continue
        width = some.shape[1]
        tiles = (
            Tile(extent.queries(run, run + end - start), range(i * width, (i + 1) * width))
            for i, run in enumerate(runs)
        )
        index = (some.flatten(0, 1) - extent.first_key).masked_fill(absent, 0)
        groups.append(Group(heads, parts_of(tiles), index, absent if bool(absent.any()) else None))
    return groups


def _listed_keys(listed: list[Pattern], near: list[Pattern], head: int, starts: torch.Tensor) -> torch.Tensor:
    """[R, J] the keys that the lists of a head have for the runs [R]; -1 where another part shows them already."""
    found, before = [], [leaf.for_head(head) for leaf in near]
    for leaf in (leaf.for_head(head) for leaf in listed):
        keys = leaf.picks(starts)
        for other in before:
            keys = keys.masked_fill((keys >= 0) & other.visible(0, starts[:, None], keys), -1)
        found.append(keys)
        before.append(leaf)
    return torch.cat(found, dim=1)


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
        first, end = extent.first_query + queries.start, extent.first_query + queries.stop
        query = torch.arange(first, end)[:, None]
        key = pattern.candidates(first, end, min(end, extent.end_key) if extent.causal else extent.end_key)
        key = key[key >= extent.first_key]
        mask = pattern.visible(head, query, key)
        if extent.causal:
            mask = mask & (key <= query)
        seen = mask.any(0).nonzero()[:, 0]
        spare = -len(seen) % _TABLE_ROWS  # rounding up makes rows alike
        yield _Row(queries, F.pad(key[seen] - extent.first_key, (0, spare)), F.pad(mask[:, seen], (0, spare)))


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


@dataclass(frozen=True, eq=False)
class Plan:
    """What an executor runs, in order.

    `complete`: each query of every head lies in a part that `writes`; `complete_keys`: each key in one that
    `writes_keys`, or among the `fresh_keys` of one.
    """

    groups: tuple[Group, ...]
    complete: bool
    complete_keys: bool


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

    Query i stands at position `first_query + i`, key j at `first_key + j`. Cached, so that layers share one
    plan.
    Raises ValueError if the pattern cannot be dealt out to `num_heads` heads.
    """
    pattern.check_heads(num_heads)
    extent = Extent(num_queries, num_keys, first_query, first_key, causal)
    groups = _groups(pattern, range(num_heads), extent)
    groups, complete, complete_keys = mark_writes(groups, num_queries, num_keys, num_heads)
    return Plan(tuple(groups), complete, complete_keys)


# ---------------------------------------------------------------------------------------------------------------------
# From a pattern to groups of parts


def _groups(pattern: Pattern, heads: range, extent: Extent) -> Iterator[Group]:
    """The groups of all heads, those that are planned together after each other."""
    groups = _view_groups(pattern, heads, extent)
    if groups is not None:
        yield from groups
    elif pattern.head_period == 1:
        yield from table_groups(pattern, heads, extent)
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


def _view_groups(pattern: Pattern, heads: range, extent: Extent) -> list[Group] | None:
    """The groups of a pattern made of views, or None if some leaf has none."""
    leaves = _simplify(pattern.parts, extent)
    if (groups := picked_groups(leaves, heads, extent)) is not None:
        return groups
    if len(leaves) == 1 and _kind(leaves[0]) is None and pattern.head_period == 1:
        return _groups_of_one(leaves[0], heads, extent)
    layout = _layout(leaves)
    if layout is None:
        return None
    groups = []
    if layout.column:
        groups.append(Group(heads, parts_of(column_tiles(layout.column, extent))))
    own_summaries = extent.causal and layout.summary
    is_far = layout.column or layout.summary
    if layout.block and not layout.local and (own_summaries or not is_far):
        groups.append(Group(heads, parts_of(block_tiles(layout.block.period, extent))))
    elif layout.block or layout.local or own_summaries:
        mask_heads = heads if pattern.head_period > 1 else heads[:1]
        chunk, low, high = window_of(layout, extent.causal)
        if len(mask_heads) * chunk * (high - low) > MAX_MASK:
            return None
        banded = layout.near if layout.sink else pattern
        groups.append(Group(heads, parts_of(band_tiles(banded, layout, mask_heads, extent))))
    if layout.summary:
        groups += summary_groups(layout.summary, heads, extent)
    if layout.sink:
        some = sees_some_sinks(layout, extent.causal)
        if len(some) * layout.sink.summary_keys.count > MAX_MASK:
            return None
        groups.append(Group(heads, parts_of(sink_tiles(layout, some, extent))))
    return groups


def _groups_of_one(leaf: Pattern, heads: range, extent: Extent) -> list[Group] | None:
    """Those of a pattern that is a view by itself, but no part of a union of views."""
    if leaf.key_step > 1 and leaf.in_columns is not None:
        return [Group(heads, parts_of(column_tiles(leaf, extent)))]
    return None if leaf.block_span(extent.first_query) is None else run_groups(leaf, heads, extent)


def layout_of(pattern: Pattern, extent: Extent) -> Layout | None:
    """How a pattern falls apart into views, or None if it does not."""
    return _layout(_simplify(pattern.parts, extent))


def _layout(leaves: list[Pattern]) -> Layout | None:
    """How a union falls apart into views, or None if it does not."""
    kinds = {_kind(leaf): leaf for leaf in leaves}
    if None in kinds or len(kinds) < len(leaves):
        return None
    layout = Layout(*(kinds.get(kind) for kind in Layout._fields))
    if sum(far is not None for far in (layout.column, layout.summary, layout.sink)) > 1:
        return None
    if layout.summary and layout.block and layout.block.period != layout.summary.period:
        return None
    return layout


def _kind(leaf: Pattern) -> str | None:
    """Which field of a Layout a leaf is for, by its facts; None if it is for none."""
    if leaf.summary_keys is not None:
        return "summary" if leaf.summary_keys.block < FAR else "sink"
    if leaf.in_columns is not None and leaf.in_columns.is_full:
        return "column"
    if leaf.interval(0) is None or leaf.key_step > 1:
        return None
    if leaf.interval(0) == leaf.block_span(0):
        return "block"
    return "local" if leaf.period == 1 else None


def _simplify(leaves: Iterable[Pattern], extent: Extent) -> list[Pattern]:
    """The leaves of a union without those that another one contains; what shows everything becomes Full."""
    leaves = dict.fromkeys(Full() if _is_full(leaf, extent) else leaf for leaf in leaves)
    return [leaf for leaf in leaves if not any(other != leaf and contains(other, leaf) for other in leaves)]


def _is_full(leaf: Pattern, extent: Extent) -> bool:
    if _kind(leaf) == "sink":
        return leaf.summary_keys.count >= extent.end_key
    return leaf.is_full or (_kind(leaf) == "local" and leaf.reach >= extent.reach)

"""What the Triton kernels walk over: patterns as intervals of keys, cut into tiles. Plain tensors, no Triton, no N x N.

Nearly every pattern shows each query an *interval* of some list of keys, so that no mask is ever stored:

    keys                          patterns                               query i sees
    the sequence                  Full, Local, FixedBlock, Block1D       one interval around itself ("near")
    its column of every l-th      Strided(l), a dilated Local            a beginning of the column, or an interval of it
    the summary positions         FixedSummary                           a beginning of the list
    the first tokens              an interval that never moves           a beginning of the list, in unions

In a union the last three ("far") leave out what the near interval shows, which leaves one beginning and, without
causality, one end. A `Pass` is one launch over one or two such sources; passes are merged by log-sum-exp. What is no
union of these (tables.py) becomes a table of granules.

Legend: V variants (heads that differ), C columns, R rows (queries) and J keys of a column, T queries, S keys.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...modeling.attention_patterns import FAR, Pattern
from ..parts import Extent

FIELDS = 16  # of an item, as in kernels.py
_SPLIT_TILES = 16  # tiles of queries that one program takes where the work of key tiles is uneven
_UNEVEN = 4  # longest over mean


@dataclass(frozen=True, eq=False)
class Source:
    """Query i of variant v sees the indices [low[v, i], high[v, i]) of the keys: int32 [V, T], neither ever decreasing.

    `picked` [V, J] lists the tokens of the indices; None: the indices are those of the sequence or of the column.
    """

    low: Tensor
    high: Tensor
    picked: Tensor | None = None
    counts: tuple[int, ...] = ()  # of picked tokens, for each variant

    @property
    def sees_nothing(self) -> bool:
        return bool((self.low >= self.high).all())


@dataclass(frozen=True, eq=False)
class Pass:
    """One launch: the heads `first + n * period`, for each `first` of `heads`, over one or two sources.

    `step` > 1: rows are columns of every `step`-th token. The second source is always a picked one.
    """

    extent: Extent
    heads: tuple[int, ...]
    period: int
    step: int
    sources: tuple[Source, ...]


@lru_cache(maxsize=64)
def layout(pattern: Pattern, extent: Extent, num_heads: int) -> tuple[tuple[Pass, ...] | None, ...]:
    """For each set of heads that is launched together its passes; heads that need a table are left out.

    The first pass of a set reaches every query of its heads.
    """
    alike: dict[tuple, list[tuple[int, list[_Single]]]] = {}
    for head in range(min(pattern.head_period, num_heads)):
        singles = _single_passes(pattern.for_head(head), extent)
        if singles is not None:
            shape = tuple((single.step, *(source.picked is None for source in single.sources)) for single in singles)
            alike.setdefault(shape, []).append((head, singles))
    return tuple(_stack(variants, extent, pattern.head_period) for variants in alike.values())


def table_heads(pattern: Pattern, num_heads: int) -> list[int]:
    """The heads, up to the pattern's period, that are no union of intervals."""
    return [h for h in range(min(pattern.head_period, num_heads)) if _leaves(pattern.for_head(h)) is None]


# ---------------------------------------------------------------------------------------------------------------------
# From a pattern to intervals


class _Single(NamedTuple):
    """A pass of one head."""

    step: int
    sources: tuple[Source, ...]


def _leaves(pattern: Pattern) -> tuple[list[Pattern], Pattern | None] | None:
    """The near leaves of a union, and the far one; None if it is no such union."""
    leaves = pattern.parts
    near = [leaf for leaf in leaves if leaf.interval(0) is not None and leaf.key_step == 1]
    far = [leaf for leaf in leaves if leaf.summary_keys is not None or leaf.key_step > 1]
    if any(leaf.is_full for leaf in near):
        return near, None
    if len(leaves) > 1:
        far += [leaf for leaf in near if _leads(leaf)]
        near = [leaf for leaf in near if not _leads(leaf)]
        if not all(map(_holds_own, near)):  # two that do not meet are no interval together
            return None
    if len(far) > 1 or len(near) + len(far) < len(leaves):
        return None
    return near, far[0] if far else None


def _leads(leaf: Pattern) -> bool:
    """Does a pattern with an interval show all queries the same first tokens?"""
    return leaf.interval(0) == leaf.interval(FAR) and leaf.interval(0)[0] <= 0


@lru_cache(maxsize=256)
def _holds_own(leaf: Pattern) -> bool:
    """Does the interval of every query hold the query's own position?"""
    if leaf.period is None:  # not known
        return False
    query = torch.arange(leaf.period)
    low, high = leaf.interval(query)
    return bool(((low <= query) & (query < high)).all())


def _single_passes(pattern: Pattern, extent: Extent) -> list[_Single] | None:
    leaves = _leaves(pattern)
    if leaves is None:
        return None
    near, far = leaves
    before, after = _near(near, extent)  # far keys are those before `before` and from `after` on
    parts: list[_Single] = []
    if near:
        parts.append(_Single(1, (Source(before, after),)))
    if far is None:
        return parts
    far_parts = [_far(far, extent, before, after, left=True)] if near else [_far_alone(far, extent)]
    if near and not extent.causal:
        far_parts.append(_far(far, extent, before, after, left=False))
    far_parts = [part for part in far_parts if not part.sources[0].sees_nothing]
    if near and far_parts and far_parts[0].step == 1:  # summaries share the softmax of the near keys
        first = far_parts.pop(0)
        parts = [_Single(1, parts[0].sources + first.sources)]
    return parts + far_parts or [_far_alone(far, extent)]


def _near(leaves: list[Pattern], extent: Extent) -> tuple[Tensor, Tensor]:
    """The keys [low, high) [T] that the near leaves show; without any, what causality shows."""
    query = torch.arange(extent.num_queries) + extent.distance  # in indices of keys
    low = torch.full_like(query, extent.num_keys) if leaves else torch.zeros_like(query)
    high = torch.zeros_like(query) if leaves else torch.full_like(query, extent.num_keys)
    for leaf in leaves:
        leaf_low, leaf_high = (end - extent.first_key for end in leaf.interval(query + extent.first_key))
        low, high = torch.minimum(low, leaf_low), torch.maximum(high, leaf_high)
    if extent.causal:
        high = torch.minimum(high, query + 1)
    low = low.clamp(0, extent.num_keys)
    return low, torch.maximum(high.clamp(0, extent.num_keys), low)


def _far_alone(far: Pattern, extent: Extent) -> _Single:
    _, high = _near([], extent)
    return _far(far, extent, high, high, left=True)


def _far(far: Pattern, extent: Extent, before: Tensor, after: Tensor, left: bool) -> _Single:
    """The far keys before the key `before` [T]; or (not left) those from the key `after` on."""
    end = torch.full_like(before, extent.num_keys)
    low, high = (torch.zeros_like(before), before) if left else (after, end)
    if far.key_step > 1:
        query = torch.arange(extent.num_queries)
        far_low, far_high = (end - extent.first_key for end in far.interval(query + extent.first_query))
        low, high = torch.maximum(low, far_low), torch.minimum(high, far_high)
        first = (query + extent.distance) % far.key_step  # key of the query's column
        low, high = (-(-(x - first).clamp(min=0) // far.key_step) for x in (low, high))
        return _Single(far.key_step, (Source(low, torch.maximum(low, high)),))
    picked = _summary_tokens(far, extent)
    bounds = (_summaries_before(far, x, extent) for x in (low, high))
    return _Single(1, (Source(*bounds, picked, (len(picked),)),))


def _summary_tokens(far: Pattern, extent: Extent) -> Tensor:
    key = torch.arange(extent.num_keys)
    return key[far.visible(0, key, key + extent.first_key)]


def _summaries_before(far: Pattern, key: Tensor, extent: Extent) -> Tensor:
    """How many of the summary positions at hand, or of the first tokens, stand before `key`."""
    if far.summary_keys is None:
        block, first, count = FAR, 0, far.interval(0)[1]
    else:
        block, first, count = far.summary_keys

    def counted(position):
        return position // block * count + (position % block - first).clamp(0, count)

    return counted(key + extent.first_key) - counted(torch.tensor(extent.first_key))


def _stack(variants: list[tuple[int, list[_Single]]], extent: Extent, period: int) -> tuple[Pass, ...]:
    """Passes of alike heads as passes over all of them."""
    heads = tuple(head for head, _ in variants)
    passes = []
    for alike in zip(*(singles for _, singles in variants)):
        sources = tuple(_stack_sources(column) for column in zip(*(single.sources for single in alike)))
        passes.append(Pass(extent, heads, period, alike[0].step, sources))
    return tuple(passes)


def _stack_sources(sources: tuple[Source, ...]) -> Source:
    low, high = (torch.stack([getattr(source, name) for source in sources]).int() for name in ("low", "high"))
    if sources[0].picked is None:
        return Source(low, high)
    picked = torch.nn.utils.rnn.pad_sequence([source.picked for source in sources], batch_first=True)
    return Source(low, high, picked.int(), tuple(len(source.picked) for source in sources))


# ---------------------------------------------------------------------------------------------------------------------
# Items: which tiles a program walks over, the longest walk first


class _Columns(NamedTuple):
    """The columns of a pass [C]: first query, first key, number of queries, number of keys."""

    first_query: Tensor
    first_key: Tensor
    queries: Tensor
    keys: Tensor


def _columns(launch: Pass) -> _Columns:
    extent, step = launch.extent, launch.step
    first_query = torch.arange(min(step, extent.num_queries))
    first_key = (first_query + extent.distance) % step
    queries, keys = (
        ((number - first).clamp(min=0) + step - 1) // step
        for number, first in ((extent.num_queries, first_query), (extent.num_keys, first_key))
    )
    return _Columns(first_query, first_key, queries, keys)


def _by_column(bound: Tensor, launch: Pass, columns: _Columns, rows: int, beyond: int) -> Tensor:
    """From [V, T] to [V, C, rows]; `beyond` where a column has no such row."""
    token = columns.first_query[:, None] + torch.arange(rows) * launch.step
    inside = token < launch.extent.num_queries
    return torch.where(inside, bound.long()[:, token.clamp(max=launch.extent.num_queries - 1)], beyond)


def _walk(start: Tensor, full_start: Tensor, full_end: Tensor, end: Tensor, tile: int) -> tuple[Tensor, ...]:
    """(start, left, full, right): tiles from `start` that cover [start, end), the full ones inside the full range."""
    length = (end - start).clamp(min=0)
    tiles = -(-length // tile)
    left = torch.minimum(-(-(full_start - start).clamp(min=0) // tile), tiles)
    full = ((torch.minimum(full_end, end) - start - left * tile).clamp(min=0)) // tile
    return start, left, full, tiles - left - full


def row_items(launch: Pass, block_m: int, block_n: int, keep_idle: bool) -> Tensor:
    """Items [n, FIELDS] of a kernel whose rows are queries.

    Fields: head, variant, first query, first key, first row, rows; then for each source its number of indices, start,
    left, full, right. Items without work are left out unless `keep_idle`.
    """
    columns = _columns(launch)
    tiles = max(1, -(-int(columns.queries.max()) // block_m))
    variants, width = len(launch.heads), len(columns.queries)
    items = torch.zeros(variants, width, tiles, FIELDS, dtype=torch.long)
    first_rows = torch.arange(tiles) * block_m
    for field, value in enumerate(_identity(launch, columns, first_rows, columns.queries[None, :, None])):
        items[..., field] = value
    for which, source in enumerate(launch.sources):
        beyond = 1 << 30
        low = _by_column(source.low, launch, columns, tiles * block_m, beyond).unflatten(2, (tiles, block_m))
        high = _by_column(source.high, launch, columns, tiles * block_m, -1).unflatten(2, (tiles, block_m))
        idle, absent = (low >= high) & (high >= 0), high < 0
        start = low.masked_fill(idle | absent, beyond).amin(3)
        end = high.masked_fill(idle | absent, 0).amax(3)
        full_start = low.masked_fill(absent, 0).masked_fill(idle, beyond).amax(3)
        full_end = high.masked_fill(absent, beyond).masked_fill(idle, 0).amin(3)
        number = torch.tensor(source.counts)[:, None, None] if source.counts else columns.keys[None, :, None]
        walk = _walk(start.clamp(max=end), full_start, full_end, end, block_n)
        for field, value in enumerate((number, *walk)):
            items[..., 6 + 5 * which + field] = value
    items = items.view(-1, FIELDS)
    items = items[items[:, 4] < items[:, 5]]  # shorter columns have fewer tiles
    return _longest_first(items, items[:, [8, 9, 10, 13, 14, 15]].sum(1), keep_idle)


def _identity(launch: Pass, columns: _Columns, first: Tensor, number: Tensor) -> tuple:
    heads = torch.tensor(launch.heads)[:, None, None]
    variants = torch.arange(len(launch.heads))[:, None, None]
    return heads, variants, columns.first_query[None, :, None], columns.first_key[None, :, None], first, number


def _longest_first(items: Tensor, cost: Tensor, keep_idle: bool) -> Tensor:
    if not keep_idle:
        items, cost = items[cost > 0], cost[cost > 0]
    return items[cost.argsort(descending=True, stable=True)].int()


class KeyItems(NamedTuple):
    """Items [n, FIELDS] of the kernel whose rows are keys; and if tiles of keys were split, which items make up each.

    Fields: head, variant, first query, first key, first place, indices; then number of queries, start, left, full,
    right. Fields of `sums` [tiles, FIELDS]: the same six; then first item and number of items.
    """

    items: Tensor
    sums: Tensor | None


def key_items(
    launch: Pass, source: Source, block_n: int, block_m: int, keep_idle: bool, split: bool = True
) -> KeyItems:
    """Where `split`, tiles of keys that far more queries see than others are shared among several programs."""
    columns = _columns(launch)
    rows = max(1, int(columns.queries.max()))
    if source.counts:
        number = torch.tensor(source.counts)[:, None, None]
    else:
        number = columns.keys[None, :, None].expand(len(launch.heads), -1, -1)
    tiles = max(1, -(-int(number.max()) // block_n))
    items = torch.zeros(len(launch.heads), len(columns.queries), tiles, FIELDS, dtype=torch.long)
    first_places = torch.arange(tiles) * block_n
    for field, value in enumerate(_identity(launch, columns, first_places, number)):
        items[..., field] = value
    low, high = (_by_column(x, launch, columns, rows, 1 << 30) for x in (source.low, source.high))
    begin = first_places.expand(*low.shape[:2], -1).contiguous()
    end = torch.minimum(begin + block_n, number)
    start = torch.searchsorted(high, begin, right=True)  # the first query that sees beyond `begin`
    stop = torch.searchsorted(low, end)
    full_start = torch.searchsorted(high, end)
    full_stop = torch.searchsorted(low, begin, right=True)
    queries = columns.queries[None, :, None]
    walk = _walk(*(torch.minimum(x, queries) for x in (start, full_start, full_stop, stop)), block_m)
    for field, value in enumerate((queries, *walk)):
        items[..., 6 + field] = value
    items = items.view(-1, FIELDS)
    items = items[items[:, 4] < items[:, 5]]
    cost = items[:, 8:11].sum(1)
    working = cost[cost > 0]
    if split and len(working) and int(cost.max()) > max(_SPLIT_TILES, _UNEVEN * float(working.float().mean())):
        return _split(items[cost > 0], block_m)
    return KeyItems(_longest_first(items, cost, keep_idle), None)


def _split(items: Tensor, block_m: int) -> KeyItems:
    """Each item in pieces of at most _SPLIT_TILES tiles, the pieces of an item one after the other."""
    pieces = -(-items[:, 8:11].sum(1) // _SPLIT_TILES)
    first = pieces.cumsum(0) - pieces
    split = items.repeat_interleave(pieces, 0)
    begin = (torch.arange(len(split)) - first.repeat_interleave(pieces)) * _SPLIT_TILES
    start, left, full, right = split[:, 7:11].unbind(1)
    edges = torch.stack([0 * left, left, left + full, left + full + right])
    kept = torch.minimum(torch.maximum(edges, begin), begin + _SPLIT_TILES).diff(dim=0)
    split[:, 7] = start + begin * block_m
    split[:, 8:11] = kept.T
    sums = items.clone()
    sums[:, 6], sums[:, 7], sums[:, 8:] = first, pieces, 0
    return KeyItems(split.int(), sums.int())

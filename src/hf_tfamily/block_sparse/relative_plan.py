"""Which distances the parts of a plan (plan.py) meet, and how scores by distance become scores by key.

Where queries and keys lie evenly, row i of the scores by distance holds those for its keys one column later than row
i - 1 does, so that a view with another stride has them by key (`EvenPart`): a window of w keys meets w distances, a
column of every l-th token one in l. Elsewhere each tile has a list of the distances it meets, and each score is looked
up there (`ListedPart`).

Legend: H heads, A tiles of a part, I queries and J keys of a tile, U distances that it meets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..modeling.attention_patterns import FAR, Pattern
from .parts import Group, Part, Tokens, aligned, mark_writes
from .plan import plan_attention

_ROWS = 256  # queries of a tile without a mask


@dataclass(frozen=True, eq=False)
class EvenPart:
    """A part whose scores by distance, [I, columns] in descending order, become scores by key [I, J] as a view that
    begins at entry I - 1 and whose rows are columns - 1 entries apart.

    Attributes:
        part: as planned.
        columns: I + J - 1.
        first: the first column that is met.
        distances: [U] on the CPU, those of the columns from `first` on, as far as they are met.
        holes: columns among these that nobody sees.
        mask: bool [A or 1, H or 1, I, J], True where a query sees a key; None if that is a matter of columns alone.
    """

    part: Part
    columns: int
    first: int
    distances: Tensor
    holes: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class ListedPart:
    """A part whose tiles have lists of distances.

    Attributes:
        part: as planned, or a piece of it.
        distances: [A or 1, H or 1, U] on the CPU.
        shift: [A, H or 1, 1], to be added to the distances; tiles and heads that differ in no more share a list.
        column: [A or 1, H or 1, I, J], where in its tile's list the distance of a query and a key is.
        mask: bool [A or 1, H or 1, I, J], True where a query sees a key; None if everywhere.
    """

    part: Part
    distances: Tensor
    shift: Tensor
    column: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class RelativeGroup:
    """Parts over the same heads and keys, as attention_parts.Group."""

    keys: Group
    parts: tuple[EvenPart | ListedPart, ...]


@dataclass(frozen=True, eq=False)
class RelativePlan:
    """What an executor runs, as attention_plan.Plan."""

    groups: tuple[RelativeGroup, ...]
    complete: bool
    complete_keys: bool


@lru_cache(maxsize=64)
def plan_relative_attention(
    pattern: Pattern, num_queries: int, num_keys: int, *, num_heads: int, first_query: int = 0, first_key: int = 0
) -> RelativePlan:
    """The plan of causal attention, with the distances that its parts meet. Arguments as for plan_attention."""
    where = {"num_heads": num_heads, "causal": True, "first_query": first_query, "first_key": first_key}
    plan = plan_attention(pattern, num_queries, num_keys, **where)
    cut = (
        replace(group, parts=tuple(in_rows(group) if group.index is None else _by_phase(group, pattern, first_query)))
        for group in plan.groups
    )
    groups, complete, complete_keys = mark_writes(cut, num_queries, num_keys, num_heads)
    relative = (
        RelativeGroup(group, tuple(_relative(part, group, num_heads, first_query, first_key) for part in group.parts))
        for group in groups
    )
    return RelativePlan(tuple(relative), complete, complete_keys)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _relative(part: Part, group: Group, num_heads: int, first_query: int, first_key: int) -> EvenPart | ListedPart:
    if part.mask is not None and part.mask.shape[1] > 1:
        part = replace(part, mask=_spread(part.mask, group, num_heads))
    queries, keys = part.queries, part.keys
    if group.index is None and queries.stride == keys.stride and (part.tiles == 1 or queries.step == keys.step):
        return _even(part, first_query + queries.start - first_key - keys.start)
    first_alone = keys.step == 0 and len(_seen(part)) == 1  # the other tiles' distances are so many steps larger
    tiles = 1 if first_alone else part.tiles
    key_indices = keys.indices(tiles)[:, None]  # [A, 1, J]
    absent = torch.zeros(1, 1, 1, dtype=torch.bool)
    if group.absent is not None:
        absent = _lookup(group.absent, key_indices, group, num_heads)
    if group.index is not None:
        key_indices = _lookup(group.index, key_indices, group, num_heads)
    query_indices = queries.indices(tiles)[:, None, :, None]
    listed = _listed(part, first_query + query_indices - first_key - key_indices[:, :, None], absent[:, :, None])
    steps = queries.step * torch.arange(part.tiles // tiles)
    return replace(listed, shift=listed.shift + steps[:, None, None])


def _even(part: Part, distance: int) -> EvenPart:
    """`distance` is from the first query of a tile to its first key."""
    num_queries, num_keys = part.queries.count, part.keys.count
    columns = num_queries + num_keys - 1
    column = num_queries - 1 - torch.arange(num_queries)[:, None] + torch.arange(num_keys)
    seen = _seen(part)
    met = torch.zeros(columns, dtype=torch.bool)
    met[column[seen.any(0).any(0)]] = True
    first, last = int(met.nonzero()[0]), int(met.nonzero()[-1])
    met_columns = torch.arange(first, min(first + aligned(last + 1 - first), columns))
    by_column = seen.shape[:2] == (1, 1) and torch.equal(seen[0, 0], met[column])
    filled = torch.where(met[met_columns], met_columns, first).cummax(0).values  # a hole repeats the one before it
    return EvenPart(
        part,
        columns,
        first,
        distances=distance + part.queries.stride * (num_queries - 1 - filled),
        holes=met_columns[~met[met_columns]],
        mask=None if by_column else seen,
    )


def _listed(part: Part, distances: Tensor, absent: Tensor) -> ListedPart:
    """distances: [A, H or 1, I, J]; absent: bool, broadcastable to it, keys that are not there."""
    tiles, heads = distances.shape[:2]
    seen = _seen(part)
    wanted = (seen & ~absent).expand(tiles, -1, -1, -1)
    wanted = wanted.any(1, keepdim=True) if heads == 1 else wanted.expand(-1, heads, -1, -1)
    shift = distances.flatten(2).amin(-1, keepdim=True)
    from_shift = (distances - shift[..., None]).flatten(0, 1)
    lists, columns = zip(*(_list(*tile) for tile in zip(from_shift, wanted.flatten(0, 1))))
    if _alike(lists) and _alike(columns):
        lists, column = lists[0][None, None], columns[0][None, None]
    else:
        longest = max(map(len, lists))
        lists = torch.stack([torch.cat([met, met[:1].expand(longest - len(met))]) for met in lists])
        lists, column = (x.unflatten(0, (tiles, heads)) for x in (lists, torch.stack(columns)))
    return ListedPart(part, lists, shift, column, mask=seen if part.causal or part.mask is not None else None)


def _alike(tensors: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors)


def _list(distances: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The distances [U] that are met among [I, J], and for each of [I, J] which it is; any where nothing is seen."""
    some = distances[seen][0] if bool(seen.any()) else 0
    return torch.where(seen, distances, some).unique(return_inverse=True)


def _seen(part: Part) -> Tensor:
    """bool [A or 1, heads or 1, I, J]"""
    if part.mask is not None:
        return part.mask
    seen = torch.ones(1, 1, part.queries.count, part.keys.count, dtype=torch.bool)
    return seen.tril() if part.causal else seen


def _lookup(values: Tensor, indices: Tensor, group: Group, num_heads: int) -> Tensor:
    """values [keys] or [keys, heads of the group] at indices [A, 1, J]: [A, 1 or H, J]."""
    if values.dim() == 1:
        return values[indices]
    return _spread(values[indices[:, 0]].movedim(2, 1), group, num_heads)


def _spread(by_head: Tensor, group: Group, num_heads: int) -> Tensor:
    """[A, heads of the group, ...] -> [A, H, ...]; heads of other groups repeat the first."""
    spread = by_head[:, :1].repeat(1, num_heads, *[1] * (by_head.dim() - 2))
    spread[:, group.heads.start : group.heads.stop : group.heads.step] = by_head
    return spread


def in_rows(group: Group) -> Iterator[Part]:
    """Parts whose large tiles are cut into rows of queries; under causality each row has its earlier keys apart."""
    for part in group.parts:
        if part.mask is not None or part.queries.count <= _ROWS:
            yield part
            continue
        for start in range(0, part.queries.count, _ROWS):
            queries = _some(part.queries, start, min(_ROWS, part.queries.count - start))
            if not part.causal:
                yield replace(part, queries=queries)
                continue
            if start:
                yield replace(part, queries=queries, keys=_some(part.keys, 0, start), causal=False)
            own = _some(part.keys, start, queries.count)
            yield replace(part, queries=queries, keys=own)


def _some(tokens: Tokens, first: int, count: int) -> Tokens:
    return replace(tokens, start=tokens.start + first * tokens.stride, count=count)


# ---------------------------------------------------------------------------------------------------------------------
# Summaries


def _by_phase(group: Group, pattern: Pattern, first_query: int) -> Iterator[Part]:
    """Parts with summary keys, whose queries are cut into one tile for each position in a block.

    Queries at one position of their blocks are whole blocks away from each other, as summaries are: together they meet
    few distances.
    """
    block = _summary_block(pattern.for_head(group.heads[0]))
    for part in group.parts:
        if block is None or part.tiles > 1 or part.queries.stride > 1:
            yield part
            continue
        head = min(-(first_query + part.queries.start) % block, part.queries.count)
        whole = (part.queries.count - head) // block
        tail = head + whole * block
        if head:
            yield _phases(part, 0, head, 1)
        if whole:
            yield _phases(part, head, block, whole)
        if tail < part.queries.count:
            yield _phases(part, tail, part.queries.count - tail, 1)


def _phases(part: Part, first: int, tiles: int, count: int) -> Part:
    """The queries from `first` on, every `tiles`-th of them a tile; a stair of a mask is as deep as a block."""
    mask = _seen(part) if part.causal or part.mask is not None else None  # cut queries are no triangle any more
    if mask is not None:
        rows = first + torch.arange(tiles)[:, None] + tiles * torch.arange(count)
        mask = mask[0][:, rows].transpose(0, 1)  # [tiles, heads or 1, count, J]
        mask = mask[:1] if bool((mask == mask[:1]).all()) else mask
    queries = Tokens(part.queries.start + first, count, tiles, 1)
    return replace(part, tiles=tiles, queries=queries, keys=replace(part.keys, step=0), causal=False, mask=mask)


def _summary_block(pattern: Pattern) -> int | None:
    blocks = {part.summary_keys.block for part in pattern.parts if part.summary_keys is not None} - {FAR}
    return blocks.pop() if len(blocks) == 1 else None

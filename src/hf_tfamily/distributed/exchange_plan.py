"""Who must send what to whom, so that each rank attends from its slice of the sequence: arithmetic, no communication.

Every rank computes the same plan from a pattern's facts. Each group of key heads whose queries follow the same patterns
takes the cheaper of two routes:

    keys      a rank receives exactly the keys outside its slice that some query of its own sees
    columns   for Strided: whole columns (residue classes of positions) are dealt out, so that queries, keys and values
              go to the rank that has their column, and outputs with their log-sum-exp come back; beside it the window
              of a Union([Local, Strided]) takes the first route

Legend: N positions of a row, R ranks, H heads, Hk key heads, D head dim of queries and keys, Dv of values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_sparse.parts import Extent
from ..block_sparse.plan import layout_of
from ..modeling.attention_patterns import Pattern, PerHead

_ROWS = 64  # queries that are asked together which keys they see


class Slices(NamedTuple):
    """Contiguous slices of `length` positions, as even as can be, one for each of `ranks`."""

    length: int
    ranks: int

    def start(self, rank: int) -> int:
        return rank * self.length // self.ranks

    def of(self, rank: int) -> range:
        """The positions that a rank holds."""
        return range(self.start(rank), self.start(rank + 1))


class Sizes(NamedTuple):
    """Of the heads of a layer."""

    heads: int
    key_heads: int
    head_dim: int
    value_dim: int


class Heads(NamedTuple):
    """Key heads whose queries follow the same patterns, with those query heads in order."""

    pattern: Pattern  # for these heads, numbered from 0
    heads: tuple[int, ...]
    key_heads: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Columns:
    """The route of whole columns. Rank r has those of the residues `slices.of(r)`, where a row is as long as a step.

    Queries see near keys under `near`; those further back than `shift` steps in their column.
    """

    step: int
    near: Pattern | None
    shift: int
    slices: Slices

    @property
    def residues(self) -> Slices:
        return Slices(self.step, self.slices.ranks)

    def held(self, rank: int) -> int:
        """How many positions lie in a rank's columns."""
        return len(self.positions(range(self.slices.length), rank))

    def positions(self, among: range, rank: int) -> Tensor:
        """Those positions of a slice that lie in a rank's columns, ascending."""
        return _in_columns(among.start, among.stop, self.step, self.residues.start(rank), self.residues.start(rank + 1))


@dataclass(frozen=True, eq=False)
class Route:
    """How one group of heads is computed.

    `needed`: for each rank the positions outside its slice whose keys it receives, ascending.
    """

    group: Heads
    needed: tuple[Tensor, ...]
    columns: Columns | None = None


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """Routes of all heads of a layer, and how many numbers each rank sends each other one.

    `inputs[s][d]`: of queries, keys and values, from rank s to rank d. `outputs[s][d]` and `lses[s][d]`: of what comes
    back from columns. Nothing on the diagonal.
    """

    slices: Slices
    causal: bool
    routes: tuple[Route, ...]
    inputs: list[list[int]]
    outputs: list[list[int]]
    lses: list[list[int]]

    @property
    def sends(self) -> bool:
        """Does any rank need anything of another?"""
        return any(map(any, self.inputs))

    def bytes_sent(self, rank: int, batch_size: int, itemsize: int, backward: bool = False) -> int:
        """By one rank in a layer's forward pass, or in its backward, where gradients go the other way."""
        exchanged = (self.inputs, itemsize), (self.outputs, itemsize), (self.lses, max(itemsize, 4))
        return batch_size * sum(size * _sent(table, rank, backward) for table, size in exchanged)


def _sent(table: list[list[int]], rank: int, backward: bool) -> int:
    return sum(row[rank] for row in table) if backward else sum(table[rank])


def predicted_bytes(
    pattern: Pattern,
    length: int,
    ranks: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    *,
    key_heads: int | None = None,
    value_dim: int | None = None,
    causal: bool = True,
    batch_size: int = 1,
    backward: bool = False,
) -> list[int]:
    """Bytes that each rank sends for one layer, by counting alone.

    Args:
        length: positions of a row; heads, key_heads: of queries and of keys (as many if None).
        head_dim, value_dim: D and Dv (as large if None); itemsize: bytes of a number.
        backward: those of the backward pass, which sends the gradients of what was received.

    Raises:
        ValueError: if there are more ranks than positions, or the pattern cannot be dealt out to the heads.
    """
    sizes = Sizes(heads, key_heads or heads, head_dim, value_dim or head_dim)
    plan = plan_exchange(pattern, Slices(length, ranks), causal, sizes)
    return [plan.bytes_sent(rank, batch_size, itemsize, backward) for rank in range(ranks)]


def dense_bytes(length: int, ranks: int, heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes that a rank sends for one layer where every rank gets all keys and values, by all-gather or round a ring:
    both pass each slice on R - 1 times."""
    return (ranks - 1) * (length // ranks) * heads * 2 * head_dim * itemsize


@lru_cache(maxsize=64)
def plan_exchange(pattern: Pattern, slices: Slices, causal: bool, sizes: Sizes) -> ExchangePlan:
    """The exchange of a layer under `pattern`; cached, so that layers share it.

    Raises:
        ValueError: if there are more ranks than positions, or the pattern cannot be dealt out to the heads.
    """
    if slices.length < slices.ranks:
        raise ValueError(
            f"Rows of {slices.length} tokens cannot be cut into slices for {slices.ranks} ranks; give longer rows, "
            "or use fewer ranks."
        )
    pattern.check_heads(sizes.heads)
    ranks = range(slices.ranks)
    inputs, outputs, lses = ([[0] * slices.ranks for _ in ranks] for _ in range(3))
    routes = []
    for group in head_groups(pattern, sizes.heads, sizes.key_heads):
        route = _cheapest(group, slices, causal, sizes)
        routes.append(route)
        for source in ranks:
            for target in ranks:
                if source != target:
                    sent = _numbers(route, slices, sizes, source, target)
                    for table, count in zip((inputs, outputs, lses), sent):
                        table[source][target] += count
    return ExchangePlan(slices, causal, tuple(routes), inputs, outputs, lses)


def head_groups(pattern: Pattern, heads: int, key_heads: int) -> list[Heads]:
    """Key heads by the patterns of the query heads that read them."""
    if pattern.head_period == 1:
        return [Heads(pattern, tuple(range(heads)), tuple(range(key_heads)))]
    size, alike = heads // key_heads, {}
    for key_head in range(key_heads):
        followed = tuple(pattern.for_head(head) for head in range(key_head * size, (key_head + 1) * size))
        alike.setdefault(followed, []).append(key_head)
    return [
        Heads(
            followed[0] if len(set(followed)) == 1 else PerHead(followed),
            tuple(head for key_head in members for head in range(key_head * size, (key_head + 1) * size)),
            tuple(members),
        )
        for followed, members in alike.items()
    ]


def _cheapest(group: Heads, slices: Slices, causal: bool, sizes: Sizes) -> Route:
    """The route on which the busiest rank sends least."""
    routes = [Route(group, _needed_by_all(group.pattern, slices, causal))]
    columns = columns_of(group.pattern, slices, causal)
    if columns is not None:
        near = columns.near
        none = (torch.empty(0, dtype=torch.long),) * slices.ranks
        routes.append(Route(group, none if near is None else _needed_by_all(near, slices, causal), columns))

    def busiest(route: Route) -> int:
        ranks = range(slices.ranks)
        return max(sum(sum(_numbers(route, slices, sizes, r, d)) for d in ranks if d != r) for r in ranks)

    return min(routes, key=busiest)


def columns_of(pattern: Pattern, slices: Slices, causal: bool) -> Columns | None:
    """Whole columns, and beside them a causal window, if that is what a pattern of one head shows; else None.

    No column is empty, and each rank has one.
    """
    if pattern.head_period > 1:
        return None
    layout = layout_of(pattern, Extent(slices.length, slices.length, 0, 0, causal))
    if layout is None or layout.column is None or layout.block or (layout.local and not causal):
        return None
    step = layout.column.key_step
    if not slices.ranks <= step <= slices.length:
        return None
    shift = layout.local.reach // step + 1 if layout.local else 0
    return Columns(step, layout.local, shift, slices)


def _numbers(route: Route, slices: Slices, sizes: Sizes, source: int, target: int) -> tuple[int, int, int]:
    """How many numbers of inputs, outputs and log-sum-exps a row needs from one rank to another."""
    heads, key_heads = len(route.group.heads), len(route.group.key_heads)
    of_key = key_heads * (sizes.head_dim + sizes.value_dim)
    inputs = len(positions_sent(route, slices, source, target)) * of_key
    if route.columns is None:
        return inputs, 0, 0
    there = len(route.columns.positions(slices.of(source), target))
    back = len(route.columns.positions(slices.of(target), source))
    return inputs + there * (heads * sizes.head_dim + of_key), back * heads * sizes.value_dim, back * heads


def positions_sent(route: Route, slices: Slices, source: int, target: int) -> Tensor:
    """The positions of a rank's slice whose keys another one receives, ascending."""
    held = slices.of(source)
    first, end = torch.searchsorted(route.needed[target], torch.tensor([held.start, held.stop])).tolist()
    return route.needed[target][first:end]


# ---------------------------------------------------------------------------------------------------------------------
# Which keys are seen


@lru_cache(maxsize=64)
def _needed_by_all(pattern: Pattern, slices: Slices, causal: bool) -> tuple[Tensor, ...]:
    return tuple(needed(pattern, slices, causal, rank) for rank in range(slices.ranks))


def needed(pattern: Pattern, slices: Slices, causal: bool, rank: int) -> Tensor:
    """The positions outside a rank's slice that some query of the slice sees in some head, ascending."""
    held = slices.of(rank)
    stop = held.start if causal else slices.length  # after a causal slice nothing is seen
    seen = torch.zeros(stop, dtype=torch.bool)
    for leaf in _leaves(pattern):
        for keys in _seen_by(leaf, held, stop):
            seen[keys] = True
    seen[held.start : held.stop] = False
    return seen.nonzero()[:, 0]


def _leaves(pattern: Pattern) -> set[Pattern]:
    """The patterns without heads that the heads' patterns are unions of."""
    return {leaf for head in range(pattern.head_period) for leaf in pattern.for_head(head).parts}


def _seen_by(leaf: Pattern, queries: range, stop: int) -> Iterator[Tensor | slice]:
    """The keys below `stop` that some of the queries sees, causality aside."""
    is_column = leaf.in_columns is not None and leaf.in_columns.is_full
    if leaf.summary_keys is not None or is_column:
        yield leaf.candidates(queries.start, queries.stop, stop)
    elif leaf.interval(0) is not None and leaf.key_step == 1:
        yield slice(max(leaf.interval(queries.start)[0], 0), max(leaf.interval(queries.stop - 1)[1], 0))
    else:
        for start in range(queries.start, queries.stop, _ROWS):
            end = min(start + _ROWS, queries.stop)
            keys = leaf.candidates(start, end, stop)
            yield keys[leaf.visible(0, torch.arange(start, end)[:, None], keys).any(dim=0)]


def all_see(pattern: Pattern, queries: range, keys: Tensor) -> bool:
    """Do all queries see all of the keys, as a pattern's facts tell without a look at each?"""
    summaries = [leaf for leaf in pattern.parts if leaf.summary_keys is not None] if pattern.head_period == 1 else []
    return any(bool(leaf.visible(0, queries.start, keys).all()) for leaf in summaries)


def _in_columns(start: int, stop: int, step: int, first: int, end: int) -> Tensor:
    """The positions in [start, stop) whose residues lie in [first, end), ascending."""
    turns = torch.arange(start // step, (stop - 1) // step + 1)
    positions = (turns[:, None] * step + torch.arange(first, end)).flatten()
    return positions[(positions >= start) & (positions < stop)]

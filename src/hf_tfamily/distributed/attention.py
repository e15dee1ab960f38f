"""Attention of a rank's queries to the keys of all ranks, along the routes of an exchange plan.

Disjoint parts are merged by their log-sum-exp (LSE); gradients flow through the merge and back along the same ways.

Shapes: B batch, T positions of this rank's slice, H heads, Hk key heads, D head dim of queries and keys, Dv of values;
h heads and hk key heads of one route; C positions of this rank's columns.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import torch
from torch import Tensor

from ..block_sparse.cpu import block_sparse_attention
from ..block_sparse.global_tokens import Attended, merge
from ..modeling.attention_patterns import Full, Pattern, Strided
from .exchange import Stream, Wire
from .exchange_plan import Columns, ExchangePlan, Route, Slices, all_see, needed, positions_sent


def attend_slices(
    plan: ExchangePlan,
    wire: Wire,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    lengths: Tensor | None = None,
    name: Hashable = None,
) -> Attended:
    """Attention [B, T, H, Dv] of this rank's slice, queries [B, T, H, D], keys [B, T, Hk, D] and values [B, T, Hk, Dv],
    and its LSE [B, T, H]; 0 and -inf for padding and for queries that see nothing.

    All ranks must call it together, and go back together.

    Args:
        lengths: [B], how many tokens each row has, all at its start; None if no row is padded.
        name: what the bytes are counted as.
    """
    layer = _Layer(plan, wire.rank, scale, lengths, key.shape[-1])
    shares = [_Share(route, query, key, value) for route in plan.routes]
    streams = [stream for share in shares for stream in layer.inputs(share)]
    came = iter(wire.exchange(streams, name) if plan.sends else [stream.values[:, :0] for stream in streams])
    parts, returning = [], []
    for share in shares:
        parts.append(layer.near(share, next(came)))
        if share.route.columns is not None:
            returning += layer.outputs(share.route.columns, *layer.column(share, next(came)))
    came = iter(wire.exchange(returning, name) if returning else ())
    found = []
    for share, near in zip(shares, parts):
        if share.route.columns is not None:
            near = [*near, layer.back(share.route.columns, next(came), next(came))]
        found.append(reduce(merge, near))
    return layer.hide_padding(*_in_order(plan, found))


def _in_order(plan: ExchangePlan, found: list[Attended]) -> Attended:
    """The heads of all routes, by their number."""
    if len(found) == 1:
        return found[0]
    heads = torch.tensor([head for route in plan.routes for head in route.group.heads])
    order = heads.argsort().to(found[0][0].device)
    output, lse = (torch.cat(tensors, dim=2).index_select(2, order) for tensors in zip(*found))
    return output, lse


class _Share:
    """Queries [B, T, h, D], and keys and values in one [B, T, hk, D + Dv], of the heads of a route."""

    def __init__(self, route: Route, query: Tensor, key: Tensor, value: Tensor):
        self.route = route
        if len(route.group.key_heads) < key.shape[2]:
            heads, key_heads = (torch.tensor(some, device=query.device) for some in route.group[1:])
            query, key, value = (
                x.index_select(2, i) for x, i in ((query, heads), (key, key_heads), (value, key_heads))
            )
        self.query = query
        self.key_value = torch.cat([key, value], dim=-1)


@dataclass(frozen=True)
class _Layer:
    """What a layer's routes have in common."""

    plan: ExchangePlan
    rank: int
    scale: float
    lengths: Tensor | None
    head_dim: int

    @property
    def slices(self) -> Slices:
        return self.plan.slices

    @property
    def ranks(self) -> range:
        return range(self.slices.ranks)

    @property
    def held(self) -> range:
        return self.slices.of(self.rank)

    # There

    def inputs(self, share: _Share) -> Iterator[Stream]:
        """Keys and values that ranks need of each other, and what goes to columns."""
        route, slices = share.route, self.slices
        sent = [positions_sent(route, slices, self.rank, rank) - self.held.start for rank in self.ranks]
        received = [len(positions_sent(route, slices, rank, self.rank)) for rank in self.ranks]
        yield Stream(share.key_value, sent, received)
        if route.columns is not None:
            sent = [route.columns.positions(self.held, rank) - self.held.start for rank in self.ranks]
            received = [len(route.columns.positions(slices.of(rank), self.rank)) for rank in self.ranks]
            yield Stream(torch.cat([share.query.flatten(2), share.key_value.flatten(2)], dim=-1), sent, received)

    def near(self, share: _Share, others: Tensor) -> list[Attended]:
        """Attention to this rank's own keys and the others' [B, J, hk, D + Dv] that it received."""
        route = share.route
        pattern = route.group.pattern if route.columns is None else route.columns.near
        if pattern is None:
            return []
        positions = route.needed[self.rank]
        before, low, high = run_around(positions, self.held)
        count = self.held.start - low
        run = torch.cat([others[:, before - count : before], share.key_value, others[:, before : before + high]], dim=1)
        where = {"q_offset": self.held.start, "kv_offset": low}
        found = [self._attend(share.query, run, pattern, low + torch.arange(run.shape[1]), self.plan.causal, **where)]
        far = torch.cat([positions[: before - count], positions[before + high :]])
        if len(far):
            picked = torch.cat([others[:, : before - count], others[:, before + high :]], dim=1)
            whole = self.slices, self.plan.causal, self.rank
            shown = Full() if all_see(pattern, self.held, far) else Picked(pattern, pattern, *whole)
            found.append(self._attend(share.query, picked, shown, far, False, q_offset=self.held.start))
        return found

    def _attend(self, query, key_value, pattern, positions: Tensor, causal: bool, **where) -> Attended:
        key, value = key_value.split([self.head_dim, key_value.shape[-1] - self.head_dim], dim=-1)
        how = {"causal": causal, "scale": self.scale, "key_valid": self.valid(positions), "return_lse": True}
        return block_sparse_attention(query, key, value, pattern, **how, **where)

    # Columns

    def column(self, share: _Share, held: Tensor) -> Attended:
        """Attention [B, C, h, Dv] of whole columns, whose queries, keys and values are `held` [B, C, *]."""
        columns, (heads, key_heads) = share.route.columns, (x.shape[2] for x in (share.query, share.key_value))
        query, key_value = held.split([heads * self.head_dim, held.shape[-1] - heads * self.head_dim], dim=-1)
        residues = len(columns.residues.of(self.rank))
        positions = columns.positions(range(self.slices.length), self.rank)
        # In the order of positions each column is every so many-th; moved on, keys that the window shows are hidden.
        where = {"q_offset": 0, "kv_offset": columns.shift * residues}
        sizes = (heads, -1), (key_heads, -1)
        query, key_value = (x.unflatten(-1, size) for x, size in zip((query, key_value), sizes))
        return self._attend(query, key_value, Strided(residues), positions, self.plan.causal, **where)

    def outputs(self, columns: Columns, output: Tensor, lse: Tensor) -> Iterator[Stream]:
        """Back to where the queries came from."""
        counts = [len(columns.positions(self.slices.of(rank), self.rank)) for rank in self.ranks]
        sent = list(torch.arange(sum(counts)).split(counts))
        received = [len(columns.positions(self.held, rank)) for rank in self.ranks]
        yield Stream(output, sent, received)
        yield Stream(lse, sent, received)

    def back(self, columns: Columns, output: Tensor, lse: Tensor) -> Attended:
        """What came from the ranks' columns, in the order of this rank's positions."""
        order = torch.cat([columns.positions(self.held, rank) for rank in self.ranks]).argsort().to(output.device)
        return output.index_select(1, order), lse.index_select(1, order)

    # Padding

    def valid(self, positions: Tensor) -> Tensor | None:
        """[B, J] bool, at which positions there are tokens; None if at all."""
        return None if self.lengths is None else positions.to(self.lengths.device) < self.lengths[:, None]

    def hide_padding(self, output: Tensor, lse: Tensor) -> Attended:
        if self.lengths is None:
            return output, lse
        padding = ~self.valid(torch.arange(self.held.start, self.held.stop))[..., None]
        return output.masked_fill(padding[..., None], 0.0), lse.masked_fill(padding, float("-inf"))


def run_around(positions: Tensor, held: range) -> tuple[int, int, int]:
    """How many of the positions come before the slice; where the run of them begins that ends with the slice; and how
    many are in the run that follows it."""
    before = int(torch.searchsorted(positions, held.start))
    gaps = positions[:before] - torch.arange(before)  # grows where one is missing
    first = int(torch.searchsorted(gaps, held.start - before)) if before else 0
    steps = positions[before:] - torch.arange(len(positions) - before)
    return before, held.start - (before - first), int(torch.searchsorted(steps, held.stop, right=True))


@dataclass(frozen=True)
class Picked(Pattern):
    """What queries see, under `pattern`, of the keys that a rank needs of others under `source`, but for the run around
    its slice. Keys are counted in the list of those, queries by position."""

    pattern: Pattern
    source: Pattern
    slices: Slices
    causal: bool
    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", "picked")  # no field of the class: it is not for configs

    def visible(self, head, query, key):
        return self.pattern.visible(head, query, _far(self.source, self.slices, self.causal, self.rank)[key])

    @property
    def head_period(self) -> int:
        return self.pattern.head_period

    def for_head(self, head: int) -> "Picked":
        return replace(self, pattern=self.pattern.for_head(head))

    def to_dict(self) -> dict:
        patterns = {"pattern": self.pattern.to_dict(), "source": self.source.to_dict()}
        return {"type": self.type, **patterns, "slices": [*self.slices], "causal": self.causal, "rank": self.rank}


@lru_cache(maxsize=64)
def _far(pattern: Pattern, slices: Slices, causal: bool, rank: int) -> Tensor:
    """The positions that a rank needs, but for the run around its slice."""
    positions, held = needed(pattern, slices, causal, rank), slices.of(rank)
    before, low, high = run_around(positions, held)
    return torch.cat([positions[: before - (held.start - low)], positions[before + high :]])

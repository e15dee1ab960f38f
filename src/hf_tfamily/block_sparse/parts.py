"""What plans (plan.py) are made of: tiles, alike tiles as parts, parts over the same keys as groups.

Legend: H heads, T queries, S keys; I queries and J keys of one tile.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

ALIGNED = 16  # products are faster where as many keys, or distances, as a multiple of this are scored


def aligned(count: int) -> int:
    """The next multiple of ALIGNED."""
    return math.ceil(count / ALIGNED) * ALIGNED


@dataclass(frozen=True)
class Tokens:
    """Which tokens each tile holds: tile t has the `count` tokens `start + t * step + i * stride`."""

    start: int
    count: int
    stride: int
    step: int

    def indices(self, tiles: int) -> torch.Tensor:
        """The tokens of `tiles` tiles, [tiles, count]."""
        return self.start + torch.arange(tiles)[:, None] * self.step + torch.arange(self.count) * self.stride


@dataclass(frozen=True, eq=False)
class Part:
    """Tiles that differ only in where they lie.

    `mask` is a bool tensor [tiles or 1, heads or 1, I, J], True where a query sees a key. `causal` means that the i-th
    query of a tile sees the first i + 1 keys of the tile. `writes` means that no earlier part covers these queries,
    `writes_keys` that no earlier part has these keys, nor two of its tiles the same one. Where tiles share keys,
    `fresh_keys` are the last ones of the part, which no earlier part has; all before them some earlier part has.
    """

    tiles: int
    queries: Tokens
    keys: Tokens
    causal: bool = False
    mask: torch.Tensor | None = None
    writes: bool = False
    writes_keys: bool = False
    fresh_keys: range = range(0)


@dataclass(frozen=True, eq=False)
class Group:
    """Parts over the same heads and the same keys: the sequence itself, or keys picked from it by `index`.

    `index` is [keys] or [keys, heads]; `absent`, of the same shape, is True for keys that are not there.
    """

    heads: range
    parts: tuple[Part, ...]
    index: torch.Tensor | None = None
    absent: torch.Tensor | None = None


@dataclass(frozen=True)
class Extent:
    """Lengths, where query 0 and key 0 stand, and whether keys after the query are hidden."""

    num_queries: int
    num_keys: int
    first_query: int
    first_key: int
    causal: bool

    @property
    def distance(self) -> int:
        """Position of query 0 less that of key 0."""
        return self.first_query - self.first_key

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


# ---------------------------------------------------------------------------------------------------------------------
# From tiles to parts


class Tile(NamedTuple):
    queries: range
    keys: range
    causal: bool = False
    mask: torch.Tensor | None = None  # [1, heads or 1, I, J]

    @property
    def shape(self) -> tuple:
        """Equal for tiles that differ only in where they lie."""
        return len(self.queries), self.queries.step, len(self.keys), self.keys.step, self.causal, id(self.mask)

    def distance(self, other: "Tile") -> tuple[int, int]:
        return self.queries.start - other.queries.start, self.keys.start - other.keys.start


def parts_of(tiles: Iterable["Tile"]) -> tuple[Part, ...]:
    """Alike tiles at even distances become one part; tiles without queries or keys are left out."""
    alike: dict[tuple, list[Tile]] = {}
    for tile in tiles:
        if tile.queries and tile.keys:
            alike.setdefault(tile.shape, []).append(tile)
    return tuple(_part(run) for tiles in alike.values() for run in _even_runs(tiles))


def _even_runs(tiles: list["Tile"]) -> Iterator[list["Tile"]]:
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


def _part(run: list["Tile"]) -> Part:
    first = run[0]
    query_step, key_step = run[1].distance(first) if len(run) > 1 else (0, 0)
    return Part(
        tiles=len(run),
        queries=Tokens(first.queries.start, len(first.queries), first.queries.step, query_step),
        keys=Tokens(first.keys.start, len(first.keys), first.keys.step, key_step),
        causal=first.causal,
        mask=first.mask,
    )


def mark_writes(
    groups: Iterable[Group], num_queries: int, num_keys: int, num_heads: int
) -> tuple[list[Group], bool, bool]:
    """The groups that have parts, with what they are the first to have; whether all queries and all keys are covered
    before anything is added to them.
    """
    queries, keys, marked = _FirstToHave(num_queries), _FirstToHave(num_keys), []
    for group in groups:
        parts = []
        for part in group.parts:
            writes, _ = queries.take(group.heads, part.queries.indices(part.tiles))
            if group.index is None:
                writes_keys, fresh = keys.take(group.heads, part.keys.indices(part.tiles), may_share=True)
            else:  # a key may be picked twice
                writes_keys, fresh = keys.take(group.heads, group.index, may_write=False)
            parts.append(replace(part, writes=writes, writes_keys=writes_keys, fresh_keys=fresh))
        if parts:
            marked.append(replace(group, parts=tuple(parts)))
    return marked, queries.all_written(num_heads), keys.all_written(num_heads)


class _FirstToHave:
    """Which parts are, among those of the same heads, the first to have their tokens."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.had: dict[range, torch.Tensor] = {}
        self.added_unwritten = False

    def take(
        self, heads: range, indices: torch.Tensor, *, may_write: bool = True, may_share: bool = False
    ) -> tuple[bool, range]:
        """Whether the next part, with the tokens at `indices`, can write them: it alone has had them, each in one tile.

        Else, if tiles may share them, the run at their end that it is the first to have; empty if they are no run.
        """
        had = self.had.setdefault(heads, torch.zeros(self.num_tokens, dtype=torch.bool))
        new = indices[~had[indices]].unique()
        writes = may_write and len(new) == indices.numel()
        run = range(int(new[0]), int(new[-1]) + 1) if may_share and len(new) and not writes else range(0)
        if len(run) > len(new) or (run and run.stop <= int(indices.max())):
            run = range(0)
        self.added_unwritten |= len(new) > 0 and not writes and not run
        had[indices] = True
        return writes, run

    def all_written(self, num_heads: int) -> bool:
        """Whether every token of every head was covered, and before anything was added to it."""
        heads = sum(len(heads) for heads, had in self.had.items() if bool(had.all()))
        return heads == num_heads and not self.added_unwritten

"""What plans (attention_plan.py) are made of: tiles, alike tiles as parts, parts over the same keys as groups.

Legend: H heads, T queries, S keys; I queries and J keys of one tile.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


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
    query of a tile sees the first i + 1 keys of the tile. `writes` means that no earlier part covers these queries,
    `writes_keys` that no earlier part has these keys, nor two of its tiles the same one.
    """

    tiles: int
    queries: Tokens
    keys: Tokens
    causal: bool = False
    mask: torch.Tensor | None = None
    writes: bool = False
    writes_keys: bool = False


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


def mark_writes(groups: list[Group], num_queries: int) -> tuple[list[Group], bool]:
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


def mark_key_writes(groups: list[Group], num_keys: int) -> tuple[list[Group], bool]:
    """The groups with `writes_keys` set, and whether every key is first written; picked keys are never."""
    covered = torch.zeros(num_keys, dtype=torch.bool)
    marked, all_written = [], True
    for group in groups:
        if group.index is not None:
            all_written &= bool(covered[group.index].all())
            marked.append(group)
            covered[group.index] = True
            continue
        parts = []
        for part in group.parts:
            places = part.keys.places(part.tiles)
            before, alone = covered[places], len(places.unique()) == places.numel()
            parts.append(replace(part, writes_keys=alone and not bool(before.any())))
            all_written &= parts[-1].writes_keys or bool(before.all())
            covered[places] = True
        marked.append(replace(group, parts=tuple(parts)))
    return marked, all_written and bool(covered.all())

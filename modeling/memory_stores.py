"""What each pattern needs of the past, and where in a buffer it lies.

    Local(w), FixedBlock(l)    a ring of the last w or l keys
    FixedSummary(l, c)         c keys of every block, appended
    Strided(l)                 every key, laid out so that a column is one contiguous run of N / l
    Block1D, Block2D           keys that a later block can see (memory_blocks.py)
    anything else              every key

Everything is counted in positions of tokens, so padding is never stored and left-padded rows are exact.

Shapes: T new tokens, Hk key heads, S keys handed out; R rows: 1 where the whole batch stands at the same position, else
B. As a position or a slot, -1 means nothing.
"""

from dataclasses import dataclass

import torch

from .attention_masks import VisibleKeys
from .attention_patterns import (
    FixedBlock,
    FixedSummary,
    Full,
    Intersection,
    Local,
    Strided,
    Union,
    walk,
)
from .attention_patterns_base import Pattern
from .attention_patterns_images import Block1D, Block2D
from .memory_blocks import BlockStore
from .memory_steps import Step


@dataclass(frozen=True)
class Ring:
    """The last `size` keys: those of a window of `window` keys, of the own block of `block`, or of both."""

    heads: tuple[int, ...]
    window: int
    block: int
    lanes: int = 1
    overwrites = True

    @property
    def size(self) -> int:
        return max(self.window, self.block)

    def room(self, end: int) -> int:
        return self.size

    def write_slots(self, step: Step) -> torch.Tensor:
        kept = (step.positions >= 0) & (step.positions > step.last - self.size)
        return torch.where(kept, step.positions % self.size, -1)[:, None]

    def start(self, step: Step) -> torch.Tensor:
        """Lowest position that the step's queries see in the ring, [R, 1]."""
        starts = [step.first - self.window + 1] if self.window else []
        starts += [step.first // self.block * self.block] if self.block else []
        return torch.stack(starts).amin(dim=0).clamp(min=0)

    def read_positions(self, step: Step) -> torch.Tensor:
        start = step.once(self.start)
        span = int((step.newest - start + 1).max())
        positions = step.newest - torch.arange(span - 1, -1, -1, device=start.device)
        return positions.masked_fill(positions < start, -1)[:, None]

    def read_slots(self, step: Step) -> torch.Tensor:
        positions = step.once(self.read_positions)
        return torch.where(positions >= 0, positions % self.size, -1)


@dataclass(frozen=True)
class Summaries:
    """The summary positions of every block; `firsts` says where in a block those of each head begin."""

    heads: tuple[int, ...]
    block: int
    summary: int
    firsts: tuple[int, ...]
    ring: Ring | None
    lanes: int = 1
    overwrites = False

    def room(self, end: int) -> int:
        return _doubled(-(-end // self.block)) * self.summary

    def write_slots(self, step: Step) -> torch.Tensor:
        firsts = torch.tensor(self.firsts, device=step.positions.device)[:, None]
        positions = step.positions[:, None]
        index = positions % self.block - firsts
        kept = (positions >= 0) & (index >= 0) & (index < self.summary)
        return torch.where(kept, positions // self.block * self.summary + index, -1)

    def read_positions(self, step: Step) -> torch.Tensor:
        """Of blocks up to the newest key's; what the ring also holds is left to it."""
        end = step.newest + 1 if self.ring is None else step.once(self.ring.start)
        slots = torch.arange(-(-int(end.max()) // self.block) * self.summary, device=end.device)
        firsts = torch.tensor(self.firsts, device=end.device)[:, None]
        positions = slots // self.summary * self.block + firsts + slots % self.summary  # [heads, S]
        return positions[None].masked_fill(positions >= end[:, None], -1)

    def read_slots(self, step: Step) -> torch.Tensor:
        return torch.arange(step.once(self.read_positions).shape[-1])[None, None]


@dataclass(frozen=True)
class Everything:
    """Every key; position p in lane p mod `lanes`, so that a column of that stride is contiguous."""

    heads: tuple[int, ...]
    lanes: int
    pattern: Pattern
    overwrites = False

    def room(self, end: int) -> int:
        return _doubled(-(-end // self.lanes))

    def _slots(self, positions: torch.Tensor, end: int) -> torch.Tensor:
        slots = positions % self.lanes * self.room(end) + positions // self.lanes
        return torch.where(positions >= 0, slots, -1)

    def write_slots(self, step: Step) -> torch.Tensor:
        return self._slots(step.positions, step.end)[:, None]

    def read_positions(self, step: Step) -> torch.Tensor:
        newest = step.newest
        places = torch.arange(int(newest.max()), -1, -1, device=newest.device)
        if step.length == 1 and _knows_distances_only(self.pattern):
            seen = self.pattern.visible(0, places, torch.zeros_like(places))
            positions = newest - places[seen]
        else:
            positions = places.flip(0).expand(len(newest), -1)
        return positions.masked_fill((positions < 0) | (positions > newest), -1)[:, None]

    def read_slots(self, step: Step) -> torch.Tensor:
        end = step.end if step.length == 1 else step.past_end  # several tokens read before they make the store grow
        return self._slots(step.once(self.read_positions), end)


class Past:
    """What all layers of one pattern share: which stores serve which key heads."""

    def __init__(self, pattern: Pattern, num_heads: int, num_key_heads: int):
        pattern.check_heads(num_heads)
        self.pattern = pattern
        self.num_heads = num_heads
        self.num_key_heads = num_key_heads
        alike: dict = {}
        for head in range(num_key_heads):
            alike.setdefault(_kind(self._pattern_of_key_head(head)), []).append(head)
        self.stores = [store for heads in alike.values() for store in self._stores(tuple(heads))]

    def _pattern_of_key_head(self, key_head: int) -> Pattern:
        """What the query heads that read `key_head` see, together."""
        group = self.num_heads // self.num_key_heads
        patterns = dict.fromkeys(self.pattern.for_head(h) for h in range(key_head * group, (key_head + 1) * group))
        return next(iter(patterns)) if len(patterns) == 1 else Union(tuple(patterns))

    def _stores(self, heads: tuple[int, ...]) -> list:
        """The stores of heads with the same needs."""
        patterns = [self._pattern_of_key_head(head) for head in heads]
        if isinstance(patterns[0], (Block1D, Block2D)):
            return [BlockStore(heads, patterns[0])]
        window, block, summary, stride, _ = _needs(patterns[0])
        if stride:
            return [Everything(heads, stride, patterns[0])]
        ring = Ring(heads, window, block) if window or block else None
        if summary is None:
            return [ring]
        firsts = tuple(_needs(pattern)[-1] for pattern in patterns)
        summaries = Summaries(heads, *summary, firsts, ring)
        return [summaries] if ring is None else [ring, summaries]

    def join_heads(self, read: list[torch.Tensor]) -> torch.Tensor:
        """What the stores handed out, each [., heads, S', ...], as [., Hk, S, ...]; missing keys are 0."""
        by_heads: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for store, tensor in zip(self.stores, read):
            by_heads.setdefault(store.heads, []).append(tensor)
        joined = {heads: _cat(tensors, len(heads)) for heads, tensors in by_heads.items()}
        if len(joined) == 1:
            return next(iter(joined.values()))
        longest = max(tensor.shape[2] for tensor in joined.values())
        sample = next(iter(joined.values()))
        whole = sample.new_zeros(len(sample), self.num_key_heads, longest, *sample.shape[3:])
        for heads, tensor in joined.items():
            whole[:, list(heads), : tensor.shape[2]] = tensor
        return whole

    def visible_keys(self, step: Step) -> VisibleKeys:
        """What the step's queries see among the keys that `update` will hand out."""
        positions = step.positions[:, None]  # [R, 1, T]
        if not step.is_first:
            # One more than the position, so that a missing key is 0 also where heads were filled up.
            past = self.join_heads([step.once(store.read_positions) + 1 for store in self.stores]) - 1
            new = positions.expand(len(past), past.shape[1], -1)
            positions = past if step.length == 1 else torch.cat([past, new], dim=2)
        if positions.shape[1] > 1:
            positions = positions.repeat_interleave(self.num_heads // self.num_key_heads, dim=1)
        positions, queries = (
            p.to(step.device).expand(step.batch_size, *p.shape[1:]) for p in (positions, step.positions)
        )
        return VisibleKeys(
            self.pattern,
            self.num_heads,
            causal=True,
            batch_size=step.batch_size,
            query_length=step.length,
            key_length=positions.shape[-1],
            query_offset=positions.shape[-1] - step.length,
            key_valid=positions >= 0,
            query_positions=queries.clamp(min=0),
            key_positions=positions.clamp(min=0),
        )


def _kind(pattern: Pattern):
    """Equal for heads that one store can serve."""
    return pattern if isinstance(pattern, (Block1D, Block2D)) else _needs(pattern)[:-1]


def _needs(pattern: Pattern) -> tuple[int, int, tuple[int, int] | None, int, int]:
    """What a head-independent pattern needs: (window, block, (block, summary), stride, first summary column).

    A stride other than 0 means every key, in so many lanes.
    """
    kinds: dict[type, list] = {}
    for part in pattern.parts:
        kinds.setdefault(type(part), []).append(part)
    forgetful = set(kinds) <= {Local, FixedBlock, FixedSummary}
    window = max((part.window for part in kinds.get(Local, [])), default=0)
    blocks, summaries = kinds.get(FixedBlock, []), kinds.get(FixedSummary, [])
    if not forgetful or len(blocks) > 1 or len(summaries) > 1:
        strides = [part.stride for part in kinds.get(Strided, [])]
        return 0, 0, None, max(strides, default=1), 0
    summary = (summaries[0].block, summaries[0].summary) if summaries else None
    return window, blocks[0].block if blocks else 0, summary, 0, summaries[0].first_column(0) if summaries else 0


def _knows_distances_only(pattern: Pattern) -> bool:
    """Does what a query sees depend on distances alone?"""
    return all(isinstance(inner, (Full, Local, Strided, Union, Intersection)) for inner in walk(pattern))


def _doubled(count: int) -> int:
    """The next power of two: room for `count` that grows seldom."""
    return 1 << max(count - 1, 0).bit_length()


def _cat(tensors: list[torch.Tensor], num_heads: int) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if any(tensor.shape[1] > 1 for tensor in tensors):
        tensors = [tensor.expand(-1, num_heads, *tensor.shape[2:]) for tensor in tensors]
    return torch.cat(tensors, dim=2)

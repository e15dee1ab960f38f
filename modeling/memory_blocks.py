"""What decoding keeps of an image under local attention: keys that a block still to come can see, and no others.

The room follows from blocks and flanges; of the image it follows the width at most, never the height.

Shapes: R rows, 1 where the whole batch stands at the same position, else B; S keys. -1 is no position and no slot.
"""

import heapq
from dataclasses import dataclass
from functools import lru_cache

import torch

from .attention_patterns_images import Block1D, Block2D


@dataclass(frozen=True)
class BlockStore:
    """The keys of a Block1D or Block2D, for PatternCache (memory.py)."""

    heads: tuple[int, ...]
    pattern: Block1D | Block2D
    lanes: int = 1
    overwrites = True

    def room(self, end: int) -> int:
        if isinstance(self.pattern, Block1D):
            return self.pattern.block + self.pattern.flange
        return int(_slot_table(self.pattern).max()) + 1

    def write_slots(self, step) -> torch.Tensor:
        """[R, 1, T]: keys that nobody sees any more are not written; those alive at one time never share a slot."""
        kept = (step.positions >= 0) & (self.pattern.last_query(step.positions.clamp(min=0)) >= step.last)
        return torch.where(kept, self._slots(step.positions), -1)[:, None]

    def read_positions(self, step) -> torch.Tensor:
        """[R, 1, S], ascending: what a single query sees, or what any of several can see of the past."""
        seen = self._seen_by_one if step.length == 1 else self._alive_before
        rows = [seen(position) for position in step.first[:, 0].tolist()]
        longest = max(len(row) for row in rows)
        padded = torch.full((len(rows), longest), -1)
        for row, positions in zip(padded, rows):
            row[: len(positions)] = positions
        return padded.to(step.positions.device)[:, None]

    def read_slots(self, step) -> torch.Tensor:
        return self._slots(step.once(self.read_positions))

    def _seen_by_one(self, query: int) -> torch.Tensor:
        memory = memory_of_block(self.pattern, self.pattern.block_span(query)[0])
        return memory[memory <= query]

    def _alive_before(self, first: int) -> torch.Tensor:
        keys = torch.arange(self.pattern.first_key(first), first)
        return keys[self.pattern.last_query(keys) >= first]

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        known = positions.clamp(min=0)
        if isinstance(self.pattern, Block1D):
            slots = known % self.room(0)
        else:
            slots = _slot_table(self.pattern).to(positions.device)[known]
        return torch.where(positions >= 0, slots, -1)


@lru_cache(maxsize=256)
def memory_of_block(pattern: Block1D | Block2D, start: int) -> torch.Tensor:
    """Positions, ascending, of all keys up to its end that the queries of the block beginning at `start` see."""
    keys = torch.arange(pattern.first_key(start), pattern.block_span(start)[1])
    return keys[pattern.visible(0, start, keys)]


@lru_cache(maxsize=16)
def _slot_table(pattern: Block2D) -> torch.Tensor:
    """A slot for each position of the image: the lowest whose key is no longer seen by anybody."""
    rows, columns, channels = pattern.grid
    last = pattern.last_query(torch.arange(rows * columns * channels)).tolist()
    table, free, busy = [], [], []
    for position, until in enumerate(last):
        while busy and busy[0][0] < position:
            heapq.heappush(free, heapq.heappop(busy)[1])
        slot = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (until, slot))
        table.append(slot)
    return torch.tensor(table)

"""A decoding cache that keeps only keys somebody can still see, and hands out only those the next queries can see.

What is kept follows from the facts of a head's pattern. Without gradients, keys are written into their place: no
step copies what earlier steps stored, except that a store which grows doubles its room. Where gradients are enabled,
every step leaves the buffers of earlier ones as they were, for the backward pass to read.

Shapes: B batch, Hk key heads, T new tokens, S keys handed out, W widths of a key and a value together. R rows: 1 where
the whole batch stands at the same position, else B. As a slot, -1 means nothing.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from .attention import CACHE, CacheNameGenerationMixin, Heads, VisibleKeys, token_positions
from .attention_patterns import Pattern, Union, patterns_for_layers


class Step:
    """The tokens of one forward pass, and what was worked out for them.

    Attributes:
        positions: [R, T].
        past_length: how many tokens came before, padding included.
        past_end: one more than the highest position that any row has reached before.
    """

    def __init__(self, positions: torch.Tensor, past_length: int, past_end: int, batch_size: int, device: torch.device):
        self.positions = positions
        self.past_length = past_length
        self.past_end = past_end
        self.batch_size = batch_size
        self.device = device
        self.length = positions.shape[1]
        self.is_first = past_length == 0
        self._worked_out: dict = {}

    @classmethod
    def of_call(
        cls,
        hidden_states: torch.Tensor,
        past_length: int,
        past_end: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> "Step":
        """From what a forward pass is given: states [B, T, hidden], mask [B, past + T], positions [B or 1, T]."""
        batch_size, length = hidden_states.shape[:2]
        if attention_mask is not None:
            wanted = [batch_size, past_length + length]
            if list(attention_mask.shape) != wanted:
                raise ValueError(
                    f"A pattern-aware cache takes an attention_mask of shape [batch, past + new tokens] = {wanted}, "
                    f"got {list(attention_mask.shape)}; for other masks pass past_key_values=DynamicCache()."
                )
            positions = token_positions(attention_mask).masked_fill(attention_mask == 0, -1)[:, past_length:]
        elif position_ids is not None:
            positions = position_ids.expand(batch_size, -1)
            if bool((positions.diff(dim=-1) != 1).any()):
                raise ValueError(
                    "A pattern-aware cache holds one document a row, but position_ids start anew within a row; "
                    "pass use_cache=False or past_key_values=DynamicCache()."
                )
        else:  # on the CPU, where its values cost no synchronisation
            positions = torch.arange(past_length, past_length + length)[None]
        return cls(positions, past_length, past_end, batch_size, hidden_states.device)

    @cached_property
    def first(self) -> torch.Tensor:
        """Lowest position of each row's new tokens, [R, 1]; 0 for a row of padding."""
        beyond = self.last + 1
        lowest = torch.where(self.positions < 0, beyond, self.positions).amin(dim=1, keepdim=True)
        return lowest.clamp(min=0)

    @cached_property
    def last(self) -> torch.Tensor:
        """Highest position of each row's new tokens, [R, 1]."""
        return self.positions.amax(dim=1, keepdim=True)

    @cached_property
    def end(self) -> int:
        """One more than the highest position that any row has reached."""
        return max(self.past_end, int(self.last.max()) + 1)

    @property
    def newest(self) -> torch.Tensor:
        """Highest position to read, [R, 1]: a single token is stored before it reads, several are stored after."""
        return self.first if self.length == 1 else self.first - 1

    def once(self, method) -> torch.Tensor:
        """`method(self)`, worked out once for all layers."""
        if method not in self._worked_out:
            self._worked_out[method] = method(self)
        return self._worked_out[method]

    def shortened(self, length: int) -> "Step":
        """The step of its first `length` tokens; stores keep the room that they have."""
        return Step(self.positions[:, :length], self.past_length, self.end, self.batch_size, self.device)

    def following(self) -> "Step":
        """Two more tokens, of which nothing is stored yet."""
        positions = self.last + torch.arange(1, 3, device=self.last.device)
        return Step(positions, self.past_length + self.length, self.end, self.batch_size, self.device)

    def with_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Step":
        """The step of a batch whose rows were reordered, chosen or repeated by `change`."""
        if len(self.positions) == 1 and self.batch_size > 1:
            return self
        positions = change(self.positions)
        return Step(positions, self.past_length, self.past_end, len(positions), self.device)

    def __getstate__(self) -> dict:
        """Copies and files leave out what can be worked out anew."""
        return {**self.__dict__, "_worked_out": {}}


class Places(NamedTuple):
    """Where a step's keys go: an index of a buffer [B, heads, slots], and one of the states [B, Hk, T] to put there."""

    kept: tuple
    states: tuple


class Store:
    """What stores of any kind share: indices that are worked out once for all layers of a step.

    Subclasses have `heads`, and say the slots where keys are written [R, 1 or heads, T] and read [R, 1 or heads, S].
    """

    heads: tuple[int, ...]

    def places(self, step: Step) -> Places:
        slots = step.once(self.write_slots)
        heads, every = list(self.heads), slice(None)
        if heads == list(range(heads[0], heads[-1] + 1)):
            heads = slice(heads[0], heads[-1] + 1)
        if slots.shape == (1, 1, 1):  # a token that stands at one position in all rows
            slot = int(slots)
            here = slice(slot, slot + 1) if slot >= 0 else slice(0)
            return Places((every, every, here), (every, heads, every if slot >= 0 else slice(0)))
        slots = slots.expand(-1, len(self.heads), -1)
        row, head, token = (slots >= 0).nonzero(as_tuple=True)
        rows = every if len(slots) == 1 else row
        of_head = torch.tensor(self.heads, device=slots.device)[head]
        return Places((rows, head, slots[row, head, token]), (rows, of_head, token))

    def seen(self, step: Step) -> slice | torch.Tensor:
        """The slots to read; a slice where they follow each other in all rows."""
        slots = step.once(self.read_slots)
        if slots.shape[:2] != (1, 1):
            return slots.clamp(min=0)
        slots = slots[0, 0]
        first, count = int(slots[0]) if len(slots) else 0, len(slots)
        if first >= 0 and torch.equal(slots.cpu(), torch.arange(first, first + count)):
            return slice(first, first + count)
        return slots.clamp(min=0)


@dataclass(frozen=True)
class Ring(Store):
    """The last `size` keys, where each of `parts` sees no farther back."""

    heads: tuple[int, ...]
    parts: tuple[Pattern, ...]
    lanes: int = 1
    overwrites = True

    @property
    def size(self) -> int:
        return 1 + max(part.reach for part in self.parts)

    def room(self, end: int) -> int:
        return self.size

    def write_slots(self, step: Step) -> torch.Tensor:
        kept = (step.positions >= 0) & (step.positions > step.last - self.size)
        return torch.where(kept, step.positions % self.size, -1)[:, None]

    def start(self, step: Step) -> torch.Tensor:
        """Lowest position that the step's queries see in the ring, [R, 1]."""
        first = torch.stack([part.first_key(step.first) for part in self.parts]).amin(dim=0)
        return torch.maximum(first, step.first - self.size + 1)

    def is_read_whole(self, step: Step) -> bool:
        """Does a single query see all that is in the ring? Then keys are taken as they lie, and none is moved."""
        return step.length == 1 and bool((step.newest - step.once(self.start) + 1 == self.size).all())

    def read_positions(self, step: Step) -> torch.Tensor:
        start = step.once(self.start)
        if step.once(self.is_read_whole):
            slots = torch.arange(self.size, device=start.device)
            return (step.newest - (step.newest - slots) % self.size)[:, None]
        span = int((step.newest - start + 1).max())
        positions = step.newest - torch.arange(span - 1, -1, -1, device=start.device)
        return positions.masked_fill(positions < start, -1)[:, None]

    def read_slots(self, step: Step) -> torch.Tensor:
        positions = step.once(self.read_positions)
        if step.once(self.is_read_whole):
            return torch.arange(positions.shape[-1], device=positions.device)[None, None]
        return torch.where(positions >= 0, positions % self.size, -1)


@dataclass(frozen=True)
class Picture(Store):
    """The keys of a pattern over a picture of known size that a query still to come can see.

    The room follows from the pattern and the picture's width, never from its height.
    """

    heads: tuple[int, ...]
    pattern: Pattern
    lanes: int = 1
    overwrites = True

    def room(self, end: int) -> int:
        return int(_slot_table(self.pattern).max()) + 1

    def write_slots(self, step: Step) -> torch.Tensor:
        """[R, 1, T]: keys that nobody sees any more are not written; those alive at one time never share a slot."""
        kept = (step.positions >= 0) & (self.pattern.last_query(step.positions.clamp(min=0)) >= step.last)
        return torch.where(kept, self._slots(step.positions), -1)[:, None]

    def read_positions(self, step: Step) -> torch.Tensor:
        """[R, 1, S], ascending: what a single query sees, or what any of several can see of the past."""
        seen = self._seen_by_one if step.length == 1 else self._alive_before
        rows = [seen(position) for position in step.first[:, 0].tolist()]
        longest = max(len(row) for row in rows)
        padded = torch.full((len(rows), longest), -1)
        for row, positions in zip(padded, rows):
            row[: len(positions)] = positions
        return padded.to(step.positions.device)[:, None]

    def read_slots(self, step: Step) -> torch.Tensor:
        return self._slots(step.once(self.read_positions))

    def _seen_by_one(self, query: int) -> torch.Tensor:
        seen = keys_of_run(self.pattern, self.pattern.block_span(query)[0])
        return seen[seen <= query]

    def _alive_before(self, first: int) -> torch.Tensor:
        keys = torch.arange(self.pattern.first_key(first), first)
        return keys[self.pattern.last_query(keys) >= first]

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        slots = _slot_table(self.pattern).to(positions.device)[positions.clamp(min=0)]
        return torch.where(positions >= 0, slots, -1)


@lru_cache(maxsize=256)
def keys_of_run(pattern: Pattern, start: int) -> torch.Tensor:
    """Positions, ascending, of all keys up to its end that the run of queries beginning at `start` sees."""
    keys = torch.arange(pattern.first_key(start), pattern.block_span(start)[1])
    return keys[pattern.visible(0, start, keys)]


@lru_cache(maxsize=16)
def _slot_table(pattern: Pattern) -> torch.Tensor:
    """A slot for each position of the picture: the lowest whose key is no longer seen by anybody."""
    last = pattern.last_query(torch.arange(pattern.num_positions)).tolist()
    table, free, busy = [], [], []
    for position, until in enumerate(last):
        while busy and busy[0][0] < position:
            heapq.heappush(free, heapq.heappop(busy)[1])
        slot = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (until, slot))
        table.append(slot)
    return torch.tensor(table)


@dataclass(frozen=True)
class Summaries(Store):
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
class Everything(Store):
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
        distances = torch.arange(int(newest.max()), -1, -1, device=newest.device)
        if step.length == 1 and self.pattern.period == 1:  # what is seen depends on distances alone
            seen = self.pattern.visible(0, distances, torch.zeros_like(distances))
            positions = newest - distances[seen]
        else:
            positions = distances.flip(0).expand(len(newest), -1)
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
        alike: dict[tuple, list[int]] = {}
        for head in range(num_key_heads):
            alike.setdefault(_needs(self._pattern_of_key_head(head)), []).append(head)
        self.stores = [store for needs, heads in alike.items() for store in self._stores(needs, tuple(heads))]

    def _pattern_of_key_head(self, key_head: int) -> Pattern:
        """What the query heads that read `key_head` see, together."""
        group = self.num_heads // self.num_key_heads
        patterns = dict.fromkeys(self.pattern.for_head(h) for h in range(key_head * group, (key_head + 1) * group))
        return next(iter(patterns)) if len(patterns) == 1 else Union(tuple(patterns))

    def _stores(self, needs: "_Needs", heads: tuple[int, ...]) -> list:
        """The stores of heads with the same needs."""
        if needs.whole is not None:
            is_picture = needs.whole.num_positions is not None and needs.whole.block_span(0) is not None
            return [Picture(heads, needs.whole) if is_picture else Everything(heads, needs.lanes, needs.whole)]
        ring = Ring(heads, needs.near) if needs.near else None
        if needs.summary is None:
            return [ring]
        parts = ([part.summary_keys for part in self._pattern_of_key_head(head).parts] for head in heads)
        firsts = tuple(next(keys.first for keys in of_head if keys is not None) for of_head in parts)
        summaries = Summaries(heads, *needs.summary, firsts, ring)
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


class _Needs(NamedTuple):
    """What a head-independent pattern needs of the past; equal for heads that one store can serve.

    Attributes:
        near: the parts that see only so far back.
        summary: (block, number of summary positions) of the part that sees some keys of every block for ever.
        whole: the pattern, if it is no union of such parts; then `near` and `summary` say nothing.
        lanes: in how many lanes to keep the keys of `whole`.
    """

    near: tuple[Pattern, ...]
    summary: tuple[int, int] | None
    whole: Pattern | None
    lanes: int


def _needs(pattern: Pattern) -> _Needs:
    parts = pattern.parts
    near = tuple(part for part in parts if part.reach < math.inf)
    summaries = [part.summary_keys for part in parts if part.summary_keys is not None]
    if len(summaries) > 1 or len(near) + len(summaries) < len(parts):
        steps = [part.key_step for part in parts if part.interval(0) is not None]
        return _Needs((), None, pattern, max(steps, default=1))
    return _Needs(near, (summaries[0].block, summaries[0].count) if summaries else None, None, 1)


def _doubled(count: int) -> int:
    """The next power of two: room for `count` that grows seldom."""
    return 1 << max(count - 1, 0).bit_length()


def _cat(tensors: list[torch.Tensor], num_heads: int) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if any(tensor.shape[1] > 1 for tensor in tensors):
        tensors = [tensor.expand(-1, num_heads, *tensor.shape[2:]) for tensor in tensors]
    return torch.cat(tensors, dim=2)


class PatternCache(Cache):
    """Past keys and values of a decoder whose layers follow attention patterns.

    A model announces the tokens of a step before its layers store them: their positions decide what is kept.

    Args:
        patterns: the pattern of each layer.
        num_heads: query heads.
        num_key_value_heads: key heads; as many as query heads if None.

    Attributes:
        end: one more than the highest position that any row has reached.
    """

    def __init__(self, patterns: list[Pattern], num_heads: int, num_key_value_heads: int | None = None):
        key_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        self.pasts = {pattern: Past(pattern, num_heads, key_heads) for pattern in patterns}
        self.end = 0
        super().__init__(layers=[PatternCacheLayer(self.pasts[pattern]) for pattern in patterns])

    @classmethod
    def from_config(cls, config, heads: Heads | None = None) -> "PatternCache":
        """The cache for one of our decoders, from its config's attention_patterns, and the heads that this process
        computes (model.local_heads), all if None."""
        if not config.attention_patterns:
            raise ValueError("config.attention_patterns is not set; a model without patterns takes a DynamicCache.")
        patterns = patterns_for_layers(config.attention_patterns, config.num_hidden_layers)
        heads = Heads(0, config.num_attention_heads) if heads is None else heads
        return cls.of_heads(patterns, heads, getattr(config, "num_key_value_heads", None))

    @classmethod
    def of_heads(cls, patterns: list[Pattern], heads: Heads, num_key_value_heads: int | None = None) -> "PatternCache":
        """The cache of the heads that this process computes of layers with these patterns and so many key heads."""
        key_heads = None if num_key_value_heads is None else heads.share(num_key_value_heads)
        return cls([heads.seen(pattern) for pattern in patterns], heads.count, key_heads)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def max_cache_len(self) -> int:
        """No limit, in the words that PEFT's prefix tuning asks in before it puts a cache of its own here."""
        return -1

    def announce(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> dict[Pattern, VisibleKeys]:
        """Take in the positions of the next T tokens, and say for each pattern what their queries will see.

        Args:
            hidden_states: [B, T, hidden].
            attention_mask: [B, past + T], 0 for padding.
            position_ids: [B or 1, T]; counted from the mask or the past if None.

        Raises:
            ValueError: where a row's past is not one document, or the mask is no padding mask.
        """
        if len({layer.get_seq_length() for layer in self.layers}) > 1:
            raise ValueError(
                "past_key_values is half updated, by a call that failed; start with a new cache, or an earlier copy."
            )
        step = Step.of_call(hidden_states, self.get_seq_length(), self.end, attention_mask, position_ids)
        self.end = step.end
        for layer in self.layers:
            layer.step = step
        return {pattern: past.visible_keys(step) for pattern, past in self.pasts.items()}

    def reset(self) -> None:
        super().reset()
        self.end = 0


class PatternCacheLayer(CacheLayerMixin):
    """The past of one layer: a buffer [B, heads, lanes, room, W] for each store."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, past: Past):  # not the base's, for which keys and values are what is stored
        self.past = past
        self.step: Step | None = None
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.cumulative_length, self.is_initialized = 0, False
        self.newest_step: Step | None = None
        self.buffers: list[torch.Tensor] = []
        self._in_a_graph = False
        self._recorded: list[_Written] = []

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, Hk, S, D], a copy of those that a coming token can see; anything where a head or a row has fewer."""
        return self._seen_next()[0]

    @property
    def values(self) -> torch.Tensor | None:
        """[B, Hk, S, Dv], as `keys`."""
        return self._seen_next()[1]

    def _seen_next(self) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        if self.newest_step is None:
            return None, None
        return self._read(self.newest_step.following()).clone().split(self.widths, dim=-1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.widths = (key_states.shape[-1], value_states.shape[-1])
        self.buffers = [
            key_states.new_empty(len(key_states), len(store.heads), store.lanes, 0, sum(self.widths))
            for store in self.past.stores
        ]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, Hk, T, D] and [B, Hk, T, Dv]; return the keys and values [B, Hk, S, ...] the queries can see."""
        step = self._take_step(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = torch.cat([key_states, value_states], dim=-1)
        if step.is_first:
            self._write(step, states)
            return key_states, value_states
        if step.length == 1:
            self._write(step, states)
            seen = self._read(step)
        else:  # a ring may overwrite what the first of these queries still sees, so it is read before
            seen = torch.cat([self._read(step), states], dim=2)
            self._write(step, states)
        return seen.split(self.widths, dim=-1)

    def _take_step(self, key_states: torch.Tensor) -> Step:
        step, self.step = self.step, None
        if step is None or step.length != key_states.shape[2]:
            raise ValueError(
                f"{key_states.shape[2]} tokens come unannounced: models whose layers follow attention patterns call "
                "announce() on this cache; give other models a DynamicCache."
            )
        batch_size = key_states.shape[0]
        if self.is_initialized and (batch_size, key_states.dtype) != (self.buffers[0].shape[0], self.dtype):
            raise ValueError(
                f"The cache holds {len(self.buffers[0])} rows of {self.dtype}, got keys of {len(key_states)} rows of "
                f"{key_states.dtype}; start with a cache of its own."
            )
        return step

    def _write(self, step: Step, states: torch.Tensor) -> None:
        before = []
        for index, store in enumerate(self.past.stores):
            self.buffers[index] = buffer = self._writable(self.buffers[index], store.room(step.end))
            places, stored = step.once(store.places), buffer.flatten(2, 3)
            if self.record_past and store.overwrites:
                before.append((index, places.kept, stored[places.kept].clone()))
            stored[places.kept] = states[places.states]
        self._in_a_graph = torch.is_grad_enabled()
        if self.record_past:
            self._recorded.append(_Written(step, states, before, self.newest_step))
        self.newest_step = step
        self.cumulative_length += step.length

    def _writable(self, buffer: torch.Tensor, room: int) -> torch.Tensor:
        """The buffer with at least so much room; a copy where a backward pass may read it."""
        missing = room - buffer.shape[3]
        if missing > 0:
            return torch.cat([buffer, buffer.new_zeros(*buffer.shape[:3], missing, buffer.shape[4])], dim=3)
        frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
        return buffer.clone() if frozen or self._in_a_graph or torch.is_grad_enabled() else buffer

    def _read(self, step: Step) -> torch.Tensor:
        """[B, Hk, S, W]"""
        read = [
            _select(buffer.flatten(2, 3), step.once(store.seen))
            for buffer, store in zip(self.buffers, self.past.stores)
        ]
        return self.past.join_heads(read)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included; not keys kept."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.step = None
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change_batch(lambda buffer: buffer[indices.to(buffer.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def _change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.buffers = [change(buffer) for buffer in self.buffers]
        self.newest_step = None if self.newest_step is None else self.newest_step.with_rows(change)
        self._recorded = []

    def activate_past_recording(self) -> None:
        """From now on remember what tokens overwrite, until `crop` says which of them stay."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -`tokens_to_remove` tokens, and let go of what was recorded.

        Raises:
            ValueError: if they were not recorded: keys that a shorter past would need may be forgotten.
        """
        surplus = -tokens_to_remove
        if not 0 <= surplus <= sum(written.step.length for written in self._recorded):
            raise ValueError(
                f"crop({tokens_to_remove}): a pattern-aware cache takes back only tokens (their number negated) that "
                "came after activate_past_recording() and the crop before, since it forgets what nobody sees any "
                "more; pass past_key_values=DynamicCache() to take back others."
            )
        while surplus > 0:
            written = self._recorded.pop()
            self._take_back(written)
            kept = max(written.step.length - surplus, 0)
            surplus -= written.step.length
            if kept:
                self._write(written.step.shortened(kept), written.states[:, :, :kept])
        self._recorded = []

    def _take_back(self, written: "_Written") -> None:
        for index, where, states in written.before:
            buffer = self.buffers[index]
            self.buffers[index] = buffer = self._writable(buffer, buffer.shape[3])
            buffer.flatten(2, 3)[where] = states
        self.newest_step = written.previous
        self.cumulative_length -= written.step.length


@dataclass(frozen=True)
class _Written:
    """A step that may be taken back: its states [B, Hk, T, W], what it overwrote (buffer, slots, states), and the step
    before it."""

    step: Step
    states: torch.Tensor
    before: list[tuple[int, tuple, torch.Tensor]]
    previous: Step | None


class PatternCacheGenerationMixin(CacheNameGenerationMixin):
    """`generate()` that uses a PatternCache unless it is asked for another one."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, generation_mode: GenerationMode, *args, **kwargs
    ):
        past, is_assistant = model_kwargs.get(CACHE), generation_config.is_assistant
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        self._refuse_what_transformers_cannot(generation_config, model_kwargs, assisted)
        asked = generation_config.cache_implementation is not None or past is not None
        cache = None if asked or generation_config.use_cache is False else self.new_pattern_cache()
        if isinstance(cache, PatternCache) or (cache is not None and not (assisted or is_assistant)):
            if is_assistant:  # its tokens may be taken back, which only a PatternCache can do
                cache.activate_past_recording()
            model_kwargs[CACHE] = cache
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """As every model's, which `generate_batch` and the others call first, where pages can hold what is needed.

        Raises:
            ValueError: where they cannot, before anything is started.
        """
        obstacle = self.obstacle_to_paging()
        if obstacle is not None:
            raise ValueError(
                f"Continuous batching {obstacle}; use generate(), which takes prompts of several lengths padded."
            )
        return super().init_continuous_batching(*args, **kwargs)

    def obstacle_to_paging(self) -> str | None:
        """What of this model continuous batching cannot do; None if it can do all."""
        return "knows no attention patterns" if self.config.attention_patterns else None

    def new_pattern_cache(self) -> Cache | None:
        """The cache that `generate()` begins with; None where Transformers' own is as good."""
        return PatternCache.from_config(self.config, self.local_heads) if self.config.attention_patterns else None

    def _refuse_what_transformers_cannot(
        self, generation_config: GenerationConfig, model_kwargs: dict, assisted: bool
    ) -> None:
        """Raise ValueError where `generate()` itself would be wrong, or fail without saying why."""
        past, cache_implementation = model_kwargs.get(CACHE), generation_config.cache_implementation
        if assisted and past is not None and past.get_seq_length() > 0:  # which it would read once more
            raise ValueError(
                f"Assisted decoding reads the whole prompt, but past_key_values holds {int(past.get_seq_length())} "
                "tokens of it; pass no past_key_values, or decode without an assistant or prompt_lookup_num_tokens."
            )
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("prefill_chunk_size cuts input_ids, not inputs_embeds; leave it out, or give input_ids.")
        if "offloaded" in (cache_implementation or "") and self.device.type == "cpu":
            raise ValueError(
                f"cache_implementation={cache_implementation!r} moves keys from a GPU to the CPU, where this model "
                "is already; leave it out, or use 'dynamic' or 'static'."
            )


def _select(buffer: torch.Tensor, slots: slice | torch.Tensor) -> torch.Tensor:
    """From [B, heads, room, W] the `slots` [S] or [R, heads or 1, S]; a view where they are a slice."""
    if isinstance(slots, slice):
        return buffer[:, :, slots]
    if slots.ndim == 1:
        return buffer.index_select(2, slots.to(buffer.device))
    slots = slots.to(buffer.device).expand(*buffer.shape[:2], -1)
    return buffer.gather(2, slots[..., None].expand(-1, -1, -1, buffer.shape[-1]))

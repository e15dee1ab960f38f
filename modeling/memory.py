"""A decoding cache that keeps only keys somebody can still see, and hands out only those the next queries can see.

What is kept follows from a head's pattern:

    Local(w), FixedBlock(l)    a ring of the last w or l keys
    FixedSummary(l, c)         c keys of every block, appended
    Strided(l)                 every key, laid out so that a column is one contiguous run of N / l
    Block1D, Block2D           keys that a later block can see (memory_blocks.py)
    anything else              every key

Everything is counted in positions of tokens, so padding is never stored and left-padded rows are exact. Keys are
written into their place: no step copies what earlier steps stored, except that a store which grows doubles its room.

Shapes: B batch, Hk key heads, T new tokens, S keys handed out, W widths of a key and a value together. R rows: 1 where
the whole batch stands at the same position, else B. As a position or a slot, -1 means nothing.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from .attention_masks import VisibleKeys, token_positions
from .attention_patterns import (
    FixedBlock,
    FixedSummary,
    Full,
    Intersection,
    Local,
    Strided,
    Union,
    patterns_for_layers,
    walk,
)
from .attention_patterns_base import Pattern
from .attention_patterns_images import Block1D, Block2D
from .memory_blocks import BlockStore


class PatternCache(Cache):
    """Past keys and values of a decoder whose layers follow attention patterns.

    A model announces the tokens of a step before its layers store them: their positions decide what is kept.

    Args:
        patterns: the pattern of each layer.
        num_heads: query heads.
        num_key_value_heads: key heads; as many as query heads if None.
    """

    def __init__(self, patterns: list[Pattern], num_heads: int, num_key_value_heads: int | None = None):
        key_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        self.pasts = {pattern: _Past(pattern, num_heads, key_heads) for pattern in patterns}
        super().__init__(layers=[PatternCacheLayer(self.pasts[pattern]) for pattern in patterns])

    @classmethod
    def from_config(cls, config) -> "PatternCache":
        """The cache for one of our decoders, from its config's attention_patterns."""
        patterns = patterns_for_layers(config.attention_patterns, config.num_hidden_layers)
        return cls(patterns, config.num_attention_heads, getattr(config, "num_key_value_heads", None))

    @property
    def nbytes(self) -> int:
        """Bytes of all stored keys and values."""
        return sum(layer.nbytes for layer in self.layers)

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
        step = _step(hidden_states, self.get_seq_length(), attention_mask, position_ids)
        for layer in self.layers:
            layer.step = step
        return {pattern: past.visible_keys(step) for pattern, past in self.pasts.items()}


class PatternCacheLayer(CacheLayerMixin):
    """The past of one layer: a buffer [B, heads, lanes, room, W] for each store."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, past: "_Past"):
        super().__init__()
        self.past = past
        self.step: _Step | None = None
        self.cumulative_length = 0
        self.buffers: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, width = key_states.shape[0], key_states.shape[-1] + value_states.shape[-1]
        self.buffers = [
            key_states.new_empty(batch, len(store.heads), store.lanes, 0, width) for store in self.past.stores
        ]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, Hk, T, D] and [B, Hk, T, Dv]; return the keys and values [B, Hk, S, ...] the queries can see."""
        step = self._take_step(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = torch.cat([key_states, value_states], dim=-1).detach()
        self.cumulative_length += step.length
        if step.is_first:
            self._write(step, states)
            return key_states, value_states
        if step.length == 1:
            self._write(step, states)
            seen = self._read(step)
        else:  # a ring may overwrite what the first of these queries still sees, so it is read before
            seen = torch.cat([self._read(step), states], dim=2)
            self._write(step, states)
        return seen.split([key_states.shape[-1], value_states.shape[-1]], dim=-1)

    def _take_step(self, key_states: torch.Tensor) -> "_Step":
        step, self.step = self.step, None
        if step is None or step.length != key_states.shape[2]:
            raise ValueError(
                f"{key_states.shape[2]} tokens come unannounced: models whose layers follow attention patterns call "
                "announce() on this cache; give other models a DynamicCache."
            )
        if self.is_initialized and len(key_states) != len(self.buffers[0]):
            raise ValueError(f"The cache holds {len(self.buffers[0])} rows, got keys of {len(key_states)}.")
        return step

    def _write(self, step: "_Step", states: torch.Tensor) -> None:
        for index, store in enumerate(self.past.stores):
            self.buffers[index] = buffer = _with_room(self.buffers[index], store.room(step.end))
            slots = step.once(store.write_slots).expand(-1, len(store.heads), -1)  # [R, heads, T]
            row, head, token = (slots >= 0).nonzero(as_tuple=True)
            of_head = torch.tensor(store.heads, device=slots.device)[head]
            rows = slice(None) if len(slots) == 1 else row
            buffer.flatten(2, 3)[rows, head, slots[row, head, token]] = states[rows, of_head, token]

    def _read(self, step: "_Step") -> torch.Tensor:
        """[B, Hk, S, W]"""
        read = [
            _select(buffer.flatten(2, 3), step.once(store.read_slots))
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
        self.buffers, self.step = [], None
        self.cumulative_length, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffers = [buffer.index_select(0, indices.to(buffer.device)) for buffer in self.buffers]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.buffers = [buffer.repeat_interleave(repeats, dim=0) for buffer in self.buffers]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "A pattern-aware cache has forgotten the keys that a shorter past would need; "
                "pass past_key_values=DynamicCache() where tokens are taken back."
            )


class PatternCacheGenerationMixin(GenerationMixin):
    """`generate()` that uses a PatternCache unless it is asked for another one, or must take tokens back."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, generation_mode: GenerationMode, *args, **kwargs
    ):
        asked = generation_config.cache_implementation is not None or model_kwargs.get("past_key_values") is not None
        takes_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        patterns = getattr(self.config, "attention_patterns", None)
        if patterns and generation_config.use_cache is not False and not asked and not takes_back:
            model_kwargs["past_key_values"] = self.new_pattern_cache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def new_pattern_cache(self) -> Cache:
        """The cache that `generate()` begins with."""
        return PatternCache.from_config(self.config)


# ---------------------------------------------------------------------------------------------------------------------
# One step


class _Step:
    """The tokens of one forward pass: positions [R, T], how many came before, and what was worked out for them."""

    def __init__(self, positions: torch.Tensor, past_length: int, batch_size: int, device: torch.device):
        self.positions = positions
        self.past_length = past_length
        self.batch_size = batch_size
        self.device = device
        self.length = positions.shape[1]
        self.is_first = past_length == 0
        self._worked_out: dict = {}

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
        """One more than the highest position."""
        return int(self.last.max()) + 1

    @property
    def newest(self) -> torch.Tensor:
        """Highest position to read, [R, 1]: a single token is stored before it reads, several are stored after."""
        return self.first if self.length == 1 else self.first - 1

    def once(self, method) -> torch.Tensor:
        """`method(self)`, worked out once for all layers."""
        if method not in self._worked_out:
            self._worked_out[method] = method(self)
        return self._worked_out[method]


def _step(hidden_states, past_length, attention_mask, position_ids) -> _Step:
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
    return _Step(positions, past_length, batch_size, hidden_states.device)


# ---------------------------------------------------------------------------------------------------------------------
# Stores: what a pattern needs of the past, and where it lies


@dataclass(frozen=True)
class _Ring:
    """The last `size` keys: those of a window of `window` keys, of the own block of `block`, or of both."""

    heads: tuple[int, ...]
    window: int
    block: int
    lanes: int = 1

    @property
    def size(self) -> int:
        return max(self.window, self.block)

    def room(self, end: int) -> int:
        return self.size

    def write_slots(self, step: _Step) -> torch.Tensor:
        kept = (step.positions >= 0) & (step.positions > step.last - self.size)
        return torch.where(kept, step.positions % self.size, -1)[:, None]

    def start(self, step: _Step) -> torch.Tensor:
        """Lowest position that the step's queries see in the ring, [R, 1]."""
        starts = [step.first - self.window + 1] if self.window else []
        starts += [step.first // self.block * self.block] if self.block else []
        return torch.stack(starts).amin(dim=0).clamp(min=0)

    def read_positions(self, step: _Step) -> torch.Tensor:
        start = step.once(self.start)
        span = int((step.newest - start + 1).max())
        positions = step.newest - torch.arange(span - 1, -1, -1, device=start.device)
        return positions.masked_fill(positions < start, -1)[:, None]

    def read_slots(self, step: _Step) -> torch.Tensor:
        positions = step.once(self.read_positions)
        return torch.where(positions >= 0, positions % self.size, -1)


@dataclass(frozen=True)
class _Summaries:
    """The summary positions of every block; `firsts` says where in a block those of each head begin."""

    heads: tuple[int, ...]
    block: int
    summary: int
    firsts: tuple[int, ...]
    ring: _Ring | None
    lanes: int = 1

    def room(self, end: int) -> int:
        return _doubled(-(-end // self.block)) * self.summary

    def write_slots(self, step: _Step) -> torch.Tensor:
        firsts = torch.tensor(self.firsts, device=step.positions.device)[:, None]
        positions = step.positions[:, None]
        index = positions % self.block - firsts
        kept = (positions >= 0) & (index >= 0) & (index < self.summary)
        return torch.where(kept, positions // self.block * self.summary + index, -1)

    def read_positions(self, step: _Step) -> torch.Tensor:
        """Of blocks up to the newest key's; what the ring also holds is left to it."""
        end = step.newest + 1 if self.ring is None else step.once(self.ring.start)
        slots = torch.arange(-(-int(end.max()) // self.block) * self.summary, device=end.device)
        firsts = torch.tensor(self.firsts, device=end.device)[:, None]
        positions = slots // self.summary * self.block + firsts + slots % self.summary  # [heads, S]
        return positions[None].masked_fill(positions >= end[:, None], -1)

    def read_slots(self, step: _Step) -> torch.Tensor:
        return torch.arange(step.once(self.read_positions).shape[-1])[None, None]


@dataclass(frozen=True)
class _Everything:
    """Every key; position p in lane p mod `lanes`, so that a column of that stride is contiguous."""

    heads: tuple[int, ...]
    lanes: int
    pattern: Pattern

    def room(self, end: int) -> int:
        return _doubled(-(-end // self.lanes))

    def _slots(self, positions: torch.Tensor, end: int) -> torch.Tensor:
        slots = positions % self.lanes * self.room(end) + positions // self.lanes
        return torch.where(positions >= 0, slots, -1)

    def write_slots(self, step: _Step) -> torch.Tensor:
        return self._slots(step.positions, step.end)[:, None]

    def read_positions(self, step: _Step) -> torch.Tensor:
        newest = step.newest
        places = torch.arange(int(newest.max()), -1, -1, device=newest.device)
        if step.length == 1 and _knows_distances_only(self.pattern):
            seen = self.pattern.visible(0, places, torch.zeros_like(places))
            positions = newest - places[seen]
        else:
            positions = places.flip(0).expand(len(newest), -1)
        return positions.masked_fill((positions < 0) | (positions > newest), -1)[:, None]

    def read_slots(self, step: _Step) -> torch.Tensor:
        # Several tokens read before they make the store grow.
        end = step.end if step.length == 1 else int(step.newest.max()) + 1
        return self._slots(step.once(self.read_positions), end)


class _Past:
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
            return [_Everything(heads, stride, patterns[0])]
        ring = _Ring(heads, window, block) if window or block else None
        if summary is None:
            return [ring]
        firsts = tuple(_needs(pattern)[-1] for pattern in patterns)
        summaries = _Summaries(heads, *summary, firsts, ring)
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

    def visible_keys(self, step: _Step) -> VisibleKeys:
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


def _with_room(buffer: torch.Tensor, room: int) -> torch.Tensor:
    """The buffer [B, heads, lanes, room, W], grown to `room` if it is smaller."""
    missing = room - buffer.shape[3]
    return (
        buffer
        if missing <= 0
        else torch.cat([buffer, buffer.new_zeros(*buffer.shape[:3], missing, buffer.shape[4])], 3)
    )


def _doubled(count: int) -> int:
    """The next power of two: room for `count` that grows seldom."""
    return 1 << max(count - 1, 0).bit_length()


def _select(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """From [B, heads, room, W] the `slots` [R, heads or 1, S]; a view where they follow each other in all rows."""
    if slots.shape[:2] == (1, 1):
        slots = slots[0, 0]
        first, count = int(slots[0]) if len(slots) else 0, len(slots)
        if first >= 0 and torch.equal(slots.cpu(), torch.arange(first, first + count)):
            return buffer[:, :, first : first + count]
        return buffer.index_select(2, slots.clamp(min=0).to(buffer.device))
    slots = slots.clamp(min=0).to(buffer.device).expand(*buffer.shape[:2], -1)
    return buffer.gather(2, slots[..., None].expand(-1, -1, -1, buffer.shape[-1]))


def _cat(tensors: list[torch.Tensor], num_heads: int) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if any(tensor.shape[1] > 1 for tensor in tensors):
        tensors = [tensor.expand(-1, num_heads, *tensor.shape[2:]) for tensor in tensors]
    return torch.cat(tensors, dim=2)

"""What Transformer-XL keeps of the segments it has read: a Cache of the last `mem_len` places of every layer. And what
the Compressive Transformer keeps: a second memory of compressed places before it.

While gradients flow it keeps each layer's input, detached, so that the key and value projections learn through memory
positions too (Dai et al. 2019, arXiv:1901.02860, section 3.2). Otherwise it keeps projected keys and values, and the
projected distances: the same result for far less work.

Shapes: B batch, H heads, T new tokens, M places in memory, C compressed places before them, D head dim, L distances,
E tokens that the short memory has no room for, a multiple of the compression rate.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin


class MemoryLayer(CacheLayerMixin):
    """The last `capacity` entries of one layer, in tensors whose places run along dimension -2.

    Attributes:
        names: what the tensors are called.
        zero_start: begin with zero hidden states in every place, instead of with nothing.
        seen: number of tokens the model has read, kept or not.
        segments: number of segments this layer has taken in.
    """

    is_sliding = False
    supports_early_init = False
    names: tuple[str, ...]

    def __init__(self, config):
        super().__init__()
        self.capacity = config.mem_len
        self.zero_start = config.zero_initial_memory
        self.seen = self.segments = 0

    @property
    def first(self) -> torch.Tensor | None:
        """One of the tensors, for its batch, dtype and device; None before the first segment."""
        return getattr(self, self.names[0]) if self.is_initialized else None

    @property
    def held(self) -> int:
        """Number of places that the next segment sees."""
        if self.is_initialized:
            return self.first.shape[-2]
        return self.capacity if self.zero_start else 0

    def lazy_initialization(self, *entries: torch.Tensor) -> None:
        for name, new in zip(self.names, entries):
            setattr(self, name, new[..., :0, :].detach())
        self.is_initialized = True

    def append(self, *entries: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is held, then the new entries; the last `capacity` of them stay, without their gradient."""
        if not self.is_initialized:
            self.lazy_initialization(*entries)
        joined = []
        for name, new in zip(self.names, entries):
            check_same_kind(getattr(self, name), new)
            joined.append(torch.cat([getattr(self, name), new], dim=-2))
            setattr(self, name, joined[-1][..., -self.capacity :, :].detach())
        self.segments += 1
        return tuple(joined)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.seen - self.held

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        for name in self.names:
            setattr(self, name, None)
        self.is_initialized = False
        self.seen = self.segments = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.change_batch(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in self.names if self.is_initialized else ():
            setattr(self, name, change(getattr(self, name)))


class HiddenStateLayer(MemoryLayer):
    """Keeps the layer's inputs [B, M, hidden]; every segment projects them anew, so that the projections learn."""

    names = ("states",)

    def lazy_initialization(self, hidden_states: torch.Tensor) -> None:
        batch_size, _, hidden_size = hidden_states.shape
        self.states = hidden_states.new_zeros(batch_size, self.held, hidden_size)
        self.is_initialized = True

    def past_states(self, like: torch.Tensor) -> torch.Tensor:
        if not self.is_initialized:
            self.lazy_initialization(like)
        check_same_kind(self.states, like)
        return self.states

    def remember(self, hidden_states: torch.Tensor) -> None:
        self.append(hidden_states)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return key_states, value_states

    def relative_keys(self, position_states: torch.Tensor, project: Callable) -> torch.Tensor:
        return project(position_states)

    def distances_wanted(self, key_length: int) -> int:
        return key_length


class KeyValueLayer(MemoryLayer):
    """Keeps keys and values [B, H, M, D], and the projected distances [H, L, D]."""

    names = ("keys", "values")

    def __init__(self, config):
        super().__init__(config)
        self.projected_distances: torch.Tensor | None = None

    def past_states(self, like: torch.Tensor) -> torch.Tensor:
        batch_size, _, hidden_size = like.shape
        return like.new_zeros(batch_size, 0 if self.is_initialized else self.held, hidden_size)

    def remember(self, hidden_states: torch.Tensor) -> None:
        """`update` did."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return self.append(key_states, value_states)

    def relative_keys(self, position_states: torch.Tensor, project: Callable) -> torch.Tensor:
        if not len(position_states):
            return self.projected_distances
        projected = project(position_states)
        self.projected_distances = projected.detach()
        return projected

    def distances_wanted(self, key_length: int) -> int:
        """0 if those at hand reach; else so many that growing memories seldom ask again."""
        if self.projected_distances is None:
            return key_length
        return 0 if self.projected_distances.shape[1] >= key_length else 2 * key_length

    def reset(self) -> None:
        super().reset()
        self.projected_distances = None


class SegmentMemory(Cache):
    """The memory of a Transformer-XL: made by the model's first call, handed back with the next segment.

    Args:
        config: a TransformerXLConfig, for num_hidden_layers, mem_len and zero_initial_memory.
        projected: keep keys and values instead of hidden states; not for training.

    Attributes:
        valid: [B, M] bool, False where a place holds padding; None if no place does.
    """

    kind = "segment"
    layer_classes = (HiddenStateLayer, KeyValueLayer)

    def __init__(self, config, projected: bool = False):
        layer_class = self.layer_classes[projected]
        super().__init__(layers=[layer_class(config) for _ in range(config.num_hidden_layers)])
        self.projected = projected
        self.valid: torch.Tensor | None = None
        self.segments = 0
        self._model = None

    @property
    def held(self) -> int:
        """Number of places that the next segment sees."""
        return self.layers[0].held

    @property
    def seen(self) -> int:
        """Number of tokens read since the start."""
        return self.layers[0].seen

    def past_states(self, like: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Remembered inputs [B, M, hidden] of a layer whose new input is `like`; [B, 0, hidden] if projected."""
        return self.layers[layer_idx].past_states(like)

    def remember(self, hidden_states: torch.Tensor, layer_idx: int) -> None:
        """Take in a layer's new input [B, T, hidden]."""
        self.layers[layer_idx].remember(hidden_states)

    def distances_wanted(self, key_length: int) -> int:
        """For how many distances the layers want R, given the number of keys; 0 if they have them projected."""
        return max(layer.distances_wanted(key_length) for layer in self.layers)

    def relative_keys(self, layer_idx: int, position_states: torch.Tensor, project: Callable) -> torch.Tensor:
        """[H, L, D]: the distances [L, hidden] projected by a layer, or its earlier projection of more of them."""
        return self.layers[layer_idx].relative_keys(position_states, project)

    def valid_keys(self, new: torch.Tensor | None, batch_size: int, length: int) -> torch.Tensor | None:
        """[B, M + T] bool for the memory followed by T new tokens, of which `new` [B, T] says which are no padding."""
        if self.valid is None and new is None:
            return None
        past = self.valid if self.valid is not None else new.new_ones(batch_size, self.held)
        return torch.cat([past, past.new_ones(batch_size, length) if new is None else new], dim=1)

    def advance(self, length: int, valid: torch.Tensor | None) -> None:
        """Every layer has taken in `length` tokens; `valid` is what `valid_keys` said."""
        for layer in self.layers:
            layer.seen += length
        self.segments += 1
        self.valid = None if valid is None or bool(valid[:, -self.held :].all()) else valid[:, -self.held :]

    def check(self, model: nn.Module, inputs_embeds: torch.Tensor) -> None:
        """Raise ValueError if this is no memory for `model` to read inputs_embeds [B, T, hidden] with."""
        owner = None if self._model is None else self._model()
        if (owner is not None and owner is not model) or len(self.layers) != model.config.num_hidden_layers:
            raise ValueError(
                "past_key_values is the memory of another model; give each model the one it returned, or None to start."
            )
        self._model = weakref.ref(model)
        if any(layer.segments != self.segments for layer in self.layers):
            raise ValueError(
                "past_key_values is half updated, by a call that failed; start with None, or with an earlier copy."
            )
        if self.projected and model.training:
            raise ValueError(
                "past_key_values holds projected keys and values, through which nothing can be learnt; it was made "
                "without gradients. Start training with past_key_values=None, and keep a memory of its own for it."
            )
        first = self.layers[0].first
        if first is not None and (first.shape[0], first.device) != (inputs_embeds.shape[0], inputs_embeds.device):
            raise ValueError(
                f"past_key_values remembers a batch of {first.shape[0]} rows on {first.device}, but the new segment "
                f"has {inputs_embeds.shape[0]} rows on {inputs_embeds.device}; give its own rows or start with None."
            )

    @property
    def recent(self) -> int:
        """Number of places that hold one token each, the last ones."""
        return min(self.held, self.seen)

    def check_padding(self, past: torch.Tensor) -> None:
        """Raise ValueError if `past` [B, seen] calls padding what was read as tokens, or the other way round."""
        past = past[:, self.seen - self.recent :]
        known = torch.ones_like(past) if self.valid is None else self.valid[:, self.valid.shape[1] - self.recent :]
        if not torch.equal(past, known):
            raise ValueError(
                "attention_mask and past_key_values disagree about which of the earlier tokens are padding; give the "
                "earlier calls the same mask."
            )

    def reset(self) -> None:
        super().reset()
        self.valid = None
        self.segments = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change_batch(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change_batch(lambda held: held[indices.to(held.device)])

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("A segment memory cannot be cropped: what it dropped for newer tokens is gone.")

    def _change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            layer.change_batch(change)
        self.valid = None if self.valid is None else change(self.valid)

    def __getstate__(self) -> dict:
        """Copies and files forget which model the memory came from."""
        return {**self.__dict__, "_model": None}


@dataclass(frozen=True)
class Evicted:
    """What leaves the short memory of a layer with the coming segment, to be compressed.

    Attributes:
        states: [B, E, hidden], without gradient.
        valid: [B, E] bool, False for padding; None if all are tokens.
        usage: [B, E] attention received before the coming segment, summed over queries; None if nobody asks.
        start: C, where the evicted begin among the keys.
        age: [E] number of queries that could see each, those of the coming segment included.
    """

    states: torch.Tensor
    valid: torch.Tensor | None
    usage: torch.Tensor | None
    start: int
    age: torch.Tensor


class CompressiveLayer(MemoryLayer):
    """A short memory of hidden states, and before it a compressed one (Rae et al. 2019, arXiv:1911.05507, section 3).

    The short memory keeps `capacity` places, and up to `rate` - 1 more that wait until so many are compressed together.
    """

    def __init__(self, config):
        super().__init__(config)
        self.compressed_capacity = config.compressed_mem_len
        self.rate = config.compression_rate
        self.usage: torch.Tensor | None = None
        if config.compression == "most_used":
            self.names = (*self.names, "usage")

    @property
    def recent(self) -> int:
        """M, the number of places that hold one token each."""
        return self.states.shape[1] if self.is_initialized else 0

    @property
    def first(self) -> torch.Tensor | None:
        return self.states if self.is_initialized else None

    def lazy_initialization(self, hidden_states: torch.Tensor) -> None:
        self.states = hidden_states[:, :0].detach()
        if "usage" in self.names:
            self.usage = self.states.new_zeros(self.states.shape[:2])
        self.is_initialized = True

    def num_evicted(self, length: int) -> int:
        """E for a coming segment of `length` tokens."""
        return max(0, self.recent + length - self.capacity) // self.rate * self.rate

    def evict(self, hidden_states: torch.Tensor, valid: torch.Tensor | None) -> Evicted:
        """What of the memory and the coming segment [B, T, hidden] is compressed."""
        if not self.is_initialized:
            self.lazy_initialization(hidden_states)
        check_same_kind(self.states, hidden_states)
        length, start = hidden_states.shape[1], self.held - self.recent
        end, together = self.num_evicted(length), self.recent + length
        return Evicted(
            states=torch.cat([self.states, hidden_states], dim=1)[:, :end].detach(),
            valid=None if valid is None else valid[:, start : start + end],
            usage=None if self.usage is None else nn.functional.pad(self.usage, (0, length))[:, :end],
            start=start,
            age=torch.arange(together, together - end, -1, device=hidden_states.device),
        )

    def remember(self, hidden_states: torch.Tensor, compressed: torch.Tensor, usage: torch.Tensor | None) -> None:
        length = hidden_states.shape[1]
        end, together = self.num_evicted(length), self.recent + length
        if self.usage is not None:
            self.usage = (nn.functional.pad(self.usage, (0, length)) + usage[:, -together:])[:, end:].detach()
        self.states = torch.cat([self.states, hidden_states], dim=1)[:, end:].detach()


class CompressiveStateLayer(CompressiveLayer, HiddenStateLayer):
    """Keeps hidden states [B, M, hidden] and [B, C, hidden]; every segment projects them anew."""

    names = ("states", "compressed")

    @property
    def held(self) -> int:
        return self.recent + self.compressed.shape[1] if self.is_initialized else 0

    def lazy_initialization(self, hidden_states: torch.Tensor) -> None:
        super().lazy_initialization(hidden_states)
        self.compressed = self.states

    def past_states(self, like: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.compressed, self.states], dim=1)

    def remember(self, hidden_states: torch.Tensor, compressed: torch.Tensor, usage: torch.Tensor | None) -> None:
        super().remember(hidden_states, compressed, usage)
        self.compressed = torch.cat([self.compressed, compressed], dim=1)[:, -self.compressed_capacity :].detach()
        self.segments += 1

    def compress(self, compressed: torch.Tensor, project: Callable) -> None:
        """`remember` will."""


class CompressiveKeyValueLayer(CompressiveLayer, KeyValueLayer):
    """Keeps keys and values [B, H, C + M, D], and the hidden states [B, M, hidden] that are yet to be compressed."""

    names = ("states", "keys", "values")

    def __init__(self, config):
        super().__init__(config)
        self.num_compressed = 0

    @property
    def held(self) -> int:
        return self.recent + self.num_compressed

    def reset(self) -> None:
        super().reset()
        self.num_compressed = 0

    def past_states(self, like: torch.Tensor) -> torch.Tensor:
        return like[:, :0]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """What is held, then the new entries; `compress` will shorten it."""
        if self.keys is not None:
            check_same_kind(self.keys, key_states)
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = key_states.detach(), value_states.detach()
        self.segments += 1
        return key_states, value_states

    def compress(self, compressed: torch.Tensor, project: Callable) -> None:
        """Put the compressed entries [B, E / rate, hidden] in the place of the E tokens they stand for."""
        if not compressed.shape[1]:
            return
        start = self.num_compressed
        end = start + compressed.shape[1] * self.rate
        for name, new in zip(("keys", "values"), project(compressed)):
            held = getattr(self, name)
            before = torch.cat([held[..., :start, :], new], dim=-2)[..., -self.compressed_capacity :, :]
            setattr(self, name, torch.cat([before, held[..., end:, :]], dim=-2).detach())
        self.num_compressed = before.shape[-2]


class CompressiveMemory(SegmentMemory):
    """The two memories of a Compressive Transformer; see SegmentMemory.

    Args:
        config: a CompressiveTransformerConfig, for num_hidden_layers, mem_len, compressed_mem_len and compression_rate.
        projected: keep keys and values besides the hidden states that are yet to be compressed; not for training.

    Attributes:
        valid: [B, C + M] bool, False where a place holds padding, or was compressed from some.
    """

    kind = "compressive"
    layer_classes = (CompressiveStateLayer, CompressiveKeyValueLayer)

    @property
    def recent(self) -> int:
        return self.layers[0].recent

    def evict(self, hidden_states: torch.Tensor, layer_idx: int, valid: torch.Tensor | None) -> Evicted:
        """What a layer compresses, given its new input [B, T, hidden] and which keys are `valid` [B, C + M + T]."""
        return self.layers[layer_idx].evict(hidden_states, valid)

    def compress(self, layer_idx: int, compressed: torch.Tensor, project: Callable) -> None:
        """Put `compressed` [B, E / rate, hidden] in the place of what a layer evicted, if it keeps keys and values."""
        self.layers[layer_idx].compress(compressed, project)

    def remember(
        self, hidden_states: torch.Tensor, layer_idx: int, compressed: torch.Tensor, usage: torch.Tensor | None
    ) -> None:
        """Take in a layer's new input, what it evicted in compressed form, and the attention [B, S] that keys got."""
        self.layers[layer_idx].remember(hidden_states, compressed, usage)

    def valid_after(self, valid: torch.Tensor | None, length: int, compress: Callable) -> torch.Tensor | None:
        """What `valid` [B, C + M + T] is once T tokens have come in and `compress` has dealt with those evicted."""
        if valid is None:
            return None
        start = self.held - self.recent
        end = start + self.layers[0].num_evicted(length)
        before = torch.cat([valid[:, :start], compress(valid[:, start:end])], dim=1)
        return torch.cat([before[:, -self.layers[0].compressed_capacity :], valid[:, end:]], dim=1)


def check_memory(memory, kind: str) -> None:
    """Raise ValueError if past_key_values is some other cache. By name: a checkpoint's own code has its own classes."""
    if getattr(memory, "kind", None) != kind:
        raise ValueError(
            f"past_key_values must be a {kind} memory, as earlier calls returned it, got a {type(memory).__name__}; "
            "give None to start with an empty one."
        )


def check_same_kind(held: torch.Tensor, new: torch.Tensor) -> None:
    """Raise ValueError unless the entries differ in nothing but the number of places."""
    for name, mine, other in (
        ("batch size", held.shape[0], new.shape[0]),
        ("sizes", (*held.shape[1:-2], held.shape[-1]), (*new.shape[1:-2], new.shape[-1])),
        ("dtype", held.dtype, new.dtype),
        ("device", held.device, new.device),
    ):
        if mine != other:
            raise ValueError(
                f"past_key_values does not fit the new segment: its {name} is {mine}, the segment's is {other}. "
                "Start with past_key_values=None, or give the memory of this very stream."
            )

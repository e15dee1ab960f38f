"""What the Compressive Transformer keeps: a short memory as Transformer-XL's, and before it one of compressed places
(Rae et al. 2019, arXiv:1911.05507, section 3).

Shapes: B batch, H heads, T new tokens, M places in the short memory, C compressed places before them, D head dim, E
tokens that the short memory has no room for, a multiple of the compression rate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .memory_segments import HiddenStateLayer, KeyValueLayer, MemoryLayer, SegmentMemory, check_same_kind


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

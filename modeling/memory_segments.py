"""The recurrent memory of a Transformer-XL: a Cache of the last `mem_len` slots of every layer.

While gradients flow it keeps each layer's input, detached, so that the key and value projections learn through memory
positions too (Dai et al. 2019, arXiv:1901.02860, section 3.2). Otherwise it keeps projected keys and values, and the
relative keys (projected distances): the same result for far less work.

Shapes: B batch, H heads, T new tokens, M slots of the memory, D head dim, L distances.
"""

import weakref
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin


class MemoryLayer(CacheLayerMixin):
    """The last `capacity` entries of one layer, in tensors whose slots run along dimension -2.

    Attributes:
        names: what the tensors are called.
        zero_start: begin with zero hidden states in every slot, instead of with nothing.
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
        """Number of slots that the next segment sees."""
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
    reach = 0  # no relative keys are at hand

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

    def reach_for(self, key_length: int) -> int:
        return key_length

    def relative_keys(self, reach: int, project: Callable[[], torch.Tensor]) -> torch.Tensor:
        return project()


class KeyValueLayer(MemoryLayer):
    """Keeps keys and values [B, H, M, D], and relative keys [H, L, D] for the distances below `reach`.

    Without gradients new entries are written behind the held ones, which move only when the room behind them is full.
    """

    names = ("keys", "values")

    def __init__(self, config):
        super().__init__(config)
        self.projected_distances: torch.Tensor | None = None
        self.reach = 0
        self._rooms: dict[str, torch.Tensor] = {}
        self._start = 0

    def past_states(self, like: torch.Tensor) -> torch.Tensor:
        batch_size, _, hidden_size = like.shape
        return like.new_zeros(batch_size, 0 if self.is_initialized else self.held, hidden_size)

    def remember(self, hidden_states: torch.Tensor) -> None:
        """`update` did."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if torch.is_grad_enabled():  # a backward pass may read what is returned, so nothing is written there
            self._rooms = {}
            return self.append(key_states, value_states)
        return self._write(key_states, value_states)

    def _write(self, *entries: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is held, then the new entries; the last `capacity` of them stay. Nothing that is held is copied."""
        if not self.is_initialized:
            self.lazy_initialization(*entries)
        for name, new in zip(self.names, entries):
            check_same_kind(getattr(self, name), new)
        length, slots = entries[0].shape[-2], self.held + entries[0].shape[-2]
        self._make_room(slots)
        first, end = self._start, self._start + slots
        self._start = max(first, end - self.capacity)
        for name, new in zip(self.names, entries):
            self._rooms[name][..., end - length : end, :] = new
            setattr(self, name, self._rooms[name][..., self._start : end, :])
        self.segments += 1
        return tuple(self._rooms[name][..., first:end, :] for name in self.names)

    def _make_room(self, slots: int) -> None:
        """For so many slots from `_start` on; else what is held moves to the front of larger tensors."""
        room = self._rooms.get(self.names[0])
        frozen = room is not None and room.is_inference() and not torch.is_inference_mode_enabled()
        if room is None or frozen or self._start + slots > room.shape[-2]:
            self._rooms = {name: _moved(getattr(self, name), slots) for name in self.names}
            self._start = 0

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().change_batch(change)
        self._rooms = {}

    def reach_for(self, key_length: int) -> int:
        """That of the relative keys at hand, or one so large that growing memories seldom ask again."""
        if self.reach >= key_length:
            return self.reach
        return 2 * key_length if self.reach else key_length

    def relative_keys(self, reach: int, project: Callable[[], torch.Tensor]) -> torch.Tensor:
        if reach <= self.reach:
            return self.projected_distances
        projected = project()
        self.projected_distances, self.reach = projected.detach(), reach
        return projected

    def reset(self) -> None:
        super().reset()
        self.projected_distances, self.reach, self._rooms = None, 0, {}


class SegmentMemory(Cache):
    """The memory of a Transformer-XL: made by the model's first call, handed back with the next segment.

    Args:
        config: a TransformerXLConfig, for num_hidden_layers, mem_len and zero_initial_memory.
        projected: keep keys and values instead of hidden states; not for training.

    Attributes:
        valid: [B, M] bool, False where a slot holds padding; None if no slot does.
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
        """Number of slots that the next segment sees."""
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

    def reach(self, key_length: int, layer_idx: int = 0) -> tuple[int, bool]:
        """Below which distance a layer's relative keys are, at least key_length; and whether it has them at hand."""
        layer = self.layers[layer_idx]
        reach = layer.reach_for(key_length)
        return reach, layer.reach == reach

    def relative_keys(self, layer_idx: int, reach: int, project: Callable[[], torch.Tensor]) -> torch.Tensor:
        """[H, L, D]: those a layer has for `reach`, or what `project` gives for it."""
        return self.layers[layer_idx].relative_keys(reach, project)

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
        """Number of slots that hold one token each, the last ones."""
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


def check_memory(memory, kind: str) -> None:
    """Raise ValueError if past_key_values is some other cache. By name: a checkpoint's own code has its own classes."""
    if getattr(memory, "kind", None) != kind:
        raise ValueError(
            f"past_key_values must be a {kind} memory, as earlier calls returned it, got a {type(memory).__name__}; "
            "give None to start with an empty one (instead of prefix tuning, use prompt tuning or LoRA)."
        )


def check_same_kind(held: torch.Tensor, new: torch.Tensor) -> None:
    """Raise ValueError unless the entries differ in nothing but the number of slots."""
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


def _moved(held: torch.Tensor, slots: int) -> torch.Tensor:
    """The held entries at the front of a tensor with a quarter more slots than are needed now."""
    room = held.new_empty(*held.shape[:-2], slots + max(slots // 4, 16), held.shape[-1])
    room[..., : held.shape[-2], :] = held
    return room

"""A decoding cache that keeps only keys somebody can still see, and hands out only those the next queries can see.

What is kept follows from a head's pattern (memory_stores.py). Without gradients, keys are written into their place: no
step copies what earlier steps stored, except that a store which grows doubles its room. Where gradients are enabled,
every step leaves the buffers of earlier ones as they were, for the backward pass to read.

Shapes: B batch, Hk key heads, T new tokens, S keys handed out, W widths of a key and a value together. R rows: 1 where
the whole batch stands at the same position, else B. As a slot, -1 means nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from .attention_masks import VisibleKeys
from .attention_patterns import patterns_for_layers
from .attention_patterns_base import Pattern
from .memory_steps import Step
from .memory_stores import Past


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
    def from_config(cls, config) -> "PatternCache":
        """The cache for one of our decoders, from its config's attention_patterns."""
        if not config.attention_patterns:
            raise ValueError("config.attention_patterns is not set; a model without patterns takes a DynamicCache.")
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
        if self.is_initialized and (len(key_states), key_states.dtype) != (len(self.buffers[0]), self.dtype):
            raise ValueError(
                f"The cache holds {len(self.buffers[0])} rows of {self.dtype}, got keys of {len(key_states)} rows of "
                f"{key_states.dtype}; start with a cache of its own."
            )
        return step

    def _write(self, step: Step, states: torch.Tensor) -> None:
        before = []
        for index, store in enumerate(self.past.stores):
            self.buffers[index] = buffer = self._writable(self.buffers[index], store.room(step.end))
            slots = step.once(store.write_slots).expand(-1, len(store.heads), -1)  # [R, heads, T]
            row, head, token = (slots >= 0).nonzero(as_tuple=True)
            of_head = torch.tensor(store.heads, device=slots.device)[head]
            rows = slice(None) if len(slots) == 1 else row
            places, where = buffer.flatten(2, 3), (rows, head, slots[row, head, token])
            if self.record_past and store.overwrites:
                before.append((index, where, places[where]))
            places[where] = states[rows, of_head, token]
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
    """A step that may be taken back: its states [B, Hk, T, W], what it overwrote (buffer, places, states), and the step
    before it."""

    step: Step
    states: torch.Tensor
    before: list[tuple[int, tuple, torch.Tensor]]
    previous: Step | None


class PatternCacheGenerationMixin(GenerationMixin):
    """`generate()` that uses a PatternCache unless it is asked for another one."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, generation_mode: GenerationMode, *args, **kwargs
    ):
        past, is_assistant = model_kwargs.get("past_key_values"), generation_config.is_assistant
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        self._refuse_what_transformers_cannot(generation_config, model_kwargs, assisted)
        asked = generation_config.cache_implementation is not None or past is not None
        cache = None if asked or generation_config.use_cache is False else self.new_pattern_cache()
        if isinstance(cache, PatternCache) or (cache is not None and not (assisted or is_assistant)):
            if is_assistant:  # its tokens may be taken back, which only a PatternCache can do
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def new_pattern_cache(self) -> Cache | None:
        """The cache that `generate()` begins with; None where Transformers' own is as good."""
        return PatternCache.from_config(self.config) if self.config.attention_patterns else None

    def _refuse_what_transformers_cannot(
        self, generation_config: GenerationConfig, model_kwargs: dict, assisted: bool
    ) -> None:
        """Raise ValueError where `generate()` itself would be wrong, or fail without saying why."""
        past, cache_implementation = model_kwargs.get("past_key_values"), generation_config.cache_implementation
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

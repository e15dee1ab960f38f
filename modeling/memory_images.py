"""The decoding cache of models that are given an image value by value, but may look at it pixel by pixel.

Shapes: B batch, T new values, P new positions of the trunk, W values in a position, d hidden.
"""

import torch
from transformers.cache_utils import Cache


class ImageCache(Cache):
    """Keys and values of the trunk, and what the next values need beside them.

    `get_seq_length` counts values seen (the start token included), while the trunk's cache counts its own positions,
    of which there is one for W values.

    Args:
        trunk: what the layers' keys and values are kept in.

    Attributes:
        values_seen: number of values.
        recent_ids: [B, W - 1] the last ids, which may belong to a position that is not complete.
        first: [B, 1, d] embedding of the start token, that is of the class where there are classes.
        last_hidden: [B, 1, d] hidden state of the newest position.
    """

    def __init__(self, trunk: Cache):
        super().__init__(layers=trunk.layers)
        self.trunk = trunk
        self._forget()

    def _forget(self) -> None:
        self.values_seen = 0
        self.recent_ids = self.first = self.last_hidden = None

    @property
    def nbytes(self) -> int:
        """Bytes of all stored keys and values."""
        return self.trunk.nbytes

    def update(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.trunk.update(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.values_seen

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self.trunk.reset()
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.trunk.reorder_cache(beam_idx)
        self._for_each_state(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.trunk.batch_select_indices(indices)
        self._for_each_state(lambda state: state[indices.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.trunk.batch_repeat_interleave(repeats)
        self._for_each_state(lambda state: state.repeat_interleave(repeats, dim=0))

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("The cache of a model with classes or of whole pixels cannot take values back.")

    def _for_each_state(self, change) -> None:
        for name in ("recent_ids", "first", "last_hidden"):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, change(state))


def image_state(cache: Cache | None) -> ImageCache | None:
    """The cache if it is an ImageCache, perhaps of another copy of this file."""
    return cache if hasattr(cache, "values_seen") else None


def windows(input_ids: torch.Tensor, count: int, cache: Cache | None, width: int) -> torch.Tensor:
    """[B, count, W]: for each of `count` new positions the W ids before it; the newest ids are left in the cache."""
    if width == 1:
        return input_ids[..., None]
    ids = with_recent(input_ids, cache, width)
    seen = 0
    if cache is not None:
        seen, cache.recent_ids = cache.values_seen, ids[:, 1 - width :]
    offset = -seen % width
    return ids[:, offset : offset + count * width].unflatten(1, (count, width))


def for_each_value(hidden_states: torch.Tensor, length: int, cache: Cache | None, width: int) -> torch.Tensor:
    """Hidden states [B, P, d] of new positions -> those of the `length` new values [B, T, d], which share them."""
    state = image_state(cache)
    if width > 1:
        within = 0 if state is None else state.values_seen % width
        if within:  # these values belong to a position that was computed before
            hidden_states = torch.cat([state.last_hidden, hidden_states], dim=1)
        hidden_states = hidden_states.repeat_interleave(width, dim=1)[:, within : within + length]
    if state is not None:
        state.last_hidden = hidden_states[:, -1:]
        state.values_seen += length
    return hidden_states


def with_recent(input_ids: torch.Tensor, cache: Cache | None, width: int) -> torch.Tensor:
    """[B, W - 1 + T]: the new ids behind the last ones that a position of `width` values may need; 0 where none are."""
    recent = getattr(cache, "recent_ids", None)
    if recent is None:
        recent = input_ids.new_zeros(input_ids.shape[0], width - 1)
    return torch.cat([recent, input_ids], dim=1)

"""What XLSparse keeps of the segments it has read: in every layer as much as its pattern reaches back to, and for
padded rows how many tokens were read before.

Shapes: B batch, H heads, T new tokens, M places in memory, L distances.
"""

from collections.abc import Callable

import torch

from .attention_patterns import Pattern, patterns_for_layers
from .memory_segments import HiddenStateLayer, KeyValueLayer, SegmentMemory


def layer_patterns(config) -> list[Pattern]:
    """The pattern of every layer, kept within mem_len tokens if the config has same_length."""
    patterns = patterns_for_layers(config.attention_patterns, config.num_hidden_layers)
    return [pattern.within(config.mem_len) for pattern in patterns] if config.same_length else patterns


class SparseHiddenStateLayer(HiddenStateLayer):
    """Keeps the layer's inputs; relative keys are projected anew with them."""

    reach = 0

    def reach_for(self, key_length: int) -> int:
        return key_length

    def relative_keys(self, reach: int, project: Callable[[], torch.Tensor]) -> torch.Tensor:
        return project()


class SparseKeyValueLayer(KeyValueLayer):
    """Keeps keys and values, and relative keys for the distances below `reach` that are met."""

    reach = 0

    def reach_for(self, key_length: int) -> int:
        """That of the relative keys at hand, or one so large that growing memories seldom ask again."""
        if self.reach >= key_length:
            return self.reach
        return 2 * key_length if self.reach else key_length

    def relative_keys(self, reach: int, project: Callable[[], torch.Tensor]) -> torch.Tensor:
        if reach > self.reach:
            self.projected_distances, self.reach = project().detach(), reach
        return self.projected_distances

    def reset(self) -> None:
        super().reset()
        self.reach = 0


class SparseSegmentMemory(SegmentMemory):
    """The memory of an XLSparse; see SegmentMemory.

    Args:
        config: an XLSparseConfig, for num_hidden_layers, mem_len, attention_patterns and same_length.
        projected: keep keys and values instead of hidden states; not for training.

    Attributes:
        forgotten_padding: [B], how many places of padding lie before those that are held; None if no row was padded.
    """

    kind = "sparse segment"
    layer_classes = (SparseHiddenStateLayer, SparseKeyValueLayer)

    def __init__(self, config, projected: bool = False):
        super().__init__(config, projected)
        self.mem_len = config.mem_len
        self.enough = [max(1, min(config.mem_len, pattern.reach)) for pattern in layer_patterns(config)]
        self.forgotten_padding: torch.Tensor | None = None

    @property
    def held(self) -> int:
        """Number of places in the layer that holds most."""
        return max(layer.held for layer in self.layers)

    def valid_keys(self, new: torch.Tensor | None, batch_size: int, length: int) -> torch.Tensor | None:
        """As every segment memory's; layers will keep what is enough for their pattern, unless padding is among it."""
        valid = super().valid_keys(new, batch_size, length)
        for layer, enough in zip(self.layers, self.enough):
            layer.capacity = enough if valid is None or bool(valid[:, -enough:].all()) else self.mem_len
        return valid

    def reach(self, layer_idx: int, key_length: int) -> tuple[int, bool]:
        """Below which distance a layer's relative keys are, at least key_length; and whether they are at hand."""
        layer = self.layers[layer_idx]
        reach = layer.reach_for(key_length)
        return reach, layer.reach == reach

    def relative_keys(self, layer_idx: int, reach: int, project: Callable[[], torch.Tensor]) -> torch.Tensor:
        """[H, L, D]: those a layer has for `reach`, or what `project` gives for it."""
        return self.layers[layer_idx].relative_keys(reach, project)

    def key_positions(self, valid: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """[B, M + T] positions of what is held and `length` new tokens, of which `valid` says which are no padding;
        None where places are positions."""
        if valid is None and self.forgotten_padding is None:
            return None
        if valid is None:
            valid = torch.ones_like(self.forgotten_padding, dtype=torch.bool)[:, None].expand(-1, self.held + length)
        positions = valid.long().cumsum(dim=-1) - 1 + self.seen - self.held
        if self.forgotten_padding is not None:
            positions = positions - self.forgotten_padding[:, None]
        return positions.clamp(min=0)

    def advance(self, length: int, valid: torch.Tensor | None) -> None:
        super().advance(length, valid)
        if valid is not None:
            gone = (~valid[:, : valid.shape[1] - self.held]).sum(dim=-1)
            self.forgotten_padding = gone if self.forgotten_padding is None else self.forgotten_padding + gone

    def reset(self) -> None:
        super().reset()
        self.forgotten_padding = None

    def _change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._change_batch(change)
        self.forgotten_padding = None if self.forgotten_padding is None else change(self.forgotten_padding)

"""XLSparse: a Transformer-XL (Dai et al. 2019, arXiv:1901.02860) whose layers see the keys that attention patterns show
(Child et al. 2019, arXiv:1904.10509), in the memory as in the segment.

Patterns count tokens from the start of the text, so that strides and blocks keep their phase from segment to segment.
Scores of distances are computed only for distances that a pattern can meet: for L of them, where the text has many
more. Read segment by segment or in one pass, a text gives the same, as far as the memory covers what patterns reach.

Shapes: B batch, T new tokens, M slots of the memory, S = M + T keys, H heads, D head dim, L distances.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .attention import BLOCK_SPARSE, VisibleKeys, lower_mask
from .attention_patterns import Pattern, distances_met, patterns_for_layers
from .configuration_xl_sparse import XLSparseConfig
from .memory_segments import SegmentMemory
from .modeling_transformer_xl import (
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLModel,
    TransformerXLPreTrainedModel,
)
from .positions import DistanceScores, rows_by_distance, scores_by_key


@dataclass(frozen=True)
class MetDistances:
    """Where the queries stand to the keys that a pattern shows them, for all its layers in one call.

    Attributes:
        distances: [L] on the CPU, those below `reach` that are met.
        reach: more than the distance of any query and key.
        states: R [L, hidden] for the distances; None if layers have them projected.
        rows: [B or 1, T, S], where among the distances each query finds each key; None where no T x S is built.
        blind: [B or 1, T, H or 1] bool, queries that see no key at all; None where the backend knows them.
    """

    distances: torch.Tensor
    reach: int
    states: torch.Tensor | None
    rows: torch.Tensor | None = None
    blind: torch.Tensor | None = None
    hidden: ClassVar[None] = None  # the bias is never a mask as well, see RelativePositions

    def bias(self, query: torch.Tensor, relative_key: torch.Tensor, scaling: float) -> torch.Tensor | DistanceScores:
        """What queries [B, H, T, D] and relative keys [H, L, D] have in common, as [B, H, T, S]; or yet to be computed.

        The terms (b) and (d) of Dai et al. 2019, section 3.3, if v has been added to the query.
        """
        if self.rows is None:
            return DistanceScores(query, relative_key, self.distances)
        return scores_by_key(query @ relative_key.transpose(-1, -2) * scaling, self.rows)


class SparseSegmentMemory(SegmentMemory):
    """The memory of an XLSparse: every layer keeps as much as its pattern reaches back to; see SegmentMemory.

    Args:
        config: an XLSparseConfig, for num_hidden_layers, mem_len, attention_patterns and same_length.
        projected: keep keys and values instead of hidden states; not for training.

    Attributes:
        forgotten_padding: [B], how many slots of padding lie before those that are held; None if no row was padded.
    """

    kind = "sparse segment"

    def __init__(self, config, projected: bool = False):
        super().__init__(config, projected)
        self.mem_len = config.mem_len
        self.enough = [max(1, min(config.mem_len, pattern.reach)) for pattern in layer_patterns(config)]
        self.forgotten_padding: torch.Tensor | None = None

    @property
    def held(self) -> int:
        """Number of slots in the layer that holds most."""
        return max(layer.held for layer in self.layers)

    def valid_keys(self, new: torch.Tensor | None, batch_size: int, length: int) -> torch.Tensor | None:
        """As every segment memory's; layers will keep what is enough for their pattern, unless padding is among it."""
        valid = super().valid_keys(new, batch_size, length)
        for layer, enough in zip(self.layers, self.enough):
            layer.capacity = enough if valid is None or bool(valid[:, -enough:].all()) else self.mem_len
        return valid

    def key_positions(self, valid: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """[B, M + T] positions of what is held and `length` new tokens, of which `valid` says which are no padding;
        None where slots are positions."""
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


class XLSparsePreTrainedModel(TransformerXLPreTrainedModel):
    """What Transformers wants to know about the family."""

    config: XLSparseConfig


class XLSparseModel(XLSparsePreTrainedModel, TransformerXLModel):
    """The decoder without a head: ids or embeddings in, hidden states [B, T, hidden] out."""

    memory_class = SparseSegmentMemory

    def __init__(self, config: XLSparseConfig):
        super().__init__(config)
        self.patterns = layer_patterns(config)

    def prepare(
        self, inputs_embeds: torch.Tensor, new_tokens: torch.Tensor | None, memory: SparseSegmentMemory
    ) -> tuple[torch.Tensor | None, list[tuple]]:
        """Which keys are valid [B, S] (None if all), and for every layer the backend's mask and the distances."""
        batch_size, length = inputs_embeds.shape[:2]
        valid = memory.valid_keys(new_tokens, batch_size, length)
        key_positions = memory.key_positions(valid, length)
        views, patterns = {}, [self.local_heads.seen(pattern) for pattern in self.patterns]
        for i, pattern in enumerate(patterns):
            if pattern not in views:
                views[pattern] = self.view(pattern, i, inputs_embeds, valid, key_positions, memory)
        return valid, [views[pattern] for pattern in patterns]

    def view(
        self,
        pattern: Pattern,
        layer_idx: int,
        inputs_embeds: torch.Tensor,
        valid: torch.Tensor | None,
        key_positions: torch.Tensor | None,
        memory: SparseSegmentMemory,
    ) -> tuple:
        """What the layers of a pattern, of which layer_idx is one, see: the backend's mask, and the distances."""
        implementation, device = self.config._attn_implementation, inputs_embeds.device
        (batch_size, length), held = inputs_embeds.shape[:2], memory.layers[layer_idx].held
        seen = VisibleKeys(
            pattern,
            self.local_heads.count,
            causal=True,
            batch_size=batch_size,
            query_length=length,
            key_length=held + length,
            query_offset=memory.seen,
            key_offset=memory.seen - held,
        )
        if key_positions is not None:
            seen = replace(
                seen,
                key_valid=None if valid is None else valid[:, -seen.key_length :],
                query_positions=key_positions[:, -length:],
                key_positions=key_positions[:, -seen.key_length :],
            )
        span = seen.key_length
        if seen.query_positions is not None:  # rows that were padded stand elsewhere, but a backend takes all at once
            span = max(span, int(seen.query_positions.max() - seen.key_positions.min()) + 1)
        reach, at_hand = memory.reach(span, layer_idx)
        distances = distances_met(pattern, reach)
        states = None if at_hand else self.dropout(self.positions.of(distances, inputs_embeds))
        rows, blind = None, None
        if implementation != BLOCK_SPARSE:
            rows = rows_by_distance(distances.to(device), seen.distances(device))
            blind = ~seen.dense(device).any(dim=-1).transpose(1, 2)
        return lower_mask(seen, implementation, device), MetDistances(distances, reach, states, rows, blind)


class XLSparseForCausalLM(XLSparsePreTrainedModel, TransformerXLForCausalLM):
    """The decoder with a softmax over the next token, adaptive where the config has cutoffs or projections."""

    model_class = XLSparseModel


class XLSparseForSequenceClassification(XLSparsePreTrainedModel, TransformerXLForSequenceClassification):
    """The decoder with a linear layer on each row's last token, the rightmost that is not config.pad_token_id."""

    model_class = XLSparseModel


def layer_patterns(config) -> list[Pattern]:
    """The pattern of every layer, kept within mem_len tokens if the config has same_length."""
    patterns = patterns_for_layers(config.attention_patterns, config.num_hidden_layers)
    return [pattern.within(config.mem_len) for pattern in patterns] if config.same_length else patterns


__all__ = [
    "XLSparseForCausalLM",
    "XLSparseForSequenceClassification",
    "XLSparseModel",
    "XLSparsePreTrainedModel",
]

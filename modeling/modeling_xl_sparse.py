"""XLSparse: a Transformer-XL (Dai et al. 2019, arXiv:1901.02860) whose layers see the keys that attention patterns show
(Child et al. 2019, arXiv:1904.10509), in the memory as in the segment.

Patterns count tokens from the start of the text, so that strides and blocks keep their phase from segment to segment.
Scores of distances are computed only for distances that a pattern can meet: for L of them, where the text has many
more. Read segment by segment or in one pass, a text gives the same, as far as the memory covers what patterns reach.

Shapes: B batch, T new tokens, M places in memory, S = M + T keys, H heads, D head dim, L distances.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .attention import BLOCK_SPARSE, VisibleKeys, eager_attention_forward, lower_mask
from .attention_patterns import Pattern, distances_met
from .configuration_xl_sparse import XLSparseConfig
from .memory_sparse_segments import SparseSegmentMemory, layer_patterns
from .modeling_transformer_xl import (
    TransformerXLAttention,
    TransformerXLBlock,
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLModel,
    TransformerXLPreTrainedModel,
)
from .positions import DistanceScores, RelativeBiases, rows_by_distance


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

    def bias(self, query: torch.Tensor, relative_key: torch.Tensor, scaling: float) -> torch.Tensor | DistanceScores:
        """What queries [B, H, T, D] and relative keys [H, L, D] have in common, as [B, H, T, S]; or yet to be computed.

        The terms (b) and (d) of Dai et al. 2019, section 3.3, if v has been added to the query.
        """
        if self.rows is None:
            return DistanceScores(query, relative_key, self.distances)
        by_distance = query @ relative_key.transpose(-1, -2) * scaling
        return by_distance.gather(-1, self.rows[:, None].expand(*by_distance.shape[:2], -1, -1))


class XLSparseAttention(TransformerXLAttention):
    """Attention to those places of memory and segment that a pattern shows."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_states: torch.Tensor,
        attention_mask,
        positions: MetDistances,
        biases: RelativeBiases,
        memory: SparseSegmentMemory,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and the weights [B, H, T, S] where the backend has them.

        past_states are remembered hidden states [B, M or 0, hidden]; what is projected already, the memory adds.
        """
        context = torch.cat([past_states, hidden_states], dim=1)
        query = self.split_heads(self.q_proj(hidden_states))  # [B, H, T, D]
        key, value = memory.update(
            self.split_heads(self.k_proj(context)), self.split_heads(self.v_proj(context)), self.layer_idx
        )  # [B, H, S, D]
        relative_key = memory.relative_keys(
            self.layer_idx, positions.reach, lambda: self.split_heads(self.r_proj(positions.states))
        )  # [H, L, D]
        content_query, position_query = biases(query)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            content_query,
            key,
            value,
            attention_mask,
            position_bias=positions.bias(position_query, relative_key, self.scaling),
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,  # the mask says all
            **kwargs,
        )  # [B, T, H, D]
        if positions.blind is not None:  # with a bias, sdpa averages over hidden keys where there are no others
            output = output.masked_fill(positions.blind[..., None], 0.0)
        return self.o_proj(output.flatten(2)), weights


class XLSparseBlock(TransformerXLBlock):
    """Residual block of a Transformer-XL around attention by pattern."""

    attention_class = XLSparseAttention


class XLSparsePreTrainedModel(TransformerXLPreTrainedModel):
    """What Transformers wants to know about the family."""

    config: XLSparseConfig
    _no_split_modules = ["XLSparseBlock"]
    _can_record_outputs = {"hidden_states": XLSparseBlock, "attentions": XLSparseAttention}


class XLSparseModel(XLSparsePreTrainedModel, TransformerXLModel):
    """The decoder without a head: ids or embeddings in, hidden states [B, T, hidden] out."""

    memory_class = SparseSegmentMemory
    block_class = XLSparseBlock

    def __init__(self, config: XLSparseConfig):
        super().__init__(config)
        self.patterns = layer_patterns(config)

    @capture_outputs
    def read_segment(
        self,
        inputs_embeds: torch.Tensor,
        new_tokens: torch.Tensor | None,
        memory: SparseSegmentMemory,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """One segment [B, T, hidden], of which new_tokens [B, T] says what is no padding; the memory takes it in."""
        batch_size, length = inputs_embeds.shape[:2]
        valid = memory.valid_keys(new_tokens, batch_size, length)
        key_positions = memory.key_positions(valid, length)
        views = {}
        for i, pattern in enumerate(self.patterns):
            if pattern not in views:
                views[pattern] = self.view(pattern, i, inputs_embeds, valid, key_positions, memory)
        hidden_states = self.dropout(inputs_embeds)
        for i, (layer, pattern) in enumerate(zip(self.layers, self.patterns)):
            entering, past_states = hidden_states, memory.past_states(hidden_states, i)
            hidden_states = layer(hidden_states, past_states, *views[pattern], self.biases_of(i), memory, **kwargs)
            memory.remember(entering, i)
        memory.advance(length, valid)
        return BaseModelOutputWithPast(last_hidden_state=self.dropout(hidden_states))

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
            self.config.num_attention_heads,
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
        reach, at_hand = memory.reach(layer_idx, seen.key_length)
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


__all__ = [
    "XLSparseForCausalLM",
    "XLSparseForSequenceClassification",
    "XLSparseModel",
    "XLSparsePreTrainedModel",
]

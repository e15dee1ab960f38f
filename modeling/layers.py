"""The layers of Vaswani et al. 2017 (arXiv:1706.03762): attention, feed-forward networks, residual connections.

A config says how large they are, how they know order and where norms stand. Equation and section numbers are the
paper's.

Shapes: B batch, T queries, S keys, H heads, D head dim.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import eager_attention_forward
from .position_schemes import POSITION_SCHEMES


class MultiHeadAttention(nn.Module):
    """Multi-head attention (section 3.2.2); the source of keys and values may be another sequence."""

    def __init__(self, config, layer_idx: int, is_causal: bool = False, order: bool = True):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.positions = POSITION_SCHEMES[config.position_encoding if order else "none"].layer(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask,
        order=None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Self-attention: [B, T, hidden] -> [B, T, hidden], and the weights [B, H, T, S] where the backend has them."""
        query = self.split_heads(self.q_proj(hidden_states))  # [B, H, T, D]
        key, value = self.split_heads(self.k_proj(hidden_states)), self.split_heads(self.v_proj(hidden_states))
        query, key = self.positions.turn(query, key, order)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.attend(query, key, value, attention_mask, order, **kwargs)

    def attend(self, query, key, value, attention_mask, order=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Equation 1 for all heads, and W^O."""
        query, value, position_bias = self.positions.relate(query, value, order, self.scaling)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            position_bias=position_bias,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )  # [B, T, H, D]
        output = self.positions.collect(output, attention_mask, order)
        return self.o_proj(output.flatten(2)), weights

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """[B, T, H * D] -> [B, H, T, D]."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class CrossAttention(MultiHeadAttention):
    """Attention to the encoder's states, whose keys and values are computed once and cached. It knows no order."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx, order=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, hidden] and the encoder's [B, S, hidden] -> [B, T, hidden], and the weights where there are any."""
        query = self.split_heads(self.q_proj(hidden_states))
        key, value = self.keys_and_values(encoder_hidden_states, past_key_values)
        return self.attend(query, key, value, attention_mask, **kwargs)

    def keys_and_values(self, states: torch.Tensor, past_key_values) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H, S, D] each; from the cache once they are in it."""
        caches = hasattr(past_key_values, "cross_attention_cache")
        if caches and past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = self.split_heads(self.k_proj(states)), self.split_heads(self.v_proj(states))
        if caches:
            key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        return key, value


class FeedForward(nn.Module):
    """Position-wise feed-forward network max(0, x W_1 + b_1) W_2 + b_2 (equation 2)."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(hidden_states))))


class PostNorm(nn.Module):
    """A residual connection as published: LayerNorm(x + Sublayer(x)) (section 3.1)."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, sublayer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return self.norm(hidden_states + self.dropout(sublayer(hidden_states)))


class PreNorm(PostNorm):
    """One whose sum is not normalised: x + Sublayer(LayerNorm(x)) (Xiong et al. 2020, arXiv:2002.04745)."""

    def forward(self, hidden_states: torch.Tensor, sublayer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return hidden_states + self.dropout(sublayer(self.norm(hidden_states)))


def residual_connection(config) -> PostNorm:
    """The residual connection around a sublayer."""
    return PreNorm(config) if config.norm_first else PostNorm(config)


def final_norm(config) -> nn.Module:
    """What ends a stack: sums that were never normalised are normalised here."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()


def label_smoothed_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """Cross-entropy of logits [B, T, V] to labels [B, T] of the same positions, in float32 (section 5.4).

    Args:
        label_smoothing: probability that the targets spread evenly over all V ids.
        num_items_in_batch: what the sum is divided by, where a batch is read in several steps; the number of labels
            that are not ignore_index if None.
    """
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, -2),
        labels.to(logits.device).flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses / num_items_in_batch

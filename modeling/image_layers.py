"""The layers of the Image Transformer (Parmar et al. 2018, arXiv:1802.05751).

Shapes: B batch, P positions, H heads, D head dim.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import eager_attention_forward


class ImageTransformerAttention(nn.Module):
    """Multi-head attention (equation 1) to the same sequence, or to an encoder's."""

    def __init__(self, config, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, P, hidden] -> [B, P, hidden], and the weights [B, H, P, keys] where the backend has them."""
        query = self._heads(self.q_proj(hidden_states))  # [B, H, P, D]
        key, value = self._keys_and_values(hidden_states, encoder_hidden_states, past_key_values)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # [B, P, H, D]
        return self.o_proj(output.flatten(2)), weights

    def _keys_and_values(self, hidden_states, encoder_hidden_states, past_key_values):
        if encoder_hidden_states is None:
            key, value = self._heads(self.k_proj(hidden_states)), self._heads(self.v_proj(hidden_states))
            return (key, value) if past_key_values is None else past_key_values.update(key, value, self.layer_idx)
        kept = past_key_values.layers[self.layer_idx] if _holds(past_key_values, self.layer_idx) else None
        if kept is not None:  # the encoder's keys are those of the first step
            return kept.keys, kept.values
        key, value = self._heads(self.k_proj(encoder_hidden_states)), self._heads(self.v_proj(encoder_hidden_states))
        return (key, value) if past_key_values is None else past_key_values.update(key, value, self.layer_idx)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MatchingKeys(nn.Linear):
    """Keys of an encoder's positions that at first are what the queries of these would be.

    So a position of the large image looks at like coordinates of the small one from the start; from independent weights
    that takes most of a short training to learn.
    """

    def __init__(self, q_proj: nn.Linear):
        super().__init__(q_proj.in_features, q_proj.out_features, bias=False)
        self.queries = (q_proj,)  # in a tuple, so that it stays no part of this module

    def init_weights(self) -> None:
        init.normal_(self.queries[0].weight, std=self.in_features**-0.5)
        init.copy_(self.weight, self.queries[0].weight)


def _holds(cache: Cache | None, layer_idx: int) -> bool:
    return cache is not None and cache.get_seq_length(layer_idx) > 0


class ImageTransformerMLP(nn.Module):
    """Position-wise feed-forward layer W_1 relu(W_2 x) (equation 2)."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class ImageTransformerBlock(GradientCheckpointingLayer):
    """Attention and a feed-forward layer, each followed by dropout, the residual and a norm (equations 1 and 2)."""

    def __init__(self, config, layer_idx: int, is_causal: bool = True, cross: bool = False):
        super().__init__()
        self.self_attn = ImageTransformerAttention(config, layer_idx, is_causal)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = ImageTransformerAttention(config, layer_idx, is_causal=False) if cross else None
        if cross:
            self.cross_attn.k_proj = MatchingKeys(self.cross_attn.q_proj)
        self.cross_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if cross else None
        self.mlp = ImageTransformerMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask=None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask=None,
        past_key_values: Cache | None = None,
        cross_past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        hidden_states = self.self_attn_norm(hidden_states + self.dropout(attended))  # equation 1
        if self.cross_attn is not None:
            attended, _ = self.cross_attn(
                hidden_states,
                encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                past_key_values=cross_past_key_values,
                **kwargs,
            )
            hidden_states = self.cross_attn_norm(hidden_states + self.dropout(attended))
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))  # equation 2

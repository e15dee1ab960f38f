"""Sparse Transformer: Child, Gray, Radford and Sutskever 2019, "Generating Long Sequences with Sparse Transformers".

A deep decoder whose heads each see a sparse set of earlier positions, so that a few steps connect any two of them.
Equation and section numbers are those of arXiv:1904.10509.

Shapes: B batch, T new tokens, S keys, H heads, D head dim of queries and keys, Dv head dim of values.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import CachingPatternBackend, eager_attention_forward, in_float32, layer_masks, new_positions
from .attention_patterns import patterns_for_layers
from .cache_patterns import PatternCacheGenerationMixin
from .causal_lm import CausalLMHead, position_wise
from .checks import check_embeddings, check_one_input, check_positions, check_token_ids
from .classification import SequenceClassificationHead
from .configuration_sparse_transformer import SparseTransformerConfig


class AxialPositionEmbedding(nn.Module):
    """Learned embeddings of a position's coordinates along several axes, summed (Child et al. 2019, section 5.3).

    Position t of data laid out in `shape` has the coordinates `unravel(t, shape)`: row, column and channel for an
    image; for text or audio, row and column of a matrix whose width is the attention's stride.

    Args:
        shape: length of each axis, the last one running fastest.
        hidden_size: width of the embeddings.
    """

    def __init__(self, shape: list[int], hidden_size: int):
        super().__init__()
        self.shape = tuple(shape)
        self.axes = nn.ModuleList(nn.Embedding(length, hidden_size) for length in shape)

    @property
    def num_positions(self) -> int:
        return math.prod(self.shape)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] positions -> [B, T, hidden]."""
        embeddings, rest = 0, position_ids
        for axis, length in zip(reversed(self.axes), reversed(self.shape)):
            embeddings = embeddings + axis(rest % length)
            rest = rest // length
        return embeddings


# By the config's `norm`.
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class SparseTransformerAttention(nn.Module):
    """Factorised self-attention (equations 2 to 8): each head attends to the keys that the layer's pattern shows it."""

    def __init__(self, config: SparseTransformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        self.scaling = config.qk_head_dim**-0.5
        heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * config.qk_head_dim)
        self.k_proj = nn.Linear(config.hidden_size, heads * config.qk_head_dim)
        self.v_proj = nn.Linear(config.hidden_size, heads * config.v_head_dim)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size)
        self.o_proj.init_divisor = 2 * config.num_hidden_layers  # W_p shrinks by 1 / sqrt(2 N), section 5.2

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and the weights [B, H, T, S] where the backend has them."""
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)  # [B, H, T, D]
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.v_head_dim)).transpose(1, 2)  # [B, H, T, Dv]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        sampling = past_key_values is not None and not self.training
        if sampling and self.config.upcast_sampling and value.dtype in (torch.float16, torch.bfloat16):
            attention = in_float32(attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # [B, T, H, Dv], equations 2 and 3
        return self.o_proj(output.flatten(2)), weights  # W_p, equation 5


class SparseTransformerMLP(nn.Module):
    """Position-wise feed-forward layer W_2 f(W_1 x + b_1) + b_2 with f(x) = x * sigmoid(1.702 x) (section 5.2)."""

    def __init__(self, config: SparseTransformerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.down_proj.init_divisor = 2 * config.num_hidden_layers  # W_2 too
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class SparseTransformerBlock(GradientCheckpointingLayer):
    """Residual block with pre-norm and dropout at the end of each branch (equations 10 and 12 to 14).

    With `model.gradient_checkpointing_enable()` attention and feed-forward are computed again in the backward pass
    (section 5.4).
    """

    def __init__(self, config: SparseTransformerConfig, layer_idx: int):
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SparseTransformerAttention(config, layer_idx)
        self.mlp_norm = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SparseTransformerMLP(config)
        self.dropout = nn.Dropout(config.resid_dropout)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask=None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.dropout(
            self.self_attn(
                self.attention_norm(hidden_states), attention_mask, past_key_values=past_key_values, **kwargs
            )[0]
        )  # H + a(H), equation 12
        if self.chunk_size:
            return position_wise(self.feed_forward, hidden_states, self.chunk_size)
        return self.feed_forward(hidden_states)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))  # + b(H), equations 13 and 14


class SparseTransformerPreTrainedModel(CachingPatternBackend, PreTrainedModel):
    """Initial weights, and what Transformers wants to know about the family."""

    config: SparseTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparseTransformerBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": SparseTransformerBlock, "attentions": SparseTransformerAttention}

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """Leave the 2-D padding mask alone: `forward` builds each layer's own mask, whatever the cache."""
        return attention_mask

    @torch.no_grad()
    def _init_weights(self, module):
        """Variance 0.125 / inputs (section 6), less where a module says `init_divisor`.

        The paper writes N(0, 0.125 / sqrt(inputs)); its authors' code has this variance.
        """
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            divisor = module.weight.shape[-1] * getattr(module, "init_divisor", 1)
            init.normal_(module.weight, std=math.sqrt(self.config.initializer_scale / divisor))


class SparseTransformerModel(SparseTransformerPreTrainedModel):
    """The decoder without a head (equations 9 and 10): ids or embeddings in, hidden states [B, T, hidden] out."""

    def __init__(self, config: SparseTransformerConfig):
        super().__init__(config)
        self.patterns = patterns_for_layers(config.attention_patterns, config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = AxialPositionEmbedding(config.position_shape, config.hidden_size)
        for axis in self.embed_positions.axes:
            axis.init_divisor = len(config.position_shape)  # n_emb, section 6
        self.dropout = nn.Dropout(config.embedding_dropout) if config.embedding_dropout else nn.Identity()
        self.layers = nn.ModuleList(SparseTransformerBlock(config, i) for i in range(config.num_hidden_layers))
        eps = config.layer_norm_eps if config.final_norm_eps is None else config.final_norm_eps
        self.norm = NORMS[config.norm](config.hidden_size, eps=eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, T] token ids, or give inputs_embeds [B, T, hidden], to which positions are still added.
            attention_mask: [B, past + T], 1 for tokens and 0 for padding, on either side.
            position_ids: [B, T] positions of the tokens; counted from the mask if None.
            past_key_values: what earlier calls returned.
        """
        check_one_input(input_ids, inputs_embeds)
        if inputs_embeds is None:
            check_token_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        else:
            check_embeddings(inputs_embeds, self.config.hidden_size)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        patterns = self.patterns[: self.config.num_hidden_layers]  # fewer than there are layers in an early exit
        said = (attention_mask, position_ids, past_key_values)
        masks = layer_masks(patterns, self.config, inputs_embeds, *said, heads=self.local_heads)
        position_ids, counted_to = new_positions(inputs_embeds, attention_mask, position_ids, past_key_values)
        check_positions(position_ids, self.embed_positions.num_positions, counted_to)
        hidden_states = self.dropout(inputs_embeds + self.embed_positions(position_ids))  # equation 15
        del inputs_embeds  # as large as the hidden states
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(hidden_states, mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class SparseTransformerForCausalLM(CausalLMHead, SparseTransformerPreTrainedModel, PatternCacheGenerationMixin):
    """The decoder with a linear layer to the next token's logits (equation 11), which is 0 at first."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SparseTransformerConfig):
        super().__init__(config)
        self.model = SparseTransformerModel(config)
        outputs = config.vocab_size if config.output_vocab_size is None else config.output_vocab_size
        self.lm_head = nn.Linear(config.hidden_size, outputs, bias=False)
        if not config.tie_word_embeddings:
            self.lm_head.init_divisor = math.inf  # logits of 0, section 6
        self.post_init()


class SparseTransformerForSequenceClassification(SequenceClassificationHead, SparseTransformerPreTrainedModel):
    """The decoder with a linear layer on each row's last token, the rightmost that is not config.pad_token_id."""

    def __init__(self, config: SparseTransformerConfig):
        super().__init__(config)
        self.model = SparseTransformerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = [
    "SparseTransformerForCausalLM",
    "SparseTransformerForSequenceClassification",
    "SparseTransformerModel",
    "SparseTransformerPreTrainedModel",
]

"""RoPE decoder: rotary positions, RMSNorm, gated feed-forward layers, grouped heads.

The decoder of Llama (Touvron et al. 2023, arXiv:2302.13971) with the rotary positions of RoFormer (Su et al. 2021,
arXiv:2104.09864), or with other positions or none in their place; any layer may follow an attention pattern.
`hf-tfamily convert` turns checkpoints of stock classes into this one and back.

Shapes: B batch, T new tokens, H query heads, Hk key heads, D head dim, R rotated dimensions of D.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import (
    CACHE,
    CachingPatternBackend,
    check_heads_of_mask,
    eager_attention_forward,
    layer_masks,
    new_positions,
    query_and_key_positions,
)
from .attention_patterns import Full, patterns_for_layers
from .cache_patterns import PatternCacheGenerationMixin
from .causal_lm import CausalLMHead, position_wise
from .checks import check_embeddings, check_one_input, check_token_ids
from .classification import SequenceClassificationHead, TokenClassificationHead
from .configuration_rope_decoder import RoPEDecoderConfig
from .positions import POSITION_SCHEMES, ROTARY_LAYOUTS, RotaryEmbedding, nothing_seen_is_zero

# Their masks come from `layer_masks`; all others (flash attention, Hub kernels, vLLM) get Transformers' own.
PATTERN_BACKENDS = ("eager", "sdpa", "flex_attention", "block_sparse")


def unchanged(states: torch.Tensor, *_) -> torch.Tensor:
    """Queries and keys that no rotation tells their order, or outputs."""
    return states


def rotations(model: "RoPEDecoderModel", inputs_embeds, attention_mask, position_ids, past_key_values) -> dict:
    """The layers' arguments that tell them the positions of new tokens: angles."""
    position_ids, _ = new_positions(inputs_embeds, attention_mask, position_ids, past_key_values)
    cos, sin = model.rotary_emb(inputs_embeds, position_ids)
    return {"position_embeddings": (cos[:, None], sin[:, None])}  # [B, 1, T, R / 2]


def scored_distances(model: "RoPEDecoderModel", inputs_embeds, attention_mask, position_ids, past_key_values) -> dict:
    """The same as a bias on the scores, which depends on the head and the distance alone."""
    check_scored(model, f"position_encoding={model.config.position_encoding!r}", past_key_values)
    queries, keys = query_and_key_positions(inputs_embeds, attention_mask, position_ids, past_key_values)
    return {"position_bias": model.positions.prepare(queries, keys, True, inputs_embeds, model.local_heads)}


def check_scored(model: "RoPEDecoderModel", who: str, past_key_values: Cache | None) -> None:
    """Raise ValueError where backend or cache cannot give `who` adds to the scores what it needs."""
    implementation = model.config._attn_implementation
    if implementation not in PATTERN_BACKENDS:
        raise ValueError(
            f"attn_implementation={implementation!r} adds no bias to the scores, which {who} needs; use "
            f"{', '.join(map(repr, PATTERN_BACKENDS))}."
        )
    if hasattr(past_key_values, "announce"):
        raise ValueError(
            f"{who} needs every past key, which a pattern-aware cache does not keep; pass "
            "past_key_values=DynamicCache()."
        )


def no_positions(*said) -> dict:
    """Causality alone tells order (Kazemnejad et al. 2023, arXiv:2305.19466)."""
    return {}


ORDERS = {"rotary": rotations, "alibi": scored_distances, "t5": scored_distances, "none": no_positions}


class RoPEDecoderAttention(nn.Module):
    """Self-attention with rotated queries and keys; each key head serves a group of query heads."""

    def __init__(self, config: RoPEDecoderConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        scored = ORDERS[config.position_encoding] is scored_distances
        self.rotate = ROTARY_LAYOUTS[config.rotary_layout] if config.position_encoding == "rotary" else unchanged
        self.collect = nothing_seen_is_zero if scored else unchanged
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask,
        position_embeddings: tuple[torch.Tensor, ...] = (),
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and the weights [B, H, T, S] where the backend has them."""
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, Hk, T, D]
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key = self.rotate(query, *position_embeddings), self.rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        check_heads_of_mask(attention_mask, query.shape[1])
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # [B, T, H, D]
        return self.o_proj(self.collect(output, attention_mask).flatten(2)), weights


class RoPEDecoderMLP(nn.Module):
    """Gated feed-forward layer, down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(self, config: RoPEDecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class RoPEDecoderBlock(GradientCheckpointingLayer):
    """Residual block with pre-norm."""

    attention_class = RoPEDecoderAttention

    def __init__(self, config: RoPEDecoderConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = self.attention_class(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = RoPEDecoderMLP(config)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask=None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        if self.chunk_size:
            return position_wise(self.feed_forward, hidden_states, self.chunk_size)
        return self.feed_forward(hidden_states)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class RoPEDecoderPreTrainedModel(CachingPatternBackend, PreTrainedModel):
    """What Transformers wants to know about the family."""

    config: RoPEDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RoPEDecoderBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": RoPEDecoderBlock, "attentions": RoPEDecoderAttention}

    @property
    def scores_distances(self) -> bool:
        return ORDERS[self.config.position_encoding] is scored_distances

    def create_masks_for_generate(
        self, inputs_embeds, attention_mask=None, past_key_values=None, position_ids=None, **kwargs
    ) -> dict | torch.Tensor | None:
        """Each layer's mask, made outside the step that `generate` compiles for a static cache; where distances are
        scored, the padding mask, which says how far tokens lie apart."""
        if self.scores_distances:
            return attention_mask
        past_key_values = kwargs.get(CACHE, past_key_values)
        masks = self.base_model.make_masks(inputs_embeds, attention_mask, position_ids, past_key_values)
        return dict(enumerate(masks))


class RoPEDecoderModel(RoPEDecoderPreTrainedModel):
    """The decoder without a head: ids or embeddings in, hidden states [B, T, hidden] out."""

    block_class = RoPEDecoderBlock

    def __init__(self, config: RoPEDecoderConfig):
        super().__init__(config)
        patterns = Full() if config.attention_patterns is None else config.attention_patterns
        self.patterns = patterns_for_layers(patterns, config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.block_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.order_of = ORDERS[config.position_encoding]
        if self.order_of is rotations:
            self.rotary_emb = RotaryEmbedding(config)
        else:
            self.positions = POSITION_SCHEMES[config.position_encoding](config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, T] token ids, or give inputs_embeds [B, T, hidden].
            attention_mask: [B, past + T], 1 for tokens and 0 for padding, on either side; or [B or 1, H or 1, T, S],
                which then says all, causality included (patterns still hold); or what create_masks_for_generate made.
            position_ids: [B or 1, T] positions of the tokens; counted from the mask if None. Where they start anew in
                a row without a mask, the row packs several documents.
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

        masks = self.make_masks(inputs_embeds, attention_mask, position_ids, past_key_values, "cache" in kwargs)
        order = self.order_of(self, inputs_embeds, attention_mask, position_ids, past_key_values)
        position_ids, _ = new_positions(inputs_embeds, attention_mask, position_ids, past_key_values)
        hidden_states = inputs_embeds
        del inputs_embeds  # the layers need not keep it
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(
                hidden_states,
                mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **order,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def make_masks(self, inputs_embeds, attention_mask, position_ids, past_key_values, paged: bool = False) -> list:
        """One mask for each layer. Without patterns any attention implementation of Transformers will do.

        Args:
            paged: the keys are in the cache of continuous batching, which made a mask for all that it holds.
        """
        patterns = self.patterns[: self.config.num_hidden_layers]  # fewer than there are layers in an early exit
        if isinstance(attention_mask, dict):
            return [attention_mask[layer] for layer in range(len(patterns))]
        stock = paged or self.config._attn_implementation not in PATTERN_BACKENDS
        if self.config.attention_patterns is None and stock:
            mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
            return [mask] * len(patterns)
        causal = attention_mask is None or attention_mask.ndim != 4
        said = (attention_mask, position_ids, past_key_values)
        return layer_masks(patterns, self.config, inputs_embeds, *said, causal=causal, heads=self.local_heads)


class RoPEDecoderForCausalLM(CausalLMHead, RoPEDecoderPreTrainedModel, PatternCacheGenerationMixin):
    """The decoder with a linear layer to the next token's logits."""

    model_class = RoPEDecoderModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: RoPEDecoderConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._can_compile_fullgraph = not self.scores_distances  # whose length is looked at
        self.post_init()

    def obstacle_to_paging(self) -> str | None:
        if self.scores_distances:
            return f"keeps no distances, which position_encoding={self.config.position_encoding!r} scores"
        return super().obstacle_to_paging()

    def new_pattern_cache(self) -> Cache | None:
        return None if self.scores_distances else super().new_pattern_cache()


class RoPEDecoderForSequenceClassification(SequenceClassificationHead, RoPEDecoderPreTrainedModel):
    """The decoder with a linear layer on each row's last token, the rightmost that is not config.pad_token_id."""

    def __init__(self, config: RoPEDecoderConfig):
        super().__init__(config)
        self.model = RoPEDecoderModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class RoPEDecoderForTokenClassification(TokenClassificationHead, RoPEDecoderPreTrainedModel):
    """The decoder with a linear layer on every token."""

    def __init__(self, config: RoPEDecoderConfig):
        super().__init__(config)
        self.model = RoPEDecoderModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


RoPEDecoder = RoPEDecoderModel

__all__ = [
    "RoPEDecoder",
    "RoPEDecoderForCausalLM",
    "RoPEDecoderForSequenceClassification",
    "RoPEDecoderForTokenClassification",
    "RoPEDecoderModel",
    "RoPEDecoderPreTrainedModel",
]

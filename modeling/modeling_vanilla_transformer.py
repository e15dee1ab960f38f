"""Vanilla Transformer: Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser and Polosukhin 2017, "Attention Is All
You Need".

An encoder reads the source, a decoder writes the target one token after the other and attends to what the encoder made
of the source. How order enters either stack is a choice of the config (positions.py). Equation and section numbers are
those of arXiv:1706.03762.

Shapes: B batch, T target tokens (or tokens of the only sequence), S source tokens, H heads, D head dim; in attention
T queries and S keys.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import (
    CachingPatternBackend,
    cross_attention_mask,
    eager_attention_forward,
    heads_of,
    layer_masks,
    query_and_key_positions,
)
from .attention_patterns import Full, Pattern, patterns_for_layers
from .cache_patterns import PatternCache, PatternCacheGenerationMixin
from .causal_lm import CausalLMHead, label_smoothed_loss, loss_by_config, own_smoothing, position_wise
from .checks import check_embeddings, check_one_input, check_positions, check_some_token, check_token_ids
from .configuration_vanilla_transformer import VanillaTransformerConfig
from .positions import POSITION_SCHEMES, RelativeBiases, T5Buckets


class FeedForward(nn.Module):
    """Position-wise feed-forward network max(0, x W_1 + b_1) W_2 + b_2 (equation 2)."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.layer_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.layer_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(hidden_states))))


def layer_norm(config) -> nn.LayerNorm:
    """A norm of a stack."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.layer_bias)


class PostNorm(nn.Module):
    """A residual connection as published: LayerNorm(x + Sublayer(x)) (section 3.1).

    The sublayer comes as a function: tools that keep weights elsewhere would move a module that is an argument.
    """

    def __init__(self, config):
        super().__init__()
        self.norm = layer_norm(config)
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
    return layer_norm(config) if config.norm_first else nn.Identity()


class MultiHeadAttention(nn.Module):
    """Multi-head attention (section 3.2.2); the source of keys and values may be another sequence."""

    def __init__(self, config, layer_idx: int, is_causal: bool = False, order: bool = True):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.layer_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.layer_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.layer_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.layer_bias)
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
        query, key = self.positions.rotate(query, key, order)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.attend(query, key, value, attention_mask, order, **kwargs)

    def attend(self, query, key, value, attention_mask, order=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Equation 1 for all heads, and W^O."""
        heads = heads_of(self, self.config.num_attention_heads)
        query, value, position_bias = self.positions.relate(query, value, order, self.scaling, heads)
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
        output = self.positions.collect(output, attention_mask, order, heads)
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


class FeedForwardBranch:
    """What ends a block: a feed-forward network, config.chunk_size_feed_forward positions at a time."""

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branch = partial(self.mlp_residual, sublayer=lambda states: self.mlp(states))
        return position_wise(branch, hidden_states, self.chunk_size) if self.chunk_size else branch(hidden_states)


class VanillaTransformerEncoderBlock(FeedForwardBranch, GradientCheckpointingLayer):
    """Self-attention and a feed-forward network (section 3.1)."""

    def __init__(self, config: VanillaTransformerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MultiHeadAttention(config, layer_idx)
        self.self_attn_residual = residual_connection(config)
        self.mlp = FeedForward(config)
        self.mlp_residual = residual_connection(config)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(
        self, hidden_states: torch.Tensor, attention_mask=None, order=None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        hidden_states = self.self_attn.positions.enter(hidden_states, order)
        hidden_states = self.self_attn_residual(
            hidden_states, lambda states: self.self_attn(states, attention_mask, order, **kwargs)[0]
        )
        return self.feed_forward(hidden_states)


class VanillaTransformerDecoderBlock(FeedForwardBranch, GradientCheckpointingLayer):
    """Causal self-attention, attention to the encoder, and a feed-forward network (section 3.1)."""

    def __init__(self, config: VanillaTransformerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MultiHeadAttention(config, layer_idx, is_causal=True)
        self.self_attn_residual = residual_connection(config)
        if config.is_encoder_decoder or config.add_cross_attention:
            self.cross_attn = CrossAttention(config, layer_idx)
            self.cross_attn_residual = residual_connection(config)
        self.mlp = FeedForward(config)
        self.mlp_residual = residual_connection(config)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask=None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask=None,
        order=None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        own_past = getattr(past_key_values, "self_attention_cache", past_key_values)
        hidden_states = self.self_attn.positions.enter(hidden_states, order)
        hidden_states = self.self_attn_residual(
            hidden_states,
            lambda states: self.self_attn(states, attention_mask, order, past_key_values=own_past, **kwargs)[0],
        )
        if encoder_hidden_states is not None:
            hidden_states = self.cross_attn_residual(
                hidden_states,
                lambda states: self.cross_attn(
                    states, encoder_hidden_states, encoder_attention_mask, past_key_values, **kwargs
                )[0],
            )
        return self.feed_forward(hidden_states)


class VanillaTransformerPreTrainedModel(CachingPatternBackend, PreTrainedModel):
    """Initial weights, and what Transformers wants to know about the family."""

    config: VanillaTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VanillaTransformerEncoderBlock", "VanillaTransformerDecoderBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def follows_patterns(self) -> bool:
        """Not where the scores need a bias that is a tensor, which masks are faster with."""
        patterns = self.config.attention_patterns or getattr(self.config, "decoder_attention_patterns", None)
        scheme = POSITION_SCHEMES[self.config.position_encoding]
        return bool(patterns) and (scheme.as_data or not scheme.biases_scores)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """Leave the 2-D padding mask alone: `forward` builds each layer's own mask, whatever the cache."""
        return attention_mask

    def _resize_token_embeddings(self, new_num_tokens: int, *args, **kwargs) -> nn.Module:
        """Source and target embeddings both, also where each has a table of its own."""
        target_size = getattr(self.config, "target_vocab_size", None)
        if target_size is not None:
            raise ValueError(
                f"Source and target have vocabularies of their own (vocab_size={self.config.vocab_size}, "
                f"target_vocab_size={target_size}), which cannot be resized together; make a new config."
            )
        resized = super()._resize_token_embeddings(new_num_tokens, *args, **kwargs)
        decoder = getattr(self.base_model, "decoder", None)
        if decoder is not None and decoder.embed_tokens.num_embeddings != resized.num_embeddings:
            decoder.embed_tokens = self._get_resized_embeddings(decoder.embed_tokens, resized.num_embeddings)
        return resized

    @torch.no_grad()
    def _init_weights(self, module):
        """As in the authors' code: linear layers as Glorot and Bengio 2010 have them, embeddings N(0, 1 / hidden)."""
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if isinstance(module, nn.Linear):
            bound = factor * math.sqrt(6 / sum(module.weight.shape))
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=factor * module.embedding_dim**-0.5)
        elif isinstance(module, T5Buckets):
            init.normal_(module.numbers.weight, std=factor * self.config.hidden_size**-0.5)
        elif isinstance(module, RelativeBiases):
            init.zeros_(module.content)
            init.zeros_(module.position)


class VanillaTransformerStack(VanillaTransformerPreTrainedModel):
    """Embeddings, positions and blocks: what encoder and decoder have in common."""

    is_causal = False
    _tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(self, config: VanillaTransformerConfig, vocab_size: int, patterns, blocks: list[nn.Module]):
        super().__init__(config)
        self.patterns = patterns_for_layers(Full() if patterns is None else patterns, len(blocks))
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.embed_scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
        self.positions = POSITION_SCHEMES[config.position_encoding](config)
        self.embedding_norm = layer_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(blocks)
        self.norm = final_norm(config)
        self.gradient_checkpointing = False

    @property
    def num_ids(self) -> int:
        return self.config.vocab_size

    def patterns_for(self, length: int) -> list[Pattern]:
        """What the layers of a call of so many tokens see."""
        return self.patterns

    def token_embeddings(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """[B, T, hidden] of ids, or what is given instead; either is scaled (section 3.4)."""
        check_one_input(input_ids, inputs_embeds)
        if inputs_embeds is None:
            check_token_ids(input_ids, self.num_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        else:
            check_embeddings(inputs_embeds, self.config.hidden_size)
        return inputs_embeds * self.embed_scale

    def prepare(
        self, embeddings, attention_mask, position_ids=None, past_key_values=None, paged: bool = False, **seen
    ) -> tuple:
        """What the blocks see: the embeddings with positions [B, T, hidden], a mask for each layer, and the order.

        Args:
            paged: the keys are in the cache of continuous batching, which made a mask for all that it holds.
            seen: what else `layer_masks` takes.
        """
        masks, queries, order = self.place(embeddings, attention_mask, position_ids, past_key_values, paged, **seen)
        return self.positions.embed(embeddings, queries), masks, order

    def place(self, embeddings, attention_mask, position_ids, past_key_values, paged: bool = False, **seen) -> tuple:
        """A mask for each layer, the positions [B or 1, T] of the tokens, and what the layers need to know of them."""
        if paged:
            masks, queries, keys = [attention_mask] * len(self.layers), position_ids, position_ids
        else:
            said = (attention_mask, position_ids, past_key_values)
            masks = layer_masks(
                self.patterns_for(embeddings.shape[1]),
                self.config,
                embeddings,
                *said,
                causal=self.is_causal,
                heads=self.local_heads,
                **seen,
            )
            queries, keys = query_and_key_positions(embeddings, *said)
        if self.positions.num_positions is not None:
            counted_to = keys.shape[1] if position_ids is None else None
            check_positions(queries, self.positions.num_positions, counted_to)
        return masks, queries, self.positions.prepare(queries, keys, self.is_causal, embeddings, self.local_heads)

    def apply_layers(self, hidden_states: torch.Tensor, masks: list, *others, **kwargs) -> torch.Tensor:
        """[B, T, hidden] through all blocks, which take `others` and `kwargs` alike."""
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(hidden_states, mask, *others, **kwargs)
        return hidden_states


class VanillaTransformerEncoder(VanillaTransformerStack):
    """Source ids or embeddings in, hidden states [B, S, hidden] out."""

    _no_split_modules = ["VanillaTransformerEncoderBlock"]
    _can_record_outputs = {
        "hidden_states": VanillaTransformerEncoderBlock,
        "attentions": MultiHeadAttention,
    }

    def __init__(self, config: VanillaTransformerConfig):
        blocks = [VanillaTransformerEncoderBlock(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(config, config.vocab_size, config.attention_patterns, blocks)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: [B, S] source ids, or give inputs_embeds [B, S, hidden], to which positions are still added.
            attention_mask: [B, S], 1 for tokens and 0 for padding, on either side.
        """
        embeddings = self.token_embeddings(input_ids, inputs_embeds)
        check_some_token(attention_mask)
        hidden_states, masks, order = self.prepare(embeddings, attention_mask)
        hidden_states = self.dropout(self.embedding_norm(hidden_states))
        return self.finish(self.apply_layers(hidden_states, masks, order=order, **kwargs))

    def finish(self, hidden_states: torch.Tensor) -> BaseModelOutput:
        """What the stack returns of what its blocks made."""
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class VanillaTransformerDecoder(VanillaTransformerStack):
    """Target ids or embeddings in, hidden states [B, T, hidden] out."""

    _no_split_modules = ["VanillaTransformerDecoderBlock"]
    is_causal = True
    _can_record_outputs = {
        "hidden_states": VanillaTransformerDecoderBlock,
        "attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(CrossAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: VanillaTransformerConfig):
        blocks = [VanillaTransformerDecoderBlock(config, i) for i in range(config.decoder_layers)]
        super().__init__(config, config.vocab_size_of_decoder, config.patterns_of_decoder, blocks)
        self.post_init()
        self.plan_cross_attention()

    def plan_cross_attention(self) -> None:
        """How tensor parallelism cuts cross-attention, where there is any."""
        if hasattr(self.layers[0], "cross_attn"):
            attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
            self.tp_plan.update({f"layers.*.cross_attn.{name}": style for name, style in attention.items()})

    @property
    def num_ids(self) -> int:
        return self.config.vocab_size_of_decoder

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            input_ids: [B, T] target ids, or give inputs_embeds [B, T, hidden], to which positions are still added.
            attention_mask: [B, past + T], 1 for tokens and 0 for padding, on either side.
            position_ids: [B or 1, T] positions of the tokens; counted where it is None or there is padding.
            encoder_hidden_states: [B, S, hidden], what to attend to beside the target.
            encoder_attention_mask: [B, S], 1 for tokens of the source and 0 for padding.
            past_key_values: what earlier calls returned.
        """
        embeddings = self.token_embeddings(input_ids, inputs_embeds)
        if encoder_hidden_states is not None and not hasattr(self.layers[0], "cross_attn"):
            raise ValueError("encoder_hidden_states need a decoder made with add_cross_attention=True in its config.")
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache(None if encoder_hidden_states is None else DynamicCache())
        own_past = getattr(past_key_values, "self_attention_cache", past_key_values)
        if self.positions.biases_scores and hasattr(own_past, "announce"):
            raise ValueError(
                f"position_encoding={self.config.position_encoding!r} needs every past key, which a "
                "pattern-aware cache does not keep; pass past_key_values=DynamicCache()."
            )

        said = (attention_mask, position_ids, own_past)
        hidden_states, masks, order = self.prepare(embeddings, *said, paged="cache" in kwargs)
        hidden_states = self.dropout(self.embedding_norm(hidden_states))
        cross_mask = None
        if encoder_hidden_states is not None:
            cross_mask = cross_attention_mask(self.config, embeddings, encoder_hidden_states, encoder_attention_mask)
        hidden_states = self.apply_layers(
            hidden_states,
            masks,
            encoder_hidden_states,  # not by name, so that gradients flow through under checkpointing
            encoder_attention_mask=cross_mask,
            order=order,
            past_key_values=past_key_values,
            **kwargs,
        )
        return self.finish(hidden_states, past_key_values)

    def finish(
        self, hidden_states: torch.Tensor, past_key_values: Cache | None
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """What the stack returns of what its blocks made."""
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def new_cache(self, cross_attention_cache: Cache | None = None, patterned: bool = False) -> Cache:
        """An empty cache of the past; with one for cross-attention, both in one.

        Args:
            patterned: keep only what the layers' patterns can still see, where the position encoding allows it.
        """
        cache = DynamicCache()
        if patterned and self.config.patterns_of_decoder is not None and not self.positions.biases_scores:
            cache = PatternCache.of_heads(self.patterns, self.local_heads)
        return cache if cross_attention_cache is None else EncoderDecoderCache(cache, cross_attention_cache)


class VanillaTransformerModel(VanillaTransformerPreTrainedModel):
    """Encoder and decoder without a head: hidden states [B, T, hidden] of the target."""

    encoder_class, decoder_class = VanillaTransformerEncoder, VanillaTransformerDecoder
    _tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(as_encoder_decoder(config, True))
        self.encoder = self.encoder_class(self.config)
        self.decoder = self.decoder_class(self.config)
        if not self.config.share_embeddings:
            self._tied_weights_keys = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The source's table; of one that source and target share the one under whose name it is saved.

        PEFT looks for what is tied to it by that name.
        """
        return self.decoder.embed_tokens if self.shares_embeddings else self.encoder.embed_tokens

    @property
    def shares_embeddings(self) -> bool:
        return self.config.share_embeddings and self.config.tie_word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value
        if self.shares_embeddings:
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_ids: [B, S] source ids, or give inputs_embeds [B, S, hidden], or what the encoder made of them.
            attention_mask: [B, S], 1 for the source's tokens and 0 for its padding.
            decoder_input_ids: [B, T] target ids behind the start token, or give decoder_inputs_embeds.
            decoder_attention_mask: [B, past + T], 0 for the target's padding; none is needed on the right.
            encoder_outputs: what the encoder returned for this source.
            past_key_values: what earlier calls returned.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("Give decoder_input_ids or decoder_inputs_embeds (or labels, where there is a loss).")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return self.join(encoder_outputs, outputs)

    def join(
        self, encoder_outputs: BaseModelOutput, outputs: BaseModelOutputWithPastAndCrossAttentions
    ) -> Seq2SeqModelOutput:
        """One output of both stacks'."""
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class VanillaTransformerGenerationMixin(PatternCacheGenerationMixin):
    """`generate()` with caches that forget what no pattern shows, unless others are asked for."""

    def obstacle_to_paging(self) -> str | None:
        if self.config.is_encoder_decoder:
            return "feeds no encoder"
        if POSITION_SCHEMES[self.config.position_encoding].biases_scores:
            return f"keeps no distances, which position_encoding={self.config.position_encoding!r} scores"
        patterned = self.config.patterns_of_decoder is not None
        return "knows no attention patterns" if patterned else None

    def new_pattern_cache(self) -> Cache:
        crosses = hasattr(self.get_decoder().layers[0], "cross_attn")
        return self.get_decoder().new_cache(DynamicCache() if crosses else None, True)


class VanillaTransformerForConditionalGeneration(VanillaTransformerPreTrainedModel, VanillaTransformerGenerationMixin):
    """Encoder and decoder with a linear layer to the next target token's logits (section 3.4)."""

    model_class = VanillaTransformerModel
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(as_encoder_decoder(config, True))
        self.loss_type = "ForMaskedLM"  # aligned with the labels; the name of the class would make it the shifting one
        self.loss_function = label_smoothed_loss
        self.loss_and_logits = loss_by_config(config, shifted=False)
        self.model = self.model_class(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size_of_decoder, bias=config.output_bias)
        self._tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
        if config.share_embeddings:
            self._tied_weights_keys["model.encoder.embed_tokens.weight"] = "model.decoder.embed_tokens.weight"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """
        Args:
            labels: [B, T] target ids, not shifted: what the decoder shall write; -100 is ignored. The decoder's input
                is made of them, behind the start token, unless it is given. In training the loss is smoothed as the
                config's label_smoothing says (section 5.4); in evaluation it is not.
            logits_to_keep: compute logits for the last so many target positions only (0: all), or for these indices.

        The other arguments are those of VanillaTransformerModel.
        """
        smoothing = own_smoothing(self, labels, kwargs, default=self.config.label_smoothing)
        if labels is not None:
            use_cache = False if use_cache is None else use_cache
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states, function = outputs.last_hidden_state[:, kept], self.loss_function
        loss, logits = self.loss_and_logits(
            self.lm_head, function, states, labels=labels, label_smoothing=smoothing, **kwargs
        )
        return self.finish(loss, logits, outputs)

    def finish(self, loss: torch.Tensor | None, logits: torch.Tensor | None, outputs: Seq2SeqModelOutput):
        """What the head returns beside what its model did."""
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """Labels [B, T] moved to the right behind the start token; what is ignored becomes padding."""
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None:
            raise ValueError(
                "decoder_start_token_id must be set in the config to make the decoder's input of labels, got None; set "
                "it, or give decoder_input_ids."
            )
        moved = nn.functional.pad(labels[:, :-1], (1, 0), value=start)
        return moved.masked_fill(moved == -100, start if padding is None else padding)


class VanillaTransformerDecoderModel(VanillaTransformerPreTrainedModel):
    """The decoder alone, under the name that it has beside an encoder, so that it takes such a checkpoint's weights."""

    decoder_class = VanillaTransformerDecoder
    _no_split_modules = ["VanillaTransformerDecoderBlock"]

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config)
        self.decoder = self.decoder_class(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

    def forward(self, *args, **kwargs):
        return self.decoder(*args, **kwargs)


class VanillaTransformerForCausalLM(CausalLMHead, VanillaTransformerPreTrainedModel, VanillaTransformerGenerationMixin):
    """The decoder alone as a language model; with add_cross_attention it may attend to an encoder's states."""

    model_class = VanillaTransformerDecoderModel
    _no_split_modules = ["VanillaTransformerDecoderBlock"]
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(as_encoder_decoder(config, False))
        self.model = self.model_class(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size_of_decoder, bias=config.output_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        """
        Args:
            labels: [B, T] ids to predict, shifted inside: position t predicts labels[t + 1]; -100 is ignored. Give
                `shift_labels` instead where t predicts shift_labels[t].
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these indices.

        The other arguments are those of VanillaTransformerDecoder.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        predicted = self.predict(outputs, labels, logits_to_keep, **kwargs)
        return self.finish(predicted, outputs)

    def finish(self, predicted: CausalLMOutputWithPast, outputs: BaseModelOutputWithPastAndCrossAttentions):
        """What the head returns beside what its model did."""
        return CausalLMOutputWithCrossAttentions(**predicted, cross_attentions=outputs.cross_attentions)


def as_encoder_decoder(config: VanillaTransformerConfig, both: bool) -> VanillaTransformerConfig:
    """The config of encoder and decoder, or of the decoder alone; a copy where it was another's."""
    if config.is_encoder_decoder is both and config.is_decoder is not both:
        return config
    config = copy.deepcopy(config)
    config.is_encoder_decoder, config.is_decoder = both, not both
    if not both:
        config.num_hidden_layers = config.decoder_layers  # what caches are made for
    return config


VanillaTransformer = VanillaTransformerModel

__all__ = [
    "VanillaTransformer",
    "VanillaTransformerForCausalLM",
    "VanillaTransformerForConditionalGeneration",
    "VanillaTransformerModel",
    "VanillaTransformerPreTrainedModel",
]

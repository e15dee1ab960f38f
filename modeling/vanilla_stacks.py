"""The encoder and the decoder of Vaswani et al. 2017 (arXiv:1706.03762): embeddings, positions and blocks.

The vanilla Transformer has both, the vanilla encoder the first. Section numbers are the paper's.

Shapes: B batch, T target tokens (or tokens of the only sequence), S source tokens.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import BLOCK_SPARSE, cross_attention_mask, layer_masks, query_and_key_positions
from .attention_patterns import Full, patterns_for_layers
from .cache_patterns import PatternCache
from .checks import check_embeddings, check_one_input, check_positions, check_some_token, check_token_ids
from .configuration_vanilla_transformer import VanillaTransformerConfig
from .layers import CrossAttention, FeedForward, MultiHeadAttention, final_norm, residual_connection
from .position_schemes import POSITION_SCHEMES
from .positions import RelativeBiases


class VanillaTransformerEncoderBlock(GradientCheckpointingLayer):
    """Self-attention and a feed-forward network (section 3.1)."""

    def __init__(self, config: VanillaTransformerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MultiHeadAttention(config, layer_idx)
        self.self_attn_residual = residual_connection(config)
        self.mlp = FeedForward(config)
        self.mlp_residual = residual_connection(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask=None, order=None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        hidden_states = self.self_attn.positions.enter(hidden_states, order)
        hidden_states = self.self_attn_residual(
            hidden_states, lambda states: self.self_attn(states, attention_mask, order, **kwargs)[0]
        )
        return self.mlp_residual(hidden_states, self.mlp)


class VanillaTransformerDecoderBlock(GradientCheckpointingLayer):
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
        return self.mlp_residual(hidden_states, self.mlp)


class VanillaTransformerPreTrainedModel(PreTrainedModel):
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

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """block_sparse where patterns are set and nothing else is asked, unless the scores need a bias."""
        patterns = self.config.attention_patterns or getattr(self.config, "decoder_attention_patterns", None)
        if attn_implementation is None and patterns and not biases_scores(self.config):
            attn_implementation = BLOCK_SPARSE
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

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
        elif isinstance(module, RelativeBiases):
            init.zeros_(module.content)
            init.zeros_(module.position)


class VanillaTransformerStack(VanillaTransformerPreTrainedModel):
    """Embeddings, positions and blocks: what encoder and decoder have in common."""

    is_causal = False

    def __init__(self, config: VanillaTransformerConfig, vocab_size: int, patterns, blocks: list[nn.Module]):
        super().__init__(config)
        self.patterns = patterns_for_layers(Full() if patterns is None else patterns, len(blocks))
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.embed_scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
        self.positions = POSITION_SCHEMES[config.position_encoding](config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(blocks)
        self.norm = final_norm(config)
        self.gradient_checkpointing = False

    def token_embeddings(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """[B, T, hidden] of ids, or what is given instead; either is scaled (section 3.4)."""
        check_one_input(input_ids, inputs_embeds)
        if inputs_embeds is None:
            check_token_ids(input_ids, self.embed_tokens.num_embeddings)
            inputs_embeds = self.embed_tokens(input_ids)
        else:
            check_embeddings(inputs_embeds, self.config.hidden_size)
        return inputs_embeds * self.embed_scale

    def survey(self, embeddings, attention_mask, position_ids=None, past_key_values=None) -> tuple:
        """What the blocks see: the embeddings with positions [B, T, hidden], a mask for each layer, and the order."""
        said = (attention_mask, position_ids, past_key_values)
        masks = layer_masks(self.patterns, self.config, embeddings, *said, causal=self.is_causal)
        queries, keys = query_and_key_positions(embeddings, *said)
        if self.positions.num_positions is not None:
            counted_to = keys.shape[1] if position_ids is None else None
            check_positions(queries, self.positions.num_positions, counted_to)
        order = self.positions.survey(queries, keys, self.is_causal, embeddings)
        return self.positions.embed(embeddings, queries), masks, order


class VanillaTransformerEncoder(VanillaTransformerStack):
    """Source ids or embeddings in, hidden states [B, S, hidden] out."""

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
        hidden_states, masks, order = self.survey(embeddings, attention_mask)
        hidden_states = self.dropout(hidden_states)
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(hidden_states, mask, order=order, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class VanillaTransformerDecoder(VanillaTransformerStack):
    """Target ids or embeddings in, hidden states [B, T, hidden] out."""

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
        if biases_scores(self.config) and hasattr(own_past, "announce"):
            raise ValueError(
                f"position_encoding={self.config.position_encoding!r} needs a place for every past key, which a "
                "pattern-aware cache does not keep; pass past_key_values=DynamicCache()."
            )

        hidden_states, masks, order = self.survey(embeddings, attention_mask, position_ids, own_past)
        hidden_states = self.dropout(hidden_states)
        cross_mask = None
        if encoder_hidden_states is not None:
            cross_mask = cross_attention_mask(self.config, embeddings, encoder_hidden_states, encoder_attention_mask)
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(
                hidden_states,
                mask,
                encoder_hidden_states,  # not by name, so that gradients flow through under checkpointing
                encoder_attention_mask=cross_mask,
                order=order,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def new_cache(self, cross_attention_cache: Cache | None = None, patterned: bool = False) -> Cache:
        """An empty cache of the past; with one for cross-attention, both in one.

        Args:
            patterned: keep only what the layers' patterns can still see, where the position encoding allows it.
        """
        cache = DynamicCache()
        if patterned and self.config.patterns_of_decoder is not None and not biases_scores(self.config):
            cache = PatternCache(self.patterns, self.config.num_attention_heads)
        return cache if cross_attention_cache is None else EncoderDecoderCache(cache, cross_attention_cache)


def biases_scores(config: VanillaTransformerConfig) -> bool:
    """Does the position encoding add a bias to the scores?"""
    return POSITION_SCHEMES[config.position_encoding].biases_scores

"""Image Transformer: Parmar, Vaswani, Uszkoreit, Kaiser, Shazeer, Ku and Tran 2018, "Image Transformer".

A decoder that predicts an image value by value, with attention limited to a block of the image and a memory around it;
and an encoder and such a decoder for enlarging images. Equation and section numbers are those of arXiv:1802.05751.

Shapes: B batch, T values (ids), W values that share a position of the trunk (1, or the channels of a pixel under a
mixture), P positions of the trunk, S source values, H heads, D head dim, V ids.
"""

import copy

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import PatternBackend, cross_attention_mask, layer_masks, token_positions
from .attention_patterns import patterns_for_layers
from .cache_patterns import PatternCache, PatternCacheGenerationMixin
from .checks import check_counted, check_embeddings, check_one_input, check_positions, check_targets, check_token_ids
from .configuration_image_transformer import ImageTransformerConfig
from .image_embeddings import (
    EMBEDDINGS,
    SOURCE_EMBEDDINGS,
    ClassCondition,
    ImageCoordinates,
    NoCondition,
    PixelConvolution,
)
from .image_enlargement import BicubicEnlargement, EnlargingEncoderOutput, check_enlarged
from .image_heads import OUTPUTS, mean_nats, next_values
from .image_layers import ImageTransformerAttention, ImageTransformerBlock, MatchingKeys
from .memory_images import ImageCache, for_each_value, image_state, windows, with_recent


class ImageTransformerPreTrainedModel(PatternBackend, PreTrainedModel):
    """Initial weights, and what Transformers wants to know about the family."""

    config: ImageTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ImageTransformerBlock"]
    _skip_keys_device_placement = ["past_key_values", "cross_past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _can_record_outputs = {
        "hidden_states": ImageTransformerBlock,
        "attentions": OutputRecorder(ImageTransformerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(ImageTransformerAttention, index=1, layer_name="cross_attn"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (PixelConvolution, MatchingKeys)):
            module.init_weights()

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """Leave the 2-D padding mask alone: `forward` builds each layer's own mask, whatever the cache."""
        return attention_mask


class ImageTransformerStack(ImageTransformerPreTrainedModel):
    """What the decoder and the encoder share: how values enter."""

    def get_input_embeddings(self) -> nn.Module:
        """The table of values and start tokens; models of whole pixels have none."""
        if not hasattr(self.embedding, "embed_tokens"):
            raise NotImplementedError("output='logistic_mixture' reads values as numbers; it has no table of ids.")
        return self.embedding.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.embed_tokens = value

    def unpadded(self, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask; none if positions are pixels, whose images are never padded."""
        if self.config.values_per_position == 1 or attention_mask is None:
            return attention_mask
        if not torch.compiler.is_compiling() and not bool((attention_mask != 0).all()):
            raise ValueError(
                "output='logistic_mixture' takes no padding: attention_mask must be 1 everywhere; "
                "an image has all of its values."
            )
        return None


class ImageTransformerModel(ImageTransformerStack):
    """The decoder without a head: ids in, and for each the hidden state [B, T, hidden] that predicts the next value.

    With `output="logistic_mixture"` the trunk has one position for each pixel, whose values share its hidden state.
    """

    def __init__(self, config: ImageTransformerConfig, cross: bool = False):
        super().__init__(config)
        config.validate_vocabulary()  # fields may have been changed since the config was made, as from_pretrained does
        self.values_per_position = config.values_per_position
        self.cross = cross
        patterns = patterns_for_layers(config.attention_patterns, config.num_hidden_layers)
        self.patterns = [pattern.bind(config.grid) for pattern in patterns]
        self.embedding = EMBEDDINGS[config.output](config)
        self.condition = ClassCondition() if config.num_classes else NoCondition()
        self.coordinates = ImageCoordinates(config.coordinates, config.grid, config.block_shape, config.hidden_size)
        self.dropout = nn.Dropout(config.resid_dropout)
        self.layers = nn.ModuleList(
            ImageTransformerBlock(config, i, cross=cross) for i in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def needs_state(self) -> bool:
        """Does decoding need more of the past than keys and values?"""
        return self.values_per_position > 1 or self.config.num_classes > 0

    def new_cache(self) -> Cache:
        """A decoding cache that keeps only keys that can still be reached."""
        keys = PatternCache(self.patterns, self.config.num_attention_heads)
        return ImageCache(keys) if self.needs_state else keys

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        enlarged: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            input_ids: [B, T] a start token and the values before those to predict, in the order of generation.
            inputs_embeds: instead, [B, T, channels * hidden] rows of the table of ids, or [B, T, hidden] of the values'
                own channels.
            attention_mask: [B, past + T], 1 for ids and 0 for padding; no padding where pixels are positions.
            position_ids: [B, T] positions; counted from the mask if None.
            encoder_hidden_states: [B, S, hidden] what cross-attention reads.
            encoder_attention_mask: [B, S], 0 for its padding.
            past_key_values: what earlier calls returned.
            enlarged: [B, pixels, channels] what the encoder interpolated; with `predict_residual`.
        """
        self._check_inputs(input_ids, inputs_embeds, encoder_hidden_states)
        check_enlarged(self.config.predict_residual, enlarged)
        if past_key_values is None and use_cache:
            past_key_values = self._whole_cache()
        past, cross_past = _split_cache(past_key_values)
        if past is not None and self.needs_state and image_state(past) is None:
            past = past_key_values = self._with_state(past)
        values = input_ids if inputs_embeds is None else inputs_embeds
        length = values.shape[1]
        attention_mask, position_ids = self._without_padding(attention_mask, position_ids, past)

        positions = self._positions(values, attention_mask, position_ids, past)
        hidden_states = self._embed(input_ids, inputs_embeds, positions, past, enlarged)
        if hidden_states.shape[1] > 0:  # else all values belong to a pixel whose position has been computed
            hidden_states = self.dropout(hidden_states + self.coordinates(positions, hidden_states))
            trunk = past.trunk if self.needs_state and past is not None else past
            masks = layer_masks(self.patterns, self.config, hidden_states, attention_mask, position_ids, trunk)
            if self.cross:
                kwargs["encoder_attention_mask"] = cross_attention_mask(
                    self.config, hidden_states, encoder_hidden_states, encoder_attention_mask
                )
                kwargs["cross_past_key_values"] = cross_past
            for layer, mask in zip(self.layers, masks):  # the encoder's states not by name: gradients flow through them
                hidden_states = layer(hidden_states, mask, encoder_hidden_states, past_key_values=trunk, **kwargs)
        hidden_states = for_each_value(hidden_states, length, past, self.values_per_position)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )

    def _check_inputs(self, input_ids, inputs_embeds, encoder_hidden_states) -> None:
        check_one_input(input_ids, inputs_embeds)
        if input_ids is not None:
            check_token_ids(input_ids, self.config.vocab_size)
        elif self.config.output != "categorical":
            raise ValueError("output='logistic_mixture' reads values as numbers: give input_ids, not inputs_embeds.")
        else:
            one, whole = self.config.hidden_size, self.config.num_channels * self.config.hidden_size
            check_embeddings(inputs_embeds, one if inputs_embeds.shape[-1] == one else whole)
        if self.cross != (encoder_hidden_states is not None):
            raise ValueError(
                "Give encoder_hidden_states to a decoder with cross-attention, and to no other; "
                f"this one has {'some' if self.cross else 'none'}."
            )

    def _whole_cache(self) -> Cache:
        cache = ImageCache(DynamicCache()) if self.needs_state else DynamicCache()
        return EncoderDecoderCache(cache, DynamicCache()) if self.cross else cache

    def _with_state(self, past: Cache) -> ImageCache:
        if past.get_seq_length() > 0:
            raise ValueError(
                "Models with classes or of whole pixels need more of the past than keys and values: give the "
                "past_key_values that an earlier call returned."
            )
        return ImageCache(past)

    def _without_padding(self, attention_mask, position_ids, past: Cache | None):
        """The mask and the positions; nothing, if positions are pixels, which are counted."""
        if self.values_per_position > 1:
            check_counted(position_ids, 0 if past is None else past.get_seq_length(), "output='logistic_mixture'")
            position_ids = None
        return self.unpadded(attention_mask), position_ids

    def _positions(self, values: torch.Tensor, attention_mask, position_ids, past: Cache | None) -> torch.Tensor:
        """[B or 1, P] positions in the trunk of the new values: the caller's, or counted from the mask or the past."""
        width, length = self.values_per_position, values.shape[1]
        seen = 0 if past is None else past.get_seq_length()
        if position_ids is not None:
            check_positions(position_ids, self.config.max_position_embeddings)
            return position_ids if position_ids.ndim == 2 else position_ids[None]
        if attention_mask is not None and attention_mask.ndim == 2:
            places = token_positions(attention_mask)[:, seen : seen + length]
        else:
            places = torch.arange(seen, seen + length, device=values.device)[None]
        check_positions(places, self.config.max_position_embeddings, counted_to=seen + length)
        return places if width == 1 else places[:, -seen % width :: width] // width

    def _embed(self, input_ids, inputs_embeds, positions: torch.Tensor, past: Cache | None, enlarged) -> torch.Tensor:
        """[B, P, hidden] of the values before those at `positions`, without coordinates."""
        if inputs_embeds is not None:
            embeddings = self.embedding.of_channel(inputs_embeds, positions)
        else:
            ids = windows(input_ids, positions.shape[1], past, self.values_per_position)
            embeddings = self.embedding(ids, positions, enlarged)
        return self.condition(embeddings, positions, image_state(past))


def _split_cache(cache: Cache | None) -> tuple[Cache | None, Cache | None]:
    """(cache of self-attention, cache of cross-attention)"""
    if hasattr(cache, "cross_attention_cache"):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


class ImageTransformerGenerationMixin(PatternCacheGenerationMixin):
    """`generate()` with a cache of reachable keys."""

    @property
    def _is_stateful(self) -> bool:
        return self.model.needs_state

    def new_pattern_cache(self) -> Cache:
        cache = self.model.new_cache()
        return EncoderDecoderCache(cache, DynamicCache()) if self.model.cross else cache

    def get_output_embeddings(self) -> nn.Module | None:
        """The linear layer to the logits of ids; a mixture has none."""
        return self.lm_head if self.config.output == "categorical" else None


class ImageTransformerForCausalLM(ImageTransformerPreTrainedModel, ImageTransformerGenerationMixin):
    """The decoder with a distribution of the next value (section 3.4); for images without a source."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.embed_tokens.weight"}

    def __init__(self, config: ImageTransformerConfig):
        check_enlarged(config.predict_residual, None)
        config = _with_encoder(config, False)
        super().__init__(config)
        self.model = ImageTransformerModel(config)
        self.output = OUTPUTS[config.output](config)
        self.lm_head = self.output.new_layer(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: [B, T] ids to predict, shifted inside: position t predicts labels[t + 1]; -100 is ignored. For
                inputs that begin with a start token give `shift_labels` instead, where t predicts shift_labels[t].
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these indices.

        Returns:
            Logits [B, T, V] of the next id. A mixture's are log-probabilities; in training with labels it works out
            those of the labels alone, and hands out no logits.
        """
        targets = next_values(labels, kwargs.pop("shift_labels", None))
        check_targets(targets, self.output.num_targets)
        num_items = kwargs.pop("num_items_in_batch", None)
        first = 0 if past_key_values is None else past_key_values.get_seq_length()
        ids = None if input_ids is None else with_recent(input_ids, past_key_values, self.config.num_channels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, nats = self.output(self.lm_head, outputs.last_hidden_state, ids, first, kept, targets)
        return CausalLMOutputWithPast(
            loss=None if nats is None else mean_nats(nats, targets[:, kept], num_items),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ImageTransformerEncoder(ImageTransformerStack):
    """The encoder of the image to enlarge: values [B, S] in raster order, without a start token -> [B, P, hidden].

    As in the decoder, a position is a value (P = S), or a pixel with `output="logistic_mixture"`.
    """

    def __init__(self, config: ImageTransformerConfig):
        super().__init__(config)
        grid = (*config.source_image_size, config.num_channels // config.values_per_position)
        patterns = patterns_for_layers(config.encoder_attention_patterns, config.num_encoder_layers)
        self.patterns = [pattern.bind(grid) for pattern in patterns]
        self.embedding = SOURCE_EMBEDDINGS[config.output](config)
        self.enlargement = BicubicEnlargement(config) if config.predict_residual else None
        stretch = tuple(large / small for large, small in zip(config.image_size, config.source_image_size))
        self.coordinates = ImageCoordinates(config.coordinates, grid, None, config.hidden_size, stretch)
        self.dropout = nn.Dropout(config.resid_dropout)
        self.layers = nn.ModuleList(
            ImageTransformerBlock(config, i, is_causal=False) for i in range(config.num_encoder_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EnlargingEncoderOutput:
        """
        Args:
            input_ids: [B, S] values of the image to enlarge.
            attention_mask: [B, S], 1 for values and 0 for padding; no padding where pixels are positions.
        """
        check_one_input(input_ids, None)
        check_token_ids(input_ids, self.config.vocab_size)
        width = self.config.values_per_position
        if input_ids.shape[1] % width:
            raise ValueError(f"input_ids must hold whole pixels of {width} values, got shape {list(input_ids.shape)}.")
        pixels = input_ids.unflatten(1, (-1, width))  # [B, P, W]
        attention_mask = self.unpadded(attention_mask)
        positions = torch.arange(pixels.shape[1], device=input_ids.device)[None]
        if attention_mask is not None:
            positions = token_positions(attention_mask)
        check_positions(positions, self.coordinates.num_positions, counted_to=pixels.shape[1])
        embeddings = self.embedding(pixels, positions + 1)
        hidden_states = self.dropout(embeddings + self.coordinates(positions, embeddings))
        masks = layer_masks(self.patterns, self.config, hidden_states, attention_mask, causal=False)
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(hidden_states, mask, **kwargs)
        enlarged = None if self.enlargement is None else self.enlargement(pixels, like=hidden_states)
        return EnlargingEncoderOutput(last_hidden_state=hidden_states, enlarged=enlarged)


class ImageTransformerForSuperResolution(ImageTransformerPreTrainedModel, ImageTransformerGenerationMixin):
    """Encoder and decoder that enlarge an image (section 5.3): a small image's values in, a large one's out.

    A sequence-to-sequence model like any other: `generate(small)` samples, and Seq2SeqTrainer trains.
    """

    _tied_weights_keys = {
        "lm_head.weight": "model.embedding.embed_tokens.weight",
        "encoder.embedding.embed_tokens.weight": "model.embedding.embed_tokens.weight",
    }

    def __init__(self, config: ImageTransformerConfig):
        config = _with_encoder(config, True)
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # labels are aligned
        self.encoder = ImageTransformerEncoder(config)
        self.model = ImageTransformerModel(config, cross=True)
        self.output = OUTPUTS[config.output](config)
        self.lm_head = self.output.new_layer(config)
        self.post_init()

    def get_encoder(self, *args, **kwargs) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the tables of encoder and decoder, and the head."""
        self.model.resize_token_embeddings(*args, **kwargs)
        return super().resize_token_embeddings(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """
        Args:
            input_ids: [B, S] values of the small image in raster order, without a start token.
            attention_mask: [B, S], 0 for padding.
            decoder_input_ids: [B, T] a start token and values of the large image in the order of generation; made of
                `labels` if None.
            labels: [B, T] values to predict, aligned with decoder_input_ids; -100 is ignored.
            encoder_outputs: what the encoder returned before, instead of input_ids.
        """
        check_targets(labels, self.output.num_targets)
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        num_items = kwargs.pop("num_items_in_batch", None)
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("Give input_ids, the values of the image to enlarge, or encoder_outputs.")
            encoder_outputs = self.encoder(input_ids, attention_mask=attention_mask, **kwargs)
        enlarged = getattr(encoder_outputs, "enlarged", None)
        first = 0 if past_key_values is None else past_key_values.get_seq_length()
        ids = with_recent(decoder_input_ids, _split_cache(past_key_values)[0], self.config.num_channels)
        outputs = self.model(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=self.encoder.unpadded(attention_mask),
            past_key_values=past_key_values,
            use_cache=use_cache,
            enlarged=enlarged,
            **kwargs,
        )
        logits, nats = self.output(self.lm_head, outputs.last_hidden_state, ids, first, slice(None), labels, enlarged)
        return Seq2SeqLMOutput(
            loss=None if nats is None else mean_nats(nats, labels, num_items),
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor | None) -> torch.LongTensor:
        """[B, T] labels one place to the right, behind the start token."""
        if labels is None:
            raise ValueError("Give decoder_input_ids, or labels to make them of.")
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)


def _with_encoder(config: ImageTransformerConfig, encoder: bool) -> ImageTransformerConfig:
    """The config with `is_encoder_decoder` set; a copy where it is not."""
    if config.is_encoder_decoder is not encoder:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = encoder
    return config


__all__ = [
    "ImageTransformerForCausalLM",
    "ImageTransformerForSuperResolution",
    "ImageTransformerModel",
    "ImageTransformerPreTrainedModel",
]

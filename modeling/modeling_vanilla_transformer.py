"""Vanilla Transformer: Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser and Polosukhin 2017, "Attention Is All
You Need".

An encoder reads the source, a decoder writes the target one token after the other and attends to what the encoder made
of the source. How order enters either stack is a choice of the config. The blocks are in vanilla_stacks.py, the
attention with its call of ALL_ATTENTION_FUNCTIONS.get_interface(...) in layers.py. Equation and section numbers are
those of arXiv:1706.03762.

Shapes: B batch, T target tokens, S source tokens.
"""

import copy

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .cache_patterns import PatternCacheGenerationMixin
from .configuration_vanilla_transformer import VanillaTransformerConfig
from .layers import label_smoothed_loss
from .vanilla_stacks import VanillaTransformerDecoder, VanillaTransformerEncoder, VanillaTransformerPreTrainedModel


class VanillaTransformerModel(VanillaTransformerPreTrainedModel):
    """Encoder and decoder without a head: hidden states [B, T, hidden] of the target."""

    _tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(as_encoder_decoder(config, True))
        self.encoder = VanillaTransformerEncoder(self.config)
        self.decoder = VanillaTransformerDecoder(self.config)
        if not self.config.share_embeddings:
            self._tied_weights_keys = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value
        if self.config.share_embeddings and self.config.tie_word_embeddings:
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

    def new_pattern_cache(self) -> Cache:
        crosses = hasattr(self.get_decoder().layers[0], "cross_attn")
        return self.get_decoder().new_cache(DynamicCache() if crosses else None, True)


class VanillaTransformerForConditionalGeneration(VanillaTransformerPreTrainedModel, VanillaTransformerGenerationMixin):
    """Encoder and decoder with a linear layer to the next target token's logits (section 3.4)."""

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(as_encoder_decoder(config, True))
        self.loss_type = "ForMaskedLM"  # aligned with the labels; the name of the class would make it the shifting one
        self.loss_function = label_smoothed_loss
        self.model = VanillaTransformerModel(self.config)
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
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            smoothing = self.config.label_smoothing if self.training else 0.0
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], label_smoothing=smoothing, **kwargs
            )
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

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config)
        self.decoder = VanillaTransformerDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

    def forward(self, *args, **kwargs):
        return self.decoder(*args, **kwargs)


class VanillaTransformerForCausalLM(VanillaTransformerPreTrainedModel, VanillaTransformerGenerationMixin):
    """The decoder alone as a language model; with add_cross_attention it may attend to an encoder's states."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(as_encoder_decoder(config, False))
        self.model = VanillaTransformerDecoderModel(self.config)
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


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

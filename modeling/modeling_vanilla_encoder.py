"""Vanilla encoder: the Transformer's encoder alone, as Devlin, Chang, Lee and Toutanova 2018 use it in "BERT:
Pre-training of Deep Bidirectional Transformers for Language Understanding" (arXiv:1810.04805).

"BERT's model architecture is a multi-layer bidirectional Transformer encoder based on the original implementation"
(section 3): blocks and attention, with its call of ALL_ATTENTION_FUNCTIONS.get_interface(...), are those of
modeling_vanilla_transformer.py. BERT's own are token types, a norm on the embeddings, and the heads.

Shapes: B batch, T tokens.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .causal_lm import label_smoothed_loss, loss_by_config, own_smoothing
from .checks import check_some_token, check_token_types
from .classification import classification_loss
from .configuration_vanilla_encoder import VanillaEncoderConfig
from .modeling_vanilla_transformer import (
    MultiHeadAttention,
    VanillaTransformerEncoderBlock,
    VanillaTransformerPreTrainedModel,
    VanillaTransformerStack,
)


class VanillaEncoderPreTrainedModel(VanillaTransformerPreTrainedModel):
    """What Transformers wants to know about the family."""

    config: VanillaEncoderConfig
    _no_split_modules = ["VanillaTransformerEncoderBlock"]
    _can_record_outputs = {"hidden_states": VanillaTransformerEncoderBlock, "attentions": MultiHeadAttention}


class VanillaEncoderModel(VanillaTransformerStack, VanillaEncoderPreTrainedModel):
    """The encoder without a head: ids or embeddings in, hidden states [B, T, hidden] out."""

    config: VanillaEncoderConfig
    block_class = VanillaTransformerEncoderBlock

    def __init__(self, config: VanillaEncoderConfig):
        blocks = [self.block_class(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(config, config.vocab_size, config.attention_patterns, blocks)
        self.embed_types = nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: [B, T] token ids, or give inputs_embeds [B, T, hidden], to which types and positions are added.
            attention_mask: [B, T], 1 for tokens and 0 for padding, on either side.
            token_type_ids: [B, T] types of the tokens; 0 if None.
            position_ids: [B or 1, T] positions of the tokens; counted where it is None or there is padding. Where they
                start anew in a row without a mask, the row packs several documents.
        """
        embeddings = self.token_embeddings(input_ids, inputs_embeds)
        check_some_token(attention_mask)
        hidden_states, masks, order = self.prepare(
            embeddings + self.type_embeddings(token_type_ids, embeddings), attention_mask, position_ids
        )
        hidden_states = self.dropout(self.embedding_norm(hidden_states))
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(hidden_states, mask, order=order, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def type_embeddings(self, token_type_ids: torch.Tensor | None, embeddings: torch.Tensor) -> torch.Tensor | float:
        """[B, T, hidden] of the tokens' types, which are 0 unless the caller says; 0 where the model has none."""
        check_token_types(token_type_ids, embeddings, self.config.type_vocab_size)
        if self.embed_types is None:
            return 0.0
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=embeddings.device)
        return self.embed_types(token_type_ids)


class VanillaEncoderForMaskedLM(VanillaEncoderPreTrainedModel):
    """The encoder with the logits of what stood at each position (section 3.1, task 1)."""

    model_class = VanillaEncoderModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VanillaEncoderConfig):
        super().__init__(config)
        self.loss_function = label_smoothed_loss
        self.loss_and_logits = loss_by_config(config, shifted=False)
        self.model = self.model_class(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.transform_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Args:
            labels: [B, T] ids that stood at each position, not shifted; -100 is ignored.
        """
        smoothing = own_smoothing(self, labels, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        states, function = outputs.last_hidden_state, self.loss_function
        loss, logits = self.loss_and_logits(
            self.predict, function, states, labels=labels, label_smoothing=smoothing, **kwargs
        )
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> logits [..., V]."""
        return self.lm_head(self.transform_norm(self.act_fn(self.transform(hidden_states))))


class VanillaEncoderForSequenceClassification(VanillaEncoderPreTrainedModel):
    """The encoder with a classifier on what it made of each row's first token (section 3.2)."""

    model_class = VanillaEncoderModel

    def __init__(self, config: VanillaEncoderConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_function = classification_loss
        self.model = self.model_class(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = torch.tanh
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Args:
            labels: [B] classes, [B] numbers where num_labels is 1, or [B, num_labels] of 0 and 1 for several classes.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        states = outputs.last_hidden_state
        rows = torch.arange(states.shape[0], device=states.device)
        padded = attention_mask is not None and attention_mask.ndim == 2
        first = states[rows, attention_mask.long().argmax(dim=-1)] if padded else states[:, 0]
        logits = self.score(self.dropout(self.act_fn(self.pooler(first))))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


VanillaEncoder = VanillaEncoderModel

__all__ = [
    "VanillaEncoder",
    "VanillaEncoderForMaskedLM",
    "VanillaEncoderForSequenceClassification",
    "VanillaEncoderModel",
    "VanillaEncoderPreTrainedModel",
]

"""What classifiers share: from hidden states to the logits of rows or tokens, and their losses.

Every loss is a sum over labels divided by `num_items_in_batch`, where a Trainer counted the labels of all that it adds
up: the micro-batches of a step, on all devices. Then how a batch is cut changes nothing.

Shapes: B rows, T tokens, K labels.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

logger = logging.get_logger(__name__)
IGNORED = -100


class SequenceClassificationHead:
    """The `forward` of a model whose linear layer `score` classifies rows' last tokens, as `model` made them.

    It stands before the PreTrainedModel among a class's bases. Transformers' own generic head leaves
    `num_items_in_batch` out, so that a step of several micro-batches would weigh as many times as much.
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_function = classification_loss

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            labels: [B] classes (-100: none), [B] or [B, K] numbers, or [B, K] of 0 and 1, as config.problem_type says.

        The other arguments are those of `model`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        rows = torch.arange(logits.shape[0], device=logits.device)
        logits = logits[rows, self._last_tokens(input_ids, logits)]
        return self._output(self._loss(outputs, logits, labels, **kwargs), logits, outputs)

    def _last_tokens(self, input_ids: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor | int:
        """[B] index of each row's rightmost token that is not config.pad_token_id; -1 where there are no ids."""
        padding = self.config.pad_token_id
        if padding is None:
            if logits.shape[0] != 1:
                raise ValueError(
                    "Cannot handle batch sizes > 1 if no padding token is defined: set config.pad_token_id."
                )
            return -1
        if input_ids is None:
            logger.warning_once(f"{type(self).__name__} cannot tell padding in inputs_embeds: it takes the last slot.")
            return -1
        indices = torch.arange(input_ids.shape[-1], device=logits.device)
        return (indices * (input_ids != padding).to(logits.device)).argmax(dim=-1)

    def _loss(self, outputs, logits: torch.Tensor, labels: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        if labels is None:
            return None
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)

    def _output(self, loss, logits, outputs: BaseModelOutputWithPast) -> SequenceClassifierOutputWithPast:
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TokenClassificationHead:
    """The `forward` of a model whose linear layer `score` classifies every token behind `dropout`."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_function = token_classification_loss

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """
        Args:
            labels: [B, T] classes; -100 is ignored.

        The other arguments are those of `model`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def classification_loss(
    labels: torch.Tensor,
    pooled_logits: torch.Tensor,
    config,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """Mean loss of logits [B, K], in float32: cross-entropy, squared error or binary cross-entropy.

    A problem_type that the config leaves open is told by K and the labels, and entered there, as in Transformers.
    """
    if config.problem_type is None:
        config.problem_type = problem_type_of(labels, config.num_labels)
    labels, logits = labels.to(pooled_logits.device), pooled_logits.float()
    if config.problem_type == "single_label_classification":
        return token_classification_loss(logits, labels, config, num_items_in_batch)
    loss = {"regression": mse_loss, "multi_label_classification": binary_cross_entropy_with_logits}[config.problem_type]
    if labels.numel() != logits.numel():
        raise ValueError(
            f"problem_type={config.problem_type!r} takes labels of shape {list(logits.shape)}, got "
            f"{list(labels.shape)}."
        )
    total = loss(logits, labels.reshape(logits.shape).float(), reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else _on(labels, num_items_in_batch))


def token_classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """Mean cross-entropy, in float32, of logits [..., K] to classes [...]; -100 is ignored."""
    labels = labels.to(logits.device).reshape(-1)
    logits = logits.reshape(-1, config.num_labels).float()
    total = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else _on(labels, num_items_in_batch))


def problem_type_of(labels: torch.Tensor, num_labels: int) -> str:
    """One number is a regression; whole numbers are classes; other numbers say of each class whether it is there."""
    if num_labels == 1:
        return "regression"
    kind = "single_label" if labels.dtype in (torch.int64, torch.int32) else "multi_label"
    return f"{kind}_classification"


def _on(labels: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor | int:
    return count.to(labels.device) if torch.is_tensor(count) else count

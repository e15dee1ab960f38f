"""What causal language models share: from hidden states to the next token's logits and loss.

Shapes: B batch, T new tokens, V ids.
"""

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

IGNORED = -100


class CausalLMHead:
    """The `forward` of a model whose `lm_head` turns the hidden states of its `model` into logits of the next token.

    It stands before the PreTrainedModel among a class's bases. Where `model` takes more arguments than these, `forward`
    is written out and ends with `predict`.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
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
            logits_to_keep: compute logits [B, T, V] for the last so many positions only (0: all), or for these indices.

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
        return self.predict(outputs, labels, logits_to_keep, **kwargs)

    def predict(
        self, outputs: BaseModelOutputWithPast, labels, logits_to_keep: int | torch.Tensor, **kwargs
    ) -> CausalLMOutputWithPast:
        """Logits of the hidden states that are kept, and their loss where there are `labels` or `shift_labels`."""
        logits = self.lm_head(outputs.last_hidden_state[:, kept_positions(logits_to_keep)])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def kept_positions(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """Index of the last so many of T positions, of all for 0; a tensor of indices as it is."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def next_tokens(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """[B, T] targets of each position: `shift_labels` as they are, or `labels` moved by one."""
    if shift_labels is not None or labels is None:
        return None if shift_labels is None else shift_labels.contiguous()
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def num_targets(targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | int:
    """What a sum of token losses is divided by: the targets that are not IGNORED, or `num_items_in_batch`."""
    if num_items_in_batch is None:
        return (targets != IGNORED).sum()
    return num_items_in_batch.to(targets.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch

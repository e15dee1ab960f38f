"""What language models share: from hidden states to the next token's logits, the losses of tokens, and long rows in
chunks.

Shapes: B batch, T new tokens, V ids.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

logger = logging.get_logger(__name__)

IGNORED = -100
INSIDE = (
    "Set label_smoothing_factor=0 and let the model smooth: "
    "data_collator=hf_tfamily.label_smoothing.SmoothingCollator(collator, 0.1)."
)


class ShiftedLabels:
    """A model whose position t predicts labels[t + 1]. It stands before the PreTrainedModel among a class's bases.

    The Trainer's label smoothing moves labels by one only for the class names in a table of Transformers; here a class
    enters its own. The key is no model type, so nothing is ever looked up by it.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedModel):
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(cls.__name__, cls.__name__)


class CausalLMHead(ShiftedLabels):
    """The `forward` of a model whose `lm_head` turns the hidden states of its `model` into logits of the next token.

    It stands before the PreTrainedModel among a class's bases. Where `model` takes more arguments than these, `forward`
    is written out and ends with `predict`.
    """

    def __init__(self, config):
        super().__init__(config)
        self.loss_function = next_token_loss
        self.loss_and_logits = loss_by_config(config, shifted=True)

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
            kwargs: `num_items_in_batch` and `label_smoothing` of the loss, see `label_smoothed_loss`.

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
        self,
        outputs: BaseModelOutputWithPast,
        labels,
        logits_to_keep: int | torch.Tensor,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the hidden states that are kept, and their loss where there are `labels` or `shift_labels`."""
        smoothing = own_smoothing(self, labels, kwargs)
        states = outputs.last_hidden_state[:, kept_positions(logits_to_keep)]
        loss, logits = self.loss_and_logits(
            self.lm_head, self.loss_function, states, labels=labels, label_smoothing=smoothing, **kwargs
        )
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
    """What a sum of token losses is divided by: the targets that are not IGNORED, or `num_items_in_batch`.

    At least 1: a batch without any target has a loss of 0 and gradients of 0, where stock models have NaN, and on a CPU
    a warning says so.
    """
    if num_items_in_batch is None:
        count = (targets != IGNORED).sum()
        if type(count) is torch.Tensor and count.device.type == "cpu" and not torch.compiler.is_compiling():
            _warn_of_none(count)
        return count.clamp(min=1)
    if torch.is_tensor(num_items_in_batch):
        return num_items_in_batch.to(targets.device).clamp(min=1)
    return max(num_items_in_batch, 1)


def _warn_of_none(count: torch.Tensor) -> None:
    if count == 0:
        logger.warning_once(
            f"This batch has 0 tokens to predict: its labels are all {IGNORED}, or its rows are of length 1, and "
            "nothing comes before their only token. Its loss is 0."
        )


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor | None, shift_labels: torch.Tensor | None = None, **kwargs
) -> torch.Tensor:
    """`label_smoothed_loss` of logits [B, T, V] to `shift_labels` [B, T], or to `labels` [B, T] moved by one."""
    return label_smoothed_loss(logits, next_tokens(labels, shift_labels), **kwargs)


def label_smoothed_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    **kwargs,
) -> torch.Tensor:
    """Cross-entropy of logits [B, T, V] to labels [B, T] of the same positions, in float32.

    Args:
        label_smoothing: probability that the targets spread evenly over all V ids (Szegedy et al. 2016).
        num_items_in_batch: what the sum is divided by, where a batch is read in several steps; the number of labels
            that are not ignore_index if None.
    """
    losses = cross_entropy(
        logits.float().flatten(0, -2),
        labels.to(logits.device).flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return losses / num_targets(labels, num_items_in_batch)


def own_smoothing(model: PreTrainedModel, labels: torch.Tensor | None, batch: dict, default: float = 0.0) -> float:
    """How much a model smooths its loss: in training, what the batch says as `label_smoothing`, or `default`.

    Args:
        batch: arguments of `forward`; `label_smoothing` and `counted_targets` are taken out.

    Raises:
        ValueError: if a batch with either has no labels, because a Trainer took them to compute a loss of its own.
    """
    smoothing, counted = batch.pop("label_smoothing", None), batch.pop("counted_targets", None)
    if labels is None and (smoothing is not None or counted is not None):
        raise ValueError(
            "This batch came without its labels. The Trainer takes them out where it computes the loss by itself "
            "(label_smoothing_factor, compute_loss_func), and smoothing moves them by one even beside shift_labels. "
            f"{INSIDE} For a compute_loss_func leave counted_targets out of the batch."
        )
    if not model.training:
        return 0.0
    return default if smoothing is None else smoothing


def check_loss_is_inside(labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None, why: str) -> None:
    """Raise ValueError where a Trainer counted labels and took them out to compute a loss; `why` it must not."""
    if labels is None and num_items_in_batch is not None:
        raise ValueError(
            f"label_smoothing_factor and compute_loss_func make the Trainer compute the loss by itself, but {why}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Long rows in chunks: in training a chunk keeps its inputs alone, and the backward computes the rest of it again.


def position_wise(function: Callable, hidden_states: torch.Tensor, size: int) -> torch.Tensor:
    """`function` of hidden states [B, T, hidden], each position for itself, `size` of them at a time."""
    return torch.cat(_of_chunks(function, size, hidden_states), dim=1)


def sum_of_chunks(loss_of: Callable, size: int, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of `loss_of` hidden states [B, T, hidden] and targets [B, T], `size` positions at a time."""
    return torch.stack(_of_chunks(loss_of, size, hidden_states, targets)).sum()


def _of_chunks(function: Callable, size: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The last chunk may be shorter, which Transformers' `apply_chunking_to_forward` refuses."""
    chunks = zip(*(tensor.split(size, dim=1) for tensor in tensors), strict=True)
    return [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]


def loss_by_config(config, shifted: bool) -> Callable:
    """How a head makes loss and logits of hidden states: `loss_and_logits`, or `loss_in_chunks` of chunk_size_lm_head.

    Args:
        shifted: position t predicts labels[t + 1]; else labels[t].
    """
    return partial(loss_in_chunks, config.chunk_size_lm_head, shifted) if config.chunk_size_lm_head else loss_and_logits


def loss_and_logits(
    head: Callable, loss_function: Callable, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Logits [B, T, V] of hidden states [B, T, hidden], and their loss where there are `labels` or `shift_labels`."""
    logits, loss = head(hidden_states), None
    if labels is not None or kwargs.get("shift_labels") is not None:
        loss = loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
    return loss, logits


def loss_in_chunks(
    size: int,
    shifted: bool,
    head: Callable,
    loss_function: Callable,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The same loss without logits, which are of `size` tokens at a time; where there are no targets, the logits."""
    targets = next_tokens(labels, shift_labels) if shifted else labels
    if targets is None:
        return None, head(hidden_states)
    count = num_targets(targets, num_items_in_batch)

    def loss_of(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits, given = head(states), {"labels": None, "shift_labels": targets} if shifted else {"labels": targets}
        return loss_function(
            logits=logits, **given, vocab_size=logits.shape[-1], num_items_in_batch=count, **kwargs
        )  # a part of the sum over all targets

    return sum_of_chunks(loss_of, size, hidden_states, targets), None

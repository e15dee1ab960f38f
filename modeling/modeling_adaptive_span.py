"""Adaptive span: Sukhbaatar, Grave, Bojanowski and Joulin 2019, "Adaptive Attention Span in Transformers"
(arXiv:1905.07799).

Every head learns how far back it looks: its weights are multiplied by a soft mask that fades over a ramp (equations 3
and 4), and each token of a span costs a little (equation 5). When spans are learned, `freeze_spans()` makes patterns of
them, so that a backend computes what is seen and no more. Blocks, and attention with its call of
ALL_ATTENTION_FUNCTIONS.get_interface(...), are those of modeling_rope_decoder.py, with rotary positions where the paper
has learned relative ones.

Shapes: B batch, T tokens, H heads, L distances.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention import query_and_key_positions
from .attention_patterns import Local, PerHead, patterns_for_layers
from .causal_lm import IGNORED, INSIDE, check_loss_is_inside, next_tokens, num_targets
from .configuration_adaptive_span import AdaptiveSpanConfig
from .modeling_rope_decoder import (
    ORDERS,
    RoPEDecoderAttention,
    RoPEDecoderBlock,
    RoPEDecoderForCausalLM,
    RoPEDecoderModel,
    RoPEDecoderPreTrainedModel,
    check_scored,
)
from .positions import BiasByDistance, nothing_seen_is_zero

UNSEEN = (
    -1e4
)  # a bias after which a weight is exactly 0; rows of a part may have no other, and infinities no difference


class Within(torch.autograd.Function):
    """Clamp to 0 ... 1, whose gradient can lead back from an end, but not beyond it."""

    @staticmethod
    def forward(ctx, share: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(share)
        return share.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (share,) = ctx.saved_tensors
        outward = ((share <= 0) & (gradient > 0)) | ((share >= 1) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0)


class Spans(nn.Module):
    """The spans z of a layer's heads, each `share` of max_span."""

    def __init__(self, config: AdaptiveSpanConfig):
        super().__init__()
        self.max_span = config.max_span
        self.share = nn.Parameter(torch.full((config.num_attention_heads,), config.initial_span / config.max_span))
        if config.frozen_spans:
            self.freeze()

    def freeze(self) -> None:
        """Learn no more: what was a parameter becomes a buffer of the same name."""
        share = self.share.detach()
        del self.share
        self.register_buffer("share", share)

    def forward(self) -> torch.Tensor:
        """[H], in tokens."""
        return self.max_span * Within.apply(self.share)


class SpanMask(BiasByDistance):
    """The soft mask m_z(x) = clamp((R + z - x) / R, 0, 1) of distances x (equation 3), as a bias log m on the scores:
    exp(s + log m) = m exp(s) (equation 4)."""

    def __init__(self, config: AdaptiveSpanConfig):
        super().__init__(config)
        self.spans = Spans(config)

    def table(self, distances: torch.Tensor, causal: bool) -> torch.Tensor:
        ramp = self.config.span_ramp
        mask = ((ramp + self.spans()[:, None] - distances) / ramp).clamp(max=1)
        seen = mask > 0
        return torch.where(seen, mask, 1.0).log().masked_fill(~seen, UNSEEN)


def places(model: "AdaptiveSpanModel", inputs_embeds, attention_mask, position_ids, past_key_values) -> dict:
    """The layers' arguments that tell them the positions of new tokens, and where these and all keys stand."""
    said = (inputs_embeds, attention_mask, position_ids, past_key_values)
    check_scored(model, "an adaptive span", past_key_values)
    positions = (*query_and_key_positions(*said), model.local_heads)
    return {**ORDERS[model.config.position_encoding](model, *said), "places": positions}


class AdaptiveSpanAttention(RoPEDecoderAttention):
    """Self-attention whose heads look as far back as they learned to."""

    def __init__(self, config: AdaptiveSpanConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mask = SpanMask(config)
        self.collect = nothing_seen_is_zero

    def forward(self, hidden_states: torch.Tensor, attention_mask, *args, places: tuple, **kwargs):
        """[B, T, hidden] -> [B, T, hidden], and the weights [B, H, T, S] where the backend has them.

        Args:
            places: positions of queries [B or 1, T] and keys [B or 1, S], and the heads that this process computes.
        """
        queries, keys, heads = places
        bias = self.mask.prepare(queries, keys, True, hidden_states, heads)
        return super().forward(hidden_states, attention_mask, *args, position_bias=bias, **kwargs)


class AdaptiveSpanBlock(RoPEDecoderBlock):
    """Residual block with pre-norm."""

    attention_class = AdaptiveSpanAttention


class AdaptiveSpanPreTrainedModel(RoPEDecoderPreTrainedModel):
    """What Transformers wants to know about the family, and the spans."""

    config: AdaptiveSpanConfig
    _no_split_modules = ["AdaptiveSpanBlock"]
    _can_record_outputs = {"hidden_states": AdaptiveSpanBlock, "attentions": AdaptiveSpanAttention}
    scores_distances = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Spans):
            init.constant_(module.share, self.config.initial_span / self.config.max_span)

    @property
    def spans(self) -> torch.Tensor:
        """[layers, H], in tokens, without the ramp."""
        return torch.stack([layer.self_attn.mask.spans() for layer in self.base_model.layers])

    @torch.no_grad()
    def freeze_spans(self) -> None:
        """Learn spans no more, and let every head see the keys alone that its soft mask shows.

        Outputs stay as they are, the soft mask too. What patterns `config.attention_patterns` had is replaced.
        """
        reach = (self.spans + self.config.span_ramp).ceil().long().clamp(min=1).tolist()
        patterns = [PerHead(tuple(Local(window) for window in layer)) for layer in reach]
        self.config.frozen_spans = True
        self.config.attention_patterns = [pattern.to_dict() for pattern in patterns]
        self.base_model.patterns = patterns_for_layers(self.config.attention_patterns, len(patterns))
        for layer in self.base_model.layers:
            layer.self_attn.mask.spans.freeze()


class AdaptiveSpanModel(AdaptiveSpanPreTrainedModel, RoPEDecoderModel):
    """The decoder without a head: ids or embeddings in, hidden states [B, T, hidden] out."""

    block_class = AdaptiveSpanBlock

    def __init__(self, config: AdaptiveSpanConfig):
        super().__init__(config)
        self.order_of = places


class AdaptiveSpanForCausalLM(AdaptiveSpanPreTrainedModel, RoPEDecoderForCausalLM):
    """The decoder with a linear layer to the next token's logits. In training its loss contains the cost of spans."""

    model_class = AdaptiveSpanModel

    def predict(self, outputs, labels, logits_to_keep, **kwargs) -> CausalLMOutputWithPast:
        predicted = super().predict(outputs, labels, logits_to_keep, **kwargs)
        num_items = kwargs.get("num_items_in_batch")
        if not self.training or self.config.frozen_spans or not self.config.span_cost:
            return predicted
        targets = next_tokens(labels, kwargs.get("shift_labels"))
        check_loss_is_inside(targets, num_items, f"spans pay a cost that only the model knows. {INSIDE}")
        if targets is not None:  # equation 5, of which each micro-batch pays as much as it has of a step's targets
            share, spans = (targets != IGNORED).sum() / num_targets(targets, num_items), self.spans
            if hasattr(spans, "full_tensor"):  # a DTensor
                raise ValueError(
                    "Spans pay their cost outside the blocks, where FSDP holds shards of them alone; shard the whole "
                    "model at once, train it in one process or under DDP, or call freeze_spans()."
                )
            predicted.loss = predicted.loss + self.config.span_cost * share * spans.mean()
        return predicted

    def obstacle_to_paging(self) -> str:
        return "keeps no distances, which adaptive spans score"


AdaptiveSpan = AdaptiveSpanModel

__all__ = [
    "AdaptiveSpan",
    "AdaptiveSpanForCausalLM",
    "AdaptiveSpanModel",
    "AdaptiveSpanPreTrainedModel",
]

"""Configuration of the adaptive-span decoder (Sukhbaatar et al. 2019, arXiv:1905.07799)."""

from huggingface_hub.dataclasses import strict

from .checks import check_not_negative, check_sizes
from .configuration_rope_decoder import RoPEDecoderConfig


@strict
class AdaptiveSpanConfig(RoPEDecoderConfig):
    """A decoder whose heads learn how far back they look.

    Args:
        max_span: S, the farthest that a head can learn to look, in tokens.
        span_ramp: R, over how many tokens beyond its span a head's weights fade to 0.
        span_cost: what the training loss pays for each token of a span, in nats; summed over all heads and divided by
            their number.
        initial_span: the spans at first, in tokens.
        frozen_spans: spans learn no more and cost nothing; `freeze_spans()` sets it, and attention_patterns with it.
        attention_patterns: which earlier positions a layer sees at most: by default the last max_span + span_ramp.
        position_encoding: "rotary" or "none".

    All other fields are those of RoPEDecoderConfig.
    """

    model_type = "adaptive_span"

    max_span: int = 1024
    span_ramp: int = 32
    span_cost: float | int = 2e-6
    initial_span: float | int = 0
    frozen_spans: bool = False

    def __post_init__(self, **kwargs):
        if self.attention_patterns is None:
            self.attention_patterns = {"type": "local", "window": self.max_span + self.span_ramp}
        super().__post_init__(**kwargs)

    def validate_spans(self):
        """Spans have a length and an end, and the positions leave the scores to them."""
        check_sizes(self, "max_span", "span_ramp")
        check_not_negative(self, "span_cost")
        if not 0 <= self.initial_span <= self.max_span:
            raise ValueError(f"initial_span must be 0 to max_span={self.max_span} tokens, got {self.initial_span}.")
        if self.position_encoding not in ("rotary", "none"):
            raise ValueError(
                f"position_encoding must be 'rotary' or 'none', since spans are added to the scores, got "
                f"{self.position_encoding!r}."
            )


__all__ = ["AdaptiveSpanConfig"]

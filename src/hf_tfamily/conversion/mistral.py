"""Mistral <-> RoPE decoder: Llama without biases, and with a sliding window in every layer."""

import torch
from transformers import MistralConfig

from ..modeling.attention_patterns import Local, patterns_for_layers
from ..modeling.configuration_rope_decoder import RoPEDecoderConfig
from .llama import from_decoder, to_decoder
from .mapping import require

SOURCE_TYPE = "mistral"
OUR_TYPE = "rope_decoder"


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    mistral = MistralConfig.from_dict(config)
    window = mistral.sliding_window
    patterns = None if window is None else Local(window).to_dict()
    return to_decoder(mistral, weights, "Mistral", attention_patterns=patterns)


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours = RoPEDecoderConfig.from_dict(config)
    for name in ("attention_bias", "attention_output_bias", "mlp_bias"):
        require(not getattr(ours, name), f"Mistral has no biases, but this model has {name}=True.")
    return from_decoder(ours, weights, MistralConfig, sliding_window=_window(ours))


def _window(ours: RoPEDecoderConfig) -> int | None:
    if ours.attention_patterns is None:
        return None
    first, *others = set(patterns_for_layers(ours.attention_patterns, ours.num_hidden_layers))
    require(
        isinstance(first, Local) and not others,
        f"Mistral has one local window in every layer, but this model has {ours.attention_patterns}.",
    )
    return first.window

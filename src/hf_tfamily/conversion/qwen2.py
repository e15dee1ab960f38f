"""Qwen2 <-> RoPE decoder: Llama with biases on queries, keys and values, and a sliding window in some layers."""

import torch
from transformers import Qwen2Config

from ..modeling.attention_patterns import Full, Local, patterns_for_layers
from ..modeling.configuration_rope_decoder import RoPEDecoderConfig
from .llama import from_decoder, to_decoder
from .mapping import require

SOURCE_TYPE = "qwen2"
OUR_TYPE = "rope_decoder"
BIASES = {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False}


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    qwen = Qwen2Config.from_dict(config)
    patterns = None
    if "sliding_attention" in qwen.layer_types:
        kinds = {"full_attention": Full(), "sliding_attention": Local(qwen.sliding_window)}
        patterns = [kinds[layer_type].to_dict() for layer_type in qwen.layer_types]
    return to_decoder(qwen, weights, "Qwen2", attention_patterns=patterns, **BIASES)


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours = RoPEDecoderConfig.from_dict(config)
    biases = {name: getattr(ours, name) for name in BIASES}
    require(biases == BIASES, f"Qwen2 has {BIASES}, but this model has {biases}.")
    return from_decoder(ours, weights, Qwen2Config, **_sliding(ours))


def _sliding(ours: RoPEDecoderConfig) -> dict:
    """The fields that say which layers slide, and how far."""
    if ours.attention_patterns is None:
        return {"use_sliding_window": False}
    patterns = patterns_for_layers(ours.attention_patterns, ours.num_hidden_layers)
    windows = {pattern.window for pattern in patterns if isinstance(pattern, Local)}
    known = all(isinstance(pattern, Local | Full) for pattern in patterns)
    require(
        known and len(windows) == 1,
        f"Qwen2 has one local window, in some layers or all, but this model has {ours.attention_patterns}.",
    )
    layer_types = ["sliding_attention" if isinstance(pattern, Local) else "full_attention" for pattern in patterns]
    return {"use_sliding_window": True, "sliding_window": windows.pop(), "layer_types": layer_types}

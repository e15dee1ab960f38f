"""Llama <-> RoPE decoder: the same architecture, so weights keep their names."""

import torch
from transformers import LlamaConfig, PreTrainedConfig

from ..modeling.configuration_rope_decoder import RoPEDecoderConfig
from .mapping import require

SOURCE_TYPE = "llama"
OUR_TYPE = "rope_decoder"

SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "attention_dropout",
    "rms_norm_eps",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "id2label",
    "label2id",
    "problem_type",
)


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    llama = LlamaConfig.from_dict(config)
    return to_decoder(llama, weights, "Llama", attention_bias=llama.attention_bias, mlp_bias=llama.mlp_bias)


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours = RoPEDecoderConfig.from_dict(config)
    require(ours.attention_patterns is None, "Llama has no attention_patterns; mistral or qwen2 may hold them.")
    require(
        ours.attention_output_bias == ours.attention_bias,
        f"Llama has biases on all of its attention projections or on none, but this model has attention_bias="
        f"{ours.attention_bias} and attention_output_bias={ours.attention_output_bias}.",
    )
    return from_decoder(ours, weights, LlamaConfig, attention_bias=ours.attention_bias, mlp_bias=ours.mlp_bias)


def to_decoder(stock: PreTrainedConfig, weights: dict, prefix: str, **fields) -> tuple[dict, dict]:
    """Our side of a decoder of Llama's shape; `fields` are what its family has of its own."""
    # Llama and its like ignore partial_rotary_factor; old checkpoints hold the angles, which follow from the config.
    rope = {key: value for key, value in stock.rope_parameters.items() if key != "partial_rotary_factor"}
    ours = {
        **{name: getattr(stock, name) for name in SHARED_FIELDS},
        "model_type": OUR_TYPE,
        "architectures": [_renamed(stock.architectures, prefix, "RoPEDecoder", weights)],
        "head_dim": getattr(stock, "head_dim", None),
        "rope_parameters": rope,
        **fields,
    }
    return ours, {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def from_decoder(ours: RoPEDecoderConfig, weights: dict, config_class: type, **fields) -> tuple[dict, dict]:
    """The side of a decoder of Llama's shape; interleaved pairs are sorted into halves."""
    prefix = config_class.__name__.removesuffix("Config")
    require(
        ours.position_encoding == "rotary",
        f"{prefix} has rotary positions, but this model has position_encoding={ours.position_encoding!r}.",
    )
    share = ours.rope_parameters.get("partial_rotary_factor", 1.0)
    require(share == 1.0, f"{prefix} rotates whole heads, but this model has partial_rotary_factor={share}.")
    stock = {
        **{name: getattr(ours, name) for name in SHARED_FIELDS},
        "model_type": config_class.model_type,
        "architectures": [_renamed(ours.architectures, "RoPEDecoder", prefix, weights)],
        "head_dim": ours.head_dim,
        "rope_parameters": dict(ours.rope_parameters),
        **fields,
    }
    if ours.rotary_layout == "interleaved":
        weights = {name: _halves(name, tensor, ours.head_dim) for name, tensor in weights.items()}
    return stock, weights


def _renamed(architectures: list[str] | None, old: str, new: str, weights: dict) -> str:
    """The class of the same head; without `architectures` the weights tell a language model from a bare one."""
    if not architectures:
        return new + ("ForCausalLM" if any(name.startswith("model.") for name in weights) else "Model")
    return new + architectures[0].removeprefix(old)


def _halves(name: str, tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows 2i and 2i + 1 of each head of a query or key projection become rows i and i + D/2."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return tensor
    pairs = tensor.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()

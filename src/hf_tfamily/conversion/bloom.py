"""BLOOM <-> vanilla Transformer: its decoder alone with ALiBi, norms first, and a norm of the embeddings."""

import re

import torch
from transformers import BloomConfig

from .alibi_decoder import OUR_TYPE, from_decoder, to_decoder
from .mapping import require

SOURCE_TYPE = "bloom"
NAMES = {"word_embeddings": "embed_tokens", "word_embeddings_layernorm": "embedding_norm", "ln_f": "norm"}
MODULES = {
    "input_layernorm": "self_attn_residual.norm",
    "post_attention_layernorm": "mlp_residual.norm",
    "self_attention.dense": "self_attn.o_proj",
    "self_attention": "self_attn",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
BUILT_IN = {"hidden_act": "gelu_pytorch_tanh", "embedding_norm": True, "layer_bias": True}
FUSED = "query_key_value"


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    bloom = BloomConfig.from_dict(config)
    require(
        not bloom.apply_residual_connection_post_layernorm,
        "This family adds what comes before a norm, but the model has apply_residual_connection_post_layernorm=True.",
    )
    ours, weights = to_decoder(bloom, weights, "h", NAMES, MODULES)
    dropouts = {"dropout": bloom.hidden_dropout, "attention_dropout": bloom.attention_dropout}
    return {**ours, **BUILT_IN, **dropouts}, _split(weights, bloom.n_head)


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours, stock, weights = from_decoder(config, weights, BloomConfig, "h", NAMES, MODULES, BUILT_IN)
    stock |= {"hidden_size": ours.hidden_size, "n_layer": ours.decoder_layers, "n_head": ours.num_attention_heads}
    stock |= {"hidden_dropout": ours.dropout, "attention_dropout": ours.attention_dropout}
    return stock, _fuse(weights, ours.num_attention_heads)


def _split(weights: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """Rows of a head's query, key and value, head after head -> three projections."""
    split = {}
    for name, tensor in weights.items():
        if FUSED in name:
            parts = tensor.unflatten(0, (heads, 3, -1)).unbind(1)
            split |= {name.replace(FUSED, f"{of}_proj"): part.flatten(0, 1) for of, part in zip("qkv", parts)}
        else:
            split[name] = tensor
    return split


def _fuse(weights: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    fused = {name: tensor for name, tensor in weights.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in weights:
        if ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{of}_proj.")].unflatten(0, (heads, -1)) for of in "qkv"]
            fused[name.replace("q_proj", FUSED)] = torch.stack(parts, 1).flatten(0, 2)
    return fused


__all__ = ["OUR_TYPE", "SOURCE_TYPE", "to_ours", "to_stock"]

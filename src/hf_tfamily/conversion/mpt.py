"""MPT <-> vanilla Transformer: its decoder alone with ALiBi, norms first, and no biases."""

import re

import torch
from transformers import MptConfig

from .alibi_decoder import OUR_TYPE, from_decoder, to_decoder
from .mapping import require

SOURCE_TYPE = "mpt"
NAMES = {"wte": "embed_tokens", "norm_f": "norm"}
MODULES = {
    "norm_1": "self_attn_residual.norm",
    "norm_2": "mlp_residual.norm",
    "attn.out_proj": "self_attn.o_proj",
    "attn": "self_attn",
    "ffn": "mlp",
}
BUILT_IN = {"hidden_act": "gelu", "embedding_norm": False, "layer_bias": False}
FUSED = "Wqkv"


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    mpt = MptConfig.from_dict(config)
    attention = mpt.attn_config
    needed = {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8, "clip_qkv": None}
    needed |= {"prefix_lm": False, "qk_ln": False, "attn_uses_sequence_id": False}
    for holder, fields in ((attention, needed), (mpt, {"expansion_ratio": 4, "no_bias": True, "logit_scale": None})):
        for field, value in fields.items():
            found = getattr(holder, field)
            require(found == value, f"This family needs {field}={value!r}, but the model has {field}={found!r}.")
    scale = (mpt.d_model / mpt.n_heads) ** -0.5
    require(
        attention.softmax_scale in (None, scale),
        f"This family scales scores by {scale}, but the model has softmax_scale={attention.softmax_scale}.",
    )
    ours, weights = to_decoder(mpt, weights, "blocks", NAMES, MODULES)
    dropouts = {"dropout": attention.attn_pdrop, "attention_dropout": attention.attn_pdrop}
    return {**ours, **BUILT_IN, **dropouts, "max_position_embeddings": mpt.max_seq_len}, _split(weights)


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours, stock, weights = from_decoder(config, weights, MptConfig, "blocks", NAMES, MODULES, BUILT_IN)
    require(
        ours.dropout == ours.attention_dropout and ours.dropout in (0, 1),
        f"MPT has one whole number for its dropouts, but this model has dropout={ours.dropout} and "
        f"attention_dropout={ours.attention_dropout}.",
    )
    stock |= {"d_model": ours.hidden_size, "n_layers": ours.decoder_layers, "n_heads": ours.num_attention_heads}
    stock |= {"attn_config": {"attn_pdrop": int(ours.dropout)}, "max_seq_len": ours.max_position_embeddings}
    return stock, _fuse(weights)


def _split(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of all queries, all keys and all values -> three projections."""
    split = {}
    for name, tensor in weights.items():
        if FUSED in name:
            split |= {name.replace(FUSED, f"{of}_proj"): part.clone() for of, part in zip("qkv", tensor.chunk(3))}
        else:
            split[name] = tensor
    return split


def _fuse(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fused = {name: tensor for name, tensor in weights.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in weights:
        if ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{of}_proj.")] for of in "qkv"]
            fused[name.replace("q_proj", FUSED)] = torch.cat(parts)
    return fused


__all__ = ["OUR_TYPE", "SOURCE_TYPE", "to_ours", "to_stock"]

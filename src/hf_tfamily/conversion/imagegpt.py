"""ImageGPT <-> Sparse Transformer: dense attention, RMS norms, and a start token behind the ids of colours."""

import re

import torch
from transformers import ImageGPTConfig

from ..modeling.configuration_sparse_transformer import SparseTransformerConfig
from .mapping import rename_in_blocks, renamed, require

SOURCE_TYPE = "imagegpt"
OUR_TYPE = "sparse_transformer"

ARCHITECTURES = {
    "ImageGPTForCausalImageModeling": "SparseTransformerForCausalLM",
    "ImageGPTModel": "SparseTransformerModel",
}
# Our fields by theirs.
FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
    "resid_pdrop": "resid_dropout",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attention_dropout",
    "layer_norm_epsilon": "layer_norm_eps",
    **{name: name for name in ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")},
}
# Theirs and ours that the other side has built in. reorder_and_upcast_attn is about half precision alone.
THEIR_BUILT_IN = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": False,
}
DENSE = {"type": "full"}
OUR_BUILT_IN = {"norm": "rms", "attention_patterns": DENSE, "tie_word_embeddings": False}
MODULES = {
    "ln_1": "attention_norm",
    "attn.c_proj": "self_attn.o_proj",
    "attn.c_attn": "self_attn.qkv",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
OUTSIDE = {"wte.": "embed_tokens.", "wpe.": "embed_positions.axes.0.", "h.": "layers.", "ln_f.": "norm."}
BUFFERS = (".attn.bias", ".attn.masked_bias")  # masks that old files hold
FUSED = ".self_attn.qkv."


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    gpt = ImageGPTConfig.from_dict(config)
    for field, needed in THEIR_BUILT_IN.items():
        found = getattr(gpt, field)
        require(found == needed, f"This family needs {field}={needed!r}, but the model has {field}={found!r}.")
    architecture = renamed(gpt.architectures, ARCHITECTURES)
    ours = {
        **{name: getattr(gpt, theirs) for theirs, name in FIELDS.items()},
        **OUR_BUILT_IN,
        "model_type": OUR_TYPE,
        "architectures": [architecture],
        "intermediate_size": gpt.n_inner,
        "output_vocab_size": gpt.vocab_size - 1,  # the start token is the last id and never comes next
    }
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(BUFFERS)}
    body = {_outside(name.removeprefix("transformer."), OUTSIDE): tensor for name, tensor in weights.items()}
    body = {name: tensor for part, x in rename_in_blocks(body, MODULES).items() for name, tensor in _split(part, x)}
    inner = "" if architecture == "SparseTransformerModel" else "model."
    return ours, {name if name.startswith("lm_head.") else inner + name: tensor for name, tensor in body.items()}


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours = SparseTransformerConfig.from_dict(config)
    architecture = renamed(ours.architectures, {name: theirs for theirs, name in ARCHITECTURES.items()})
    head_dim = ours.hidden_size / ours.num_attention_heads
    built_in = {**OUR_BUILT_IN, "qk_head_dim": head_dim, "v_head_dim": head_dim}
    built_in |= {"position_shape": [ours.max_position_embeddings]}
    for field, needed in built_in.items():
        value = getattr(ours, field)
        require(value == needed, f"ImageGPT has {field}={needed!r} built in, but this model has {field}={value!r}.")
    require(
        ours.output_vocab_size == ours.vocab_size - 1 or architecture == "ImageGPTModel",
        f"ImageGPT has one start token, the last id: output_vocab_size={ours.vocab_size - 1}, but this model has "
        f"output_vocab_size={ours.output_vocab_size}.",
    )
    require(
        ours.final_norm_eps in (None, ours.layer_norm_eps),
        f"ImageGPT has one epsilon for all norms, but this model has final_norm_eps={ours.final_norm_eps}.",
    )
    stock = {
        **{theirs: getattr(ours, name) for theirs, name in FIELDS.items()},
        **THEIR_BUILT_IN,
        "model_type": SOURCE_TYPE,
        "architectures": [architecture],
        "n_inner": ours.intermediate_size,
    }
    back = {name: theirs for theirs, name in OUTSIDE.items()}
    body = {_outside(name.removeprefix("model."), back): tensor for name, tensor in _fused(weights).items()}
    body = rename_in_blocks(body, {name: theirs for theirs, name in MODULES.items()})
    body = {name: _turned(name, tensor) for name, tensor in body.items()}
    inner = "" if architecture == "ImageGPTModel" else "transformer."
    return stock, {name if name.startswith("lm_head.") else inner + name: tensor for name, tensor in body.items()}


def _outside(name: str, modules: dict[str, str]) -> str:
    """A name whose beginning is one of the modules outside of blocks, or a block's."""
    start = next((start for start in modules if name.startswith(start)), "")
    return modules.get(start, "") + name.removeprefix(start)


def _split(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Their layers hold [in, out] where ours hold [out, in]; queries, keys and values are side by side."""
    if re.search(r"(qkv|o_proj|up_proj|down_proj)\.weight$", name):
        tensor = tensor.T.contiguous()
    if FUSED not in name:
        return [(name, tensor)]
    return [(name.replace("qkv", f"{of}_proj"), part.clone()) for of, part in zip("qkv", tensor.chunk(3))]


def _fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fused = {name: tensor for name, tensor in weights.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in weights:
        if ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{of}_proj.")] for of in "qkv"]
            fused[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return fused


def _turned(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous() if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name) else tensor


__all__ = ["OUR_TYPE", "SOURCE_TYPE", "to_ours", "to_stock"]

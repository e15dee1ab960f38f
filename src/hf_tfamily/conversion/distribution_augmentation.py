"""The Sparse Transformers of openai/distribution_augmentation (Jun et al. 2020) -> Sparse Transformer.

Their checkpoints are a `.npz` of TensorFlow variables, with averaged weights and the optimizer's beside them; how many
heads there are and what they see is in their hyperparams.py alone. So the source is a folder with model.npz and a
config.json that repeats it:

    {"model_type": "distribution_augmentation", "n_head": 2, "attention_layers": "bT,b,b,b", "local_attn_ctx": 96}

A start token of theirs stands before position 0 and has no position; here it has position 0, whose embedding is zero,
and everything else moves on by one, so that the table has a row for each position. Models that were told how a picture
was changed have a start token for each combination; the first is for pictures as they are.
"""

import itertools
import math
import os

import torch

from .mapping import require

SOURCE_TYPE = "distribution_augmentation"
OUR_TYPE = "sparse_transformer"

# What they call patterns: dense, the last keys, every so many-th key.
PATTERNS = {
    "a": lambda context: {"type": "full"},
    "b": lambda context: {"type": "local", "window": context},
    "bT": lambda context: {"type": "strided", "stride": context},
}
NEEDED = ("n_head", "attention_layers")
BODY = "model/"
AVERAGED = "/Ema/ema"
# In the order in which their sums are made: the last changes fastest among our start tokens.
CHANGES = ("sos_rot", "sos_c", "sos_tr", "sos_rev", "sos_js", "sos_aa", "sos_rd", "sos_data")
MODULES = {
    "attn_input": "attention_norm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "post_proj": "self_attn.o_proj",
    "mlp": "mlp_norm",
    "mlp_proj1": "mlp.up_proj",
    "mlp_proj2": "mlp.down_proj",
}
LEAVES = {"g": "weight", "b": "bias", "w": "weight"}


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    """See the package. Variables that nobody knows keep their names, and are refused with the rest left over."""
    missing = [name for name in NEEDED if name not in config]
    require(not missing, f"config.json has to say {' and '.join(missing)}, as the model's hyperparams.py does.")
    variables = _used(weights)
    table, starts = variables.pop("we"), _starts(variables)
    positions, shape = _positions(variables)
    ours = {
        "model_type": OUR_TYPE,
        "architectures": ["SparseTransformerForCausalLM"],
        "vocab_size": len(table) + len(starts),
        "output_vocab_size": len(table),
        "hidden_size": table.shape[1],
        "num_hidden_layers": 1 + max((int(name.split("/")[0][1:]) for name in variables if _in_block(name)), default=0),
        "num_attention_heads": config["n_head"],
        "position_shape": [math.prod(shape) + 1],
        "attention_patterns": _patterns(config),
        "layer_norm_eps": 1e-5,
        "final_norm_eps": 1e-6,
        "hidden_act": "quick_gelu",
        "resid_dropout": config.get("resid_pdrop", 0.0),
        "embedding_dropout": config.get("embd_pdrop", 0.0),
        **_widths(config, variables),
    }
    found = {"model.embed_tokens.weight": torch.cat([table, starts]), "model.embed_positions.axes.0.weight": positions}
    for name, tensor in variables.items():
        found |= _renamed(name, tensor)
    return ours, found


def _used(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Variables of the model without "model/" and ":0": the averages where there are some, as they sample with.

    What lies below a variable's name is its average, or the optimizer's.
    """
    tidy = {os.path.normpath(name.removesuffix(":0").rstrip("/")): tensor for name, tensor in weights.items()}
    names = {name for name in tidy if name.startswith(BODY)}
    own = {name for name in names if names.isdisjoint(_parents(name))}
    return {name.removeprefix(BODY): tidy.get(name + AVERAGED, tidy[name]).float() for name in own}


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


def _starts(variables: dict[str, torch.Tensor]) -> torch.Tensor:
    """[starts, hidden]: one, or a sum for each combination of what a model was told; they are taken out."""
    if "sos_token/sos" in variables:
        return variables.pop("sos_token/sos").reshape(1, -1)
    tables = [variables.pop(f"sos_token/{name}") for name in CHANGES if f"sos_token/{name}" in variables]
    require(bool(tables), "There is no start token: model/sos_token/ has neither sos nor any of " + ", ".join(CHANGES))
    return torch.stack([torch.stack(rows).sum(0) for rows in itertools.product(*tables)])


def _positions(variables: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """[1 + positions, hidden], the sum of their axes' embeddings behind a row of zeros; and the lengths of the axes."""
    names = sorted((name for name in variables if name.startswith("pos_emb_")), key=lambda name: int(name[8:]))
    axes = [variables.pop(name) for name in names]
    require(bool(axes), "There are no embeddings of positions: model/pos_emb_0 is missing.")
    table = axes[0].new_zeros(1, axes[0].shape[1])
    for axis in axes:
        table = (table[:, None] + axis).flatten(0, 1)
    return torch.cat([torch.zeros_like(table[:1]), table]), [len(axis) for axis in axes]


def _patterns(config: dict) -> list[dict]:
    names, context = config["attention_layers"].split(","), config.get("local_attn_ctx")
    unknown = sorted(set(names) - set(PATTERNS))
    require(not unknown, f"attention_layers has {', '.join(unknown)}; what can be converted is {', '.join(PATTERNS)}.")
    require(set(names) == {"a"} or isinstance(context, int), "config.json has to say local_attn_ctx, a number of keys.")
    return [PATTERNS[name](context) for name in names]


def _widths(config: dict, variables: dict[str, torch.Tensor]) -> dict[str, int]:
    """Of the first block."""
    heads, widths = config["n_head"], {}
    for field, name, parts in (
        ("qk_head_dim", "h0/q_proj/w", heads),
        ("v_head_dim", "h0/v_proj/w", heads),
        ("intermediate_size", "h0/mlp_proj1/w", 1),
    ):
        require(name in variables, f"model/{name} is missing.")
        width = variables[name].shape[-1]
        require(width % parts == 0, f"model/{name} is {width} wide, which n_head={heads} does not divide.")
        widths[field] = width // parts
    return widths


def _in_block(name: str) -> bool:
    first = name.split("/")[0]
    return first.startswith("h") and first[1:].isdigit()


def _renamed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Theirs hold [in, out]."""
    *path, leaf = name.split("/")
    if path == ["final_norm"] and leaf in LEAVES:
        return {f"model.norm.{LEAVES[leaf]}": tensor}
    if name == "gen_logits/logits_proj":
        return {"lm_head.weight": tensor.T.contiguous()}
    if len(path) == 2 and _in_block(name) and path[1] in MODULES and leaf in LEAVES:
        tensor = tensor.T.contiguous() if leaf == "w" else tensor
        return {f"model.layers.{path[0][1:]}.{MODULES[path[1]]}.{LEAVES[leaf]}": tensor}
    return {name: tensor}


__all__ = ["OUR_TYPE", "SOURCE_TYPE", "to_ours"]

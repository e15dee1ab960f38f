"""Longformer's encoder as Beltagy et al. 2020 write it: one query, one key, one head at a time.

Takes a model's weights and says what it makes of one document. No dropout, no padding.
"""

import math

import torch
from torch.nn.functional import gelu

from .vanilla_transformer import linear, normed


def sees(pattern, head: int, query: int, key: int, marked: set[int]) -> bool:
    """The pattern, or a global token on either side (section 3.1)."""
    return query in marked or key in marked or bool(pattern.visible(head, query, key))


def attention(module, states: torch.Tensor, pattern, marked: set[int]) -> torch.Tensor:
    """[T, hidden] -> [T, hidden], before the residual connection; `marked` are the global tokens."""
    config, rows = module.config, []
    size = config.hidden_size // config.num_attention_heads
    for i in range(len(states)):
        of_own = "global_" if config.global_projections and i in marked else ""
        q_proj, k_proj, v_proj = (getattr(module, f"{of_own}{name}_proj") for name in "qkv")
        outputs = []
        for head in range(config.num_attention_heads):
            mine = slice(head * size, (head + 1) * size)
            keys = [j for j in range(len(states)) if sees(pattern, head, i, j, marked)]
            query = linear(q_proj, states[i])[mine]
            scores = [query @ linear(k_proj, states[j])[mine] / math.sqrt(size) for j in keys]
            weights = torch.stack(scores).softmax(dim=0)
            outputs.append(sum(w * linear(v_proj, states[j])[mine] for w, j in zip(weights, keys)))
        rows.append(linear(module.o_proj, torch.cat(outputs)))
    return torch.stack(rows)


def long_encoder(model, ids: torch.Tensor, marked: set[int], patterns: list) -> torch.Tensor:
    """Hidden states [T, hidden] of ids [T], given each layer's pattern and the global tokens."""
    states = model.embed_tokens.weight[ids] + model.positions.table.weight[: len(ids)] + model.embed_types.weight[0]
    states = normed(model.embedding_norm, states)
    for layer, pattern in zip(model.layers, patterns, strict=True):
        mixed = attention(layer.self_attn, states, pattern, marked)
        states = normed(layer.self_attn_residual.norm, states + mixed)
        hidden = gelu(states @ layer.mlp.up_proj.weight.T + layer.mlp.up_proj.bias)
        fed = hidden @ layer.mlp.down_proj.weight.T + layer.mlp.down_proj.bias
        states = normed(layer.mlp_residual.norm, states + fed)
    return states

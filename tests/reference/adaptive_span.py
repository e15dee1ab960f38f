"""Adaptive span as Sukhbaatar et al. 2019 write it, one query, one key, one head at a time.

Takes a model's weights and says what its hidden states for one row must be. No dropout, no padding.
"""

import math

import torch

from .rope import rotate


def soft_mask(distance: int, span: float, ramp: int) -> float:
    """m_z(x) (equation 3)."""
    return min(max((ramp + span - distance) / ramp, 0.0), 1.0)


def attention(module, states: torch.Tensor, config) -> torch.Tensor:
    """[T, hidden] -> [T, hidden]; weights are m exp(s) over their sum (equation 4)."""
    heads, size = config.num_attention_heads, config.head_dim
    group = heads // config.num_key_value_heads
    rows = []
    for t in range(len(states)):
        outputs = []
        for h in range(heads):
            span = config.max_span * min(max(float(module.mask.spans.share[h]), 0.0), 1.0)
            mine, keys = slice(h * size, (h + 1) * size), slice(h // group * size, (h // group + 1) * size)
            q = rotate((module.q_proj.weight @ states[t])[mine], t, 10000, "half", size)
            weights, values = [], []
            for r in range(t + 1):
                k = rotate((module.k_proj.weight @ states[r])[keys], r, 10000, "half", size)
                weights.append(soft_mask(t - r, span, config.span_ramp) * math.exp(float(q @ k) / math.sqrt(size)))
                values.append((module.v_proj.weight @ states[r])[keys])
            outputs.append(sum(w * v for w, v in zip(weights, values)) / sum(weights))
        rows.append(module.o_proj.weight @ torch.cat(outputs))
    return torch.stack(rows)


def normed(norm, states: torch.Tensor) -> torch.Tensor:
    return torch.stack([norm.weight * x / torch.sqrt((x * x).mean() + norm.eps) for x in states])


def adaptive_span(model, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [T, hidden] of ids [T]."""
    states = torch.stack([model.embed_tokens.weight[token] for token in ids])
    for layer in model.layers:
        states = states + attention(layer.self_attn, normed(layer.input_layernorm, states), model.config)
        given = normed(layer.post_attention_layernorm, states)
        gate = torch.nn.functional.silu(given @ layer.mlp.gate_proj.weight.T)
        states = states + (gate * (given @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
    return normed(model.norm, states)

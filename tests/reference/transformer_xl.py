"""Transformer-XL as section 3 of Dai et al. 2019 writes it: one query, one key, one head at a time.

Takes a TransformerXLModel's weights and says what its output for a list of segments must be. No dropout.
"""

import math
from functools import partial

import torch
from torch.nn.functional import layer_norm


def distance_wave(distance: int, config) -> torch.Tensor:
    """R_{i-j}: [hidden], sines in the first half and cosines in the second."""
    if config.clamp_len is not None:
        distance = min(distance, config.clamp_len)
    half = config.hidden_size // 2
    angles = [distance / 10000 ** (2 * k / config.hidden_size) for k in range(half)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def sees_by_length(head: int, query: int, key: int, config) -> bool:
    """Does a query see the key at a place up to its own? All of them, or the last mem_len."""
    return query - key < config.mem_len if config.same_length else True


def attention(layer, u, v, segment, past, config, sees) -> torch.Tensor:
    """[T, hidden] segment and [M, hidden] past -> [T, hidden], before the residual connection."""
    context = torch.cat([past, segment])
    heads, size = config.num_attention_heads, config.head_dim
    rows = []
    for t in range(len(segment)):
        i = len(past) + t
        outputs = []
        for h in range(heads):
            mine = slice(h * size, (h + 1) * size)
            query = layer.q_proj.weight[mine] @ segment[t]
            keys = [j for j in range(i + 1) if sees(h, i, j)]
            scores = []
            for j in keys:
                key = layer.k_proj.weight[mine] @ context[j]
                distance_key = layer.r_proj.weight[mine] @ distance_wave(i - j, config)
                a, b = query @ key, query @ distance_key
                c, d = u[h] @ key, v[h] @ distance_key
                scores.append((a + b + c + d) / math.sqrt(size))
            weights = torch.stack(scores).softmax(dim=0) if keys else []
            values = [layer.v_proj.weight[mine] @ context[j] for j in keys]
            outputs.append(sum((w * value for w, value in zip(weights, values)), torch.zeros_like(query)))
        rows.append(layer.o_proj.weight @ torch.cat(outputs))
    return torch.stack(rows)


def normed(norm, states: torch.Tensor) -> torch.Tensor:
    return layer_norm(states, states.shape[-1:], norm.weight, norm.bias, norm.eps)


def feed_forward(mlp, states: torch.Tensor) -> torch.Tensor:
    return (states @ mlp.up_proj.weight.T + mlp.up_proj.bias).relu() @ mlp.down_proj.weight.T + mlp.down_proj.bias


def block(layer, u, v, segment, past, config, sees=None) -> torch.Tensor:
    """[T, hidden] -> [T, hidden]; `sees(head, query, key)` counts places from the start of the past."""
    sees = sees or partial(sees_by_length, config=config)
    if config.norm_first:
        norm = layer.attention_pre_norm
        segment = segment + attention(layer.self_attn, u, v, normed(norm, segment), normed(norm, past), config, sees)
        return segment + feed_forward(layer.mlp, normed(layer.mlp_pre_norm, segment))
    segment = normed(layer.attention_post_norm, segment + attention(layer.self_attn, u, v, segment, past, config, sees))
    return normed(layer.mlp_post_norm, segment + feed_forward(layer.mlp, segment))


def transformer_xl(model, segments: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states [B, T1 + T2 + ..., hidden] of ids [B, T1], [B, T2], ..., read one after the other."""
    config = model.config
    start = config.mem_len if config.zero_initial_memory else 0
    rows = []
    for row in range(len(segments[0])):
        memory = [torch.zeros(start, config.hidden_size, dtype=torch.float64) for _ in model.layers]
        outputs = []
        for ids in segments:
            states = model.embed_tokens(ids[row]) * math.sqrt(config.hidden_size)
            for n, layer in enumerate(model.layers):
                biases = model.biases[n if config.untie_r else 0]
                entering = states
                states = block(layer, biases.content, biases.position, entering, memory[n], config)
                memory[n] = torch.cat([memory[n], entering.detach()])[-config.mem_len :]  # SG
            outputs.append(states)
        rows.append(torch.cat(outputs))
    return torch.stack(rows)

"""Attention as loops over `visible`: one query, one head, one key at a time, in float64."""

import math

import torch


def visible_table(pattern, num_heads, query_positions, key_positions, seen) -> torch.Tensor:
    """[B, H, T, S]: `pattern.visible` on integers, and `seen(b, i, j)` for causality, padding and packing."""
    table = torch.zeros(
        len(query_positions), num_heads, len(query_positions[0]), len(key_positions[0]), dtype=torch.bool
    )
    for b, (queries, keys) in enumerate(zip(query_positions, key_positions)):
        for h in range(num_heads):
            for i, query in enumerate(queries):
                for j, key in enumerate(keys):
                    table[b, h, i, j] = bool(pattern.visible(h, query, key)) and seen(b, i, j)
    return table


def attention(query, key, value, table, scale) -> torch.Tensor:
    """[B, H, T, D] queries and [B, Hk, S, D] keys -> [B, T, H, Dv] in float64; nothing seen gives 0."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    output = query.new_zeros(batch, length, heads, value.shape[-1])
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                keys = [j for j in range(key.shape[2]) if table[b, h, i, j]]
                scores = [float(query[b, h, i] @ key[b, h // groups, j]) * scale for j in keys]
                total = sum(math.exp(score - max(scores)) for score in scores)
                for j, score in zip(keys, scores):
                    output[b, i, h] += math.exp(score - max(scores)) / total * value[b, h // groups, j]
    return output

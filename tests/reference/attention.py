"""Attention under a pattern as one dense masked softmax, in the dtype of its inputs: the oracle, in float64."""

import torch


def dense_mask(pattern, num_heads, num_queries, num_keys, *, causal, q_offset=0, kv_offset=0) -> torch.Tensor:
    """[H, T, S], True where a query sees a key."""
    head = torch.arange(num_heads)[:, None, None]
    query = q_offset + torch.arange(num_queries)[:, None]
    key = kv_offset + torch.arange(num_keys)
    mask = pattern.visible(head, query, key).expand(num_heads, num_queries, num_keys)
    return mask & (key <= query) if causal else mask


def dense_attention(query, key, value, pattern, *, causal, scale, q_offset, kv_offset=0, key_valid=None):
    """[B, T, H, D], [B, S, Hk, D], [B, S, Hk, Dv] -> [B, T, H, Dv]; nothing seen gives 0."""
    heads = query.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in (key, value))
    mask = dense_mask(
        pattern, heads, query.shape[1], key.shape[2], causal=causal, q_offset=q_offset, kv_offset=kv_offset
    )
    if key_valid is not None:
        mask = mask & key_valid[:, None, None]
    scores = query.transpose(1, 2) @ key.mT * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0)
    return (weights @ value).transpose(1, 2)

"""Attention as Transformers' models call it: the eager law, masks for every backend, float32 sampling.

Shapes: B batch, H heads, T queries, S keys, D head dim.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention_block_sparse import NAME as BLOCK_SPARSE
from .attention_masks import VisibleKeys, drop_trivial, full_causal, sees_all, visible_keys
from .attention_patterns import Full
from .attention_patterns_base import Pattern


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as its equation says; every other backend is held to it.

    Args:
        query, key, value: [B, H, T, D], [B, Hk, S, D], [B, Hk, S, Dv], with H a multiple of Hk.
        attention_mask: boolean, broadcastable to [B, H, T, S], True where a key is seen; None if all are.
        position_bias: [B or 1, H, T, S], added to the scaled scores.

    Returns:
        The output [B, T, H, Dv], and the weights [B, H, T, S]. A query that sees nothing has weights and output 0.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, 0.0)
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def layer_masks(
    patterns: list[Pattern],
    config,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    causal: bool = True,
) -> list:
    """The mask of every layer, in the form that the config's attention implementation takes.

    Transformers' own mask builders collapse heads, so patterns that differ between heads need this one. Layers of the
    same pattern share a mask. Arguments are those of `visible_keys`.
    """
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    if isinstance(past_length, torch.Tensor):  # a static cache's, which moves on before a lazy mask is read
        one_token = hidden_states.shape[1] == 1 and config._attn_implementation == BLOCK_SPARSE and causal
        past_length = past_length.clone() if one_token else int(past_length)
    attention_mask, position_ids = drop_trivial(hidden_states, attention_mask, position_ids, past_length)
    arguments = (config.num_attention_heads, hidden_states, attention_mask, position_ids, past_length)

    seen = {}
    if hasattr(past_key_values, "announce"):  # a PatternCache, perhaps of another copy of its file
        seen = past_key_values.announce(hidden_states, attention_mask, position_ids)
    cases = patterns
    if not seen or (isinstance(past_length, int) and past_length == 0):
        cases = [(p, *_key_sizes(past_key_values, hidden_states, layer)) for layer, p in enumerate(patterns)]
        seen = {case: visible_keys(case[0], *arguments, *case[1:], causal=causal) for case in set(cases)}
    masks = {case: lower_mask(seen[case], config._attn_implementation, hidden_states.device) for case in set(cases)}
    return [masks[case] for case in cases]


def _key_sizes(past_key_values: Cache | None, hidden_states: torch.Tensor, layer_idx: int) -> tuple[int, ...]:
    """How many keys the cache hands to a layer, and the place of the first; nothing where there is no cache."""
    return () if past_key_values is None else past_key_values.get_mask_sizes(hidden_states.shape[1], layer_idx)


def lower_mask(seen: VisibleKeys, implementation: str, device: torch.device):
    """What `implementation` takes as attention_mask to show each query just the keys that `seen` says.

    Raises:
        ValueError: if the implementation cannot run patterns, naming those that can.
    """
    if implementation == "sdpa" and (full_causal(seen) or sees_all(seen)):
        return None
    if implementation in ("eager", "sdpa"):
        return seen.dense(device)
    if implementation == "flex_attention":
        return seen.block_mask(device)
    if implementation == BLOCK_SPARSE:
        return seen
    raise ValueError(
        f"attn_implementation={implementation!r} cannot run attention patterns; "
        f"use '{BLOCK_SPARSE}', 'sdpa', 'flex_attention' or 'eager'."
    )


def cross_attention_mask(
    config, hidden_states: torch.Tensor, key_states: torch.Tensor, key_mask: torch.Tensor | None = None
):
    """The mask of attention from [B, T, hidden] to another sequence [B, S, hidden], in its implementation's form.

    Args:
        key_mask: [B, S], nonzero for tokens; None if all are.

    Raises:
        ValueError: if key_mask has another shape.
    """
    batch_size, key_length = key_states.shape[:2]
    if key_mask is not None and key_mask.shape != (batch_size, key_length):
        raise ValueError(
            f"The attention_mask of the sequence attended to must have shape [{batch_size}, {key_length}], "
            f"got {list(key_mask.shape)}."
        )
    valid, _ = drop_trivial(key_states, key_mask, None, 0)
    seen = VisibleKeys(
        Full(),
        config.num_attention_heads,
        causal=False,
        batch_size=batch_size,
        query_length=hidden_states.shape[1],
        key_length=key_length,
        key_valid=None if valid is None else valid.bool(),
    )
    return lower_mask(seen, config._attn_implementation, hidden_states.device)


def query_and_key_positions(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the new tokens [B or 1, T] and of all keys [B or 1, S]: counted, unless the caller says."""
    length, device = hidden_states.shape[1], hidden_states.device
    past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if attention_mask is not None and attention_mask.ndim != 2:
        attention_mask = None  # it hides keys, but moves none
    attention_mask, position_ids = drop_trivial(hidden_states, attention_mask, position_ids, past_length)
    sizes = _key_sizes(past_key_values, hidden_states, 0)
    seen = visible_keys(Full(), 1, hidden_states, attention_mask, position_ids, past_length, *sizes)
    if seen.query_positions is not None:
        return seen.query_positions, seen.key_positions
    keys = torch.arange(seen.key_offset, seen.key_offset + seen.key_length, device=device)[None]
    return torch.arange(past_length, past_length + length, device=device)[None], keys


def in_float32(attention: Callable) -> Callable:
    """`attention` with queries, keys and values in float32 and the output in their own dtype.

    Query-key products can exceed the largest float16 when sampling (Child et al. 2019, section 5.6).
    """

    def upcast(module, query, key, value, attention_mask, **kwargs):
        dtype = value.dtype
        with torch.autocast(query.device.type, enabled=False):
            output, weights = attention(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
        return output.to(dtype), weights

    return upcast

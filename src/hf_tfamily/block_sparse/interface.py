"""What Transformers calls under `attn_implementation="block_sparse"`, for our models and for stock ones.

Shapes: B batch, H heads, T queries, S keys, D head dim of queries and keys, Dv of values.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.attention import BLOCK_SPARSE as NAME
from ..modeling.attention import VisibleKeys, check_whole_rows
from ..modeling.attention_patterns import Pattern
from ..modeling.positions import DistanceBias, rows_by_distance
from .alignment import Tensors, attend_packed, attend_padded
from .cpu import block_sparse_attention
from .decode import attend_biased, attend_masked, attend_one, mask_of_step
from .distance_bias import biased_attention, check_bias, dense_of
from .global_tokens import attend_global, most_global
from .patterns import own_mask
from .relative import relative_attention
from .stock_masks import bind, of_local_heads
from .windows import window_attention

# The attribute of a model's modules that says who holds the other slices of its rows (hf_tfamily.distributed).
SLICES = "context_parallel"


def block_sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: VisibleKeys | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    return_lse: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, T, H, Dv] of queries [B, H, T, D] to keys [B, Hk, S, D] and values [B, Hk, S, Dv].

    Args:
        attention_mask: VisibleKeys of any copy of modeling/attention.py; None where the layer's pattern says all.
        position_bias (in kwargs): scores for distances as data: positions.DistanceBias, a number for each head and
            distance, or what they are computed from, positions.DistanceScores. Under a Window2D without a grid the
            batch is one of windows that are already cut: then the mask's `extra` [L, 1, T, T] holds for each picture's
            L, and the bias is a tensor [1, H, T, T].
        s_aux (in kwargs): [H], a learned score for each head of a key without a value (attention sinks).
        return_lse: also return the log-sum-exp [B, H, T] of each query's scores, -inf where it sees nothing.

    Raises:
        ValueError: for what the backend cannot do, naming what can.
    """
    seen = attention_mask if isinstance(attention_mask, VisibleKeys) else None
    if seen is None and hasattr(attention_mask, "awaits_pattern"):  # of another copy of modeling/
        seen = own_mask(attention_mask)
    if seen is not None and _is_window(seen.pattern):
        return _attend_window(query, key, value, seen.extra, scaling, dropout, **kwargs), None
    check_whole_rows()
    stock = seen is None or seen.awaits_pattern
    under_pattern = stock and bool(getattr(module.config, "attention_patterns", None))
    dropout = dropout if module.training else 0.0
    _refuse_unsupported(attention_mask, dropout, {**kwargs, "return_lse": return_lse}, under_pattern)
    if stock:
        is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        seen = bind(seen, module, query, key, is_causal)
    elif seen.num_heads != query.shape[1]:
        seen = of_local_heads(seen, module, query.shape[1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias, slices = kwargs.get("position_bias"), _other_slices(module, attention_mask)
    if bias is not None and not hasattr(bias, "table") and slices is None:
        return attend_relative(seen, query, key, value, scaling, bias), None
    tensors = (tensor.transpose(1, 2) for tensor in in_one_dtype(query, key, value))
    sinks = kwargs.get("s_aux")
    if slices is not None and seen.global_tokens is not None:
        raise ValueError("context_parallel: global tokens would be needed on every rank; use data parallelism or FSDP.")
    if slices is None:
        output, lse = attend_seen(seen, *tensors, scaling, return_lse or sinks is not None, bias)
    else:
        output, lse = slices.attend(module, attention_mask, seen, *tensors, scaling, bias)
    if sinks is not None:
        output, lse = with_sinks(output, lse, sinks)
    return output, lse if return_lse else None


def _other_slices(module: nn.Module, attention_mask: Any):
    """Who holds the other slices of the rows; None if there are none.

    Raises:
        ValueError: where a checkpoint computes slices anew that no longer have any.
    """
    slices = getattr(module, SLICES, None)
    if slices is None and SLICES in getattr(attention_mask, "memo", ()):
        raise ValueError("This batch went forward under context_parallel: go back inside it, too.")
    return slices


def _is_window(pattern: Pattern) -> bool:
    """Are the windows of a picture already cut? A pattern without a grid could show nothing else."""
    return pattern.type == "window_2d" and pattern.grid is None


def _attend_window(query, key, value, mask, scaling, dropout, *, position_bias, output_attentions=False, **kwargs):
    if output_attentions:
        raise ValueError(f"attn_implementation='{NAME}' does not support output_attentions; use 'eager'.")
    tensors = in_one_dtype(query, key, value)
    return window_attention(*tensors, position_bias[0], None if mask is None else mask[:, 0], scaling, dropout)


def attend_seen(
    seen: VisibleKeys,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    with_lse: bool = False,
    bias: DistanceBias | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, T, H, Dv] of queries [B, T, H, D] to the keys [B, S, Hk, D] that `seen` shows, and if asked for the
    log-sum-exp [B, H, T] of each query's scores, -inf where it sees nothing.

    Args:
        bias: added to the scaled scores, by head and distance; of any copy of modeling/positions.py.
    """

    def execute(queries: Tensors, key: Tensor, value: Tensor, **where) -> Tensors:
        how = {"causal": seen.causal, "scale": scaling}
        if seen.global_tokens is not None:
            return attend_global(*queries, key, value, seen.pattern, most=most_global(seen), **how, **where)
        how["return_lse"] = True
        if bias is not None:
            return biased_attention(*queries, key, value, bias.table, bias.distances, seen.pattern, **how, **where)
        return block_sparse_attention(*queries, key, value, seen.pattern, **how, **where)

    if bias is not None:
        check_bias(seen, bias, query.shape[2])
    if seen.global_tokens is not None and seen.query_length == 1:
        return attend_masked(*mask_of_step(seen, query.device), query, key, value, scaling, with_lse)
    if _is_one_token(seen, key.device):
        return attend_one(seen, query, key, value, scaling, with_lse, bias)
    if seen.query_positions is not None and (seen.query_length == 1 or seen.key_positions.ndim == 3):
        if bias is not None:
            return attend_biased(seen.dense(query.device), query, key, value, scaling, dense_of(seen, bias))
        return attend_masked(*mask_of_step(seen, query.device), query, key, value, scaling, with_lse)
    output, lse = _run(seen, (query,), key, value, execute)
    return output, lse.transpose(1, 2) if with_lse else None


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, Dv] and log-sum-exps [B, H, T] with one key more for each head, of score `sinks` [H] and no
    value: weights are exp(score) / (exp(lse) + exp(sink)), so outputs shrink by sigmoid(lse - sink).

    Raises:
        ValueError: if there is not one sink for each head.
    """
    if sinks.shape != (output.shape[2],):
        raise ValueError(
            f"Sinks (s_aux) must have shape [{output.shape[2]}], one for each head, got {list(sinks.shape)}."
        )
    sinks = sinks.to(lse.dtype)[:, None]
    share = torch.sigmoid(lse - sinks).transpose(1, 2)[..., None]
    return output * share.to(output.dtype), torch.logaddexp(lse, sinks)


def _run(seen: VisibleKeys, queries: Tensors, key: Tensor, value: Tensor, execute: Callable) -> Tensors:
    """What `execute` gives for queries and keys at the positions that they have, [B, T, ...] each."""
    if seen.query_positions is None:
        where = {"q_offset": seen.query_offset, "kv_offset": seen.key_offset, "key_valid": seen.key_valid}
        if seen.global_tokens is not None:
            where["global_tokens"] = seen.global_tokens
        return execute(queries, key, value, **where)
    align = attend_padded if seen.query_documents is None else attend_packed
    return align(seen, queries, key, value, execute)


def _is_one_token(seen: VisibleKeys, device: torch.device) -> bool:
    """Is this a step of decoding over all slots, to be run without a look at where it stands?

    Where slots are positions known to the host, a CPU is faster with a plan.
    """
    one = seen.query_length == 1 and seen.causal and seen.all_places and seen.extra is None
    if not one or seen.query_documents is not None or (seen.key_positions is not None and seen.key_offset):
        return False
    return seen.key_positions is not None or isinstance(seen.query_offset, Tensor) or device.type == "cuda"


def attend_relative(seen: VisibleKeys, query: Tensor, key: Tensor, value: Tensor, scaling: float, bias) -> Tensor:
    """Attention of [B, H, T, D] to keys [B, H, S, D] with scores for their distance -> [B, T, H, D]."""
    *tensors, relative_key = in_one_dtype(query, bias.position_query, key, value, bias.relative_key)
    query, position_query, key, value = (tensor.transpose(1, 2) for tensor in tensors)

    def execute(queries: Tensors, key: Tensor, value: Tensor, **where) -> Tensors:
        scores = (relative_key, bias.distances)
        return (relative_attention(*queries, key, value, *scores, seen.pattern, scale=scaling, **where),)

    if seen.query_length == 1:
        return _attend_one(seen, query, position_query, key, value, scaling, relative_key, bias.distances)
    return _run(seen, (query, position_query), key, value, execute)[0]


def _refuse_unsupported(attention_mask: Any, dropout: float, kwargs: dict[str, Any], under_pattern: bool) -> None:
    """`under_pattern`: a stock model under a pattern, which every other backend would ignore."""

    def has(field: str) -> bool:
        return getattr(attention_mask, field, None) is not None

    bias = kwargs.get("position_bias")
    scores, of_distances = hasattr(bias, "relative_key"), "scores of queries and distances (DistanceScores)"
    eager, or_sdpa, softcap = "use 'eager'", "use 'eager' or 'sdpa'", "set attn_logit_softcapping to None in the config"
    masks = "masks that are tensors, whether given as a 4-D attention_mask or built by the model itself"
    off = "set_attention_patterns(model, patterns, attention_dropout=0.0) turns it off"
    refused = [
        ("dropout of attention weights", off if under_pattern else f"set it to 0 in the config, or {or_sdpa}", dropout),
        ("output_attentions", eager, kwargs.get("output_attentions")),
        ("softcap", softcap if under_pattern else f"{softcap}, or {eager}", kwargs.get("softcap") is not None),
        (f"attention sinks (s_aux) beside {of_distances}", eager, scores and kwargs.get("s_aux") is not None),
        ("a position_bias that is a tensor", or_sdpa, isinstance(bias, Tensor)),
        (f"return_lse beside {of_distances}", eager, scores and kwargs.get("return_lse")),
        ("global tokens beside a position_bias", or_sdpa, bias is not None and has("global_tokens")),
        (masks, or_sdpa, isinstance(attention_mask, Tensor)),
        ("a 4-D attention_mask", or_sdpa, has("extra")),
    ]
    for what, instead, applies in refused:
        if applies:
            if under_pattern and "use 'eager'" in instead:
                instead = "set_attention_patterns(model, None) takes the pattern away"
            raise ValueError(f"attn_implementation='{NAME}' does not support {what}; {instead}.")


def _attend_one(
    seen: VisibleKeys, query, position_query, key, value, scaling: float, relative_key, distances
) -> Tensor:
    """One query [B, 1, H, D] in each row, which reads only keys that it sees and scores only their distances."""
    mask = None
    key, value = key.transpose(1, 2), value.transpose(1, 2)  # [B, H, S, D], as memories store them
    if seen.query_positions is None and seen.key_valid is None and seen.pattern.head_period == 1:
        chosen, distance = _seen_by_one(seen.pattern, seen.query_offset, seen.key_offset, seen.key_length)
        if len(chosen) < seen.key_length:
            key, value = (tensor.index_select(2, chosen.to(tensor.device)) for tensor in (key, value))
    else:
        mask = seen.dense(query.device)
        distance = seen.distances(query.device)[:, 0]
    scores = torch.einsum("bohd,hld->bhol", position_query, relative_key) * scaling
    rows = rows_by_distance(distances, distance.cpu()).to(query.device)
    bias = scores.gather(3, rows[:, None, None].expand(*scores.shape[:3], -1))
    if mask is not None:
        bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    output = nn.functional.scaled_dot_product_attention(query.transpose(1, 2), key, value, bias, scale=scaling)
    if mask is not None:
        output = output.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return output.transpose(1, 2)


@lru_cache(maxsize=16)  # for the layers of a step
def _seen_by_one(pattern: Pattern, query: int, first_key: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """Which keys a query at a position sees [J], and their distances [1, J]."""
    positions = torch.arange(first_key, min(first_key + num_keys, query + 1))
    chosen = pattern.visible(0, query, positions).nonzero()[:, 0]
    return chosen, query - positions[None, chosen]


def in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, models mix float32 (rotated queries, say) with the autocast dtype."""
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    return tensors

"""The engine without a model: attention under a pattern as a function of tensors, for people who write their own.

    from hf_tfamily import Local, Sink, Union
    from hf_tfamily.block_sparse import attend, attend_varlen

    output = attend(query, key, value, Union([Local(252), Sink(4)]), causal=True)

Shapes: B batch, H heads, Hk key heads (H a multiple), T queries, S keys, D head dim of queries and keys, Dv of values.
"""

import json
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from ..modeling.attention import VisibleKeys, check_whole_rows
from ..modeling.attention_patterns import Pattern, pattern_from_dict
from ..modeling.positions import DistanceBias
from .interface import attend_seen, in_one_dtype, with_sinks
from .patterns import own_pattern

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | Mapping,
    *,
    causal: bool,
    scale: float | None = None,
    bias: DistanceBias | Tensor | None = None,
    sinks: Tensor | None = None,
    key_valid: Tensor | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V over the keys that the pattern, causality and `key_valid` show, at the cost of those.

    Differentiable once in query, key, value and sinks; whole under torch.compile; under autocast in its dtype.

    Args:
        query: [B, H, T, D]; key: [B, Hk, S, D]; value: [B, Hk, S, Dv]. One dtype (any of DTYPES) and device, any
            strides. Query head h reads key head h // (H / Hk).
        pattern: which keys a query may see, by position; a pattern or its dict.
        causal: whether keys at later positions than the query's are hidden.
        scale: D ** -0.5 if None.
        bias: added to the scaled scores, by head and distance: a table [H, L] whose column d is for the distance
            i - j = d, or a DistanceBias of a table and the distance of each column (negative ones for keys to come).
            All distances that are met must be there.
        sinks: [H], for each head the score of a key more, without a value (learned attention sinks).
        key_valid: [B, S] bool, False for keys that nobody may see. It moves no position: for rows that begin at
            different places see attend_varlen.
        query_offset, key_offset: query i stands at position `query_offset + i`, key j at `key_offset + j`.
        return_lse: also return the log-sum-exp of each query's scores, the sink's among them.

    Returns:
        [B, H, T, Dv], and if asked [B, H, T] in at least float32. A query that sees no key gets 0, and -inf where there
        is no sink either.

    Raises:
        ValueError: if a shape, dtype, device or offset does not fit, naming it; if the pattern is none, or does not fit
            the heads; if a distance is met that the bias lacks.
    """
    query, key, value = in_one_dtype(query, key, value)
    _check_tensors(query, key, value, "[B, H, T, D]", "[B, Hk, S, D]", 4)
    num_heads, num_keys = query.shape[1], key.shape[2]
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have the batch of query, {query.shape[0]}, got {key.shape[0]}.")
    _check_key_valid(key_valid, query.shape[0], num_keys, query.device)
    for name, offset in (("query_offset", query_offset), ("key_offset", key_offset)):
        if isinstance(offset, bool) or not isinstance(offset, int | torch.SymInt) or offset < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {offset!r}.")
    seen = VisibleKeys(
        read_pattern(pattern, num_heads),
        num_heads,
        causal,
        query.shape[0],
        query.shape[2],
        num_keys,
        query_offset=query_offset,
        key_offset=key_offset,
        key_valid=key_valid,
        all_places=True,
    )
    return _attend(seen, query, key, value, scale, bias, sinks, return_lse)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | Mapping,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    bias: DistanceBias | Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` for documents packed one after the other, which do not see each other; each begins at position 0.

    As flash-attn's `flash_attn_varlen_func` for self-attention. Documents of similar length are computed together, so
    that torch.compile leaves the graph here.

    Args:
        query: [N, H, D]; key: [N, Hk, D]; value: [N, Hk, Dv], with N tokens in all.
        cu_seqlens: [documents + 1] of integers, where each document begins, and N.
        pattern, causal, scale, bias, sinks, return_lse: as for `attend`.

    Returns:
        [N, H, Dv], and if asked the log-sum-exp [H, N].

    Raises:
        ValueError: as `attend`; if cu_seqlens does not begin with 0, end with N, or decreases.
    """
    query, key, value = in_one_dtype(query, key, value)
    _check_tensors(query, key, value, "[N, H, D]", "[N, Hk, D]", 3)
    num_tokens, num_heads = query.shape[:2]
    if key.shape[0] != num_tokens:
        raise ValueError(f"key must have as many tokens as query, {num_tokens}, got {key.shape[0]}.")
    documents, positions = _documents(cu_seqlens, num_tokens, query.device)
    seen = VisibleKeys(
        read_pattern(pattern, num_heads),
        num_heads,
        causal,
        1,
        num_tokens,
        num_tokens,
        query_positions=positions,
        key_positions=positions,
        query_documents=documents,
        key_documents=documents,
    )
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    output, lse = _attend(seen, *heads_first, scale, bias, sinks, True)
    output = output[0].transpose(0, 1)
    return (output, lse[0]) if return_lse else output


def _attend(seen: VisibleKeys, query, key, value, scale, bias, sinks, return_lse) -> Tensor | tuple[Tensor, Tensor]:
    check_whole_rows()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _check_sinks(sinks, seen.num_heads, query.device)
    if isinstance(bias, Tensor):
        if bias.dim() != 2:
            raise ValueError(f"bias must be a table [H, L] or a DistanceBias, got shape {list(bias.shape)}.")
        bias = DistanceBias(bias, torch.arange(bias.shape[1]))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output, lse = attend_seen(seen, query, key, value, scale, return_lse or sinks is not None, bias)
    if sinks is not None:
        output, lse = with_sinks(output, lse, sinks)
    output = output.transpose(1, 2)
    return (output, lse) if return_lse else output


# ---------------------------------------------------------------------------------------------------------------------
# What is given


_READ = SimpleNamespace()  # patterns by their text: torch.compile cannot make one from a dict, but find one here


def read_pattern(pattern: Pattern | Mapping, num_heads: int) -> Pattern:
    """The installed package's pattern for one of any copy, or for a dict."""
    if isinstance(pattern, Mapping):
        pattern = getattr(_READ, _read(dict(pattern)))
    elif not isinstance(pattern, Pattern) and not (hasattr(pattern, "visible") and hasattr(pattern, "type")):
        raise ValueError(f"pattern must be a pattern, such as Local(64), or the dict of one, got {pattern!r}.")
    pattern = own_pattern(pattern)
    pattern.check_heads(num_heads)
    return pattern


@torch.compiler.assume_constant_result
def _read(values: dict) -> str:
    text = json.dumps(values, sort_keys=True)
    if not hasattr(_READ, text):
        setattr(_READ, text, pattern_from_dict(values))
    return text


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, queries: str, keys: str, dims: int) -> None:
    """`queries`, `keys`: their shapes in words."""
    values = keys.replace(" D]", " Dv]")
    for name, tensor, shape in (("query", query, queries), ("key", key, keys), ("value", value, values)):
        if tensor.dim() != dims:
            raise ValueError(f"{name} must be {shape}, got shape {list(tensor.shape)}.")
        if tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                f"query, key and value must have one dtype of {', '.join(map(str, DTYPES))}, got {query.dtype} for "
                f"query and {tensor.dtype} for {name}."
            )
        _check_device(name, tensor, query.device)
    if key.shape[:-1] != value.shape[:-1] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must be {keys} and value {values} for a query {queries}, got query {list(query.shape)}, "
            f"key {list(key.shape)}, value {list(value.shape)}."
        )
    num_heads, key_heads = query.shape[1], key.shape[1]
    if key_heads == 0 or num_heads % key_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {key_heads} key heads.")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {tensor.device}.")


def _check_key_valid(key_valid: Tensor | None, batch_size: int, num_keys: int, device: torch.device) -> None:
    if key_valid is None:
        return
    if key_valid.dtype != torch.bool or key_valid.shape != (batch_size, num_keys):
        raise ValueError(
            f"key_valid must be bool [B, S] = [{batch_size}, {num_keys}], got {key_valid.dtype} "
            f"{list(key_valid.shape)}."
        )
    _check_device("key_valid", key_valid, device)


def _check_sinks(sinks: Tensor | None, num_heads: int, device: torch.device) -> None:
    if sinks is None:
        return
    if sinks.shape != (num_heads,) or not sinks.is_floating_point():
        raise ValueError(f"sinks must be floats [H] = [{num_heads}], got {sinks.dtype} {list(sinks.shape)}.")
    _check_device("sinks", sinks, device)


def _documents(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The document of each token, and its position in it: [1, N] each."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be integers [documents + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}."
        )
    starts = cu_seqlens.to(device).long()
    if not torch.compiler.is_compiling():
        first, last, falls = int(starts[0]), int(starts[-1]), bool((starts.diff() < 0).any())
        if first != 0 or last != num_tokens or falls:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {num_tokens}, got {cu_seqlens.tolist()}."
            )
    tokens = torch.arange(num_tokens, device=device)
    documents = torch.searchsorted(starts[1:], tokens, right=True)
    return documents[None], (tokens - starts[documents])[None]

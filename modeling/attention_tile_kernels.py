"""Attention of tiles, with log-sum-exp (LSE), and its gradients: by PyTorch's flash kernel for CPUs, elsewhere by plain
matrix products.

Legend: H heads, Hk key heads, D head dimension; A tiles or batch entries together; I queries and J keys of one tile.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_parts import Part
from .attention_products import MASKED, Space, wide

_PRODUCT_KEYS = 512  # of a tile that products take over
_PIECE_SCORES = 1 << 22  # scores held at once without a flash kernel


class Kernel(NamedTuple):
    """Attention of [A, H, I, D] over [A, Hk, J, D], whose LSE is [A, H, I]."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    leaves_to_products: Callable[[Part], bool] = lambda *_: False  # rather than run the backward itself


def kernel_for(query: Tensor) -> Kernel:
    return FLASH if query.device.type == "cpu" else PLAIN


def _flash_forward(q, k, v, bias, causal, scale):
    if q.dtype == torch.float16:  # its range does not hold the bias
        q, k, v = (_cast(x, torch.float32) for x in (q, k, v))
    elif q.dtype == torch.float32 and q.stride(2) > q.shape[1] * q.shape[3]:
        q, k, v = _side_by_side(q, k, v)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=causal, attn_mask=None if bias is None else bias.to(q.dtype), scale=scale
    )


def _side_by_side(*tiles: Tensor) -> list[Tensor]:
    """Tiles with their tokens next to each other: those of a column share few sets of the processor's cache."""
    space = Space.shared(tiles[0])
    return [space.take(f"tile {i}", *tile.shape).copy_(tile) for i, tile in enumerate(tiles)]


def _flash_backward(grad_out, q, k, v, out, lse, bias, causal, scale):
    # For half precision the kernel's backward takes twice as long as in float32, even with matrix instructions.
    grad_out, q, k, v, out = (_cast(x, lse.dtype) for x in (grad_out, q, k, v, out))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def _is_column_or_band(part: Part) -> bool:
    """Small tiles whose tokens are far apart or whose keys overlap, which the flash kernel's backward is slow with."""
    overlap = part.tiles > 1 and part.keys.stride == 1 and 0 < part.keys.step < part.keys.count
    return (overlap or part.queries.stride > 1) and part.keys.count <= _PRODUCT_KEYS


def _plain_forward(q, k, v, bias, causal, scale):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outs, lses = [], []
    for rows in _rows(q, k):
        scores = _scores(q, k, bias, causal, scale, rows)
        lse = scores.logsumexp(-1)
        outs.append((scores - lse[..., None]).exp().to(v.dtype) @ v)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _plain_backward(grad_out, q, k, v, out, lse, bias, causal, scale):
    num_key_heads = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad_out.to(lse.dtype) * out).sum(-1, keepdim=True)
    for rows in _rows(q, k):
        weights = (_scores(q, k, bias, causal, scale, rows) - lse[:, :, rows, None]).exp()
        grad_weights = (grad_out[:, :, rows] @ v.mT).to(lse.dtype)
        grad_scores = (weights * (grad_weights - delta[:, :, rows]) * scale).to(q.dtype)
        grad_q.append(grad_scores @ k)
        grad_k += grad_scores.mT @ q[:, :, rows]
        grad_v += weights.to(v.dtype).mT @ grad_out[:, :, rows]
    grad_k, grad_v = (x.unflatten(1, (num_key_heads, -1)).sum(2) for x in (grad_k, grad_v))
    return torch.cat(grad_q, 2), grad_k, grad_v


def _rows(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the queries whose scores are held at once."""
    at_once = max(1, _PIECE_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(start, start + at_once) for start in range(0, q.shape[2], at_once))


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float, rows: slice) -> Tensor:
    """Scores [A, H, rows, J] in at least float32, with the bias and causality added."""
    scores = (q[:, :, rows] @ k.mT).to(wide(q.dtype)) * scale
    if bias is not None:
        scores += bias[:, :, rows] if bias.shape[2] > 1 else bias
    if causal:
        query, key = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
        scores.masked_fill_(key > query[rows, None], MASKED)
    return scores


FLASH = Kernel(_flash_forward, _flash_backward, _is_column_or_band)
PLAIN = Kernel(_plain_forward, _plain_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


def overlap_step(x: Tensor) -> int | None:
    """How many tokens the windows [A, H, J, D] of neighbouring tiles lie apart, None if they share no token."""
    tile, _, token, _ = x.stride()
    return tile // token if len(x) > 1 and 0 < token <= tile < token * x.shape[2] and tile % token == 0 else None


def span_of(x: Tensor, step: int) -> Tensor:
    """The tokens [H, N, D] under the windows [A, H, J, D]."""
    return x.as_strided((x.shape[1], (len(x) - 1) * step + x.shape[2], x.shape[3]), x.stride()[1:])


def windows_of(span: Tensor, shape: torch.Size, step: int) -> Tensor:
    """The windows [A, H, J, D] on the tokens [H, N, D]."""
    return span.as_strided(shape, (step * span.stride(1), *span.stride()))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Tiles [A, H, J, D] in `dtype`; what windows share is converted once."""
    if x.dtype == dtype or (step := overlap_step(x)) is None:
        return x.to(dtype)
    return windows_of(span_of(x, step).to(dtype), x.shape, step)

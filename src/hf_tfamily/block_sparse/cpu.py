"""Runs a plan (plan.py) with PyTorch, tiles by its own kernels or products.py.

Each part is one strided view of the queries and one of the keys, computed in chunks of tiles; outputs are merged by
their log-sum-exp (LSE). The backward drives each part with the *global* output and LSE, which makes it exact: with
P = exp(S - LSE) a part needs nothing from the others.

Legend: B batch, H heads, Hk key heads, T queries, S keys, D head dimension (Dv of values); A tiles or batch entries
taken together; I queries and J keys of one tile.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.attention_patterns import Pattern
from .parts import Part, Tokens
from .patterns import from_text, to_text
from .plan import Plan, plan_attention
from .products import (
    LOG2_E,
    MASKED,
    Extra,
    Keys,
    Space,
    Work,
    additive,
    backward_part,
    causal_bias,
    scaled_delta,
    wide,
    zero_keys,
)

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
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=causal, attn_mask=None if bias is None else bias.to(q.dtype), scale=scale
    )


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


NAMESPACE = "hf_tfamily_block_sparse"
OPERATORS = getattr(torch.ops, NAMESPACE)
_EMPTY_ROW = -1e29
# Elements of the queries taken together: few calls, and little memory beside the sequence.
_PIECE = 1 << 19


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    causal: bool,
    scale: float,
    q_offset: int,
    kv_offset: int = 0,
    key_valid: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V over the keys that the pattern, causality and `key_valid` show, never T x S at once.

    Args:
        query: [B, T, H, D]; key: [B, S, Hk, D]; value: [B, S, Hk, Dv]. Query head h reads key head h // (H / Hk).
            Any strides; one dtype of float16, bfloat16, float32, float64.
        pattern: which keys a query may see, by position.
        causal: whether keys after the query are hidden.
        q_offset, kv_offset: query i stands at position `q_offset + i`, key j at `kv_offset + j`.
        key_valid: bool [B, S], False for keys that nobody may see.

    Returns [B, T, H, Dv], with `return_lse` also the log-sum-exp [B, T, H] of each query's scaled scores, in at least
    float32. A query that sees no key gets 0 and -inf, and gives gradient 0. Both can be differentiated once.
    """
    check_inputs(query, key, value, key_valid)
    output, lse = OPERATORS.attention(
        query, key, value, key_valid, to_text(pattern), causal, scale, q_offset, kv_offset
    )
    return (output, lse.masked_fill(lse == float("inf"), float("-inf"))) if return_lse else output


def check_inputs(query: Tensor, key: Tensor, value: Tensor, key_valid: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} must be [batch, length, heads, head dimension] in the dtype of query ({query.dtype}), "
                f"got shape {tuple(tensor.shape)} and {tensor.dtype}."
            )
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key must be [B, S, Hk, D] and value [B, S, Hk, Dv] for a query [B, T, H, D], "
            f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}."
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads are no multiple of {key.shape[2]} key heads.")
    if key_valid is not None and (key_valid.dtype != torch.bool or key_valid.shape != key.shape[:2]):
        raise ValueError(
            f"key_valid must be bool {tuple(key.shape[:2])}, got {key_valid.dtype} {tuple(key_valid.shape)}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# A whole call


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_valid: Tensor | None,
    pattern: str,
    causal: bool,
    scale: float,
    q_offset: int,
    kv_offset: int,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, Dv] and LSE [B, T, H]; the LSE is +inf where a query sees nothing."""
    plan = _plan(query, key, pattern, causal, q_offset, kv_offset)
    kernel = kernel_for(query)
    q, k, v = prepare(plan, query, key, value)
    output = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=wide(q.dtype))
    if not plan.complete:
        output.zero_()
        lse.fill_(MASKED)
    for group in plan.groups:
        keys = Keys(group, k, key_valid)
        of_queries, of_keys = [x[:, :, keys.heads] for x in (q, output, lse)], (keys.pick(k), keys.pick(v))
        for part in group.parts:
            for bias, tile_q, out, tile_lse, tile_k, tile_v in _tiles(part, keys, of_queries, of_keys):
                part_out, part_lse = kernel.forward(tile_q, tile_k, tile_v, bias, part.causal, scale)
                if part.writes:
                    out.copy_(part_out)
                    tile_lse.copy_(part_lse)
                else:
                    _merge(out, tile_lse, part_out, part_lse)
    empty = lse < _EMPTY_ROW
    if empty.any():
        output.masked_fill_(empty[..., None], 0)
        lse.masked_fill_(empty, float("inf"))
    return output[..., : value.shape[3]].contiguous(), lse


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_valid: Tensor | None,
    output: Tensor,
    lse: Tensor,
    pattern: str,
    causal: bool,
    scale: float,
    q_offset: int,
    kv_offset: int,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. P = exp(S - LSE) with the LSE over all parts, so each part stands alone.

    `grad_lse` [B, T, H], 0 where a query sees nothing, is the gradient of the LSE: dS = P (dP - delta + dLSE).
    """
    num_values = value.shape[3]
    if grad_lse is not None:
        grad_output, value, output = with_lse_gradient(grad_output, grad_lse, value, output, lse)
    plan = _plan(query, key, pattern, causal, q_offset, kv_offset)
    kernel = kernel_for(query)
    q, k, v = prepare(plan, query, key, value)
    output, grad_output = (_widen(x, v.shape[3]) for x in (output, grad_output))
    grad_q = torch.empty_like(q) if plan.complete else torch.zeros_like(q)
    fresh = torch.empty_like if plan.complete_keys and q.shape[2] == k.shape[2] else torch.zeros_like
    grad_k, grad_v = fresh(k), fresh(v)
    delta, log2_lse, space = None, (lse * LOG2_E)[..., None], Space(lse)
    for group in plan.groups:
        keys = Keys(group, k, key_valid)
        group_grad_k, group_grad_v = keys.pick_zeros(grad_k), keys.pick_zeros(grad_v)
        of_queries = [x[:, :, keys.heads] for x in (q, output, lse, grad_output, grad_q)]
        of_keys = (keys.pick(k), keys.pick(v), group_grad_k, group_grad_v)
        for part in group.parts:
            if kernel.leaves_to_products(part):
                delta = scaled_delta(grad_output, output, scale) if delta is None else delta
                work = _work(keys, of_queries, of_keys, log2_lse, delta, scale, space)
                backward_part(part, work, extra_of(part, keys, q))
            else:
                _backward_tiles(part, keys, kernel, of_queries, of_keys, scale)
        keys.put_back(grad_k, group_grad_k)
        keys.put_back(grad_v, group_grad_v)
    grads = (grad_q, sum_heads(grad_k, key.shape[2]), sum_heads(grad_v, key.shape[2]))
    widths = (query.shape[3], key.shape[3], num_values)
    return tuple(grad[..., :width].contiguous() for grad, width in zip(grads, widths, strict=True))


def _work(
    keys: Keys,
    of_queries: list[Tensor],
    of_keys: tuple[Tensor, ...],
    log2_lse: Tensor,
    delta: Tensor,
    scale: float,
    space: Space,
) -> Work:
    q, _, _, grad_out, grad_q = of_queries
    k, v, grad_k, grad_v = of_keys
    lse, delta = (x[:, :, keys.heads] for x in (log2_lse, delta))
    gradients = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    return Work(q, k, v, lse, scale, space, grad_out=grad_out, delta=delta, **gradients)


def extra_of(part: Part, keys: Keys, query: Tensor) -> Extra:
    """What is added to the scores of a part: causality, its mask, and hidden keys."""
    dtype, biases = wide(query.dtype), []
    if part.causal:
        biases.append(causal_bias(part, query, dtype))
    if part.mask is not None:
        biases.append(_bias(part.mask.to(query.device), dtype))
    hidden = keys.hidden
    return Extra(biases, None if hidden is None else hidden.expand(-1, -1, len(keys.group.heads))[..., None])


def _backward_tiles(
    part: Part,
    keys: Keys,
    kernel: Kernel,
    of_queries: list[Tensor],
    of_keys: tuple[Tensor, ...],
    scale: float,
) -> None:
    """Add up the gradients of a part by a flash kernel."""
    zero_keys(part.fresh_keys, *of_keys[2:])
    for bias, *tiles in _tiles(part, keys, of_queries, of_keys):
        tile_q, out, tile_lse, grad_out, tile_grad_q, tile_k, tile_v, tile_grad_k, tile_grad_v = tiles
        part_grad_q, part_grad_k, part_grad_v = kernel.backward(
            grad_out, tile_q, tile_k, tile_v, out, tile_lse, bias, part.causal, scale
        )
        tile_grad_q.copy_(part_grad_q) if part.writes else tile_grad_q.add_(part_grad_q)
        for total, gradient in ((tile_grad_k, part_grad_k), (tile_grad_v, part_grad_v)):
            total.copy_(gradient) if part.writes_keys else _add_windows(total, gradient)


def _plan(query: Tensor, key: Tensor, pattern: str, causal: bool, q_offset: int, kv_offset: int) -> Plan:
    return plan_attention(
        from_text(pattern),
        query.shape[1],
        key.shape[1],
        num_heads=query.shape[2],
        causal=causal,
        first_query=q_offset,
        first_key=kv_offset,
    )


def prepare(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors as the kernels want them; copied only where Dv != D, or where grouped heads are planned apart."""
    dim = max(query.shape[3], value.shape[3])
    repeats = query.shape[2] // key.shape[2] if any(len(g.heads) < query.shape[2] for g in plan.groups) else 1
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    return tuple(_widen(x, dim) for x in (query, key, value))


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge the output and LSE of a part into those so far, in place."""
    weight = torch.sigmoid(part_lse - lse)[..., None]
    if out.dtype == weight.dtype:
        out.lerp_(part_out.to(weight.dtype), weight)
    else:
        out.copy_(torch.lerp(out.to(weight.dtype), part_out.to(weight.dtype), weight))
    torch.logaddexp(lse, part_lse, out=lse)


def _add_windows(total: Tensor, part: Tensor) -> None:
    """total += part for key tiles [A, Hk, J, D], where windows of neighbouring tiles may overlap in `total`."""
    step = overlap_step(total)
    if step is None:
        total.add_(part)
        return
    if total.dtype != part.dtype:  # sum up what overlaps before it is rounded
        span = span_of(total, step)
        sums = torch.zeros_like(span, dtype=part.dtype)
        _add_windows(windows_of(sums, total.shape, step), part)
        span.add_(sums)
        return
    for start in range(0, part.shape[2], step):  # in tokens that are not yet shared
        total[:, :, start : start + step].add_(part[:, :, start : start + step])


def _widen(x: Tensor, dim: int) -> Tensor:
    """Zeros behind the last dimension, up to `dim`."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


def sum_heads(grad: Tensor, num_heads: int) -> Tensor:
    """The gradient of heads that were repeated for each of their query heads."""
    return grad if grad.shape[2] == num_heads else grad.unflatten(2, (num_heads, -1)).sum(3)


# ---------------------------------------------------------------------------------------------------------------------
# Views


def _tiles(
    part: Part, keys: Keys, of_queries: list[Tensor], of_keys: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor | None, ...]]:
    """(bias, tiles of each tensor) of a part, in chunks: at most _PIECE elements of their queries.

    Tiles are [A, heads, I or J, D].
    """
    views = [_view(x, part.queries, part.tiles) for x in of_queries]
    views += [_view(x, part.keys, part.tiles) for x in of_keys]
    biases = _biases(part, keys.hidden, views[0])
    at_once = max(1, _PIECE // views[0][0, 0].numel())
    for piece in _pieces([*views, *biases], at_once):
        yield _sum(piece[len(views) :]), *piece[: len(views)]


def _view(x: Tensor, tokens: Tokens, tiles: int) -> Tensor:
    """[B, N, heads, ...] as [B, tiles, heads, tokens of a tile, ...], overlapping where the tiles do."""
    batch, token, head, *rest = x.stride()
    size = (x.shape[0], tiles, x.shape[2], tokens.count, *x.shape[3:])
    stride = (batch, tokens.step * token, head, tokens.stride * token, *rest)
    return x.as_strided(size, stride, x.storage_offset() + tokens.start * token)


def _pieces(views: list[Tensor], at_once: int) -> Iterator[tuple[Tensor, ...]]:
    """From views [B, tiles, ...] many tiles of one batch entry at a time, or the other way round: [A, ...]."""
    across = 0 if views[0].shape[1] >= views[0].shape[0] else 1
    for lines in zip(*(view.unbind(across) for view in views)):
        yield from zip(*(line.split(at_once) for line in lines))


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, a huge negative number elsewhere."""
    return additive(~seen, dtype)


def _biases(part: Part, hidden: Tensor | None, query: Tensor) -> list[Tensor]:
    """What is added to the scores of a part for the query tiles [B, tiles, ...]: [B, tiles, heads or 1, I or 1, J]."""
    biases = []
    if part.mask is not None:
        mask = _bias(part.mask.to(query.device), wide(query.dtype))
        biases.append(mask.expand(*query.shape[:2], *mask.shape[1:]))
    if hidden is not None:
        biases.append(_view(hidden, part.keys, part.tiles)[:, :, :, None])
    return biases


def _sum(biases: tuple[Tensor, ...]) -> Tensor | None:
    """The sum of biases [A, ...], which is [1, ...] where all tiles share it; None if there are none."""
    shared = [bias[:1] if bias.stride(0) == 0 else bias for bias in biases]
    return sum(shared[1:], shared[0]) if shared else None


# ---------------------------------------------------------------------------------------------------------------------
# The operator, so that torch.compile and torch.export see one node


def _forward_fake(query, key, value, key_valid, pattern, causal, scale, q_offset, kv_offset):
    refuse_onnx()
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    return output, query.new_empty(query.shape[:3], dtype=wide(query.dtype))


def refuse_onnx() -> None:
    """Raise ValueError while a model is traced for ONNX."""
    if torch.onnx.is_in_onnx_export():
        raise ValueError("attn_implementation='block_sparse' has no form in ONNX; export under 'sdpa' or 'eager'.")


def _backward_fake(grad_output, query, key, value, *_):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of an LSE that nobody used
    query, key, value, key_valid, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, key_valid, *output)


def _autograd_backward(ctx, grad_output, grad_lse):
    query, key, value, key_valid, output, lse = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(lse == float("inf"), 0.0)
    grads = OPERATORS.attention_backward(grad_output, query, key, value, key_valid, output, lse, *ctx.rest, grad_lse)
    return *grads, *[None] * 6


def with_lse_gradient(grad_output: Tensor | None, grad_lse: Tensor | None, value, output, lse) -> tuple[Tensor, ...]:
    """The gradient of the output, values and output, [..., Dv], as the backward takes them: if the LSE has a gradient
    too, dS = P (dP - delta + dLSE), a column of values 0, outputs 1 and gradients -dLSE says it."""
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if grad_lse is None:
        return grad_output, value, output
    grad_lse = grad_lse.masked_fill(lse == float("inf"), 0.0)[..., None].to(grad_output.dtype)
    return torch.cat([grad_output, -grad_lse], dim=-1), F.pad(value, (0, 1)), F.pad(output, (0, 1), value=1.0)


def register_operators() -> None:
    forward = torch.library.custom_op(f"{NAMESPACE}::attention", _forward, mutates_args=())
    forward.register_fake(_forward_fake)
    forward.register_autograd(_autograd_backward, setup_context=_save_for_backward)
    backward = torch.library.custom_op(f"{NAMESPACE}::attention_backward", _backward, mutates_args=())
    backward.register_fake(_backward_fake)

"""Attention inside windows of a picture with a learned bias (Liu et al. 2021, arXiv:2103.14030, section 3.2).

On a CPU scores of some windows at a time stay in the processor's cache, forward and backward.

Shapes: B batch, L windows of N tokens each, H heads, D head dim.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.call_modes import is_observed
from ..modeling.freed_memory import keep_freed_memory

SCORES = 2**20  # at a time on a CPU


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside windows, [B * L, N, H, D], of queries, keys and values [B * L, H, N, D].

    Args:
        position_bias: [H, N, N], added to the scaled scores.
        mask: [L, N, N] bool, True where a key is seen; None if all are.
        dropout: of the attention weights.
    """
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        keep_freed_memory()
    if not dropout and attends_in_pieces(query, key, value, position_bias):
        packed = torch.stack([x.transpose(1, 2) for x in (query, key, value)], dim=2)
        return packed_window_attention(packed, position_bias, mask, scaling)
    bias = _bias(position_bias, mask, query.dtype)
    if not dropout and not _learns(query, key, value, bias):
        return _attend_fused(query, key, value, bias, scaling)
    scores = _scores(query, key, bias, scaling)
    weights = F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2)


def packed_window_attention(packed: Tensor, position_bias: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`window_attention` of queries, keys and values that lie together, [B * L, N, 3, H, D].

    For what `attends_in_pieces`.
    """
    bias = _bias(position_bias, mask, packed.dtype)
    if not _learns(packed, bias):
        return _attend(packed, bias, scaling)
    output, _ = torch.ops.hf_tfamily_block_sparse.window_attention(packed, bias, scaling)
    return output


def attends_in_pieces(*tensors: Tensor) -> bool:
    """On a CPU: where gradients are wanted, and where PyTorch's fused attention without them is slow."""
    if tensors[0].device.type != "cpu" or is_observed():
        return False
    return _learns(*tensors) or _fused_is_slow(tensors[0])


def _fused_is_slow(tensor: Tensor) -> bool:
    """In half precision PyTorch's kernel for CPUs wants their matrix instructions."""
    if torch.compiler.is_compiling():
        return False
    return tensor.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _bias(position_bias: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[H, N, N], or with a mask [L, H, N, N], in at least single precision; a window's own token is always seen."""
    bias = position_bias.to(torch.promote_types(dtype, torch.float32))
    return bias if mask is None else bias.masked_fill(~mask[:, None], torch.finfo(dtype).min)


def _scores(query: Tensor, key: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Q K^T / sqrt(d) + B of equation 4, [B * L, H, N, N] in the type of the bias, [H, N, N] or [L, H, N, N]."""
    products = query @ key.transpose(-1, -2)
    return torch.add(bias, products.view(-1, *bias.shape), alpha=scaling).view(products.shape)


def _whole_pictures(windows: int, bias: Tensor) -> int:
    """The least multiple of a picture's windows that is about as many as `windows`."""
    of_picture = len(bias) if bias.ndim == 4 else 1
    return max(1, windows // of_picture) * of_picture


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """PyTorch's fused attention. Biases of windows are repeated for a few pictures at a time."""
    bias = bias.to(query.dtype)
    if bias.ndim == 3:
        return F.scaled_dot_product_attention(query, key, value, bias[None], scale=scaling).transpose(1, 2)
    step = _whole_pictures(64, bias)
    bias = bias.repeat(step // len(bias), 1, 1, 1)
    outputs = [
        F.scaled_dot_product_attention(*part, bias[: len(part[0])], scale=scaling).transpose(1, 2)
        for part in zip(query.split(step), key.split(step), value.split(step))
    ]
    return torch.cat(outputs)


# ---------------------------------------------------------------------------------------------------------------------
# In pieces; with gradients as an operator, which torch.compile leaves alone


@torch.autocast("cpu", enabled=False)
def _attend(packed: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Outputs [B * L, N, H, D] without gradients."""
    keep_freed_memory()
    output = torch.empty_like(packed[:, :, 0])
    for into, part in _pieces(bias, output, packed):
        _attend_piece(part, bias, scaling, into, part.new_empty(len(part), *bias.shape[-3:]))
    return output


@torch.autocast("cpu", enabled=False)
def _attend_for_backward(packed: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Outputs [B * L, N, H, D], and weights [B * L, H, N, N] for the backward pass."""
    keep_freed_memory()
    output, weights = _results(packed)
    for into, part, into_weights in _pieces(bias, output, packed, weights):
        _attend_piece(part, bias, scaling, into, into_weights)
    return output, weights


def _attend_piece(packed: Tensor, bias: Tensor, scaling: float, output: Tensor, weights: Tensor) -> None:
    """Fills the outputs and the weights."""
    query, key, value = _apart(packed)
    scores = _scores(query, key, bias, scaling)
    if scores.dtype == weights.dtype:
        torch.softmax(scores, dim=-1, out=weights)
    else:
        weights.copy_(scores.softmax(dim=-1))
    output.copy_((weights @ value).transpose(1, 2))


@torch.autocast("cpu", enabled=False)
def _attend_backward(
    gradient: Tensor, packed: Tensor, weights: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the packed tensor and of the bias, summed over windows while they are at hand."""
    to_packed, to_bias = torch.empty_like(packed), torch.zeros_like(bias)
    for into, to_output, part, weight in _pieces(bias, to_packed, gradient, packed, weights):
        states = _apart(part)
        to_states = torch.empty_like(states)
        query, key, value = states.flatten(1, 2)
        to_query, to_key, to_value = to_states.flatten(1, 2)
        to_output, weight = to_output.transpose(1, 2).reshape(value.shape), weight.flatten(0, 1)
        to_scores = torch._softmax_backward_data(to_output @ value.transpose(1, 2), weight, -1, weight.dtype)
        to_bias += to_scores.view(-1, *bias.shape).sum(dim=0, dtype=bias.dtype)
        to_scores *= scaling
        torch.bmm(to_scores, key, out=to_query)
        torch.bmm(to_scores.transpose(1, 2), query, out=to_key)
        torch.bmm(weight.transpose(1, 2), to_output, out=to_value)
        into.copy_(to_states.permute(1, 3, 0, 2, 4))
    return to_packed, to_bias


def _pieces(bias: Tensor, *tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Some windows of each [B * L, ...] at a time."""
    heads, places, _ = bias.shape[-3:]
    step = _whole_pictures(SCORES // (heads * places * places), bias)
    return zip(*(x.split(step) for x in tensors))


def _apart(packed: Tensor) -> Tensor:
    """[3, B * L, H, N, D] of [B * L, N, 3, H, D], in memory of its own."""
    return packed.permute(2, 0, 3, 1, 4).contiguous()


def _results(packed: Tensor, *_) -> tuple[Tensor, Tensor]:
    windows, places, _, heads, width = packed.shape
    return packed.new_empty(windows, places, heads, width), packed.new_empty(windows, heads, places, places)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # of the weights
    packed, bias, ctx.scaling = inputs
    ctx.save_for_backward(packed, output[1], bias)


def _differentiate(ctx, gradient: Tensor | None, _) -> tuple[Tensor | None, Tensor | None, None]:
    if gradient is None:
        return None, None, None
    backward = torch.ops.hf_tfamily_block_sparse.window_attention_backward
    return *backward(gradient, *ctx.saved_tensors, ctx.scaling), None


def register_operators() -> None:
    operator = torch.library.custom_op(
        "hf_tfamily_block_sparse::window_attention", _attend_for_backward, mutates_args=()
    )
    operator.register_fake(_results)
    operator.register_autograd(_differentiate, setup_context=_save)
    backward = torch.library.custom_op(
        "hf_tfamily_block_sparse::window_attention_backward", _attend_backward, mutates_args=()
    )
    backward.register_fake(
        lambda gradient, packed, weights, bias, scaling: (torch.empty_like(packed), torch.empty_like(bias))
    )

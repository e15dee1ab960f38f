"""Attention inside windows of a picture with a learned bias (Liu et al. 2021, arXiv:2103.14030, equation 4).

Training on a CPU goes through windows in chunks, whose scores stay in the processor's cache, forward and backward.

Shapes: B batch, L windows of N tokens each, H heads, D head dim.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

SCORES = 2**20  # of a chunk
NAMESPACE = "hf_tfamily_block_sparse"


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
        mask: [L, N, N] bool, True where a key is seen, as a window's own token always is; None if all are.
        dropout: of the attention weights.
    """
    bias = position_bias.to(torch.promote_types(query.dtype, torch.float32))
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None], torch.finfo(query.dtype).min)  # [L, H, N, N]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, bias))
    if not learns and not dropout:
        return _attend_fused(query, key, value, bias, scaling)
    # Exported graphs hold PyTorch's own operators alone, so that others can run them.
    if query.device.type == "cpu" and not dropout and not torch.compiler.is_exporting():
        return _WindowAttention.apply(query, key, value, bias, scaling)[0]
    weights = _scores(query, key, bias, scaling).softmax(dim=-1).to(value.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2)


def _scores(query: Tensor, key: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Q K^T / sqrt(d) + B, [B * L, H, N, N] in the type of the bias, [H, N, N] or [L, H, N, N]."""
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
        F.scaled_dot_product_attention(*chunk, bias[: len(chunk[0])], scale=scaling).transpose(1, 2)
        for chunk in zip(query.split(step), key.split(step), value.split(step))
    ]
    return torch.cat(outputs)


# ---------------------------------------------------------------------------------------------------------------------
# In chunks, as operators, which torch.compile leaves alone


class _WindowAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, bias, scaling):
        return torch.ops.hf_tfamily_block_sparse.window_attention(query, key, value, bias, scaling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # of the weights
        *tensors, ctx.scaling = inputs
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        if gradient is None:
            return None, None, None, None, None
        backward = torch.ops.hf_tfamily_block_sparse.window_attention_backward
        return *backward(gradient, *ctx.saved_tensors, ctx.scaling), None


@torch.autocast("cpu", enabled=False)
def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Outputs [B * L, N, H, D], and weights [B * L, H, N, N] for the backward pass."""
    output, weights = _results(query)
    for q, k, v, into_output, into_weights in _chunks(bias, query, key, value, output, weights):
        into_weights.copy_(_scores(q, k, bias, scaling).softmax(dim=-1))
        into_output.copy_((into_weights @ v).transpose(1, 2))
    return output, weights


@torch.autocast("cpu", enabled=False)
def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and the bias, which is summed over windows while they are at hand."""
    to_query, to_key, to_value, to_bias = map(torch.empty_like, (query, key, value, bias))
    to_bias.zero_()
    tensors = (gradient.transpose(1, 2), query, key, value, weights, to_query, to_key, to_value)
    for *chunk, into_query, into_key, into_value in _chunks(bias, *tensors):
        to_output, q, k, v, weight = (x.contiguous() for x in chunk)
        to_scores = torch._softmax_backward_data(to_output @ v.transpose(-1, -2), weight, -1, weight.dtype)
        to_bias += to_scores.view(-1, *bias.shape).sum(dim=0, dtype=bias.dtype)
        to_scores *= scaling
        into_query.copy_(to_scores @ k)
        into_key.copy_(to_scores.transpose(-1, -2) @ q)
        into_value.copy_(weight.transpose(-1, -2) @ to_output)
    return to_query, to_key, to_value, to_bias


def _chunks(bias: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some windows of each [B * L, ...] at a time."""
    step = _whole_pictures(SCORES // bias.shape[-3:].numel(), bias)
    return zip(*(x.split(step) for x in tensors))


def _results(query: Tensor, *_) -> tuple[Tensor, Tensor]:
    windows, heads, length, width = query.shape
    return query.new_empty(windows, length, heads, width), query.new_empty(windows, heads, length, length)


def _register(name: str, run: Callable, fake: Callable, products: int) -> None:
    """An operator, what torch.compile, torch.func and counters know of it; its products are of N x D by D x N."""
    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=())
    operator.register_fake(fake)

    @operator.register_vmap
    def one_by_one(info, in_dims, *inputs):
        calls = (
            operator(*(x if dim is None else x.select(dim, number) for x, dim in zip(inputs, in_dims)))
            for number in range(info.batch_size)
        )
        results = tuple(map(torch.stack, zip(*calls)))
        return results, (0,) * len(results)

    @register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name), get_raw=True)
    def flops(*inputs, **_):
        return products * 2 * inputs[1].numel() * inputs[1].shape[2]  # keys, or queries: [B * L, H, N, D]


_register("window_attention", _forward, _results, products=2)
_register("window_attention_backward", _backward, lambda _, *x: tuple(map(torch.empty_like, x[:4])), products=4)

"""Attention inside windows of a picture with a learned bias (Liu et al. 2021, arXiv:2103.14030, equation 4).

Training on a CPU goes through windows in chunks, whose scores stay in the processor's cache, forward and backward.

Shapes: B batch, L windows of N tokens each, H heads, D head dim.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SCORES = 2**20  # of a chunk


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Attention inside windows, [B * L, N, H, D], of queries, keys and values [B * L, H, N, D].

    Args:
        bias: [H, N, N], added to the scaled scores.
        mask: [L, N, N] bool, True where a key is seen, as a window's own token always is; None if all are.
        dropout: of the attention weights.
    """
    bias = bias.to(torch.promote_types(query.dtype, torch.float32))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, bias))
    if not learns and not dropout:
        return _attend_fused(query, key, value, _masked(bias, mask, query.dtype).to(query.dtype), scaling)
    # Exported graphs hold PyTorch's own operators alone, so that others can run them.
    if query.device.type == "cpu" and not dropout and not torch.compiler.is_exporting():
        return _WindowAttention.apply(query, key, value, bias, mask, scaling)[0]
    return _attend(query, key, value, bias, mask, scaling, dropout)


def _attend(query, key, value, bias, mask, scaling: float, dropout: float = 0.0) -> Tensor:
    weights = _scores(query, key, _masked(bias, mask, query.dtype), scaling).softmax(dim=-1).to(value.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2)


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """PyTorch's fused attention; in chunks, so that biases of windows are repeated for a few pictures only."""
    if bias.ndim == 3:
        return F.scaled_dot_product_attention(query, key, value, bias[None], scale=scaling).transpose(1, 2)
    chunks = list(_chunks(64, bias, query, key, value))
    bias = bias.repeat(len(chunks[0][0]) // len(bias), 1, 1, 1)
    outputs = (F.scaled_dot_product_attention(*chunk, bias[: len(chunk[0])], scale=scaling) for chunk in chunks)
    return torch.cat([output.transpose(1, 2) for output in outputs])


def _masked(bias: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[H, N, N], or [L, H, N, N] with a mask."""
    return bias if mask is None else bias.masked_fill(~mask[:, None], torch.finfo(dtype).min)


def _scores(query: Tensor, key: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Q K^T / sqrt(d) + B, [B * L, H, N, N] in the type of the bias, [H, N, N] or [L, H, N, N]."""
    products = query @ key.transpose(-1, -2)
    return torch.add(bias, products.view(-1, *bias.shape), alpha=scaling).view(products.shape)


def _chunks(windows: int, bias: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of about so many of the B * L windows: of whole pictures where each window has a bias of its own."""
    of_picture = len(bias) if bias.ndim == 4 else 1
    step = max(1, windows // of_picture) * of_picture
    return zip(*(x.split(step) for x in tensors))


class _WindowAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, bias, mask, scaling):
        return torch.ops.hf_tfamily_block_sparse.window_attention(query, key, value, bias, mask, scaling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # of the weights
        *tensors, ctx.scaling = inputs
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, gradient, _):
        if gradient is None:
            return (None,) * 6
        *tensors, mask, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients may want gradients
            return *torch.func.vjp(lambda *x: _attend(*x, mask, ctx.scaling), *tensors)[1](gradient), None, None
        backward = torch.ops.hf_tfamily_block_sparse.window_attention_backward
        return *backward(gradient, *tensors, weights, ctx.scaling), None, None


@torch.autocast("cpu", enabled=False)
def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Outputs [B * L, N, H, D], and weights [B * L, H, N, N] for the backward pass."""
    bias, tensors = _masked(bias, mask, query.dtype), (query, key, value, *_results(query))
    for q, k, v, output, weights in _chunks(SCORES // bias.shape[-3:].numel(), bias, *tensors):
        weights.copy_(_scores(q, k, bias, scaling).softmax(dim=-1))
        output.copy_((weights @ v).transpose(1, 2))
    return tensors[3:]


@torch.autocast("cpu", enabled=False)
def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and the bias, which is summed over windows while they are at hand."""
    to_query, to_key, to_value, to_bias = *map(torch.empty_like, (query, key, value)), torch.zeros_like(bias)
    tensors = (gradient.transpose(1, 2), query, key, value, weights, to_query, to_key, to_value)
    for *chunk, into_query, into_key, into_value in _chunks(SCORES // bias.numel(), bias, *tensors):
        to_output, q, k, v, weight = (x.contiguous() for x in chunk)
        to_scores = torch._softmax_backward_data(to_output @ v.transpose(-1, -2), weight, -1, weight.dtype)
        to_bias += to_scores.sum(dim=0, dtype=bias.dtype)
        to_scores *= scaling
        into_query.copy_(to_scores @ k)
        into_key.copy_(to_scores.transpose(-1, -2) @ q)
        into_value.copy_(weight.transpose(-1, -2) @ to_output)
    return to_query, to_key, to_value, to_bias


def _results(query: Tensor, *_) -> tuple[Tensor, Tensor]:
    windows, heads, length, width = query.shape
    return query.new_empty(windows, length, heads, width), query.new_empty(windows, heads, length, length)


def _register(name: str, run: Callable, fake: Callable, products: int) -> None:
    """An operator, and what torch.compile, torch.func and FLOP counters need to know of it."""
    operator = torch.library.custom_op(f"hf_tfamily_block_sparse::{name}", run, mutates_args=())
    operator.register_fake(fake)

    @operator.register_vmap
    def one_by_one(info, in_dims, *inputs):
        samples = zip(*([x] * info.batch_size if d is None else x.unbind(d) for x, d in zip(inputs, in_dims)))
        results = [torch.stack(result) for result in zip(*(operator(*sample) for sample in samples))]
        return tuple(results), (0,) * len(results)

    @register_flop_formula(getattr(torch.ops.hf_tfamily_block_sparse, name), get_raw=True)
    def flops(*inputs, **_):
        return products * 2 * inputs[1].numel() * inputs[1].shape[2]  # each of N x D and N for a head of a window


def register_operators() -> None:
    _register("window_attention", _forward, _results, products=2)
    _register("window_attention_backward", _backward, lambda _, *x: tuple(map(torch.empty_like, x[:4])), products=4)

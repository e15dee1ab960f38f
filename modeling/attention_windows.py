"""Attention in windows of a picture (Liu et al. 2021, arXiv:2103.14030, section 3.2): where tokens lie, the fast path.

A grid of tokens is padded to whole windows, moved by the shift, and cut; both ways are one gather each.

Shapes: B batch, gh x gw grid of T tokens, L windows of N tokens, H heads, D head dim, C channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .attention_patterns_images import Window2D
from .freed_memory import keep_freed_memory

WINDOWS = 256  # attended to at a time on a CPU


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """Where each token of a grid lies among the places of its windows, and which places see each other.

    Attributes:
        grid: rows and columns of tokens.
        window: rows and columns of a window.
        tokens: [L * N] the token at each place; an arbitrary one where there is none.
        places: [T] the place of each token.
        pads: places without a token; None if there are none.
        mask: [L, N, N] bool, True where places of a window see each other; None if all do.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    tokens: torch.Tensor
    places: torch.Tensor
    pads: torch.Tensor | None
    mask: torch.Tensor | None

    def partition(self, states: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B * L, N, C]; places without a token hold zeros."""
        windows = _Partition.apply(states, self.tokens, self.places, self.pads)
        return windows.view(-1, self.window[0] * self.window[1], states.shape[-1])

    def reverse(self, windows: torch.Tensor) -> torch.Tensor:
        """[B * L, N, C] -> [B, T, C]; what lies at places without a token is dropped."""
        states = windows.reshape(-1, len(self.tokens), windows.shape[-1])
        return _Reverse.apply(states, self.tokens, self.places, self.pads)


def window_layout(pattern: Window2D, grid: tuple[int, int], device: torch.device | str, fit: bool) -> WindowLayout:
    """The layout of `grid` under the windows of `pattern`.

    Args:
        fit: windows that would cover the shorter side of the grid are not shifted, nor larger than the grid: what the
            paper's classifiers do. Otherwise the grid is padded to whole windows: what its detectors do.
    """
    shift, window = pattern.shift, (pattern.size, pattern.size)
    if fit and min(grid) <= pattern.size:
        shift, window = 0, (min(pattern.size, grid[0]), min(pattern.size, grid[1]))
    padded = tuple(-(-side // length) * length for side, length in zip(grid, window))
    rows, columns = (torch.arange(side, device=device) for side in padded)

    def place(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Where the token of a row and column of the padded grid goes."""
        # The cyclic shift; nothing is below 0, which torch.compile's index arithmetic could not take.
        row, column = (row[:, None] + padded[0] - shift) % padded[0], (column + padded[1] - shift) % padded[1]
        number = row // window[0] * (padded[1] // window[1]) + column // window[1]
        return (number * window[0] + row % window[0]) * window[1] + column % window[1]

    row, column = (_into_windows(axis, padded, window) for axis in ((rows[:, None] + shift), (columns + shift)))
    row, column = row % padded[0], column % padded[1]
    below, beside = place(rows[grid[0] :], columns), place(rows[: grid[0]], columns[grid[1] :])
    mask = None
    if shift:
        windows = pattern.bind(padded).window(row * padded[1] + column).view(-1, window[0] * window[1])
        mask = windows[:, :, None] == windows[:, None, :]
    return WindowLayout(
        grid=grid,
        window=window,
        tokens=row.clamp(max=grid[0] - 1) * grid[1] + column.clamp(max=grid[1] - 1),
        places=place(rows[: grid[0]], columns[: grid[1]]).flatten(),
        pads=torch.cat([below.flatten(), beside.flatten()]) if padded != grid else None,
        mask=mask,
    )


def _into_windows(values: torch.Tensor, padded: tuple[int, ...], window: tuple[int, int]) -> torch.Tensor:
    """Values over the padded grid (broadcast to it), window after window, [L * N]."""
    values = values.expand(padded).reshape(padded[0] // window[0], window[0], padded[1] // window[1], window[1])
    return values.transpose(1, 2).flatten()


class _Partition(torch.autograd.Function):
    """[B, T, C] -> [B, L * N, C]. Both directions gather; the general backward of a gather would scatter and add."""

    @staticmethod
    def forward(ctx, states, tokens, places, pads):
        ctx.save_for_backward(tokens, places, pads)
        windows = _gather(states, tokens)
        return windows if pads is None else windows.index_fill_(1, pads, 0)

    @staticmethod
    def backward(ctx, gradient):
        return _Reverse.apply(gradient, *ctx.saved_tensors), None, None, None


class _Reverse(torch.autograd.Function):
    """[B, L * N, C] -> [B, T, C], the transpose of _Partition."""

    @staticmethod
    def forward(ctx, windows, tokens, places, pads):
        ctx.save_for_backward(tokens, places, pads)
        return _gather(windows, places)

    @staticmethod
    def backward(ctx, gradient):
        return _Partition.apply(gradient, *ctx.saved_tensors), None, None, None


def _gather(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, S, C] -> [B, T, C], the same `rows` [T] of every picture. PyTorch gathers one long list twice as fast."""
    batch, length = states.shape[:2]
    pictures = torch.arange(batch, device=rows.device)[:, None] * length
    return states.flatten(0, 1).index_select(0, (pictures + rows).flatten()).unflatten(0, (batch, -1))


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_bias: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention inside windows, [B * L, N, H, D], of queries, keys and values [B * L, H, N, D].

    Args:
        position_bias: [H, N, N], added to the scaled scores.
        mask: [L, N, N] bool, True where a key is seen; None if all are.
        dropout: of the attention weights.
    """
    _prepare_memory(query)
    bias = _masked(position_bias.to(query.dtype), mask)
    tensors = (query, key, value)
    if not dropout and learns_in_pieces(*tensors, bias):
        return _WindowAttention.apply(bias, scaling, *tensors)
    if not dropout and not _learns(*tensors, bias):
        if _fused_is_slow(query):
            return torch.cat([output for _, output in _in_pieces(tensors, bias, scaling)])
        return _attend_fused(*tensors, bias, scaling)
    scores = _scores(query, key, bias, scaling)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return (weights @ value).transpose(1, 2)


def packed_window_attention(
    packed: torch.Tensor, position_bias: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`window_attention` of queries, keys and values that lie together, [B * L, N, 3, H, D]; see `learns_in_pieces`."""
    _prepare_memory(packed)
    return _WindowAttention.apply(_masked(position_bias.to(packed.dtype), mask), scaling, packed)


def _prepare_memory(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        keep_freed_memory()


def learns_in_pieces(*tensors: torch.Tensor) -> bool:
    """Does what is made of these get gradients on a CPU, from operations as they are called?"""
    return _learns(*tensors) and tensors[0].device.type == "cpu" and not torch.compiler.is_compiling()


def _learns(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _masked(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[H, N, N], or with a mask [L, H, N, N]; a window's own token is always seen."""
    return bias if mask is None else bias.masked_fill(~mask[:, None], torch.finfo(bias.dtype).min)


def _scores(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, scaling: float) -> torch.Tensor:
    """Q K^T / sqrt(d) + B of equation 4, [B * L, H, N, N]; the bias is [H, N, N], or [L, H, N, N] for each window."""
    products = query @ key.transpose(-1, -2)
    return torch.add(bias, products.view(-1, *bias.shape), alpha=scaling).view_as(products)


def _attend_fused(query, key, value, bias: torch.Tensor, scaling: float) -> torch.Tensor:
    """Without gradients: PyTorch's fused attention. Biases of windows are repeated for a few pictures at a time."""
    if bias.ndim == 3:
        return F.scaled_dot_product_attention(query, key, value, bias[None], scale=scaling).transpose(1, 2)
    step = _whole_pictures(64, bias)
    bias = bias.repeat(step // len(bias), 1, 1, 1)
    outputs = [
        F.scaled_dot_product_attention(*part, bias[: len(part[0])], scale=scaling).transpose(1, 2)
        for part in zip(query.split(step), key.split(step), value.split(step))
    ]
    return torch.cat(outputs)


def _fused_is_slow(query: torch.Tensor) -> bool:
    """In half precision PyTorch's kernel for CPUs wants their matrix instructions."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return query.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def _in_pieces(
    tensors: Sequence[torch.Tensor], bias: torch.Tensor, scaling: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weights [., H, N, N] and outputs [., N, H, D] of some hundred windows at a time."""
    step = _whole_pictures(WINDOWS, bias)
    for query, key, value in zip(*(x.split(step) for x in tensors)):
        weights = _scores(query, key, bias, scaling).softmax(dim=-1)
        yield weights, (weights @ value).transpose(1, 2)


def _whole_pictures(windows: int, bias: torch.Tensor) -> int:
    """The least multiple of a picture's windows that is about as many as `windows`."""
    of_picture = len(bias) if bias.ndim == 4 else 1
    return max(1, windows // of_picture) * of_picture


class _WindowAttention(torch.autograd.Function):
    """Attention of some hundred windows at a time, forward and backward, so that scores stay in the processor's cache.

    The gradient of the bias is summed over windows while they are there; as a mask it would be dense.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, bias, scaling, *tensors):
        weights, outputs = zip(*_in_pieces(_apart(tensors), bias, scaling))
        ctx.save_for_backward(*tensors, *weights)
        ctx.scaling, ctx.bias_shape, ctx.count = scaling, bias.shape, len(tensors)
        return torch.cat(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, gradient):
        saved = ctx.saved_tensors  # which checkpointing hands out once
        tensors, weights = saved[: ctx.count], saved[ctx.count :]
        gradients = [torch.empty_like(x) for x in tensors]  # whose memory runs as the projections want it
        bias_gradient, precision = 0, torch.promote_types(gradient.dtype, torch.float32)
        step = len(weights[0])
        parts = zip(*(x.split(step) for x in (*_apart(tensors), *_apart(gradients), gradient)), weights)
        for q, k, v, to_query, to_key, to_value, g, w in parts:
            g = g.transpose(1, 2).contiguous()
            to_value.copy_(w.transpose(-1, -2) @ g)
            to_scores = torch._softmax_backward_data(g @ v.transpose(-1, -2), w, -1, w.dtype)
            bias_gradient = bias_gradient + to_scores.view(-1, *ctx.bias_shape).sum(dim=0, dtype=precision)
            to_scores *= ctx.scaling
            to_query.copy_(to_scores @ k)
            to_key.copy_(to_scores.transpose(-1, -2) @ q)
        return bias_gradient.to(gradient.dtype), None, *gradients


def _apart(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Three of [B * L, H, N, D], given them or the one [B * L, N, 3, H, D] in which they lie."""
    return tensors if len(tensors) == 3 else tensors[0].permute(2, 0, 3, 1, 4).unbind()

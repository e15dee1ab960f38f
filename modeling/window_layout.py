"""Windows of a picture (Liu et al. 2021, arXiv:2103.14030, section 3.2): where each token lies.

A grid of tokens is padded to whole windows, moved by the shift, and cut; both ways are one gather each.

Shapes: B batch, gh x gw grid of T tokens, L windows of N tokens, C channels.
"""

from dataclasses import dataclass

import torch

from .attention_patterns_images import Window2D
from .call_modes import is_observed


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
        partition = _partition if is_observed() else _Partition.apply
        windows = partition(states, self.tokens, self.places, self.pads)
        return windows.view(-1, self.window[0] * self.window[1], states.shape[-1])

    def reverse(self, windows: torch.Tensor) -> torch.Tensor:
        """[B * L, N, C] -> [B, T, C]; what lies at places without a token is dropped."""
        states = windows.reshape(-1, len(self.tokens), windows.shape[-1])
        reverse = _reverse if is_observed() else _Reverse.apply
        return reverse(states, self.tokens, self.places, self.pads)


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


def _partition(states: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, pads: torch.Tensor | None):
    windows = _gather(states, tokens)
    return windows if pads is None else windows.index_fill_(1, pads, 0)


def _reverse(windows: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, pads: torch.Tensor | None):
    return _gather(windows, places)


class _Partition(torch.autograd.Function):
    """[B, T, C] -> [B, L * N, C]. Both directions gather; the general backward of a gather would scatter and add."""

    @staticmethod
    def forward(ctx, states, tokens, places, pads):
        ctx.save_for_backward(tokens, places, pads)
        return _partition(states, tokens, places, pads)

    @staticmethod
    def backward(ctx, gradient):
        return _Reverse.apply(gradient, *ctx.saved_tensors), None, None, None


class _Reverse(torch.autograd.Function):
    """[B, L * N, C] -> [B, T, C], the transpose of _Partition."""

    @staticmethod
    def forward(ctx, windows, tokens, places, pads):
        ctx.save_for_backward(tokens, places, pads)
        return _reverse(windows, tokens, places, pads)

    @staticmethod
    def backward(ctx, gradient):
        return _Partition.apply(gradient, *ctx.saved_tensors), None, None, None


def _gather(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, S, C] -> [B, T, C], the same `rows` [T] of every picture. PyTorch gathers one long list twice as fast."""
    batch, length = states.shape[:2]
    pictures = torch.arange(batch, device=rows.device)[:, None] * length
    return states.flatten(0, 1).index_select(0, (pictures + rows).flatten()).unflatten(0, (batch, -1))

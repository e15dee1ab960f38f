"""Windows of a picture (Liu et al. 2021, arXiv:2103.14030, section 3.2): where each token lies.

A grid of tokens is padded to whole windows, moved by the shift, and cut; both ways are one gather each.

Shapes: B batch, gh x gw grid of T tokens, L windows of N tokens, C channels.
"""

from dataclasses import dataclass

import torch

from .attention_patterns import Window2D
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
        windows = _move(states, self.tokens, self.pads, self.places, None)
        return windows.view(-1, self.window[0] * self.window[1], states.shape[-1])

    def reverse(self, windows: torch.Tensor) -> torch.Tensor:
        """[B * L, N, C] -> [B, T, C]; what lies at places without a token is dropped."""
        states = windows.reshape(-1, len(self.tokens), windows.shape[-1])
        return _move(states, self.places, None, self.tokens, self.pads)


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


def _move(
    states: torch.Tensor,
    rows: torch.Tensor,
    empty: torch.Tensor | None,
    back: torch.Tensor,
    back_empty: torch.Tensor | None,
) -> torch.Tensor:
    """`_gather` of `rows` and `empty`, whose transpose is that of `back` and `back_empty`."""
    if is_observed():
        return _gather(states, rows, empty)
    return _Move.apply(states, rows, empty, back, back_empty)


class _Move(torch.autograd.Function):
    """Both directions gather; the general backward of a gather would scatter and add."""

    @staticmethod
    def forward(ctx, states, rows, empty, back, back_empty):
        ctx.save_for_backward(rows, empty, back, back_empty)
        return _gather(states, rows, empty)

    @staticmethod
    def backward(ctx, gradient):
        rows, empty, back, back_empty = ctx.saved_tensors
        return _Move.apply(gradient, back, back_empty, rows, empty), None, None, None, None


def _gather(states: torch.Tensor, rows: torch.Tensor, empty: torch.Tensor | None) -> torch.Tensor:
    """[B, S, C] -> [B, T, C], the same `rows` [T] of every picture, zeros where they are `empty`.

    PyTorch gathers one long list twice as fast.
    """
    batch, length = states.shape[:2]
    pictures = torch.arange(batch, device=rows.device)[:, None] * length
    moved = states.flatten(0, 1).index_select(0, (pictures + rows).flatten()).unflatten(0, (batch, -1))
    return moved if empty is None else moved.index_fill_(1, empty, 0)

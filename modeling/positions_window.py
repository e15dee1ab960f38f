"""Relative position bias of windows (Liu et al. 2021, arXiv:2103.14030, section 3.2).

Shapes: H heads, N tokens of a window of M x M.
"""

import torch
import torch.nn.functional as F
from torch import nn


class WindowPositionBias(nn.Module):
    """The bias B of equation 4: a learned number for each head and each of (2M - 1) x (2M - 1) offsets.

    Args:
        window_size: M.
        num_heads: H.

    Attributes:
        relative_position_bias_table: B-hat [(2M - 1)^2, H], by rows then columns of offsets, most negative first.
    """

    def __init__(self, window_size: int, num_heads: int):
        super().__init__()
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))

    def forward(self, window: tuple[int, int]) -> torch.Tensor:
        """[H, N, N] for windows of these rows and columns, each at most M."""
        offsets = self.offsets(window, self.relative_position_bias_table.device)
        bias = self.relative_position_bias_table.t().index_select(1, offsets.flatten())
        return bias.view(-1, *offsets.shape)

    def offsets(self, window: tuple[int, int], device: torch.device | str) -> torch.Tensor:
        """[N, N] the row of the table for query and key."""
        rows, columns = (torch.arange(length, device=device) for length in window)
        rows, columns = (axis[:, None] - axis + self.window_size - 1 for axis in (rows, columns))
        offsets = rows[:, None, :, None] * (2 * self.window_size - 1) + columns[None, :, None, :]
        return offsets.reshape(len(rows) * len(columns), -1)

    @torch.no_grad()
    def resize(self, window_size: int) -> None:
        """Go over to windows of another size: the table is interpolated (bicubic), as its authors do to fine-tune."""
        old, new = 2 * self.window_size - 1, 2 * window_size - 1
        table = self.relative_position_bias_table
        grid = table.t().reshape(1, -1, old, old).float()
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        self.relative_position_bias_table = nn.Parameter(
            grid.view(-1, new * new).t().contiguous().to(table.dtype), requires_grad=table.requires_grad
        )
        self.window_size = window_size

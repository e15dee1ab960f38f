"""How order enters a model.

Shapes: B batch, T tokens.
"""

import math

import torch
from torch import nn


class AxialPositionEmbedding(nn.Module):
    """Learned embeddings of a position's coordinates along several axes, summed (Child et al. 2019, section 5.3).

    Position t of data laid out in `shape` has the coordinates `unravel(t, shape)`: row, column and channel for an
    image; for text or audio, row and column of a matrix whose width is the attention's stride.

    Args:
        shape: length of each axis, the last one running fastest.
        hidden_size: width of the embeddings.
    """

    def __init__(self, shape: list[int], hidden_size: int):
        super().__init__()
        self.shape = tuple(shape)
        self.axes = nn.ModuleList(nn.Embedding(length, hidden_size) for length in shape)

    @property
    def num_positions(self) -> int:
        return math.prod(self.shape)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] positions -> [B, T, hidden]."""
        embeddings, rest = 0, position_ids
        for axis in reversed(self.axes):
            embeddings = embeddings + axis(rest % axis.num_embeddings)
            rest = rest // axis.num_embeddings
        return embeddings

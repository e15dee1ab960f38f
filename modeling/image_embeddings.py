"""How an image enters a model: embeddings of values, of whole pixels, of classes, and of where they lie.

Section numbers are those of Parmar et al. 2018 (arXiv:1802.05751).

Shapes: B batch, P positions of the trunk, C channels, W values in a position (1 or C), d hidden.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .attention_patterns import Block2D
from .memory_images import ImageCache
from .mixture_of_logistics import RESIDUAL_UNIT, rescale
from .positions import sinusoids


class ValueEmbedding(nn.Module):
    """A position for each value, embedded by the table of its channel (section 3.1).

    A row of `embed_tokens` holds an id's vectors for all channels. They are multiplied by sqrt(d), as in the authors'
    code.
    """

    def __init__(self, config):
        super().__init__()
        self.channels, self.hidden_size = config.num_channels, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.num_channels * config.hidden_size)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, enlarged: None = None) -> torch.Tensor:
        """The ids [B, P, 1] before the values at `positions` [B or 1, P] -> [B, P, d]."""
        return self.of_channel(self.embed_tokens(ids.squeeze(-1)), positions)

    def of_channel(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """From rows [B, P, C * d] of the table what belongs to each value's channel; [B, P, d] is taken as it is."""
        if rows.shape[-1] != self.hidden_size:
            channel = ((positions - 1) % self.channels)[..., None, None]
            rows = rows.unflatten(-1, (self.channels, self.hidden_size))
            rows = rows.gather(-2, channel.expand(*rows.shape[:2], 1, self.hidden_size)).squeeze(-2)
        return rows * math.sqrt(self.hidden_size)


class PixelConvolution(nn.Linear):
    """The 1 x C convolution over the values of a pixel, before a ReLU."""

    def init_weights(self) -> None:
        """Weights and biases of one size, so that the ReLUs bend at brightnesses all over the range.

        From small weights and no biases, which bend only at grey, brightness is learned much more slowly.
        """
        bound = self.in_features**-0.5
        init.uniform_(self.weight, -bound, bound)
        init.uniform_(self.bias, -bound, bound)


class SourcePixelEmbedding(nn.Module):
    """A position for each pixel: a 1 x C convolution over its values as numbers from -1 to 1 (section 3.1).

    Followed by a ReLU, as in the authors' code.
    """

    def __init__(self, config):
        super().__init__()
        self.num_values = config.num_values
        self.embed_values = PixelConvolution(config.num_channels, config.hidden_size)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Whole pixels [B, P, C] -> [B, P, d]."""
        return self.embed_numbers(self.numbers(ids, self.embed_values.weight.dtype))

    def numbers(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """From -1 to 1; start tokens as the last value."""
        return rescale(ids.clamp(max=self.num_values - 1), self.num_values, dtype)

    def embed_numbers(self, numbers: torch.Tensor) -> torch.Tensor:
        """[B, P, C] -> [B, P, d]"""
        return self.embed_values(numbers.to(self.embed_values.weight.dtype)).relu()


class PixelEmbedding(SourcePixelEmbedding):
    """The same for the pixels before those to predict, or how they differ from an enlarged image.

    Before the first is the start token.
    """

    def __init__(self, config):
        super().__init__(config)
        self.hidden_size = config.hidden_size
        self.embed_start = nn.Embedding(config.vocab_size - config.num_values, config.hidden_size)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, enlarged: torch.Tensor | None = None) -> torch.Tensor:
        """The pixels [B, P, C] before those at `positions` [1, P] -> [B, P, d]; `enlarged` [B, pixels, C]."""
        start = self.embed_start((ids[..., -1] - self.num_values).clamp(min=0)) * math.sqrt(self.hidden_size)
        if enlarged is None:
            pixels = super().forward(ids, positions)
        else:
            before = enlarged[:, (positions[0] - 1).clamp(min=0)]
            pixels = self.embed_numbers((self.numbers(ids, enlarged.dtype) - before) / RESIDUAL_UNIT)
        return torch.where((positions == 0)[..., None], start, pixels)


EMBEDDINGS: dict[str, type[nn.Module]] = {"categorical": ValueEmbedding, "logistic_mixture": PixelEmbedding}
SOURCE_EMBEDDINGS: dict[str, type[nn.Module]] = {
    "categorical": ValueEmbedding,
    "logistic_mixture": SourcePixelEmbedding,
}


class ClassCondition(nn.Module):
    """Adds the embedding of the class, which is the start token's, to every later position (section 5.1)."""

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, past: ImageCache | None) -> torch.Tensor:
        """[B, P, d] at `positions` [B or 1, P]; the class of earlier calls is in `past`, and left there again."""
        before = None if past is None else past.first
        before = torch.zeros_like(embeddings[:, :1]) if before is None else before
        if embeddings.shape[1] == 0:
            return embeddings
        places = torch.arange(1, embeddings.shape[1] + 1, device=embeddings.device)
        starts = torch.where(positions == 0, places, 0).cummax(dim=-1).values  # the last start so far; 0: the past's
        starts = starts.expand(embeddings.shape[:2])[..., None].expand_as(embeddings)
        classes = torch.cat([before, embeddings], dim=1).gather(1, starts)
        if past is not None:
            past.first = classes[:, -1:]
        return embeddings + classes * (positions > 0)[..., None]


class NoCondition(nn.Module):
    """Images without classes."""

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, past: ImageCache | None) -> torch.Tensor:
        return embeddings


class SinusoidalAxis(nn.Module):
    """A coordinate as waves; the middle of a pixel of a small image is that of the pixels it stands for in a large one.

    So attention from the large image to the same place in the small one is between the same waves.
    """

    def __init__(self, length: int, width: int, stretch: float):
        super().__init__()
        self.width, self.stretch = width, stretch

    def forward(self, coordinate: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        exact = torch.promote_types(like.dtype, torch.float32)
        stretched = (coordinate.to(exact) + 0.5) * self.stretch - 0.5
        return sinusoids(stretched, self.width).to(like.dtype)


class LearnedAxis(nn.Embedding):
    """A coordinate as a learned vector."""

    def __init__(self, length: int, width: int, stretch: float):
        super().__init__(length, width)

    def forward(self, coordinate: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return super().forward(coordinate)


AXES: dict[str, type[nn.Module]] = {"sinusoidal": SinusoidalAxis, "learned": LearnedAxis}


class ImageCoordinates(nn.Module):
    """Where in the image a position lies: half of the dimensions for its row, half for its column and channel.

    Args:
        kind: a key of AXES.
        grid: rows, columns, and positions in a pixel.
        block_shape: height and width of the blocks in whose order positions count; None for row by row.
        hidden_size: d.
        stretch: height and width of the image that coordinates are of, as multiples of the grid's.
    """

    def __init__(
        self,
        kind: str,
        grid: tuple[int, int, int],
        block_shape: list[int] | None,
        hidden_size: int,
        stretch: tuple[float, float] = (1.0, 1.0),
    ):
        super().__init__()
        height, width = grid[:2] if block_shape is None else block_shape
        self.order = Block2D(height, width, 0, 0).bind(grid)
        self.rows = AXES[kind](grid[0], hidden_size // 2, stretch[0])
        self.columns = AXES[kind](grid[1] * grid[2], hidden_size // 2, stretch[1])

    @property
    def num_positions(self) -> int:
        return math.prod(self.order.grid)

    def forward(self, positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[B, P] positions -> [B, P, d] in the dtype of `like`."""
        row, column = self.order.place(positions)
        depth = self.order.grid[2]
        return torch.cat([self.rows(row, like), self.columns(column * depth + positions % depth, like)], dim=-1)

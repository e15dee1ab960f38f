"""Layers of the Swin Transformer around its attention: patches in, feed-forward, merging, stochastic depth.

Section numbers are those of Liu et al. 2021, arXiv:2103.14030.

Shapes: B batch, T tokens of a grid gh x gw, C width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .checks import check_patch_mask, check_pixels
from .configuration_swin_transformer import SwinTransformerConfig, pair
from .feed_forward import feed_forward
from .linear_onednn import OneDNNLinear, linear


class SwinTransformerPatchEmbeddings(nn.Module):
    """Patches of pixels -> tokens (section 3.1); a picture is padded with zeros to whole patches."""

    def __init__(self, config: SwinTransformerConfig):
        super().__init__()
        self.patch_size = pair(config.patch_size)
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(config.num_channels, config.embed_dim, self.patch_size, stride=self.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, height, width] -> [B, C, gh, gw]."""
        height, width = pixel_values.shape[2:]
        below, beside = -height % self.patch_size[0], -width % self.patch_size[1]
        if below or beside:
            pixel_values = F.pad(pixel_values, (0, beside, 0, below))
        return self.projection(pixel_values.to(self.projection.weight.dtype))


class SwinTransformerEmbeddings(nn.Module):
    """Patch embeddings with a norm; mask tokens and absolute positions where the model has them."""

    def __init__(self, config: SwinTransformerConfig, use_mask_token: bool):
        super().__init__()
        self.config = config
        self.patch_embeddings = SwinTransformerPatchEmbeddings(config)
        self.position_grid = tuple(
            side // patch for side, patch in zip(pair(config.image_size), pair(config.patch_size))
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if use_mask_token else None
        self.position_embeddings = None
        if config.use_absolute_embeddings:
            num_positions = self.position_grid[0] * self.position_grid[1]
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.embed_dim))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """[B, channels, height, width] -> [B, T, C], and the grid (gh, gw)."""
        check_pixels(pixel_values, self.config.num_channels, self.patch_embeddings.patch_size)
        patches = self.patch_embeddings(pixel_values)
        grid = tuple(patches.shape[2:])
        embeddings = self.norm(patches.flatten(2).transpose(1, 2))
        if bool_masked_pos is not None:
            embeddings = self._masked(embeddings, bool_masked_pos)
        if self.position_embeddings is not None:
            embeddings = embeddings + self._positions(grid, interpolate_pos_encoding)
        return self.dropout(embeddings), grid

    def _masked(self, embeddings: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """The mask token in place of masked patches."""
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos needs a mask token, which this model lacks; use "
                "SwinTransformerForMaskedImageModeling, or SwinTransformerModel(config, use_mask_token=True)."
            )
        check_patch_mask(bool_masked_pos, embeddings)
        return torch.where(bool_masked_pos[..., None].bool(), self.mask_token.to(embeddings.dtype), embeddings)

    def _positions(self, grid: tuple[int, int], interpolate: bool) -> torch.Tensor:
        """[1, T, C]."""
        if grid == self.position_grid:
            return self.position_embeddings
        if not interpolate:
            raise ValueError(
                f"The model has absolute embeddings for a grid of {self.position_grid} patches "
                f"(image_size={self.config.image_size}), got {grid}; use interpolate_pos_encoding=True."
            )
        positions = self.position_embeddings.unflatten(1, self.position_grid).permute(0, 3, 1, 2)
        positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
        return positions.flatten(2).transpose(1, 2)


class SwinTransformerMLP(nn.Module):
    """Feed-forward layer with a GELU in between (section 3.1)."""

    def __init__(self, config: SwinTransformerConfig, width: int):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.has_gelu = config.hidden_act == "gelu"
        self.fc1 = OneDNNLinear(width, int(config.mlp_ratio * width))
        self.fc2 = OneDNNLinear(int(config.mlp_ratio * width), width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]."""
        layers = (self.fc1, self.fc2)
        if self.has_gelu and all(map(_is_bare, layers)) and not _is_hooked(self.activation_fn):
            return feed_forward(hidden_states, *(x for layer in layers for x in (layer.weight, layer.bias)))
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def are_bare(layers: Sequence[nn.Module]) -> bool:
    """Are these linear layers of one shape that nobody changed, wrapped or hooked?"""
    return all(map(_is_bare, layers)) and len({(x.weight.shape, x.weight.dtype, x.bias is None) for x in layers}) == 1


def _is_bare(layer: nn.Module) -> bool:
    return type(layer) is OneDNNLinear and "forward" not in vars(layer) and not _is_hooked(layer)


def _is_hooked(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)


def project_together(states: torch.Tensor, layers: Sequence[nn.Linear]) -> torch.Tensor:
    """[..., C] -> [..., widths of the layers one after the other], for layers that `are_bare`, in one product."""
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return linear(states, torch.cat([layer.weight for layer in layers]), bias)


class SwinTransformerDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): a branch is left out for some pictures of a batch."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class SwinTransformerPatchMerging(nn.Module):
    """Four neighbouring tokens become one, twice as wide (section 3.1); an odd side is padded with zeros."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = OneDNNLinear(4 * width, 2 * width, bias=False)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, gh * gw, C] -> [B, ceil(gh / 2) * ceil(gw / 2), 2 C]."""
        states = hidden_states.unflatten(1, grid)
        if grid[0] % 2 or grid[1] % 2:
            states = F.pad(states, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        states = states.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, gh / 2, 2, gw / 2, 2, C]
        states = states.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # four neighbours, column after column
        return self.reduction(self.norm(states))

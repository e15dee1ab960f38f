"""The small image at the size of the large one, for a super-resolution model that predicts what is added to it.

Not in Parmar et al. 2018: networks that enlarge images are commonly given the plain interpolation and learn the
residual, as in Kim, Lee and Lee 2016 (arXiv:1511.04587), section 3.1. It is what `predict_residual` of the config does.

Shapes: B batch, S pixels of the small image, N of the large one, C channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from .attention_patterns import Block2D
from .mixture_of_logistics import rescale


@dataclass
class EnlargingEncoderOutput(BaseModelOutput):
    """What the encoder of a small image returns.

    Attributes:
        enlarged: [B, N, C] numbers from about -1 to 1 in the order of generation, the image interpolated to the size of
            the large one; None without `predict_residual`.
    """

    enlarged: torch.FloatTensor | None = None


class BicubicEnlargement(nn.Module):
    """Bicubic interpolation with Pillow's kernel (Keys 1981, a = -1/2)."""

    def __init__(self, config):
        super().__init__()
        self.small, self.large, self.num_values = config.source_image_size, config.image_size, config.num_values
        self.order = Block2D(*(config.block_shape or config.image_size), 0, 0).bind(config.grid)

    def forward(self, pixels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Ids [B, S, C] in raster order -> [B, N, C], of the dtype of `like` but of at least float32."""
        if pixels.shape[1] != math.prod(self.small):
            raise ValueError(
                f"predict_residual=True enlarges whole images of {self.small} pixels; input_ids hold {pixels.shape[1]}."
            )
        values = rescale(
            pixels.clamp(max=self.num_values - 1), self.num_values, torch.promote_types(like.dtype, torch.float32)
        )
        # The kernel is Pillow's with `antialias` only; where an image grows, that changes nothing else.
        enlarged = nn.functional.interpolate(
            values.mT.unflatten(2, self.small), self.large, mode="bicubic", antialias=True
        )
        rows, columns = self.order.place(torch.arange(math.prod(self.large), device=pixels.device))
        return enlarged[:, :, rows, columns].mT


def check_enlarged(predict_residual: bool, enlarged: torch.Tensor | None) -> None:
    """Raise ValueError if the enlarged image is missing, or is given to a model that predicts values themselves."""
    if predict_residual and enlarged is None:
        raise ValueError(
            "predict_residual=True needs the enlarged small image: use ImageTransformerForSuperResolution, with "
            "input_ids, or with encoder_outputs as its encoder returned them."
        )
    if not predict_residual and enlarged is not None:
        raise ValueError("enlarged is for models with predict_residual=True; this one predicts values themselves.")

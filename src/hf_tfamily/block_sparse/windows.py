"""Attention inside windows of a picture with a learned bias (Liu et al. 2021, arXiv:2103.14030, equation 4).

Shapes: B batch, L windows of N tokens each, H heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Attention inside windows, [B * L, N, H, D], of queries, keys and values [B * L, H, N, D].

    The bias and the softmax are in at least float32, and no mask is repeated for each picture.

    Args:
        bias: [H, N, N], added to the scaled scores.
        mask: [L, N, N] bool, True where a key is seen, as a window's own token always is; None if all are.
        dropout: of the attention weights.
    """
    bias = bias.to(torch.promote_types(query.dtype, torch.float32))
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None], torch.finfo(query.dtype).min)  # [L, H, N, N]
    with torch.autocast(query.device.type, enabled=False):  # types are what the projections gave
        products = query @ key.transpose(-1, -2)
        scores = torch.add(bias, products.view(-1, *bias.shape), alpha=scaling).view(products.shape)
        weights = F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout)
        return (weights @ value).transpose(1, 2)

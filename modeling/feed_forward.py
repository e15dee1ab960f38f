"""Feed-forward layers with a GELU between two linear layers; on a CPU some tokens at a time.

The wide states then stay in the processor's cache; and with gradients only those before the GELU are kept, which the
backward pass applies again.

Shapes: T tokens of width C, W the width in between.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .call_modes import is_plain_on_cpu
from .freed_memory import keep_freed_memory
from .linear_onednn import linear, linear_gelu, weight_gradient

WIDE = 2**23  # bytes of a layer at a time on a CPU


def feed_forward(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor) -> Tensor:
    """Linear layer, GELU, linear layer: [..., C] -> [..., C] for weights [W, C] and [C, W], biases [W] and [C]."""
    parameters = (weight_in, bias_in, weight_out, bias_out)
    learns = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, *parameters)]
    in_pieces = not torch.compiler.is_compiling() and is_plain_on_cpu(x, *parameters)
    if in_pieces and all(learns):
        return _FeedForward.apply(x.flatten(0, -2), *parameters).view(x.shape)
    if any(learns):
        return linear(F.gelu(linear(x, weight_in, bias_in)), weight_out, bias_out)
    parts = _split(x.flatten(0, -2), weight_in) if in_pieces else [x]
    return _join([linear(linear_gelu(part, weight_in, bias_in), weight_out, bias_out) for part in parts]).view(x.shape)


def _split(tokens: Tensor, weight_in: Tensor) -> Sequence[Tensor]:
    return tokens.split(max(1, WIDE // (len(weight_in) * tokens.element_size())))


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight_in, bias_in, weight_out, bias_out):
        keep_freed_memory()
        wide, outputs = [], []
        for part in _split(tokens, weight_in):
            wide.append(linear(part, weight_in, bias_in))
            outputs.append(linear(F.gelu(wide[-1]), weight_out, bias_out))
        ctx.save_for_backward(tokens, weight_in, bias_in, weight_out, *wide)
        return _join(outputs)

    @staticmethod
    def backward(ctx, gradient):
        tokens, weight_in, bias_in, weight_out, *wide = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives need to know where the wide states come from
            wide = [linear(part, weight_in, bias_in) for part in _split(tokens, weight_in)]
        parts = zip(_split(gradient, weight_in), _split(tokens, weight_in), wide)
        to_tokens, *to_parameters = zip(*(_gradients(*part, weight_in, weight_out) for part in parts))
        return _join(to_tokens), *(reduce(torch.add, parts) for parts in to_parameters)


def _gradients(gradient: Tensor, tokens: Tensor, wide: Tensor, weight_in: Tensor, weight_out: Tensor):
    """Of the tokens, and of the weight and the bias of either layer."""
    to_wide = torch.ops.aten.gelu_backward(linear(gradient, weight_out.t(), None), wide)
    return (
        linear(to_wide, weight_in.t(), None),
        weight_gradient(tokens, to_wide),
        to_wide.sum(0),
        weight_gradient(F.gelu(wide), gradient),
        gradient.sum(0),
    )

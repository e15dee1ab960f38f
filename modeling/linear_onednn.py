"""Linear layers by oneDNN, where PyTorch's own are slower.

In bfloat16 PyTorch calls it too, but writes the bias to memory first. In float32 it calls MKL, which is slow on AMD's
processors: there oneDNN takes a fifth to a third less time.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call_modes import is_plain_on_cpu


def _dtypes() -> tuple[torch.dtype, ...]:
    """Those that gain on this machine."""
    if not torch.backends.mkldnn.is_available():
        return ()
    file = Path("/proc/cpuinfo")
    is_amd = file.exists() and "AuthenticAMD" in file.read_text()
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32,) * is_amd + (torch.bfloat16,) * has_bfloat16


DTYPES = _dtypes()


class OneDNNLinear(nn.Linear):
    """nn.Linear, with the same parameters and results."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear: [..., C] -> [..., K] for a weight [K, C] and a bias [K]."""
    return _Linear.apply(x, weight, bias) if _gains(x, weight) else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of F.linear, without gradients: in one pass."""
    return _product(x, weight, bias, "gelu") if _gains(x, weight) else F.gelu(F.linear(x, weight, bias))


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient [K, C] of a weight, of inputs [M, C] and the gradient [M, K] of outputs.

    Long sums in float32, where MKL is slow, are those of a 1 x 1 convolution, oneDNN's fast way to them.
    """
    length, widths = len(x), (gradient.shape[1], x.shape[1])
    if x.dtype != torch.float32 or torch.float32 not in DTYPES or length < max(widths):
        return gradient.t() @ x
    gradient, pixels = (
        rows.view(1, 1, length, -1).permute(0, 3, 1, 2) for rows in (gradient.contiguous(), x.contiguous())
    )
    kernel = x.new_empty(1).expand(*widths, 1, 1)
    wants = [False, True, False]
    _, product, _ = torch.ops.aten.convolution_backward(
        gradient, pixels, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wants
    )
    return product.view(widths)


def _gains(x: Tensor, weight: Tensor) -> bool:
    return is_plain_on_cpu(x, weight) and x.dtype in DTYPES


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    call = torch.ops.hf_tfamily.onednn_linear if torch.compiler.is_compiling() else _onednn
    return call(x, weight, bias, activation)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none" if activation == "gelu" else "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            linear(gradient, weight.t(), None) if wants_x else None,
            weight_gradient(x.flatten(0, -2), rows) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _register() -> None:
    """For torch.compile, which takes oneDNN's own operator with constant weights only."""
    operator = torch.library.custom_op("hf_tfamily::onednn_linear", _onednn, mutates_args=())
    operator.register_fake(lambda x, weight, *_: x.new_empty((*x.shape[:-1], len(weight))))


# The operator is global to the process: a copy of this file, such as remote code, uses the one that is there.
if not hasattr(torch.ops.hf_tfamily, "onednn_linear"):
    _register()

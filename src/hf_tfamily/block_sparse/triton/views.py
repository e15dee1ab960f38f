"""Patterns that are dense attention on a view: handed to the best dense kernel that PyTorch has on a GPU.

    Full             the sequence as it is
    Strided(l)       [B, N, H, D] seen as [B, N/l, l*H, D]: each column is a sequence of its own
    FixedBlock(l)    [B, N, H, D] seen as [B*N/l, l, H, D]

Which kernel it is, is a choice of this file (`dense_kernel`), not of torch's dispatcher, so that it can be reported.
Legend: B batch, N tokens, H heads, Hk key heads, D head dimension.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...modeling.attention_patterns import Pattern
from ..parts import Extent

_CUDNN_AT_LEAST = 91501  # from here on torch itself prefers cuDNN on Hopper and Blackwell
aten = torch.ops.aten


class View(NamedTuple):
    """Rows of [B, N, H, D] as sequences: `columns` of every columns-th token, or blocks of `block` tokens."""

    kernel: str
    columns: int = 1
    block: int | None = None

    def apply(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> [B', H', N', D]; a view where the strides allow it."""
        if self.block:
            return x.reshape(-1, self.block, *x.shape[2:]).transpose(1, 2)
        return x.reshape(x.shape[0], -1, self.columns * x.shape[2], x.shape[3]).transpose(1, 2)

    def undo(self, x: Tensor, shape: torch.Size) -> Tensor:
        """[B', H', N', ...] -> [B, N, H, ...]."""
        return x.transpose(1, 2).reshape(*shape[:3], *x.shape[3:])


def view_of(pattern: Pattern, extent: Extent, query: Tensor, value: Tensor) -> View | None:
    """The view on which `pattern` is dense attention of queries and keys of one length; None if there is none."""
    kernel = dense_kernel(query, value)
    if kernel is None or extent.num_queries != extent.num_keys or extent.distance:
        return None
    columns = pattern.in_columns
    if columns is not None and columns.is_full and extent.num_queries % pattern.key_step == 0:
        return View(kernel, columns=pattern.key_step)
    own, span = pattern.interval(0), pattern.block_span(0)
    if span is not None and own == span:
        block = span[1] - span[0]
        if extent.num_queries % block == 0 and extent.first_query % block == 0:
            return View(kernel, block=block)
    return None


def dense_kernel(query: Tensor, value: Tensor) -> str | None:
    """The dense kernel for these tensors: "cudnn" or "flash"; None if none takes them."""
    dim = query.shape[3]
    if query.device.type != "cuda":
        return None
    if query.dtype == torch.float32 or dim != value.shape[3] or dim % 8 or dim > 128:
        return None
    hopper = torch.version.cuda is not None and torch.cuda.get_device_capability(query.device)[0] in (9, 10)
    return "cudnn" if hopper and (torch.backends.cudnn.version() or 0) >= _CUDNN_AT_LEAST else "flash"


def view_forward(
    view: View, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] and LSE [B, N, H]."""
    run = DENSE_KERNELS[view.kernel].forward
    output, lse = run(*(view.apply(x) for x in (query, key, value)), causal, scale)
    return view.undo(output, query.shape).contiguous(), view.undo(lse, query.shape).contiguous()


def view_backward(
    view: View,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    run = DENSE_KERNELS[view.kernel].backward
    inputs = [view.apply(x) for x in (grad_output, query, key, value, output)]
    lse = view.apply(lse[..., None])[..., 0].contiguous()
    grads = run(*inputs, lse, causal, scale)
    return tuple(view.undo(grad, x.shape).contiguous() for grad, x in zip(grads, (query, key, value)))


# ---------------------------------------------------------------------------------------------------------------------
# Dense kernels: attention of [B, H, N, D] over [B, Hk, N, D], with LSE [B, H, N]


class _DenseKernel(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _no_seed(query: Tensor) -> tuple[Tensor, Tensor]:
    """Seed and offset of a dropout that there is not."""
    return tuple(torch.empty((), dtype=torch.long, device=query.device) for _ in range(2))


def _flash_forward(query, key, value, causal, scale):
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[:2]


def _flash_backward(grad_output, query, key, value, output, lse, causal, scale):
    return aten._scaled_dot_product_flash_attention_backward(
        *(grad_output, query, key, value, output, lse),
        *(None, None, query.shape[2], key.shape[2], 0.0, causal),
        *_no_seed(query),
        scale=scale,
    )


def _cudnn_forward(query, key, value, causal, scale):
    key, value = _repeated(query, key, value)
    output, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return output, lse.reshape(query.shape[:3])


def _cudnn_backward(grad_output, query, key, value, output, lse, causal, scale):
    heads = key.shape[1]
    key, value = _repeated(query, key, value)
    grad_query, *grads = aten._scaled_dot_product_cudnn_attention_backward(
        *(grad_output, query, key, value, output, lse[..., None], *_no_seed(query)),
        *(None, None, None, query.shape[2], key.shape[2], 0.0, causal),
        scale=scale,
    )
    return grad_query, *(grad.unflatten(1, (heads, -1)).sum(2) for grad in grads)


def _repeated(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Key heads as many as query heads."""
    return [
        x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in tensors
    ]


DENSE_KERNELS = {
    "flash": _DenseKernel(_flash_forward, _flash_backward),
    "cudnn": _DenseKernel(_cudnn_forward, _cudnn_backward),
}

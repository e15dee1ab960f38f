"""Runs patterns with Triton kernels on NVIDIA GPUs: the implementation of the block-sparse operator for "cuda".

What layout.py and tables.py cut a pattern into is launched pass by pass; passes are
merged by log-sum-exp (LSE), and the backward drives each with the LSE of all. Patterns that are dense attention on a
view go to the best dense kernel instead (views.py). Triton itself is imported at the first call, so
that remote code loads, and other devices run, without it.

Legend: B batch, H heads, Hk key heads, T queries, S keys, D head dimension (Dv of values).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..cpu import NAMESPACE
from .call import Bias, Call, unit_stride
from .launch import Gradients, delta_of, launch_forward, launch_key_grad, launch_query_grad
from .views import view_backward, view_forward


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_valid: Tensor | None,
    pattern: str,
    causal: bool,
    scale: float,
    q_offset: int,
    kv_offset: int,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, Dv] and LSE [B, T, H]; the LSE is +inf where a query sees nothing.

    `bias` is added to the scaled scores. Otherwise as in cpu.py.
    """
    call = Call.of(query, key, value, key_valid, pattern, causal, scale, q_offset, kv_offset, bias)
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if not (query.shape[1] and key.shape[1]):
        return output.zero_(), lse.fill_(float("inf"))
    view = call.view
    if view is not None:
        return view_forward(view, call.query, call.key, call.value, causal, scale)
    for launches in call.launches:
        for number, launch in enumerate(launches):
            of_pass = None if bias is None else bias.of(launch)
            launch_forward(call, launch, of_pass, output, lse, number > 0, number == len(launches) - 1)
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_valid: Tensor | None,
    output: Tensor,
    lse: Tensor,
    pattern: str,
    causal: bool,
    scale: float,
    q_offset: int,
    kv_offset: int,
    grad_lse: Tensor | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the bias takes its own. The same sums in the same order each time.

    `grad_lse` [B, T, H], 0 where a query sees nothing, is the gradient of the LSE.
    """
    call = Call.of(query, key, value, key_valid, pattern, causal, scale, q_offset, kv_offset, bias)
    if not (query.shape[1] and key.shape[1]):
        return tuple(torch.zeros_like(x) for x in (query, key, value))
    grad_output = unit_stride(grad_output)
    view = call.view if grad_lse is None else None  # dense kernels take no gradient of the LSE
    if view is not None:
        return view_backward(view, grad_output, call.query, call.key, call.value, output, lse, causal, scale)
    delta = delta_of(grad_output, output)
    if grad_lse is not None:  # dS = P (dP - delta + dLSE)
        delta -= grad_lse
    grads = Gradients(call)
    for launches in call.launches:
        for number, launch in enumerate(launches):
            of_pass = None if bias is None else bias.of(launch)
            grad_bias = torch.zeros_like(of_pass) if bias is not None and bias.has_gradient else None
            launch_query_grad(call, launch, of_pass, grad_bias, grad_output, lse, delta, grads, number > 0)
            for source in getattr(launch, "sources", (None,)):
                launch_key_grad(call, launch, source, of_pass, grad_output, lse, delta, grads)
            if grad_bias is not None:
                bias.take_gradient(launch, grad_bias)
    return grads.finished()


def register_on(device: str) -> None:
    """Make this the operator's implementation on `device`."""
    register_kernels(f"{NAMESPACE}::attention", device, forward, backward)


def register_kernels(operator: str, device: str, forward: Callable, backward: Callable) -> None:
    """Of an operator and its backward, on `device`."""
    torch.library.register_kernel(operator, device, forward)
    torch.library.register_kernel(f"{operator}_backward", device, backward)

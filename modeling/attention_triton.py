"""Runs patterns with Triton kernels on NVIDIA GPUs: the implementation of the block-sparse operator for "cuda".

What attention_triton_layout.py and attention_triton_tables.py cut a pattern into is launched pass by pass; passes are
merged by log-sum-exp (LSE), and the backward drives each with the LSE of all. Patterns that are dense attention on a
view go to the best dense kernel instead (attention_triton_views.py). Triton itself is imported at the first call, so
that remote code loads, and other devices run, without it.

Legend: B batch, H heads, Hk key heads, T queries, S keys, D head dimension (Dv of values).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention_triton_launch import (
    Call,
    Gradients,
    delta_of,
    launch_forward,
    launch_key_grad,
    launch_query_grad,
    unit_stride,
)
from .attention_triton_views import view_backward, view_forward

_OPERATOR = "hf_tfamily::block_sparse_attention"


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
    biases: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, Dv] and LSE [B, T, H]; the LSE is +inf where a query sees nothing.

    `biases` holds one tensor [B or 1, H, T, distances] for each pass of `Call.launches`, added to the scaled scores:
    entry r is for the key r steps (of the pass's column) behind the query. Otherwise as in attention_torch.py.
    """
    call = Call.of(query, key, value, key_valid, pattern, causal, scale, q_offset, kv_offset, biases)
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if not (query.shape[1] and key.shape[1]):
        return output.zero_(), lse.fill_(float("inf"))
    view = call.view
    if view is not None:
        return view_forward(view, call.query, call.key, call.value, causal, scale)
    for launches in call.launches:
        for number, launch in enumerate(launches):
            launch_forward(call, launch, output, lse, number > 0, number == len(launches) - 1)
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
    biases: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, and of each bias. The same sums in the same order each time."""
    call = Call.of(query, key, value, key_valid, pattern, causal, scale, q_offset, kv_offset, biases)
    if not (query.shape[1] and key.shape[1]):
        return *(torch.zeros_like(x) for x in (query, key, value)), *(torch.zeros_like(bias) for bias in biases)
    grad_output = unit_stride(grad_output)
    view = call.view
    if view is not None:
        return view_backward(view, grad_output, call.query, call.key, call.value, output, lse, causal, scale)
    delta = delta_of(grad_output, output)
    grads = Gradients(call)
    for launches in call.launches:
        for number, launch in enumerate(launches):
            launch_query_grad(call, launch, grad_output, lse, delta, grads, number > 0)
            for source in getattr(launch, "sources", (None,)):
                launch_key_grad(call, launch, source, grad_output, lse, delta, grads)
    return grads.finished()


def register(device: str = "cuda") -> None:
    """Make this the operator's implementation on `device`, unless there is one (of another copy of this file)."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, device.upper()):
        torch.library.register_kernel(_OPERATOR, device, forward_operator)
        torch.library.register_kernel(f"{_OPERATOR}_backward", device, backward_operator)


def forward_operator(query, key, value, key_valid, pattern, causal, scale, q_offset, kv_offset):
    return forward(query, key, value, key_valid, pattern, causal, scale, q_offset, kv_offset)


def backward_operator(
    grad_output, query, key, value, key_valid, output, lse, pattern, causal, scale, q_offset, kv_offset
):
    return backward(grad_output, query, key, value, key_valid, output, lse, pattern, causal, scale, q_offset, kv_offset)

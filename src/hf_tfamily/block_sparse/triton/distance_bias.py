"""A bias by head and distance (distance_bias.py) in the Triton kernels: its implementation for "cuda".

Each pass gets the entries of the table for the distances that it reaches, [H, distances], as one bias of all queries.
The table's gradient takes the gradients of scores, [B, H, T, distances], of some queries at a time, and is left out
where nobody asks for it (ALiBi).

float64 and head dimensions above 256 are beyond the kernels and stay with PyTorch.
Legend: B batch, H heads, T queries, S keys, D head dimension, L distances of the table.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cpu import NAMESPACE
from ..distance_bias import _backward as pytorch_backward
from ..distance_bias import _forward as pytorch_forward
from ..distance_bias import columns_of
from .attention import backward as attention_backward
from .attention import forward as attention_forward
from .attention import register_kernels
from .call import kernels_take, pass_distances
from .layout import Pass
from .tables import TablePass

_SCORES = 1 << 26  # gradients of scores held at once: 256 MB
_LEAST_ROWS = 128


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    distances: Tensor,
    key_valid: Tensor | None,
    pattern: str,
    causal: bool,
    scale: float,
    q_offset: int,
    kv_offset: int,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, Dv] and LSE [B, T, H], as in distance_bias.py."""
    where = (key_valid, pattern, causal, scale, q_offset, kv_offset)
    if not kernels_take(query, value):
        return pytorch_forward(query, key, value, table, distances, *where)
    return attention_forward(query, key, value, *where, _TableBias(table, distances, query.shape))


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    distances: Tensor,
    key_valid: Tensor | None,
    output: Tensor,
    lse: Tensor,
    pattern: str,
    causal: bool,
    scale: float,
    q_offset: int,
    kv_offset: int,
    grad_lse: Tensor | None,
    of_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and table (of no elements unless `of_table`), as in distance_bias.py."""
    rest = (pattern, causal, scale)
    if not kernels_take(query, value):
        tensors = (grad_output, query, key, value, table, distances, key_valid, output, lse)
        return pytorch_backward(*tensors, *rest, q_offset, kv_offset, grad_lse, of_table)
    gradient = torch.zeros_like(table, dtype=torch.float32) if of_table else None
    of_queries, of_keys = [], []
    for rows in _rows(query, key) if of_table else (slice(0, query.shape[1]),):
        bias = _TableBias(table, distances, query[:, rows].shape, gradient)
        tensors = (query[:, rows], key, value, key_valid, output[:, rows], lse[:, rows].contiguous())
        of_lse = None if grad_lse is None else grad_lse[:, rows]
        where = (*rest, q_offset + rows.start, kv_offset, of_lse, bias)
        grad_query, *grads = attention_backward(grad_output[:, rows], *tensors, *where)
        of_queries.append(grad_query)
        of_keys = [total + x.float() for total, x in zip(of_keys, grads)] if of_keys else grads
    grads = (torch.cat(of_queries, 1), *of_keys)
    of_inputs = (grad.to(x.dtype).contiguous() for grad, x in zip(grads, (query, key, value)))
    return *of_inputs, table.new_empty(0) if gradient is None else gradient.to(table.dtype)


def register_on(device: str) -> None:
    """Make this the operator's implementation on `device`."""
    register_kernels(f"{NAMESPACE}::biased_attention", device, forward, backward)


def _rows(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Slices of the queries whose gradients of scores are held at once."""
    batch, length, heads, _ = query.shape
    held = _SCORES // (batch * heads * (length + key.shape[1]))
    at_once = max(_LEAST_ROWS, held // _LEAST_ROWS * _LEAST_ROWS)
    yield from (slice(start, min(start + at_once, length)) for start in range(0, max(length, 1), at_once))


class _TableBias:
    """The table's entries, as call.Bias.

    table: [H, L]; distances: [L] on the CPU; shape: of the queries; `gradient`: float32 [H, L], the table's is added.
    """

    def __init__(self, table: Tensor, distances: Tensor, shape: torch.Size, gradient: Tensor | None = None):
        self.table, self.distances, self.shape = table, distances, shape
        self.gradient, self.has_gradient = gradient, gradient is not None

    def of(self, launch: Pass | TablePass) -> Tensor:
        columns, _ = self._columns(launch)
        batch, length, heads, _ = self.shape
        bias = self.table.index_select(1, columns).float()[None, :, None].expand(batch, heads, length, -1)
        return bias.contiguous() if self.has_gradient else bias

    def take_gradient(self, launch: Pass | TablePass, gradient: Tensor) -> None:
        columns, listed = self._columns(launch)
        self.gradient.index_add_(1, columns[listed], gradient.sum((0, 2))[:, listed])

    def _columns(self, launch: Pass | TablePass) -> tuple[Tensor, Tensor]:
        """Columns of the table for the distances of a pass, any where it lists none; and which it lists."""
        wanted = torch.tensor(pass_distances(launch)) * getattr(launch, "step", 1)
        return tuple(x.to(self.table.device) for x in columns_of(self.distances, wanted))

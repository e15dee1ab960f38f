"""Attention with scores for distances (relative.py) by the Triton kernels: its implementation for "cuda".

Each pass gets its scores by distance, [B, H, T, distances that the pass reaches], as a bias, from one matrix product:
a window of w keys takes w numbers a query, the column of every l-th token one for l tokens of the past, and a pass
with summary positions or a table one for each token. Queries are taken in chunks, so that these numbers are never
more than `_SCORES`, however long the sequence.

float64 and head dimensions above 256 are beyond the kernels and stay with PyTorch.
Legend: B batch, H heads, T queries, S keys, D head dimension, L distances.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...modeling.attention_patterns import distances_met
from ...modeling.positions import rows_by_distance
from ..cpu import NAMESPACE
from ..patterns import from_text
from ..relative import _backward as pytorch_backward
from ..relative import _forward as pytorch_forward
from .attention import backward as attention_backward
from .attention import forward as attention_forward
from .attention import register_kernels
from .call import ROUNDED, kernels_take, pass_distances
from .layout import Pass, table_heads
from .tables import TablePass

_SCORES = 1 << 27  # scores of one pass held at once: 256 MB in half precision, twice that in the backward
_LEAST_ROWS = 128


def forward(
    query: Tensor,
    position_query: Tensor,
    key: Tensor,
    value: Tensor,
    relative_key: Tensor,
    distances: Tensor,
    key_valid: Tensor | None,
    pattern: str,
    scale: float,
    q_offset: int,
    kv_offset: int,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, D] and LSE [B, T, H, 1], as in relative.py."""
    if not kernels_take(query, value):
        arguments = (key_valid, pattern, scale, q_offset, kv_offset)
        return pytorch_forward(query, position_query, key, value, relative_key, distances, *arguments)
    outputs, lses = [], []
    for rows in _rows(query, distances, pattern, q_offset - kv_offset):
        bias = _RelativeBias(position_query[:, rows], relative_key, distances, scale)
        where = (pattern, True, scale, q_offset + rows.start, kv_offset)
        output, lse = attention_forward(query[:, rows], key, value, key_valid, *where, bias)
        outputs.append(output)
        lses.append(lse)
    return _joined(outputs), _joined(lses)[..., None]


def backward(
    grad_output: Tensor,
    query: Tensor,
    position_query: Tensor,
    key: Tensor,
    value: Tensor,
    relative_key: Tensor,
    distances: Tensor,
    key_valid: Tensor | None,
    output: Tensor,
    lse: Tensor,
    pattern: str,
    scale: float,
    q_offset: int,
    kv_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, position_query, key, value and relative_key, as in relative.py."""
    inputs = (query, position_query, key, value, relative_key)
    if not kernels_take(query, value):
        rest = (distances, key_valid, output, lse, pattern, scale, q_offset, kv_offset)
        return pytorch_backward(grad_output, *inputs, *rest)
    lse = lse[..., 0]
    grads, of_queries = [0, 0, torch.zeros_like(relative_key, dtype=torch.float32)], []
    chunks = list(_rows(query, distances, pattern, q_offset - kv_offset))
    for rows in chunks:
        bias = _RelativeBias(position_query[:, rows], relative_key, distances, scale, grads[2])
        where = (pattern, True, scale, q_offset + rows.start, kv_offset)
        tensors = (query[:, rows], key, value, key_valid, output[:, rows], lse[:, rows].contiguous())
        grad_query, *of_keys = attention_backward(grad_output[:, rows], *tensors, *where, bias=bias)
        of_queries.append((grad_query, bias.grad_position_query()))
        grads[:2] = of_keys if len(chunks) == 1 else [total + x.float() for total, x in zip(grads, of_keys)]
    grad_query, grad_position_query = (_joined(x) for x in zip(*of_queries))
    grads = (grad_query, grad_position_query, *grads)
    return tuple(grad.to(x.dtype).contiguous() for grad, x in zip(grads, inputs))


def register_on(device: str) -> None:
    """Make this the operator's implementation on `device`."""
    register_kernels(f"{NAMESPACE}::relative_attention", device, forward, backward)


def _joined(pieces: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _rows(query: Tensor, distances: Tensor, text: str, distance: int) -> Iterator[slice]:
    """Slices of the queries whose scores are held at once; `distance` is that of query 0 to key 0."""
    batch, length, heads, _ = query.shape
    reach = max(1, distance + length)
    pattern = from_text(text)
    met = distances_met(pattern, reach)
    _check_distances(distances, met)
    widest = reach if table_heads(pattern, heads) else len(met) + ROUNDED
    at_once = max(_LEAST_ROWS, _SCORES // (batch * heads * widest) // _LEAST_ROWS * _LEAST_ROWS)
    yield from (slice(start, min(start + at_once, length)) for start in range(0, max(length, 1), at_once))


def _check_distances(distances: Tensor, met: Tensor) -> None:
    known = torch.zeros(int(distances.max()) + 1, dtype=torch.bool)
    known[distances] = True
    missing = (met >= len(known)) | ~known[met.clamp(max=len(known) - 1)]
    if bool(missing.any()):
        raise ValueError(f"relative_key has no row for the distance {int(met[missing][0])}, which is met.")


class _RelativeBias:
    """scale * (position_query . relative_key of each distance), as call.Bias.

    position_query: [B, T, H, D]; relative_key: [H, L, D]; `gradient`: float32, that of relative_key is added to it.
    """

    def __init__(self, position_query, relative_key, distances, scale: float, gradient: Tensor | None = None):
        self.shape = position_query.shape
        self.position_query = position_query.permute(2, 0, 1, 3).flatten(1, 2)  # [H, B * T, D]
        self.relative_key, self.distances, self.scale = relative_key, distances, scale
        self.gradient, self.has_gradient = gradient, gradient is not None
        self.sum = None if gradient is None else torch.zeros_like(self.position_query, dtype=torch.float32)

    def of(self, launch: Pass | TablePass) -> Tensor:
        batch, length, num_heads, _ = self.shape
        relative_key = self.relative_key.index_select(1, self._rows(launch))  # [H, distances, D]
        scores = relative_key.new_empty(num_heads, batch * length, relative_key.shape[1])
        for heads in _heads(launch):
            query, key = self.position_query[heads], relative_key[heads].mT
            scores[heads] = torch.baddbmm(scores[heads], query, key, beta=0, alpha=self.scale)
        return scores.unflatten(1, (batch, length)).transpose(0, 1)

    def take_gradient(self, launch: Pass | TablePass, gradient: Tensor) -> None:
        rows = self._rows(launch)
        relative_key = self.relative_key.index_select(1, rows)
        gradient = gradient.transpose(0, 1).flatten(1, 2)  # [H, B * T, distances]
        for heads in _heads(launch):
            grad, query = gradient[heads], self.position_query[heads]
            self.sum[heads] += self.scale * torch.bmm(grad, relative_key[heads]).float()
            self.gradient[heads] = self.gradient[heads].index_add(
                1, rows, self.scale * torch.bmm(grad.mT, query).float()
            )

    def grad_position_query(self) -> Tensor:
        """[B, T, H, D] in float32."""
        return self.sum.unflatten(1, self.shape[:2]).permute(1, 2, 0, 3)

    def _rows(self, launch: Pass | TablePass) -> Tensor:
        """Rows of relative_key for the distances of a pass; any where the pattern never meets a distance."""
        wanted = torch.tensor(pass_distances(launch)) * getattr(launch, "step", 1)
        return rows_by_distance(self.distances, wanted).to(self.relative_key.device)


def _heads(launch: Pass | TablePass) -> list[slice]:
    """The heads of a pass."""
    if len(launch.heads) == launch.period:
        return [slice(None)]
    return [slice(head, None, launch.period) for head in launch.heads]

"""Attention whose scores know the distance from query to key (Dai et al. 2019, arXiv:1901.02860, section 3.3), run
through a plan whose parts score the distances that they can meet and no others (relative_plan.py).

Parts are merged by their log-sum-exp (LSE), and the backward drives each with the global LSE, as in cpu.py;
here all of it is in matrix products (products.py), because the gradient of the scores themselves is needed.
All is computed in at least float32.

Legend: B batch, H heads, T queries, S keys, D head dimension, L distances; of one part: A tiles, I queries and J keys
of a tile, U distances that it meets; G tiles, batch entries or heads taken together.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..modeling.attention_patterns import Pattern
from .cpu import NAMESPACE, OPERATORS
from .parts import Group, Part
from .patterns import from_text, to_text
from .products import (
    LOG2_E,
    MASKED,
    Extra,
    Keys,
    Piece,
    ScoreMemory,
    Space,
    Work,
    additive,
    backward_part,
    causal_bias,
    forward_part,
    of_piece,
    pieces,
    put,
    scaled_delta,
    wide,
)
from .relative_plan import EvenPart, ListedPart, RelativePlan, plan_relative_attention

_EMPTY_ROW = -1e29


def relative_attention(
    query: Tensor,
    position_query: Tensor,
    key: Tensor,
    value: Tensor,
    relative_key: Tensor,
    distances: Tensor,
    pattern: Pattern,
    *,
    scale: float,
    q_offset: int,
    kv_offset: int = 0,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Causal attention by scale * (query . key + position_query . relative_key of the distance), never T x S at once.

    Args:
        query, position_query: [B, T, H, D]; key, value: [B, S, H, D]; all of one dtype, any strides.
        relative_key: [H, L, D], row r for the distance `distances[r]`; all that the pattern can meet must be there.
        distances: [L] on the CPU, each at least 0.
        pattern, q_offset, kv_offset, key_valid: as in cpu.block_sparse_attention.

    Returns [B, T, H, D]. A query that sees no key gets 0, and gives gradient 0. Can be differentiated once.
    """
    _check(query, position_query, key, value, relative_key, distances, key_valid)
    repeats = pattern.period  # as near to 0 as may be, so that segment after segment has the same plan
    start = 0 if repeats is None else kv_offset // repeats * repeats
    output, _ = OPERATORS.relative_attention(
        query,
        position_query,
        key,
        value,
        relative_key,
        distances,
        key_valid,
        to_text(pattern),
        scale,
        q_offset - start,
        kv_offset - start,
    )
    return output


def _check(query, position_query, key, value, relative_key, distances, key_valid) -> None:
    batch, _, heads, dim = query.shape
    wanted = {
        "position_query": (position_query, tuple(query.shape)),
        "key": (key, (batch, key.shape[1], heads, dim)),
        "value": (value, (batch, key.shape[1], heads, dim)),
        "relative_key": (relative_key, (heads, distances.shape[0], dim)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} must have shape {shape} and the dtype of query ({query.dtype}), "
                f"got {tuple(tensor.shape)} and {tensor.dtype}."
            )
    if key_valid is not None and (key_valid.dtype != torch.bool or key_valid.shape != key.shape[:2]):
        raise ValueError(
            f"key_valid must be bool {tuple(key.shape[:2])}, got {key_valid.dtype} {tuple(key_valid.shape)}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# A whole call


def _forward(
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
    """Output [B, T, H, D] and LSE [B, T, H, 1] in base 2, which is +inf where a query sees nothing."""
    plan = _plan(query, key, pattern, q_offset, kv_offset)
    q, pq, k, v = (_widen(x) for x in (query, position_query, key, value))
    table = _Table(_widen(relative_key), distances)
    output, lse = q.new_empty(q.shape), q.new_empty((*q.shape[:3], 1))
    if not plan.complete:
        output.zero_()
        lse.fill_(MASKED)
    space = Space(q)
    for group in plan.groups:
        keys = Keys(group.keys, k, key_valid)
        group_q, group_pq, *results = (x[:, :, keys.heads] for x in (q, pq, output, lse))
        work = Work(group_q, keys.pick(k), keys.pick(v), results[1], scale, space, output=results[0])
        for relative in group.parts:
            scores = SCORES[type(relative)](relative, group.keys, work, group_pq, table)
            forward_part(relative.part, work, _extra(relative.part, keys, scores))
    empty = lse < _EMPTY_ROW
    if empty.any():
        output.masked_fill_(empty, 0)
        lse.masked_fill_(empty, float("inf"))
    return output.to(query.dtype), lse


def _backward(
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
    """Gradients of query, position_query, key, value and relative_key."""
    plan = _plan(query, key, pattern, q_offset, kv_offset)
    q, pq, k, v, grad_out = (_widen(x) for x in (query, position_query, key, value, grad_output))
    delta = scaled_delta(grad_out, output, scale)
    table, space = _Table(_widen(relative_key), distances, with_gradient=True), Space(q)
    grad_q, grad_pq = (q.new_empty(q.shape) if plan.complete else q.new_zeros(q.shape) for _ in range(2))
    grad_k, grad_v = (k.new_empty(k.shape) if plan.complete_keys else k.new_zeros(k.shape) for _ in range(2))
    for group in plan.groups:
        keys = Keys(group.keys, k, key_valid)
        picked = [keys.pick_zeros(x) for x in (grad_k, grad_v)]
        of_queries = [x[:, :, keys.heads] for x in (q, lse, grad_out, delta, grad_q, pq, grad_pq)]
        group_q, group_lse, *of_queries, group_pq, group_grad_pq = of_queries
        work = Work(group_q, keys.pick(k), keys.pick(v), group_lse, scale, space, None, *of_queries, *picked)
        for relative in group.parts:
            scores = SCORES[type(relative)](relative, group.keys, work, group_pq, table, group_grad_pq)
            backward_part(relative.part, work, _extra(relative.part, keys, scores))
        keys.put_back(grad_k, picked[0])
        keys.put_back(grad_v, picked[1])
    grads = (x.to(query.dtype) for x in (grad_q, grad_pq, grad_k, grad_v))
    return *grads, table.gradient.to(relative_key.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def _extra(part: Part, keys: Keys, scores: "_PartScores") -> Extra:
    like = scores.position_query
    hidden = None if keys.hidden is None else keys.hidden.expand(-1, -1, like.shape[2])[..., None]
    return Extra([causal_bias(part, like, like.dtype)] if part.causal else [], hidden, scores)


def _plan(query: Tensor, key: Tensor, pattern: str, q_offset: int, kv_offset: int) -> RelativePlan:
    return plan_relative_attention(
        from_text(pattern),
        query.shape[1],
        key.shape[1],
        num_heads=query.shape[2],
        first_query=q_offset,
        first_key=kv_offset,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Scores of distances


class _Table:
    """The relative keys [H, L, D] by their distance, and the sum of their gradients."""

    def __init__(self, relative_key: Tensor, distances: Tensor, *, with_gradient: bool = False):
        self.relative_key = relative_key
        self.gradient = relative_key.new_zeros(relative_key.shape) if with_gradient else None
        self.distances = distances.long().numpy().tobytes()  # by value, to look up only what was not before

    def rows(self, distances: Tensor) -> Tensor:
        """Rows of the table for distances of any shape, all of which must be there."""
        return _rows(self.distances, distances).to(self.relative_key.device)

    def of_part(self, relative: EvenPart, heads: slice) -> tuple[Tensor, Tensor]:
        """The rows [U] for the distances of a part, and the relative keys there, [heads, U, D]: if they can, a view."""
        rows, run = _rows_of_part(self.distances, relative)
        rows, relative_key = rows.to(self.relative_key.device), self.relative_key[heads]
        return rows, relative_key.index_select(1, rows) if run is None else relative_key[:, run]


@lru_cache(maxsize=64)
def _row_of(distances: bytes) -> Tensor:
    """The row of each distance, -1 where there is none."""
    with torch.inference_mode(False):
        distances = torch.frombuffer(bytearray(distances), dtype=torch.long)
        rows = torch.full((int(distances.max()) + 1,), -1)
        rows[distances] = torch.arange(len(distances))
        return rows


def _rows(table: bytes, distances: Tensor) -> Tensor:
    row_of = _row_of(table)
    missing = distances >= len(row_of)
    rows = row_of[distances.masked_fill(missing, 0)]
    missing = missing | (rows < 0)
    if bool(missing.any()):
        raise ValueError(f"relative_key has no row for the distance {int(distances[missing][0])}, which is met.")
    return rows


@lru_cache(maxsize=64)
def _rows_of_part(table: bytes, relative: EvenPart) -> tuple[Tensor, slice | None]:
    """The rows of a part, and the slice that they are, if they follow each other."""
    with torch.inference_mode(False):
        rows = _rows(table, relative.distances)
        first, end = int(rows[0]), int(rows[0]) + len(rows)
        return rows, slice(first, end) if torch.equal(rows, torch.arange(first, end)) else None


class _PartScores:
    """Scores of the distances that a part meets, and the gradients of what they are made of.

    `position_query` and `gradient`, which may be missing, are [B, T, H, D] of the heads of the part's group.
    """

    def __init__(
        self,
        relative: EvenPart | ListedPart,
        group: Group,
        work: Work,
        position_query: Tensor,
        table: _Table,
        gradient: Tensor | None = None,
    ):
        self.part, self.table, self.factor, self.space = relative.part, table, work.scale * LOG2_E, work.space
        self.heads = slice(group.heads.start, group.heads.stop, group.heads.step)
        self.position_query, self.gradient = position_query, gradient
        self.read = None  # the piece read last, and its position queries
        self.largest = max(piece.count for piece in pieces(self.part, work.q, work.k, backward=gradient is not None))
        self.mask = None if relative.mask is None else additive(~self._of_group(relative.mask), position_query.dtype)

    def _of_group(self, x: Tensor) -> Tensor:
        """[A or 1, H or 1, ...] of the heads of the group."""
        x = x.to(self.position_query.device)
        return x if x.shape[1] == 1 else x[:, self.heads]

    def _rows(self, piece: Piece, matrices: int) -> Tensor:
        """The position queries of a piece, [heads or tiles, queries, D]: all that meet the same relative keys."""
        if self.read is None or self.read[0] is not piece:
            self.read = piece, self.space.read("position_query", self.position_query, self.part.queries, piece)
        rows = self.read[1]
        return rows.reshape(matrices, -1, rows.shape[2])

    def _add(self, grad: Tensor, relative_key: Tensor, piece: Piece) -> None:
        """Take in the gradient of the position queries of a piece."""
        gradient = self.space.take("of queries", *grad.shape[:2], relative_key.shape[2])
        put(self.gradient, torch.bmm(grad, relative_key, out=gradient), self.part, piece)


class _EvenScores(_PartScores):
    """Those of an EvenPart. What nobody sees gets a huge negative score, but for what causality hides."""

    def __init__(self, relative: EvenPart, *arguments):
        super().__init__(relative, *arguments)
        self.rows, self.relative_key = self.table.of_part(relative, self.heads)
        self.met = range(relative.first, relative.first + len(self.rows))
        self.holes = relative.holes.to(self.rows.device) - relative.first
        self.pitch = max(self.part.keys.count, self.met[-1])  # then no entry by key is one of another row's by distance
        if not self.part.causal:
            self.pitch = max(self.pitch, relative.columns - 1 - self.met[0])
        self.memory = ScoreMemory(self.space, "scores by distance", self.part, self.largest, self.pitch, fill=MASKED)

    def by_key(self, piece: Piece) -> Tensor:
        """[G, I, J] in base 2"""
        relative_key = self.relative_key[piece.heads.start : piece.heads.stop]
        scores = self.memory.by_distance(piece.count, relative_key.shape[0], self.met)
        rows = self._rows(piece, relative_key.shape[0])
        scores.baddbmm_(rows, relative_key.mT, beta=0, alpha=self.factor)
        if self.holes.numel():
            scores.index_fill_(-1, self.holes, MASKED)
        scores = self.memory.by_key(piece.count)
        return scores if self.mask is None else scores + of_piece(self.mask, piece)

    def backward(self, grad_scores: ScoreMemory, piece: Piece) -> None:
        heads = slice(piece.heads.start, piece.heads.stop)
        relative_key = self.relative_key[heads]
        grad = grad_scores.by_distance(piece.count, len(relative_key), self.met)
        grad_key = torch.bmm(grad.mT, self._rows(piece, len(relative_key)))
        self.table.gradient[self.heads][heads].index_add_(1, self.rows, grad_key)
        self._add(grad, relative_key, piece)


class _ListedScores(_PartScores):
    """Those of a ListedPart."""

    pitch = 0  # any

    def __init__(self, relative: ListedPart, *arguments):
        super().__init__(relative, *arguments)
        self.distances, self.shift, self.column = map(
            self._of_group, (relative.distances, relative.shift, relative.column)
        )

    def by_key(self, piece: Piece) -> Tensor:
        """[G, I, J] in base 2"""
        relative_key = self.table.relative_key[self._index(piece)] * self.factor
        scores = torch.bmm(self._rows(piece, len(relative_key)), relative_key.mT)
        scores = scores.view(piece.count, self.part.queries.count, -1)
        bias = scores.gather(2, self._column(piece))
        return bias if self.mask is None else bias.add_(of_piece(self.mask, piece))

    def backward(self, grad_scores: ScoreMemory, piece: Piece) -> None:
        index = self._index(piece)
        relative_key = self.table.relative_key[index]
        grad = relative_key.new_zeros(piece.count, self.part.queries.count, relative_key.shape[1])
        grad.scatter_add_(2, self._column(piece), grad_scores.by_key(piece.count))
        grad = grad.view(len(relative_key), -1, relative_key.shape[1])
        grad_key = torch.bmm(grad.mT, self._rows(piece, len(relative_key)))
        self.table.gradient.index_put_(index, grad_key, accumulate=True)
        self._add(grad, relative_key, piece)

    def _index(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """(head, row) of the relative keys of each list, [heads or tiles, U]."""
        one = piece._replace(batch=range(1))
        rows = self.table.rows((of_piece(self.distances, one) + of_piece(self.shift, one)).cpu())
        heads = torch.arange(len(self.table.relative_key))[self.heads][piece.heads.start : piece.heads.stop, None]
        return torch.broadcast_tensors(heads.to(rows.device), rows)

    def _column(self, piece: Piece) -> Tensor:
        return of_piece(self.column, piece).expand(piece.count, -1, -1)


SCORES = {EvenPart: _EvenScores, ListedPart: _ListedScores}


# ---------------------------------------------------------------------------------------------------------------------
# The operator, so that torch.compile and torch.export see one node


def _forward_fake(query, position_query, key, value, relative_key, distances, *_):
    batch, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, length, heads, 1), dtype=wide(query.dtype))


def _backward_fake(grad_output, query, position_query, key, value, relative_key, *_):
    return tuple(x.new_empty(x.shape) for x in (query, position_query, key, value, relative_key))


def _save_for_backward(ctx, inputs, output):
    *tensors, pattern, scale, q_offset, kv_offset = inputs
    ctx.rest = pattern, scale, q_offset, kv_offset
    ctx.save_for_backward(*tensors, *output)


def _autograd_backward(ctx, grad_output, _grad_lse):
    grads = OPERATORS.relative_attention_backward(grad_output, *ctx.saved_tensors, *ctx.rest)
    return *grads, *[None] * 6


def register_operators() -> None:
    forward = torch.library.custom_op(f"{NAMESPACE}::relative_attention", _forward, mutates_args=())
    forward.register_fake(_forward_fake)
    forward.register_autograd(_autograd_backward, setup_context=_save_for_backward)
    backward = torch.library.custom_op(f"{NAMESPACE}::relative_attention_backward", _backward, mutates_args=())
    backward.register_fake(_backward_fake)

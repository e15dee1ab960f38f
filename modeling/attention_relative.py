"""Attention whose scores know the distance from query to key (Dai et al. 2019, arXiv:1901.02860, section 3.3), run
through a plan whose parts score the distances that they can meet and no others (attention_relative_plan.py).

Parts are merged by their log-sum-exp (LSE), and the backward drives each with the global LSE, as in attention_torch.py;
here it is written out in matrix products, because the gradient of the scores themselves is needed. All is computed in
at least float32.

Legend: B batch, H heads, T queries, S keys, D head dimension, L distances; of one part: A tiles, I queries and J keys
of a tile, U distances that it meets; G tiles, batch entries or heads taken together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_patterns import Pattern
from .attention_plan import Group, Part, Tokens
from .attention_relative_plan import EvenPart, ListedPart, RelativePlan, period, plan_relative_attention
from .attention_torch import _from_json, _to_json

_MASKED = -1e30  # not -inf: a row without keys then keeps a finite LSE, far below any real one
_EMPTY_ROW = -1e29
_PIECE = 1 << 18  # scores taken together: few enough to stay in the processor's cache


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
        pattern, q_offset, kv_offset, key_valid: as in attention_torch.block_sparse_attention.

    Returns [B, T, H, D]. A query that sees no key gets 0, and gives gradient 0. Can be differentiated once.
    """
    _check(query, position_query, key, value, relative_key, distances, key_valid)
    repeats = period(pattern)  # as near to 0 as may be, so that segment after segment has the same plan
    start = 0 if repeats is None else kv_offset // repeats * repeats
    output, _ = torch.ops.hf_tfamily.relative_attention(
        query,
        position_query,
        key,
        value,
        relative_key,
        distances,
        key_valid,
        _to_json(pattern),
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
# A whole call. Inside, tensors are contiguous [H, B, N, D], so that heads, batch entries and tiles lie evenly.


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
    """Output [B, T, H, D] and LSE [H, B, T, 1]; the LSE is +inf where a query sees nothing."""
    plan = _plan(query, key, pattern, q_offset, kv_offset)
    q, pq, k, v = (_lay_out(x) for x in (query, position_query, key, value))
    table = _Table(relative_key.to(q.dtype) * scale, distances)
    output, lse = torch.empty_like(q), q.new_empty((*q.shape[:3], 1))
    if not plan.complete:
        output.zero_()
        lse.fill_(_MASKED)
    kernel = _flash if q.device.type == "cpu" else _plain
    for group in plan.groups:
        keys = _Keys(group.keys, key_valid, k)
        group_k, group_v = keys.pick(k), keys.pick(v)
        for relative in group.parts:
            part, scores = relative.part, SCORES[type(relative)](relative, table)
            for piece in _pieces(group.keys.heads, q.shape[1], part):
                bias = keys.hide(scores.by_key(_view(pq, part.queries, piece), piece), part.keys, piece)
                tiles = (_view(q, part.queries, piece), *(_view(x, part.keys, piece) for x in (group_k, group_v)))
                part_out, part_lse = kernel(*tiles, bias, scale)
                out, tile_lse = (_view(x, part.queries, piece) for x in (output, lse))
                if part.writes:
                    out.copy_(part_out)
                    tile_lse.copy_(part_lse)
                else:
                    out.lerp_(part_out, torch.sigmoid(part_lse - tile_lse))
                    tile_lse.copy_(torch.logaddexp(tile_lse, part_lse))
    empty = lse < _EMPTY_ROW
    output.masked_fill_(empty, 0)
    lse.masked_fill_(empty, float("inf"))
    return _lay_back(output, query.dtype), lse


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
    q, pq, k, v, grad_out, out = (_lay_out(x) for x in (query, position_query, key, value, grad_output, output))
    delta = (grad_out * out).sum(-1, keepdim=True)
    table = _Table(relative_key.to(q.dtype) * scale, distances)
    grad_q, grad_pq, grad_k, grad_v = (torch.zeros_like(x) for x in (q, pq, k, v))
    for group in plan.groups:
        keys = _Keys(group.keys, key_valid, k)
        group_k, group_v = keys.pick(k), keys.pick(v)
        group_grad_k, group_grad_v = keys.pick_zeros(grad_k), keys.pick_zeros(grad_v)
        for relative in group.parts:
            part, scores = relative.part, SCORES[type(relative)](relative, table)
            for piece in _pieces(group.keys.heads, q.shape[1], part):
                tile_q, tile_pq, tile_out, tile_delta, tile_lse = (
                    _view(x, part.queries, piece) for x in (q, pq, grad_out, delta, lse)
                )
                tile_k, tile_v = (_view(x, part.keys, piece) for x in (group_k, group_v))
                bias = keys.hide(scores.by_key(tile_pq, piece), part.keys, piece)
                weights = torch.baddbmm(bias, tile_q, tile_k.mT, alpha=scale).sub_(tile_lse).exp_()
                grad_scores = torch.bmm(tile_out, tile_v.mT).sub_(tile_delta).mul_(weights)
                _view(grad_q, part.queries, piece).baddbmm_(grad_scores, tile_k, alpha=scale)
                _view(grad_pq, part.queries, piece).add_(scores.backward(tile_pq, grad_scores, piece))
                _add_tiles(group_grad_k, torch.bmm(grad_scores.mT, tile_q).mul_(scale), part.keys, piece)
                _add_tiles(group_grad_v, torch.bmm(weights.mT, tile_out), part.keys, piece)
        keys.put_back(grad_k, group_grad_k)
        keys.put_back(grad_v, group_grad_v)
    grads = (_lay_back(x, query.dtype) for x in (grad_q, grad_pq, grad_k, grad_v))
    return *grads, (table.gradient * scale).to(relative_key.dtype)


def _lay_out(x: Tensor) -> Tensor:
    """[B, N, H, D] -> contiguous [H, B, N, D] in at least float32."""
    return x.permute(2, 0, 1, 3).to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _lay_back(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[H, B, N, D] -> [B, N, H, D]."""
    return x.permute(1, 2, 0, 3).to(dtype).contiguous()


def _plan(query: Tensor, key: Tensor, pattern: str, q_offset: int, kv_offset: int) -> RelativePlan:
    return plan_relative_attention(
        _from_json(pattern),
        query.shape[1],
        key.shape[1],
        num_heads=query.shape[2],
        first_query=q_offset,
        first_key=kv_offset,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pieces: what is taken together


class _Piece(NamedTuple):
    """Either one tile of several heads and all batch entries, or of one head several batch entries or tiles."""

    heads: range
    batch: range
    tiles: range

    @property
    def count(self) -> int:
        return len(self.heads) * len(self.batch) * len(self.tiles)


def _pieces(heads: range, batch: int, part: Part) -> Iterator[_Piece]:
    at_once = max(1, _PIECE // (part.queries.count * part.keys.count))
    together = len(heads) * batch
    if heads.step == 1 and part.tiles <= together <= at_once:
        yield from (_Piece(heads, range(batch), range(tile, tile + 1)) for tile in range(part.tiles))
        return
    for head in heads:
        head = range(head, head + 1)
        if batch > part.tiles:
            for tile in range(part.tiles):
                entries = (range(batch)[start : start + at_once] for start in range(0, batch, at_once))
                yield from (_Piece(head, some, range(tile, tile + 1)) for some in entries)
        else:
            for entry in range(batch):
                tiles = (range(part.tiles)[start : start + at_once] for start in range(0, part.tiles, at_once))
                yield from (_Piece(head, range(entry, entry + 1), some) for some in tiles)


def _view(x: Tensor, tokens: Tokens, piece: _Piece) -> Tensor:
    """[G, tokens of a tile, D] of a tensor [H, B, N, D], overlapping where the tiles do."""
    _, num_entries, length, token = x.shape
    entry = length * token  # not x.stride(1), which may be anything where there is one entry
    head = num_entries * entry
    step = tokens.step * token if len(piece.tiles) > 1 else entry
    first = piece.heads.start * head + piece.batch.start * entry
    first += (tokens.start + piece.tiles.start * tokens.step) * token
    return x.as_strided((piece.count, tokens.count, token), (step, tokens.stride * token, 1), first)


def _add_tiles(total: Tensor, part: Tensor, tokens: Tokens, piece: _Piece) -> None:
    """Add key tiles [G, J, D] to [H, B, N, D], where the tokens of neighbouring tiles may be the same."""
    if len(piece.tiles) > 1 and tokens.step == 0:
        part, piece = part.sum(0, keepdim=True), piece._replace(tiles=piece.tiles[:1])
    view = _view(total, tokens, piece)
    overlap = len(piece.tiles) > 1 and tokens.stride == 1 and 0 < tokens.step < tokens.count
    width = tokens.step if overlap else tokens.count
    for start in range(0, tokens.count, width):  # in tokens that are not yet shared
        view[:, start : start + width].add_(part[:, start : start + width])


def _of_piece(x: Tensor, piece: _Piece) -> Tensor:
    """From [A or 1, H or 1, ...] what belongs to a piece: [G or 1, ...]."""
    if len(piece.heads) > 1:
        x = x[piece.tiles.start if len(x) > 1 else 0]
        return x.repeat_interleave(len(piece.batch), 0) if len(x) > 1 else x
    tiles = slice(piece.tiles.start, piece.tiles.stop) if len(x) > 1 else slice(1)
    return x[tiles, piece.heads.start if x.shape[1] > 1 else 0]


class _Keys:
    """The keys of a group, the sequence or those picked by its index, as [H, B, J, D]; and which of them are hidden."""

    def __init__(self, group: Group, key_valid: Tensor | None, key: Tensor) -> None:
        self.index = None if group.index is None else self._by_head(group.index, group, key)
        hidden = None if key_valid is None else ~key_valid.expand(len(key), *key_valid.shape)
        if hidden is not None and self.index is not None:
            hidden = hidden.gather(2, self.index[:, None].expand(-1, hidden.shape[1], -1))
        if group.absent is not None:
            absent = self._by_head(group.absent, group, key)[:, None].expand(-1, key.shape[1], -1)
            hidden = absent if hidden is None else hidden | absent
        self.hidden = None if hidden is None else _additive(hidden[..., None], key.dtype)

    @staticmethod
    def _by_head(x: Tensor, group: Group, key: Tensor) -> Tensor:
        """[keys] or [keys, heads of the group] -> [H, keys]; heads of other groups get something or other."""
        by_head = x.view(len(x), -1).T.to(key.device)
        if len(by_head) == 1:
            return by_head.expand(len(key), -1).contiguous()
        spread = by_head.new_zeros(len(key), len(x))
        spread[group.heads.start : group.heads.stop : group.heads.step] = by_head
        return spread

    def pick(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.gather(2, self._expanded(x))

    def pick_zeros(self, grad: Tensor) -> Tensor:
        """Where the gradient of what was picked is summed up."""
        return grad if self.index is None else grad.new_zeros((*grad.shape[:2], self.index.shape[1], grad.shape[3]))

    def put_back(self, grad: Tensor, picked: Tensor) -> None:
        """Add the gradient of what was picked to that of the sequence."""
        if self.index is not None:
            grad.scatter_add_(2, self._expanded(grad), picked)

    def hide(self, bias: Tensor, tokens: Tokens, piece: _Piece) -> Tensor:
        """Scores [G, I, J] with those of hidden keys far below all others."""
        return bias if self.hidden is None else bias + _view(self.hidden, tokens, piece).mT

    def _expanded(self, x: Tensor) -> Tensor:
        return self.index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A huge negative number where `hidden`, 0 elsewhere."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, _MASKED)


# ---------------------------------------------------------------------------------------------------------------------
# Scores of distances


class _Table:
    """The scaled relative keys [H, L, D] by their distance, and the sum of their gradients."""

    def __init__(self, relative_key: Tensor, distances: Tensor):
        self.relative_key = relative_key
        self.gradient = torch.zeros_like(relative_key)
        self.row_of = torch.full((int(distances.max()) + 1,), -1)
        self.row_of[distances] = torch.arange(len(distances))

    def rows(self, distances: Tensor) -> Tensor:
        """Rows of the table for distances of any shape, all of which must be there."""
        missing = distances >= len(self.row_of)
        rows = self.row_of[distances.masked_fill(missing, 0)]
        missing = missing | (rows < 0)
        if bool(missing.any()):
            raise ValueError(f"relative_key has no row for the distance {int(distances[missing][0])}, which is met.")
        return rows.to(self.relative_key.device)


class _EvenScores:
    """Those of an EvenPart. What nobody sees gets a huge negative score."""

    def __init__(self, relative: EvenPart, table: _Table):
        self.table = table
        self.rows = table.rows(relative.distances)
        self.relative_key = table.relative_key.index_select(1, self.rows)
        self.columns = relative.columns
        self.met = slice(relative.first, relative.first + len(self.rows))
        self.holes = relative.holes.to(self.rows.device)
        self.mask = _mask(relative.mask, self.relative_key)
        self.shape = relative.part.queries.count, relative.part.keys.count

    def by_key(self, position_query: Tensor, piece: _Piece) -> Tensor:
        """[G, I, J] from position queries [G, I, D]."""
        scores = position_query.new_empty(*position_query.shape[:2], self.columns)
        scores[..., : self.met.start] = _MASKED
        scores[..., self.met.stop :] = _MASKED
        relative_key = self.relative_key[piece.heads.start : piece.heads.stop]
        by_head = scores.view(len(relative_key), -1, self.columns)[..., self.met]
        torch.bmm(_rows(position_query, relative_key), relative_key.mT, out=by_head)
        if len(self.holes):
            scores.index_fill_(-1, self.holes, _MASKED)
        bias = self._view(scores)
        return bias if self.mask is None else bias + _of_piece(self.mask, piece)

    def backward(self, position_query: Tensor, grad_scores: Tensor, piece: _Piece) -> Tensor:
        """The gradient of position queries [G, I, D]; that of the relative keys is added up in the table."""
        heads = slice(piece.heads.start, piece.heads.stop)
        grad = grad_scores.new_zeros(*grad_scores.shape[:2], self.columns)
        self._view(grad).copy_(grad_scores)
        relative_key = self.relative_key[heads]
        grad = grad.view(len(relative_key), -1, self.columns)[..., self.met]
        grad_key = torch.bmm(grad.mT, _rows(position_query, relative_key))
        self.table.gradient[heads].index_add_(1, self.rows, grad_key)
        return torch.bmm(grad, relative_key).view_as(position_query)

    def _view(self, scores: Tensor) -> Tensor:
        """[G, I, columns] by distance as [G, I, J] by key."""
        num_queries, num_keys = self.shape
        strides = (num_queries * self.columns, self.columns - 1, 1)
        return scores.as_strided((len(scores), num_queries, num_keys), strides, num_queries - 1)


class _ListedScores:
    """Those of a ListedPart."""

    def __init__(self, relative: ListedPart, table: _Table):
        self.table = table
        self.distances, self.shift = relative.distances, relative.shift
        self.column = relative.column.to(table.relative_key.device)
        self.mask = _mask(relative.mask, table.relative_key)

    def by_key(self, position_query: Tensor, piece: _Piece) -> Tensor:
        """[G, I, J] from position queries [G, I, D]."""
        relative_key = self.table.relative_key[self._index(piece)]
        scores = torch.bmm(_rows(position_query, relative_key), relative_key.mT)
        scores = scores.view(*position_query.shape[:2], -1)
        bias = scores.gather(2, self._column(scores, piece))
        return bias if self.mask is None else bias + _of_piece(self.mask, piece)

    def backward(self, position_query: Tensor, grad_scores: Tensor, piece: _Piece) -> Tensor:
        """The gradient of position queries [G, I, D]; that of the relative keys is added up in the table."""
        index = self._index(piece)
        relative_key = self.table.relative_key[index]
        grad = grad_scores.new_zeros(*grad_scores.shape[:2], relative_key.shape[1])
        grad.scatter_add_(2, self._column(grad, piece), grad_scores)
        grad = grad.view(len(relative_key), -1, relative_key.shape[1])
        grad_key = torch.bmm(grad.mT, _rows(position_query, relative_key))
        self.table.gradient.index_put_(index, grad_key, accumulate=True)
        return torch.bmm(grad, relative_key).view_as(position_query)

    def _index(self, piece: _Piece) -> tuple[Tensor, Tensor]:
        """(head, row) of the relative keys of each list, [heads or tiles, U]."""
        one = piece._replace(batch=range(1))
        rows = self.table.rows(_of_piece(self.distances, one) + _of_piece(self.shift, one))
        heads = torch.tensor(piece.heads, device=rows.device)[:, None]
        return torch.broadcast_tensors(heads, rows)

    def _column(self, scores: Tensor, piece: _Piece) -> Tensor:
        return _of_piece(self.column, piece).expand(len(scores), -1, -1)


SCORES = {EvenPart: _EvenScores, ListedPart: _ListedScores}


def _mask(seen: Tensor | None, like: Tensor) -> Tensor | None:
    return None if seen is None else _additive(~seen.to(like.device), like.dtype)


def _rows(position_query: Tensor, relative_key: Tensor) -> Tensor:
    """[G, I, D] as [heads or tiles, queries, D], one for each matrix of relative keys."""
    return position_query.reshape(len(relative_key), -1, position_query.shape[2])


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: attention of tiles [G, I, D] over [G, J, D] with the bias [G, I, J], and LSE [G, I, 1]


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v, bias = (x[:, None] for x in (q, k, v, bias))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    return out[:, 0], lse[:, 0, :, None]


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.baddbmm(bias, q, k.mT, alpha=scale)
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.bmm((scores - lse).exp_(), v), lse


# ---------------------------------------------------------------------------------------------------------------------
# The operator, so that torch.compile and torch.export see one node


def _forward_fake(query, position_query, key, value, relative_key, distances, *_):
    batch, length, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((heads, batch, length, 1), dtype=dtype)


def _backward_fake(grad_output, query, position_query, key, value, relative_key, *_):
    return tuple(x.new_empty(x.shape) for x in (query, position_query, key, value, relative_key))


def _save_for_backward(ctx, inputs, output):
    *tensors, pattern, scale, q_offset, kv_offset = inputs
    ctx.rest = pattern, scale, q_offset, kv_offset
    ctx.save_for_backward(*tensors, *output)


def _autograd_backward(ctx, grad_output, _grad_lse):
    grads = torch.ops.hf_tfamily.relative_attention_backward(grad_output, *ctx.saved_tensors, *ctx.rest)
    return *grads, *[None] * 6


def _register() -> None:
    forward = torch.library.custom_op("hf_tfamily::relative_attention", _forward, mutates_args=())
    forward.register_fake(_forward_fake)
    forward.register_autograd(_autograd_backward, setup_context=_save_for_backward)
    backward = torch.library.custom_op("hf_tfamily::relative_attention_backward", _backward, mutates_args=())
    backward.register_fake(_backward_fake)


# The operator is global to the process: a copy of this file, such as remote code, uses the one that is there.
if not hasattr(torch.ops.hf_tfamily, "relative_attention"):
    _register()

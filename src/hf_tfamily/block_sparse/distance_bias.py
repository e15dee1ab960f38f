"""Attention with a bias that depends on the head and on the distance from key to query alone (ALiBi, T5's buckets),
run through a plan (plan.py) by matrix products (products.py), with a gradient for the bias.

Where queries and keys of a part lie evenly, all of its tiles have one bias, a window on a vector of I + J - 1 entries
that moves by one entry from query to query; elsewhere each pair of a piece looks its entry up. Never queries x keys:
full attention takes some rows of queries at a time. All is computed in at least float32.

Legend: B batch, H heads, Hk key heads, T queries, S keys, D head dimension (Dv of values), L distances; of one part:
A tiles, I queries and J keys of a tile; G tiles, batch entries or heads taken together.
"""

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..modeling.attention import VisibleKeys
from ..modeling.attention_patterns import Pattern
from ..modeling.positions import DistanceBias
from .cpu import NAMESPACE, OPERATORS, check_inputs, extra_of, prepare, refuse_onnx, sum_heads, with_lse_gradient
from .parts import Group, Part, mark_writes
from .patterns import from_text, to_text
from .plan import Plan, plan_attention
from .products import (
    LOG2_E,
    MASKED,
    Keys,
    Piece,
    ScoreMemory,
    Space,
    Work,
    backward_part,
    forward_part,
    scaled_delta,
    wide,
)
from .relative_plan import in_rows

_EMPTY_ROW = -1e29


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    distances: Tensor,
    pattern: Pattern,
    *,
    causal: bool,
    scale: float,
    q_offset: int,
    kv_offset: int = 0,
    key_valid: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T + bias of the distance) V over the keys that are shown, never T x S at once.

    Args:
        query: [B, T, H, D]; key: [B, S, Hk, D]; value: [B, S, Hk, Dv], as in cpu.block_sparse_attention.
        table: [H or 1, L], of any floating point dtype: column c is added to scaled scores at `distances[c]`.
        distances: [L] integers on the CPU, from a key to a later query; negative for keys after the query. What is met
            at a distance that is not there gets the bias of some other one: `check_distances` looks.
        pattern, causal, scale, q_offset, kv_offset, key_valid, return_lse: as in cpu.block_sparse_attention.

    Returns what cpu.block_sparse_attention does. Can be differentiated once, by the table too.
    """
    check_inputs(query, key, value, key_valid)
    check_table(table, distances, query.shape[2])
    output, lse = OPERATORS.biased_attention(
        query,
        key,
        value,
        table.expand(query.shape[2], -1),
        distances,
        key_valid,
        to_text(pattern),
        causal,
        scale,
        q_offset,
        kv_offset,
    )
    return (output, lse.masked_fill(lse == float("inf"), float("-inf"))) if return_lse else output


def check_table(table: Tensor, distances: Tensor, num_heads: int) -> None:
    """Raise ValueError unless the bias is [H or 1, L] for L integer distances."""
    if distances.ndim != 1 or distances.is_floating_point() or distances.shape[0] == 0:
        raise ValueError(
            f"The distances of a bias must be at least one integer [L], got {list(distances.shape)} {distances.dtype}."
        )
    length = distances.shape[0]  # `len` would fix it in an export
    fits = table.ndim == 2 and table.shape[0] in (1, num_heads) and table.shape[1] == length
    if not fits or not table.is_floating_point():
        raise ValueError(
            f"The table of a bias by distance must be floating point [{num_heads} or 1, {length}], one row for "
            f"each head or one for all and one column for each distance, got {list(table.shape)} {table.dtype}."
        )


def check_distances(distances: Tensor, pattern: Pattern, lowest: int, highest: int) -> None:
    """Raise ValueError unless all distances from `lowest` to `highest` at which the pattern shows a key are there."""
    missing = _first_missing(distances.numpy().tobytes(), distances.dtype, pattern, lowest, highest)
    if missing is not None:
        raise ValueError(
            f"The bias by distance has no entry for the distance {missing}, at which {pattern!r} shows a key; its "
            f"distances must hold all from {lowest} to {highest} that are met."
        )


@lru_cache(maxsize=64)
def _first_missing(listed: bytes, dtype: torch.dtype, pattern: Pattern, lowest: int, highest: int) -> int | None:
    with torch.inference_mode(False):
        distances = torch.frombuffer(bytearray(listed), dtype=dtype).long()
        past, later = _run(max(lowest, 0), highest + 1), _run(lowest, min(0, highest + 1))
        wanted = torch.cat([later[-later <= _ahead(pattern)], past[pattern.meets(past)]])
        missing = wanted[~torch.isin(wanted, distances)]
        return int(missing[0]) if len(missing) else None


def _run(low: int, high: int) -> Tensor:
    """The numbers from `low` to below `high`; none where all keys lie behind all queries, say."""
    return torch.arange(low, max(low, high))


def _ahead(pattern: Pattern) -> float:
    """No query sees a key of its future that is farther away; infinite where it is not known."""
    interval = pattern.interval(0) if pattern.period == 1 else None
    return math.inf if interval is None else interval[1] - 1


def check_bias(seen: VisibleKeys, bias: DistanceBias, num_heads: int) -> None:
    """Raise ValueError unless the bias fits, and has an entry wherever `seen` may show a key."""
    check_table(bias.table, bias.distances, num_heads)
    offset = seen.query_offset
    if isinstance(offset, Tensor) or torch.compiler.is_compiling():  # no look at values
        return
    highest = offset + seen.query_length - 1 - seen.key_offset  # positions are no farther apart than slots
    lowest = 0 if seen.causal else offset - seen.key_offset - seen.key_length + 1
    check_distances(bias.distances, seen.pattern, lowest, highest)


def at_distances(bias: DistanceBias, distances: Tensor) -> Tensor:
    """The bias [B or 1, H, T, S] at distances [B or 1, H or 1, T, S]; what is not listed gets that of another one."""
    columns, _ = columns_of(bias.distances.to(distances.device), distances)
    heads = torch.arange(len(bias.table), device=columns.device)[:, None, None]
    return bias.table[heads, columns]


def dense_of(seen: VisibleKeys, bias: DistanceBias) -> Tensor:
    """The bias [B or 1, H, T, S] of all that `seen` speaks of, where queries are few."""
    queries, keys, device = seen.query_positions, seen.key_positions, bias.table.device
    if queries is None:
        queries = (torch.arange(seen.query_length, device=device) + seen.query_offset)[None]
        keys = (torch.arange(seen.key_length, device=device) + seen.key_offset)[None]
    keys = keys if keys.ndim == 3 else keys[:, None]  # heads may have keys of their own
    return at_distances(bias, queries[:, None, :, None] - keys[:, :, None])


# ---------------------------------------------------------------------------------------------------------------------
# A whole call


def _forward(
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
    """Output [B, T, H, Dv] and LSE [B, T, H]; the LSE is +inf where a query sees nothing."""
    plan = _plan(query, key, pattern, causal, q_offset, kv_offset)
    q, k, v = (_widen(x) for x in prepare(plan, query, key, value))
    bias = _Bias(table, distances, q, k, q_offset - kv_offset)
    output, lse = q.new_empty(q.shape), q.new_empty((*q.shape[:3], 1))
    if not plan.complete:
        output.zero_()
        lse.fill_(MASKED)
    space = Space(q)
    for group in plan.groups:
        keys = Keys(group, k, key_valid)
        group_q, *results = (x[:, :, keys.heads] for x in (q, output, lse))
        work = Work(group_q, keys.pick(k), keys.pick(v), results[1], scale, space, output=results[0])
        for part in group.parts:
            forward_part(part, work, replace(extra_of(part, keys, q), scores=_scores(part, group, bias, scale)))
    empty = lse < _EMPTY_ROW
    if empty.any():
        output.masked_fill_(empty, 0)
        lse.masked_fill_(empty, float("inf"))
    return output[..., : value.shape[3]].to(query.dtype, copy=True), lse[..., 0] / LOG2_E


def _backward(
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
    """Gradients of query, key, value and table (of no elements unless `of_table`).

    `grad_lse` [B, T, H] is the gradient of the LSE.
    """
    num_values = value.shape[3]
    if grad_lse is not None:
        grad_output, value, output = with_lse_gradient(grad_output, grad_lse, value, output, lse)
    plan = _plan(query, key, pattern, causal, q_offset, kv_offset)
    q, k, v = (_widen(x) for x in prepare(plan, query, key, value))
    bias = _Bias(table, distances, q, k, q_offset - kv_offset, with_gradient=of_table)
    grad_out, out = (torch.nn.functional.pad(_widen(x), (0, v.shape[3] - x.shape[3])) for x in (grad_output, output))
    delta, lse, space = scaled_delta(grad_out, out, scale), (lse * LOG2_E)[..., None], Space(q)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    for group in plan.groups:
        keys = Keys(group, k, key_valid)
        picked = [keys.pick_zeros(x) for x in (grad_k, grad_v)]
        group_q, group_lse, *of_queries = (x[:, :, keys.heads] for x in (q, lse, grad_out, delta, grad_q))
        work = Work(group_q, keys.pick(k), keys.pick(v), group_lse, scale, space, None, *of_queries, *picked)
        for part in group.parts:
            backward_part(part, work, replace(extra_of(part, keys, q), scores=_scores(part, group, bias, scale)))
        keys.put_back(grad_k, picked[0])
        keys.put_back(grad_v, picked[1])
    grads = (grad_q, sum_heads(grad_k, key.shape[2]), sum_heads(grad_v, key.shape[2]))
    widths = (query.shape[3], key.shape[3], num_values)
    grads = (grad[..., :width].to(query.dtype, copy=True) for grad, width in zip(grads, widths))
    return *grads, bias.gradient_of_table().to(table.dtype) if of_table else table.new_empty(0)


def _widen(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def _plan(query: Tensor, key: Tensor, pattern: str, causal: bool, q_offset: int, kv_offset: int) -> Plan:
    sizes = query.shape[1], key.shape[1], query.shape[2]
    return _plan_in_rows(from_text(pattern), *sizes, causal, q_offset, kv_offset)


@lru_cache(maxsize=64)
def _plan_in_rows(pattern: Pattern, num_queries, num_keys, num_heads, causal, first_query, first_key) -> Plan:
    """A plan whose large tiles are cut into rows of queries."""
    where = {"num_heads": num_heads, "causal": causal, "first_query": first_query, "first_key": first_key}
    plan = plan_attention(pattern, num_queries, num_keys, **where)
    cut = (replace(group, parts=tuple(in_rows(group))) for group in plan.groups)
    groups, complete, complete_keys = mark_writes(cut, num_queries, num_keys, num_heads)
    return Plan(tuple(groups), complete, complete_keys)


# ---------------------------------------------------------------------------------------------------------------------
# The bias, and the gradients of parts


class _Bias:
    """The bias of all distances that T queries and S keys can have, [H, T + S - 1], from the largest down.

    Attributes:
        by_distance: entry n is for the distance `highest` - n.
        gradient: the same for its gradient, in float64 where that is the table's.
        distance: from the first query to the first key.
    """

    def __init__(self, table, distances, query, key, distance: int, *, with_gradient: bool = False):
        self.table, self.distance = table, distance
        self.highest = distance + query.shape[1] - 1
        wanted = torch.arange(self.highest, distance - key.shape[1], -1)
        self.columns, self.listed = (x.to(table.device) for x in columns_of(distances, wanted))
        self.by_distance = table.to(query.dtype)[:, self.columns]
        self.gradient = torch.zeros_like(self.by_distance) if with_gradient else None

    def gradient_of_table(self) -> Tensor:
        """[H, L]; what stood for a distance that is not listed was seen by nobody."""
        gradient = self.gradient.new_zeros(self.table.shape)
        return gradient.index_add_(1, self.columns[self.listed], self.gradient[:, self.listed])


def columns_of(distances: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the wanted distances its column, any where it is not listed; and which are."""
    order = distances.argsort()
    place = torch.searchsorted(distances[order], wanted).clamp(max=len(distances) - 1)
    columns = order[place]
    return columns, distances[columns] == wanted


def _scores(part: Part, group: Group, bias: _Bias, scale: float) -> "_EvenBias | _LookedUpBias":
    queries, keys = part.queries, part.keys
    even = queries.stride == keys.stride and (part.tiles == 1 or queries.step == keys.step)
    return (_EvenBias if even and group.index is None else _LookedUpBias)(part, group, bias, scale)


class _EvenBias:
    """That of a part whose tiles all have the same distances (products.Scores)."""

    def __init__(self, part: Part, group: Group, bias: _Bias, scale: float):
        self.part, self.scale = part, scale
        num_queries, num_keys = part.queries.count, part.keys.count
        self.pitch = num_queries + num_keys - 1
        heads = slice(group.heads.start, group.heads.stop, group.heads.step)
        # Column c is for the key c - (I - 1) + i of the i-th query, so the first is for the last query and first key.
        farthest = bias.distance + part.queries.start - part.keys.start + part.queries.stride * (num_queries - 1)
        first, step = bias.highest - farthest, part.queries.stride
        columns = slice(first, first + (self.pitch - 1) * step + 1, step)
        self.columns = bias.by_distance[heads, columns]
        self.gradient = None if bias.gradient is None else bias.gradient[heads, columns]
        self.kept = None  # the heads and the bias that were asked for last

    def by_key(self, piece: Piece) -> Tensor:
        """[G or 1, I, J] in base 2"""
        if self.kept is None or self.kept[0] != piece.heads:
            windows = self.columns[piece.heads.start : piece.heads.stop].unfold(1, self.part.keys.count, 1)
            self.kept = piece.heads, windows.flip(1).mul_(LOG2_E)
        bias, repeats = self.kept[1], piece.count // len(piece.heads)
        return bias if repeats == 1 or len(bias) == 1 else bias.repeat_interleave(repeats, 0)

    def backward(self, grad_scores: ScoreMemory, piece: Piece) -> None:
        if self.gradient is None:
            return
        by_distance = grad_scores.by_distance(piece.count, len(piece.heads), range(self.pitch))
        self.gradient[piece.heads.start : piece.heads.stop].add_(by_distance.sum(1), alpha=1 / self.scale)


class _LookedUpBias:
    """That of any part: each pair of a query and a key looks up its own (products.Scores)."""

    pitch = 0  # any

    def __init__(self, part: Part, group: Group, bias: _Bias, scale: float):
        self.part, self.group, self.bias, self.scale = part, group, bias, scale
        self.heads = torch.tensor(group.heads, device=bias.by_distance.device)

    def by_key(self, piece: Piece) -> Tensor:
        """[G, I, J] in base 2"""
        heads, entries = self._entries(piece)
        found = self.bias.by_distance[heads, entries].mul_(LOG2_E)  # [heads, tiles, I, J]
        return found[:, None].expand(-1, len(piece.batch), -1, -1, -1).flatten(0, 2)

    def backward(self, grad_scores: ScoreMemory, piece: Piece) -> None:
        if self.bias.gradient is None:
            return
        heads, entries = self._entries(piece)
        found = grad_scores.by_key(piece.count).unflatten(0, tuple(map(len, piece))).sum(1) / self.scale
        at = heads * self.bias.gradient.shape[1] + entries
        self.bias.gradient.view(-1).index_add_(0, at.expand_as(found).flatten(), found.flatten())

    def _entries(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Heads [heads, 1, 1, 1] and the entries [heads or 1, tiles, I, J] of their biases; any where nothing is."""
        tiles = slice(piece.tiles.start, piece.tiles.stop)
        queries, keys = (x.indices(self.part.tiles)[tiles] for x in (self.part.queries, self.part.keys))
        keys = keys[None]  # [1, tiles, J]
        if self.group.index is not None:
            index = self.group.index.view(len(self.group.index), -1).T  # [heads or 1, keys]
            some = slice(piece.heads.start, piece.heads.stop) if len(index) > 1 else slice(1)
            keys = index[some][:, keys[0]]
        distances = self.bias.distance + queries[None, :, :, None] - keys[:, :, None]
        entries = (self.bias.highest - distances).to(self.heads.device)
        return self.heads[piece.heads.start : piece.heads.stop, None, None, None], entries


# ---------------------------------------------------------------------------------------------------------------------
# The operator, so that torch.compile and torch.export see one node


def _forward_fake(query, key, value, *_):
    refuse_onnx()
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    return output, query.new_empty(query.shape[:3], dtype=wide(query.dtype))


def _backward_fake(grad_output, query, key, value, table, *rest):
    *_, of_table = rest
    of_inputs = (x.new_empty(x.shape) for x in (query, key, value))
    return *of_inputs, table.new_empty(table.shape if of_table else 0)


def _save_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of an LSE that nobody used
    *tensors, ctx.pattern, ctx.causal, ctx.scale, ctx.q_offset, ctx.kv_offset = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd_backward(ctx, grad_output, grad_lse):
    *inputs, output, lse = ctx.saved_tensors
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(lse == float("inf"), 0.0)
    of_table = ctx.needs_input_grad[3]
    rest = ctx.pattern, ctx.causal, ctx.scale, ctx.q_offset, ctx.kv_offset, grad_lse, of_table
    *grads, grad_table = OPERATORS.biased_attention_backward(grad_output, *inputs, output, lse, *rest)
    return *grads, grad_table if of_table else None, *[None] * 7


def register_operators() -> None:
    forward = torch.library.custom_op(f"{NAMESPACE}::biased_attention", _forward, mutates_args=())
    forward.register_fake(_forward_fake)
    forward.register_autograd(_autograd_backward, setup_context=_save_for_backward)
    backward = torch.library.custom_op(f"{NAMESPACE}::biased_attention_backward", _backward, mutates_args=())
    backward.register_fake(_backward_fake)

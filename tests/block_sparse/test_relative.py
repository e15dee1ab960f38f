"""Relative scores in parts: outputs and gradients equal to dense attention, at the cost of distances that are met."""

import pytest
import torch

from hf_tfamily.block_sparse import cpu, products, relative
from hf_tfamily.block_sparse.patterns import to_text
from hf_tfamily.block_sparse.relative import relative_attention
from hf_tfamily.block_sparse.relative_plan import EvenPart, plan_relative_attention
from hf_tfamily.modeling.attention_patterns import (
    Fixed,
    FixedSummary,
    Full,
    Intersection,
    Local,
    PerHead,
    Strided,
    Union,
    distances_met,
    walk,
)
from hf_tfamily.modeling.positions import rows_by_distance
from tests.block_sparse.test_cpu import ROUNDINGS, LargestTensor, poisoned_memory
from tests.block_sparse.test_plan import EXTENTS, HEADS, PATTERNS
from tests.reference.attention import dense_mask

BATCH, DIM = 2, 6
NAMES = ("output", "query", "position_query", "key", "value", "relative_key")
# Patterns of pictures are bound to grids smaller than what is read here.
TEXT_PATTERNS = [
    *(p for p in PATTERNS if all(getattr(inner, "grid", None) is None for inner in walk(p))),
    Intersection([Strided(3), Local(20)]),
]
MERGED = Union([Local(9), Strided(4)])


def dense(query, position_query, key, value, relative_key, distances, pattern, scale, q_offset, kv_offset, key_valid):
    """One dense masked softmax in the dtype of the inputs; nothing seen gives 0."""
    places = (query.shape[1], key.shape[1])
    mask = dense_mask(pattern, query.shape[2], *places, causal=True, q_offset=q_offset, kv_offset=kv_offset)[None]
    if key_valid is not None:
        mask = mask & key_valid[:, None, None]
    distance = q_offset + torch.arange(places[0])[:, None] - kv_offset - torch.arange(places[1])
    of_distance = relative_key[:, rows_by_distance(distances, distance)]  # [H, T, S, D]
    scores = torch.einsum("bthd,bshd->bhts", query, key)
    scores = (scores + torch.einsum("bthd,htsd->bhts", position_query, of_distance)) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0)
    return torch.einsum("bhts,bshd->bthd", weights, value)


def make_inputs(pattern, num_queries, num_keys, q_offset=0, kv_offset=0, *, batch=BATCH, dtype=torch.float64):
    """The five tensors that have gradients, and the distances of the relative keys."""
    shapes = [(batch, HEADS, length, DIM) for length in (num_queries, num_queries, num_keys, num_keys)]
    tensors = [torch.randn(shape, dtype=dtype).transpose(1, 2) for shape in shapes]
    distances = distances_met(pattern, max(1, q_offset + num_queries - kv_offset))
    tensors.append(torch.randn(HEADS, len(distances), DIM, dtype=dtype))
    return [tensor.requires_grad_() for tensor in tensors], distances


def with_gradients(function, inputs, distances, pattern, grad_output, *, q_offset=0, kv_offset=0, key_valid=None):
    """The output and the five gradients, in float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    where = {"scale": 0.4, "q_offset": q_offset, "kv_offset": kv_offset, "key_valid": key_valid}
    output = function(*inputs, distances, pattern, **where)
    grads = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
    return [x.detach().double() for x in (output, *grads)]


def assert_exact(pattern, num_queries, num_keys, q_offset=0, kv_offset=0, *, key_valid=None, batch=BATCH):
    """Equal to dense attention in float64."""
    inputs, distances = make_inputs(pattern, num_queries, num_keys, q_offset, kv_offset, batch=batch)
    grad_output = torch.randn(inputs[0].shape, dtype=torch.float64)
    where = {"q_offset": q_offset, "kv_offset": kv_offset, "key_valid": key_valid}
    ours = with_gradients(relative_attention, inputs, distances, pattern, grad_output, **where)
    theirs = with_gradients(dense, inputs, distances, pattern, grad_output, **where)
    for name, mine, other in zip(NAMES, ours, theirs):
        assert (mine - other).abs().max() <= 1e-11 * (1 + other.abs().max()), name  # NaN fails too


@pytest.mark.parametrize("pattern", TEXT_PATTERNS, ids=str)
def test_equals_dense(pattern):
    """Lengths, offsets and holes in the keys."""
    with poisoned_memory():
        for num_queries, num_keys, q_offset, kv_offset in EXTENTS:
            assert_exact(pattern, num_queries, num_keys, q_offset, kv_offset)
            valid = torch.rand(BATCH, num_keys) > 0.4
            assert_exact(pattern, num_queries, num_keys, q_offset, kv_offset, key_valid=valid)


@pytest.mark.parametrize("pattern", [Fixed(4, 1), FixedSummary(3, 1), Fixed(4, 2, sub_blocks=2)], ids=str)
def test_few_queries_after_a_past(pattern):
    """Wherever in a block they begin and end."""
    for q_offset in range(4, 9):
        for num_queries in range(2, 7):
            assert_exact(pattern, num_queries, q_offset + num_queries, q_offset)
            assert_exact(pattern, num_queries, num_queries + 3, q_offset, q_offset - 3)


@pytest.mark.parametrize(
    "pattern", [Full(), MERGED, Fixed(16, 4, sub_blocks=2), PerHead([Local(9), Strided(4)])], ids=str
)
def test_pieces(pattern, monkeypatch):
    """However the work is cut: along heads, batch or tiles."""
    for size, batch in ((1 << 9, 2), (1 << 9, 7), (1 << 13, 1), (1 << 13, 7)):
        monkeypatch.setattr(products, "_PIECE", size)
        assert_exact(pattern, 90, 130, 40, 0, batch=batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Local(40), Union([Local(33), Strided(16)]), Fixed(64, 16, sub_blocks=4)], ids=str)
def test_dtypes(pattern, dtype):
    """Our error against float64 is at most twice that of dense attention in the same dtype, plus rounding."""
    inputs, distances = make_inputs(pattern, 200, 300, 100, dtype=dtype, batch=1)
    grad_output = torch.randn(inputs[0].shape, dtype=dtype)
    wide = [x.double() for x in inputs]
    exact = with_gradients(dense, wide, distances, pattern, grad_output.double(), q_offset=100)
    theirs = with_gradients(dense, inputs, distances, pattern, grad_output, q_offset=100)
    ours = with_gradients(relative_attention, inputs, distances, pattern, grad_output, q_offset=100)
    for name, mine, other, true in zip(NAMES, ours, theirs, exact):
        budget = 2 * (other - true).abs().max() + ROUNDINGS[dtype] * torch.finfo(dtype).eps * true.abs().max()
        error = (mine - true).abs().max()
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"


def test_rows_that_see_nothing():
    """Output and gradient are exactly 0."""
    for pattern in (Full(), FixedSummary(8, 2), MERGED):
        inputs, distances = make_inputs(pattern, 20, 20)
        valid = torch.ones(BATCH, 20, dtype=torch.bool)
        valid[0, :10] = False
        output, *grads = with_gradients(
            relative_attention, inputs, distances, pattern, torch.ones(BATCH, 20, HEADS, DIM), key_valid=valid
        )
        assert (output[0, :10] == 0).all()
        assert all((grad[0, :10] == 0).all() for grad in grads[:4])
        assert all(grad.isfinite().all() for grad in grads)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def test_distances_met_are_those_at_which_some_query_sees_a_key():
    for pattern in TEXT_PATTERNS:
        seen = dense_mask(pattern, HEADS, 40, 140, causal=True, q_offset=100).any(0)
        distance = (100 + torch.arange(40)[:, None] - torch.arange(140))[seen]
        met = set(distances_met(pattern, 140).tolist())
        assert set(distance.tolist()) <= met
        if isinstance(pattern, (Local, Strided)) or pattern == Union([Local(5), Strided(5)]):
            assert set(distance.tolist()) == met


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (Local(64), 64 + 32),
        (Strided(16), 3 * 512 // 16),
        (Union([Local(64), Strided(16)]), 64 + 32 + 3 * 512 // 16),
        (Fixed(32, 4), 32 + 4 * 1024 // 32 + 4 * 512 // 32 + 4),
    ],
    ids=str,
)
def test_a_query_scores_few_more_distances_than_it_sees_keys(pattern, most):
    """In a segment of 512 after a memory of 512; rectangles of I queries and J keys meet I + J - 1."""
    plan = plan_relative_attention(pattern, 512, 1024, num_heads=HEADS, first_query=512)
    scored = torch.zeros(512, dtype=torch.long)
    for group in plan.groups:
        for scored_part in group.parts:
            queries = scored_part.part.queries.indices(scored_part.part.tiles)
            scored.index_add_(0, queries.flatten(), torch.full((queries.numel(),), scored_part.distances.shape[-1]))
            if isinstance(relative, EvenPart):
                assert relative.distances.numel() <= relative.columns
    assert scored.max() <= most


@pytest.mark.parametrize("pattern", [Union([Local(16), Strided(32)]), Fixed(64, 8, sub_blocks=4)], ids=str)
def test_never_length_times_length(pattern, monkeypatch):
    monkeypatch.setattr(products, "_PIECE", 1 << 14)
    length = 1024
    inputs, distances = make_inputs(pattern, length, length, batch=1)
    inputs = [x.detach() for x in inputs]
    where = (to_text(pattern), 0.5, 0, 0)
    relative.plan_relative_attention.cache_clear()
    with LargestTensor() as largest:  # it does not see inside the operator, so past it
        output, lse = relative._forward(*inputs, distances, None, *where)
        relative._backward(output, *inputs, distances, None, output, lse, *where)
    assert length * HEADS * DIM <= largest.elements <= length * length / 8


# ---------------------------------------------------------------------------------------------------------------------
# The operator, and what it refuses


def call(query, position_query, key, value, relative_key, distances):
    offset = key.shape[1] - query.shape[1]
    return relative_attention(
        query, position_query, key, value, relative_key, distances, MERGED, scale=0.4, q_offset=offset
    )


def test_opcheck():
    for key_valid in (None, torch.rand(BATCH, 20) > 0.3):
        inputs, distances = make_inputs(MERGED, 12, 20, 8, dtype=torch.float32)
        arguments = (*inputs, distances, key_valid, to_text(MERGED), 0.4, 8, 0)
        torch.library.opcheck(cpu.OPERATORS.relative_attention.default, arguments)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for length, past in ((16, 0), (24, 0), (31, 7)):
        inputs, distances = make_inputs(MERGED, length, length + past, past)
        torch.testing.assert_close(compiled(*inputs, distances), call(*inputs, distances))


def test_wrong_inputs():
    inputs, distances = make_inputs(MERGED, 12, 20, 8)
    with pytest.raises(ValueError, match="relative_key has no row for the distance 19, which is met"):
        relative_attention(*inputs[:4], inputs[4][:, 1:], distances[1:], Full(), scale=0.4, q_offset=8)
    with pytest.raises(ValueError, match=r"relative_key must have shape \(4, 11, 6\)"):
        relative_attention(*inputs[:4], inputs[4][:, 1:], distances, MERGED, scale=0.4, q_offset=8)
    with pytest.raises(ValueError, match=r"position_query must have .* dtype of query \(torch.float64\)"):
        relative_attention(inputs[0], inputs[1].float(), *inputs[2:], distances, MERGED, scale=0.4, q_offset=8)
    short = torch.ones(BATCH, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"key_valid must be bool \(2, 20\)"):
        relative_attention(*inputs, distances, MERGED, scale=0.4, q_offset=8, key_valid=short)

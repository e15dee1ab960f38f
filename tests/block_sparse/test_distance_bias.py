"""A bias by distance in parts: outputs, log-sum-exps and gradients equal to dense attention, the table's among them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hf_tfamily.block_sparse import block_sparse_attention_forward, cpu, distance_bias, products
from hf_tfamily.block_sparse.distance_bias import biased_attention, check_distances, dense_of
from hf_tfamily.block_sparse.patterns import to_text
from hf_tfamily.modeling.attention import VisibleKeys, eager_attention_forward, with_padding
from hf_tfamily.modeling.attention_patterns import (
    Fixed,
    Full,
    Intersection,
    Local,
    PerHead,
    Strided,
    Union,
)
from hf_tfamily.modeling.positions import DistanceBias, rows_by_distance
from tests.block_sparse.test_cpu import ROUNDINGS, LargestTensor, poisoned_memory
from tests.block_sparse.test_plan import EXTENTS, HEADS, PATTERNS
from tests.reference.attention import dense_mask

BATCH = 2
NAMES = ("output", "lse", "query", "key", "value", "table")
EVERY_PATTERN = [*PATTERNS, Intersection([Strided(3), Local(20)])]
MERGED = Union([Local(9), Strided(4)])


def dense(query, key, value, table, distances, pattern, *, causal, scale, q_offset, kv_offset=0, key_valid=None):
    """One dense masked softmax in the dtype of the inputs, and its log-sum-exp; nothing seen gives 0 and -inf."""
    heads, places = query.shape[2], (query.shape[1], key.shape[1])
    key, value = (x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in (key, value))
    mask = dense_mask(pattern, heads, *places, causal=causal, q_offset=q_offset, kv_offset=kv_offset)[None]
    if key_valid is not None:
        mask = mask & key_valid[:, None, None]
    distance = q_offset + torch.arange(places[0])[:, None] - kv_offset - torch.arange(places[1])
    bias = table[:, rows_by_distance(distances, distance)].to(torch.promote_types(query.dtype, torch.float32))
    scores = ((query.transpose(1, 2) @ key.mT).to(bias.dtype) * scale + bias).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~mask, 0)
    blind = ~mask.any(-1)
    lse = scores.masked_fill(blind[..., None], 0.0).logsumexp(-1).masked_fill(blind, float("-inf"))
    return (weights.to(value.dtype) @ value).transpose(1, 2), lse.transpose(1, 2)


def make_inputs(num_queries, num_keys, q_offset=0, kv_offset=0, *, key_heads=HEADS, dims=(6, 6), rows=HEADS, **kwargs):
    """The four tensors that have gradients, and the distances of the table in no order."""
    batch, dtype = kwargs.get("batch", BATCH), kwargs.get("dtype", torch.float64)
    shapes = [(num_queries, HEADS, dims[0]), (num_keys, key_heads, dims[0]), (num_keys, key_heads, dims[1])]
    tensors = [torch.randn(batch, heads, length, d, dtype=dtype).transpose(1, 2) for length, heads, d in shapes]
    distances = torch.arange(q_offset - kv_offset - num_keys + 1, q_offset + num_queries - kv_offset)
    distances = distances[torch.randperm(len(distances))]
    return [x.requires_grad_() for x in (*tensors, torch.randn(rows, len(distances), dtype=dtype))], distances


def with_gradients(function, inputs, distances, pattern, **kwargs):
    """Output, log-sum-exp and the gradients of both, in float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    generator = torch.Generator().manual_seed(0)
    output, lse = function(*inputs, distances, pattern, **kwargs)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (output, lse)]
    seen = lse.isfinite()
    total = (output * weights[0]).sum() + (lse.masked_fill(~seen, 0.0) * weights[1].masked_fill(~seen, 0.0)).sum()
    return [x.detach().double() for x in (output, lse, *torch.autograd.grad(total, inputs))]


def ours(*arguments, **kwargs):
    return biased_attention(*arguments, **kwargs, return_lse=True)


def assert_exact(pattern, num_queries, num_keys, q_offset=0, kv_offset=0, *, causal=True, key_valid=None, **kwargs):
    """Equal to dense attention in float64."""
    inputs, distances = make_inputs(num_queries, num_keys, q_offset, kv_offset, **kwargs)
    how = {"scale": 0.4, "causal": causal, "q_offset": q_offset, "kv_offset": kv_offset, "key_valid": key_valid}
    mine = with_gradients(ours, inputs, distances, pattern, **how)
    theirs = with_gradients(dense, inputs, distances, pattern, **how)
    for name, my, other in zip(NAMES, mine, theirs):
        assert torch.equal(my.isinf(), other.isinf()), name
        my, other = (x.masked_fill(x.isinf(), 0.0) for x in (my, other))
        assert (my - other).abs().max() <= 1e-11 * (1 + other.abs().max()), name  # NaN fails too


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)
def test_equals_dense(pattern, causal):
    """Lengths, offsets, grouped heads, one row for all heads, Dqk != Dv and holes in the keys."""
    shapes = [{}, {"key_heads": 2, "dims": (6, 3)}, {"key_heads": 1, "dims": (3, 6), "rows": 1}]
    with poisoned_memory():
        for case, extent in enumerate(EXTENTS):
            assert_exact(pattern, *extent, causal=causal, **shapes[case % 3])
            valid = torch.rand(BATCH, extent[1]) > 0.4
            assert_exact(pattern, *extent, causal=causal, key_valid=valid, **shapes[(case + 1) % 3])


@pytest.mark.parametrize(
    "pattern", [Full(), MERGED, Fixed(16, 4, sub_blocks=2), PerHead([Local(9), Strided(4)])], ids=str
)
def test_pieces(pattern, monkeypatch):
    """However the work is cut: along heads, batch or tiles."""
    for size, batch in ((1 << 9, 2), (1 << 9, 7), (1 << 13, 1), (1 << 13, 7)):
        monkeypatch.setattr(products, "_PIECE", size)
        for key_heads in (HEADS, 2):
            assert_exact(pattern, 90, 130, 40, 0, batch=batch, key_heads=key_heads, causal=size == 1 << 9)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_full_attention(causal):
    """Large tiles are cut into rows of queries."""
    for pattern in (Full(), Local(300)):
        assert_exact(pattern, 600, 620, 20, causal=causal, batch=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Local(40), Union([Local(33), Strided(16)]), Fixed(64, 16, sub_blocks=4)], ids=str)
def test_dtypes(pattern, dtype):
    """Our error against float64 is at most twice that of dense attention in the same dtype, plus rounding."""
    inputs, distances = make_inputs(200, 300, 100, dtype=dtype, batch=1)
    how = {"scale": 0.4, "causal": True, "q_offset": 100}
    exact = with_gradients(dense, [x.double() for x in inputs], distances, pattern, **how)
    theirs = with_gradients(dense, inputs, distances, pattern, **how)
    mine = with_gradients(ours, inputs, distances, pattern, **how)
    for name, my, other, true in zip(NAMES, mine, theirs, exact):
        budget = 2 * (other - true).abs().max() + ROUNDINGS[dtype] * torch.finfo(dtype).eps * true.abs().max()
        error = (my - true).abs().max()
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"


def test_rows_that_see_nothing():
    """Output and gradient are exactly 0, the log-sum-exp is -inf."""
    valid = torch.ones(BATCH, 20, dtype=torch.bool)
    valid[0, :10] = False
    for pattern in (Full(), MERGED):
        inputs, distances = make_inputs(20, 20)
        how = {"scale": 0.4, "causal": True, "q_offset": 0, "key_valid": valid}
        output, lse, *grads = with_gradients(ours, inputs, distances, pattern, **how)
        assert (output[0, :10] == 0).all()
        assert (lse[0, :10] == -torch.inf).all()
        assert all((grad[0, :10] == 0).all() for grad in grads[:3])
        assert all(grad.isfinite().all() for grad in grads)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [Local(64), Union([Local(16), Strided(32)]), Fixed(64, 8), Full()], ids=str)
def test_never_length_times_length(pattern, causal, monkeypatch):
    monkeypatch.setattr(products, "_PIECE", 1 << 14)
    length = 1024
    inputs, distances = make_inputs(length, length, batch=1)
    inputs = [x.detach() for x in inputs]
    where = (to_text(pattern), causal, 0.5, 0, 0)
    distance_bias._plan_in_rows.cache_clear()
    with LargestTensor() as largest:  # it does not see inside the operator, so past it
        output, lse = distance_bias._forward(*inputs, distances, None, *where)
        distance_bias._backward(output, *inputs, distances, None, output, lse, *where, None, True)
    rows = length * 256 * 2 if pattern.is_full else length * length / 8  # of queries that are taken together
    assert largest.elements <= rows


# ---------------------------------------------------------------------------------------------------------------------
# The operator, and what it refuses


def call(query, key, value, table, distances):
    offset = key.shape[1] - query.shape[1]
    return biased_attention(query, key, value, table, distances, MERGED, causal=True, scale=0.4, q_offset=offset)


def test_opcheck():
    for key_valid in (None, torch.rand(BATCH, 20) > 0.3):
        inputs, distances = make_inputs(12, 20, 8, dtype=torch.float32, key_heads=2)
        arguments = (*inputs, distances, key_valid, to_text(MERGED), True, 0.4, 8, 0)
        torch.library.opcheck(cpu.OPERATORS.biased_attention.default, arguments)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for length, past in ((16, 0), (24, 0), (31, 7)):
        inputs, distances = make_inputs(length, length + past, past)
        torch.testing.assert_close(compiled(*inputs, distances), call(*inputs, distances))


def test_wrong_inputs():
    inputs, distances = make_inputs(12, 20, 8)
    with pytest.raises(ValueError, match=r"table of a bias by distance must be floating point \[4 or 1, 31\], .*4, 30"):
        call(*inputs[:3], inputs[3][:, 1:], distances)
    with pytest.raises(ValueError, match=r"table .* must be floating point .*torch.int64"):
        call(*inputs[:3], inputs[3].long(), distances)
    with pytest.raises(ValueError, match=r"distances of a bias must be .* got \[31\] torch.float32"):
        call(*inputs, distances.float())
    with pytest.raises(ValueError, match=r"value must be .* in the dtype of query"):
        call(*inputs[:2], inputs[2].float(), inputs[3], distances)


def test_a_distance_that_is_met_must_be_there():
    check_distances(torch.arange(9), Local(9), 0, 500)
    check_distances(torch.arange(-8, 9), Local(9), -500, 500)
    check_distances(torch.arange(0, 100, 4), Strided(4), 0, 99)
    for distances, pattern, lowest in (
        (torch.arange(8), Local(9), 0),
        (torch.arange(9), Local(9), -1),
        (torch.arange(0, 96, 4), Strided(4), 0),
        (torch.arange(499), Full(), 0),
    ):
        with pytest.raises(ValueError, match=r"has no entry for the distance (8|-1|96|499), at which"):
            check_distances(distances, pattern, lowest, 499)


# ---------------------------------------------------------------------------------------------------------------------
# As models call it


def attended(seen, module, tensors, bias):
    """By the engine, and by eager attention with the bias as a tensor: outputs and log-sum-exps, then gradients."""
    found = []
    for attention, mask, position_bias in (
        (block_sparse_attention_forward, seen, bias),
        (eager_attention_forward, seen.dense("cpu"), dense_of(seen, bias)),
    ):
        output, lse = attention(module, *tensors, mask, scaling=0.4, position_bias=position_bias, return_lse=True)
        total = (output * torch.arange(output.numel()).view_as(output).cos()).sum()
        total = total + (lse.masked_fill(lse.isinf(), 0.0) * 0.3).sum()
        found.append([output, lse, *torch.autograd.grad(total, (*tensors, bias.table), retain_graph=True)])
    return zip(*found)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("pattern", [Full(), Local(9), PerHead([Local(9), Strided(4)])], ids=str)
@pytest.mark.parametrize("rows", ["plain", "padded", "heads"])
def test_decoding(rows, pattern, queries):
    """One token or a few after a past: plain rows, padded ones, and heads that kept keys of their own."""
    keys = 20
    sizes = {"batch_size": 2, "query_length": queries, "key_length": keys, "query_offset": keys - queries}
    seen = VisibleKeys(pattern, HEADS, True, **sizes, all_places=rows != "heads")
    if rows == "padded":
        seen = with_padding(seen, torch.arange(keys) >= torch.tensor([[3], [0]]))
    if rows == "heads":
        positions = torch.stack([torch.randperm(30)[:keys] for _ in range(2 * HEADS)]).view(2, HEADS, keys)
        seen = replace(seen, query_positions=30 + torch.arange(queries).expand(2, -1), key_positions=positions)
    distances = torch.arange(40)
    table = torch.randn(HEADS, 40, dtype=torch.float64, requires_grad=True)
    shapes = [(2, HEADS, queries, 6), (2, 2, keys, 6), (2, 2, keys, 6)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    module = SimpleNamespace(training=False, config=SimpleNamespace())
    for mine, other in attended(seen, module, tensors, DistanceBias(table, distances)):
        torch.testing.assert_close(mine, other, atol=1e-11, rtol=1e-11)


def test_beside_sinks():
    """A sink of score -1e9 changes nothing; others take their share."""
    seen = VisibleKeys(Local(9), HEADS, True, 2, 12, 12)
    table, sinks = torch.randn(HEADS, 12, dtype=torch.float64), torch.randn(HEADS, dtype=torch.float64)
    tensors = [torch.randn(2, HEADS, 12, 6, dtype=torch.float64) for _ in range(3)]
    module = SimpleNamespace(training=False, config=SimpleNamespace())
    how = {"scaling": 0.4, "position_bias": DistanceBias(table, torch.arange(12)), "return_lse": True}
    plain, lse = block_sparse_attention_forward(module, *tensors, seen, **how)
    far, _ = block_sparse_attention_forward(module, *tensors, seen, **how, s_aux=torch.full_like(sinks, -1e9))
    torch.testing.assert_close(far, plain)
    output, _ = block_sparse_attention_forward(module, *tensors, seen, **how, s_aux=sinks)
    share = lse.exp() / (lse.exp() + sinks.exp()[:, None])
    torch.testing.assert_close(output, plain * share.transpose(1, 2)[..., None])


def test_a_bias_that_does_not_fit_is_refused():
    seen = VisibleKeys(Full(), HEADS, True, 1, 6, 6)
    tensors, module = [torch.randn(1, HEADS, 6, 4) for _ in range(3)], SimpleNamespace(training=False)
    module.config = SimpleNamespace()
    for table, distances, message in (
        (torch.randn(3, 6), torch.arange(6), r"must be floating point \[4 or 1, 6\]"),
        (torch.randn(HEADS, 5), torch.arange(5), "no entry for the distance 5, at which"),
    ):
        with pytest.raises(ValueError, match=message):
            block_sparse_attention_forward(module, *tensors, seen, position_bias=DistanceBias(table, distances))

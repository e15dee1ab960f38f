"""Relative scores by the Triton kernels against dense attention in float64: outputs and all five gradients."""

import pytest
import torch

pytest.importorskip("triton")

from hf_tfamily.block_sparse.patterns import to_text
from hf_tfamily.block_sparse.triton import call
from hf_tfamily.block_sparse.triton import relative as triton_relative
from hf_tfamily.modeling.attention_patterns import (
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Intersection,
    Local,
    PerHead,
    Strided,
    Union,
)
from tests.block_sparse.test_cpu import poisoned_memory
from tests.block_sparse.test_relative import BATCH, NAMES, dense, make_inputs, with_gradients
from tests.block_sparse.triton_support import DEVICE, assert_as_exact, take_small_tiles

PATTERNS = [
    Full(),
    Local(9),
    Strided(4),
    Union([Local(9), Strided(4)]),
    Fixed(8, 2, sub_blocks=2),
    FixedSummary(8, 2),
    PerHead([Local(9), Strided(4)]),
    PerHead([Local(5), FixedBlock(8)]),
    Union([Strided(3), Strided(4)]),
    Intersection([Local(20), Strided(2)]),
]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, position_query, key, value, relative_key, *rest):
        inputs = (query, position_query, key, value, relative_key)
        output, lse = triton_relative.forward(*inputs, *rest)
        ctx.save_for_backward(*inputs, output, lse)
        ctx.rest = rest
        return output

    @staticmethod
    def backward(ctx, grad_output):
        *inputs, output, lse = ctx.saved_tensors
        distances, key_valid, *rest = ctx.rest
        grads = triton_relative.backward(grad_output, *inputs, distances, key_valid, output, lse, *rest)
        return *grads, *[None] * 6


def relative_attention(*inputs, scale, q_offset, kv_offset, key_valid):
    """As relative.relative_attention."""
    *tensors, distances, pattern = inputs
    tensors = (x.to(DEVICE) for x in tensors)
    key_valid = None if key_valid is None else key_valid.to(DEVICE)
    output = _Attention.apply(*tensors, distances, key_valid, to_text(pattern), scale, q_offset, kv_offset)
    return output.cpu()


def assert_as_exact_as_dense(pattern, num_queries, num_keys, q_offset, *, dtype=torch.float32, key_valid=None):
    """Our error against float64 is at most twice that of dense attention in the same dtype, plus rounding."""
    inputs, distances = make_inputs(pattern, num_queries, num_keys, q_offset, dtype=dtype)
    grad_output = torch.randn(inputs[0].shape, dtype=dtype)
    where = {"q_offset": q_offset, "key_valid": key_valid}
    wide = [x.double() for x in inputs]
    exact = with_gradients(dense, wide, distances, pattern, grad_output.double(), **where)
    theirs = with_gradients(dense, inputs, distances, pattern, grad_output, **where)
    with poisoned_memory():
        ours = with_gradients(relative_attention, inputs, distances, pattern, grad_output, **where)
    assert_as_exact(NAMES, ours, theirs, exact, dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    take_small_tiles(monkeypatch)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_dense(pattern):
    """A segment after a memory, with holes in the keys."""
    assert_as_exact_as_dense(pattern, 40, 57, 17, key_valid=torch.rand(BATCH, 57) > 0.3)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_dense_in_other_extents(pattern):
    for num_queries, num_keys, q_offset in ((1, 1, 0), (2, 30, 28), (33, 33, 0), (20, 40, 10)):
        assert_as_exact_as_dense(pattern, num_queries, num_keys, q_offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Union([Local(9), Strided(4)]), Fixed(8, 2)], ids=str)
def test_dtypes(pattern, dtype):
    """With the tiles that a GPU would get."""
    assert_as_exact_as_dense(pattern, 50, 70, 20, dtype=dtype)


@pytest.mark.usefixtures("small_tiles")
def test_queries_are_taken_some_at_a_time(monkeypatch):
    """However few scores may be held at once: the same outputs and gradients."""
    pattern = Union([Local(9), Strided(4)])
    inputs, distances = make_inputs(pattern, 40, 57, 17, dtype=torch.float32, batch=1)
    call = (inputs, distances, pattern, torch.randn(inputs[0].shape))
    whole = with_gradients(relative_attention, *call, q_offset=17)
    monkeypatch.setattr(triton_relative, "_SCORES", 1)
    monkeypatch.setattr(triton_relative, "_LEAST_ROWS", 16)
    pieces = with_gradients(relative_attention, *call, q_offset=17)
    for name, one, other in zip(NAMES, whole, pieces):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("pattern", [Full(), Local(1024), Fixed(256, 32), Union([Local(256), Strided(256)])], ids=str)
def test_long_sequences_never_hold_queries_times_keys(pattern):
    length = 1 << 16
    query = torch.empty(1, length, 8, 64, device="meta")
    distances = triton_relative.distances_met(pattern, length)
    slices = list(triton_relative._rows(query, distances, to_text(pattern), 0))
    assert [rows.start for rows in slices[1:]] == [rows.stop for rows in slices[:-1]]
    assert slices[-1].stop == length
    assert max(rows.stop - rows.start for rows in slices) * 8 * len(distances) <= triton_relative._SCORES


def test_a_pass_scores_no_more_distances_than_it_reaches():
    for pattern, numbers in (
        (Local(20), [32]),
        (Union([Local(16), Strided(32)]), [16, 16]),  # 256 / 32 rounded up to 16
        (Fixed(32, 4), [240]),
    ):
        query, key = torch.zeros(1, 128, 2, 16), torch.zeros(1, 256, 2, 16)
        made = call.Call.of(query, key, key, None, to_text(pattern), True, 1.0, 128, 0)
        launches = [launch for launches in made.launches for launch in launches]
        assert [call.pass_distances(launch) for launch in launches] == [range(number) for number in numbers]


def test_what_the_kernels_cannot_is_left_to_pytorch():
    """float64, and head dimensions above 256."""
    for dtype, dim in ((torch.float64, 8), (torch.float32, 264)):
        query = torch.randn(1, 6, 2, dim, dtype=dtype, device=DEVICE)
        relative_key = torch.randn(2, 6, dim, dtype=dtype, device=DEVICE)
        inputs = (query, query, query, query, relative_key, torch.arange(5, -1, -1), None, to_text(Local(3)))
        ours = triton_relative.forward(*inputs, 0.5, 0, 0)
        theirs = triton_relative.pytorch_forward(*inputs, 0.5, 0, 0)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs))


def test_missing_distances_are_refused():
    inputs, distances = make_inputs(Full(), 12, 20, 8, dtype=torch.float32)
    tensors = [x.to(DEVICE) for x in (*inputs[:4], inputs[4][:, 1:])]
    with pytest.raises(ValueError, match="relative_key has no row for the distance 19, which is met"):
        triton_relative.forward(*tensors, distances[1:], None, to_text(Full()), 0.4, 8, 0)

"""Sinks over the Triton kernels, learned ones (softmax with one column more: outputs, and gradients of all four through
that of the log-sum-exp) and the first tokens, seen by all beside other patterns."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from hf_tfamily.block_sparse.interface import block_sparse_attention_forward
from hf_tfamily.block_sparse.parts import Extent
from hf_tfamily.block_sparse.triton.layout import layout, table_heads
from hf_tfamily.modeling.attention import VisibleKeys
from hf_tfamily.modeling.attention_patterns import Fixed, FixedBlock, Local, Sink, Strided, Union
from tests.block_sparse.test_cpu import make_inputs
from tests.block_sparse.test_triton import assert_as_exact_as_dense
from tests.block_sparse.triton_support import DEVICE, models_on_triton
from tests.reference.attention import dense_mask

NAMES = ("output", "query", "key", "value", "sinks")
HEADS, KEY_HEADS, LENGTH, BATCH = 4, 2, 24, 2
ROUNDINGS = {torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}
MODULE = SimpleNamespace(config=SimpleNamespace(), is_causal=True, training=True)


def eager(query, key, value, sinks, mask):
    """softmax over the seen keys and one column of the head's sink, in the dtype of the inputs; [B, T, H, Dv]."""
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    column = sinks[None, :, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)
    return (torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value).transpose(1, 2)


def with_gradients(attention, inputs, grad_output):
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output.to(output.dtype))]


def of_rows(pattern, padding=0, documents=None):
    """(VisibleKeys, mask [B, 1, T, T]) of rows whose first is padded on the left, or packed into `documents`."""
    positions, valid = torch.arange(LENGTH).expand(BATCH, -1), None
    mask = dense_mask(pattern, 1, LENGTH, LENGTH, causal=True).expand(BATCH, -1, -1)
    about = {}
    if padding:
        valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        valid[0, :padding] = False
        positions = (valid.cumsum(1) - 1).clamp(min=0)
        about = {"key_valid": valid}
    elif documents is not None:
        positions = torch.cat([torch.arange(length) for length in documents]).expand(BATCH, -1)
        numbers = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)).expand(BATCH, -1)
        about = {"query_documents": numbers, "key_documents": numbers}
    if about:
        about |= {"query_positions": positions, "key_positions": positions}
        mask = pattern.visible(0, positions[:, :, None], positions[:, None]) & torch.ones(LENGTH, LENGTH).bool().tril()
        mask = mask if valid is None else mask & valid[:, None]
        mask = mask if documents is None else mask & (numbers[:, :, None] == numbers[:, None])
    about = {name: x.to(DEVICE) for name, x in about.items()}
    return VisibleKeys(pattern, HEADS, True, BATCH, LENGTH, LENGTH, **about), mask[:, None]


def assert_as_exact_as_eager(seen, mask, dtype=torch.float32, dims=(16, 16)):
    """Errors against float64 are at most twice those of eager in the same dtype, plus rounding."""
    shapes = [(BATCH, HEADS, LENGTH, dims[0]), *[(BATCH, KEY_HEADS, LENGTH, dim) for dim in dims]]
    inputs = [*(torch.randn(shape, dtype=dtype) for shape in shapes), torch.randn(HEADS, dtype=dtype)]
    grad_output = torch.randn(BATCH, LENGTH, HEADS, dims[1], dtype=dtype) * mask.any(-1).transpose(1, 2)[..., None]

    def ours(query, key, value, sinks):
        tensors = (x.to(DEVICE) for x in (query, key, value))
        return block_sparse_attention_forward(MODULE, *tensors, seen, s_aux=sinks.to(DEVICE))[0].cpu()

    exact = with_gradients(lambda *x: eager(*x, mask), [x.double() for x in inputs], grad_output)
    theirs = with_gradients(lambda *x: eager(*x, mask), inputs, grad_output)
    with models_on_triton() as ran:
        found = with_gradients(ours, inputs, grad_output)
    assert len(ran) == 2 or DEVICE == "cuda", "the operator and its backward were to run on Triton"
    for name, mine, other, true in zip(NAMES, found, theirs, exact):
        rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps * (1 + true.abs().max())
        error = (mine - true).abs().max()  # NaN fails too
        assert error <= 2 * (other - true).abs().max() + rounding, f"{name}: {error:.2e}"


ROWS = {"whole": {}, "padded": {"padding": 5}, "packed": {"documents": (9, 4, 11)}}


@pytest.mark.parametrize("rows", ROWS)
def test_sinks_equal_eager(rows):
    assert_as_exact_as_eager(*of_rows(Local(5), **ROWS[rows]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sinks_in_half_precision(dtype):
    """The gradient of the log-sum-exp is float32, whatever the dtype of queries and keys."""
    assert_as_exact_as_eager(*of_rows(Union([Local(5), Strided(5)]), padding=5), dtype=dtype, dims=(16, 24))


@pytest.mark.parametrize("dims", [(128, 128), (256, 256)], ids=str)
def test_sinks_in_the_widest_heads(dims):
    """A column more of values would not fit the kernels' tiles of 128, nor 256 at all."""
    assert_as_exact_as_eager(*of_rows(Local(5)), dims=dims, dtype=torch.bfloat16)


FIRST = Sink(3)
WITH_FIRST_TOKENS = [  # pattern, whether one launch runs all heads
    (FIRST, True),
    (Union([Local(5), FIRST]), True),
    (Union([FIRST, FixedBlock(8)]), True),
    (Union([Local(1), Sink(40)]), True),  # more than there are
    (Union([Local(2), FixedBlock(4), FIRST]), True),
    (Union([FIRST, Strided(4)]), False),
    (Union([Local(3, dilation=2), FIRST]), False),
    (Union([FIRST, Fixed(8, 2)]), False),
]


@pytest.mark.parametrize(("pattern", "is_one"), WITH_FIRST_TOKENS, ids=str)
def test_first_tokens_beside_other_patterns(pattern, is_one):
    """Gaps between the first tokens and a window are not seen; later chunks and keys that begin later, too."""
    for num_queries, num_keys, q_offset, kv_offset in ((21, 21, 0, 0), (5, 26, 21, 0), (6, 20, 20, 1)):
        inputs = make_inputs(num_queries, num_keys, key_heads=2, batch=1)
        where = {"q_offset": q_offset, "kv_offset": kv_offset}
        assert_as_exact_as_dense(pattern, inputs, causal=True, scale=0.5, **where)
    assert_as_exact_as_dense(pattern, make_inputs(19, 19, batch=1), causal=False, scale=0.5, q_offset=0)
    passes = layout(pattern, Extent(64, 64, 0, 0, True), HEADS)
    assert (not table_heads(pattern, HEADS) and [len(launches) for launches in passes] == [1]) == is_one

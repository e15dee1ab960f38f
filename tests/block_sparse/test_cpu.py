"""The executor: outputs and gradients equal to dense masked attention; and the operator around it."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_tfamily.block_sparse import cpu, products
from hf_tfamily.block_sparse.cpu import block_sparse_attention
from hf_tfamily.block_sparse.patterns import to_text
from hf_tfamily.modeling.attention_patterns import (
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Local,
    PerHead,
    Strided,
    Union,
)
from tests.block_sparse.test_plan import EXTENTS, HEADS, PATTERNS
from tests.reference.attention import dense_attention, dense_mask
from tests.reference.masked_attention import attention as attention_by_loops

BATCH = 2
# Half precision rounds what was summed in float32; wider types round at each step.
ROUNDINGS = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def make_inputs(num_queries, num_keys, *, dtype=torch.float32, key_heads=HEADS, dim=8, value_dim=8, batch=BATCH):
    """Query, key, value as models hold them: some storage order or other, transposed."""
    shapes = [(num_queries, HEADS, dim), (num_keys, key_heads, dim), (num_keys, key_heads, value_dim)]
    inputs = [torch.randn(batch, heads, length, d, dtype=dtype).transpose(1, 2) for length, heads, d in shapes]
    return [x.requires_grad_() for x in inputs]


def with_gradients(function, inputs, grad_output, **kwargs):
    """The output and the three gradients, in float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs, **kwargs)
    grads = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
    return [x.detach().double() for x in (output, *grads)]


def assert_as_exact_as_dense(pattern, inputs, **kwargs):
    """Our error against float64 is at most twice that of dense masked attention in the same dtype, plus rounding."""
    dtype = inputs[0].dtype
    grad_output = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], dtype=dtype)
    wide = [x.double() for x in inputs]
    exact = with_gradients(dense_attention, wide, grad_output.double(), pattern=pattern, **kwargs)
    dense = with_gradients(dense_attention, inputs, grad_output, pattern=pattern, **kwargs)
    ours = with_gradients(block_sparse_attention, inputs, grad_output, pattern=pattern, **kwargs)
    # Gradients of query and key are differences of dP and delta: where these cancel, to 0 even, their rounding stays.
    delta = (grad_output * exact[0]).sum(-1).abs().max()
    cancelled = [0, *(kwargs["scale"] * delta * x.abs().max() for x in (wide[1], wide[0])), 0]
    for name, ours_x, dense_x, exact_x, size in zip(("output", "query", "key", "value"), ours, dense, exact, cancelled):
        rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps * (exact_x.abs().max() + size)
        budget = 2 * (dense_x - exact_x).abs().max() + rounding
        error = (ours_x - exact_x).abs().max()  # NaN fails too
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e} for {pattern} {kwargs}"


@contextmanager
def poisoned_memory():
    """torch.empty gives NaN, so that whatever is left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["flash", "plain"])
def kernel(request, monkeypatch):
    """Both kernels, although on the CPU the plain one is not chosen."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "kernel_for", lambda query: cpu.PLAIN)


def test_dense_oracle_equals_loops():
    for pattern in PATTERNS:
        query, key, value = make_inputs(5, 7, key_heads=2, dtype=torch.float64, dim=2, value_dim=3, batch=1)
        for causal in (True, False):
            table = dense_mask(pattern, HEADS, 5, 7, causal=causal, q_offset=2)[None]
            with torch.no_grad():
                dense = dense_attention(query, key, value, pattern, causal=causal, scale=0.7, q_offset=2)
                loops = attention_by_loops(*(x.transpose(1, 2) for x in (query, key, value)), table, 0.7)
            torch.testing.assert_close(dense, loops)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_dense(pattern, causal):
    """Lengths, offsets, grouped heads, Dqk != Dv and holes in the keys; float32 and bfloat16."""
    shapes = [
        {"dim": 8, "value_dim": 8, "key_heads": HEADS},
        {"dim": 8, "value_dim": 4, "key_heads": 2},
        {"dim": 4, "value_dim": 8, "key_heads": 1},
    ]
    with poisoned_memory():
        for case, (num_queries, num_keys, q_offset, kv_offset) in enumerate(EXTENTS):
            inputs = make_inputs(
                num_queries, num_keys, dtype=(torch.float32, torch.bfloat16)[case % 2], **shapes[case % 3]
            )
            where = {"causal": causal, "scale": 0.5, "q_offset": q_offset, "kv_offset": kv_offset}
            assert_as_exact_as_dense(pattern, inputs, **where)
            assert_as_exact_as_dense(pattern, inputs, **where, key_valid=torch.rand(BATCH, num_keys) > 0.4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "pattern",
    [
        Local(40),
        Union([Local(33), Strided(16)]),
        Fixed(64, 16, sub_blocks=4),
        Fixed(128, 8),
        Union([Strided(16), Strided(24)]),
    ],
    ids=str,
)
def test_dtypes(pattern, dtype):
    """Longer sequences: tiles of many kinds, several groups of summaries, many merges."""
    inputs = make_inputs(600, 700, dtype=dtype, dim=16, value_dim=16, key_heads=2, batch=1)
    assert_as_exact_as_dense(pattern, inputs, causal=True, scale=0.25, q_offset=100)


@pytest.mark.usefixtures("kernel")
def test_pieces(monkeypatch):
    """However the work is cut: along tiles or along the batch."""
    monkeypatch.setattr(cpu, "_PIECE", 1 << 11)
    monkeypatch.setattr(cpu, "_PIECE_SCORES", 1 << 12)
    for batch, pattern in itertools.product(
        (1, 5), (Full(), Union([Local(40), Strided(8)]), Fixed(16, 4, sub_blocks=2))
    ):
        inputs = make_inputs(90, 90, batch=batch, dtype=torch.float64, key_heads=2)
        for key_valid in (None, torch.rand(batch, 90) > 0.2):
            assert_as_exact_as_dense(pattern, inputs, causal=True, scale=0.5, q_offset=0, key_valid=key_valid)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("pattern", [Full(), FixedBlock(16), Fixed(128, 8)], ids=str)
def test_parts_that_are_the_whole_sequence(pattern):
    """Their results are the call's, whatever the batch and the order of storage, with grouped heads and Dqk != Dv."""
    for batch, by_token in itertools.product((1, 3), (True, False)):
        inputs = make_inputs(256, 256, batch=batch, key_heads=2, value_dim=4)
        if by_token:  # [B, N, H, D] lies in a row, so that batch entries can be tiles as well
            inputs = [x.detach().contiguous().requires_grad_() for x in inputs]
        with poisoned_memory():
            assert_as_exact_as_dense(pattern, inputs, causal=True, scale=0.5, q_offset=0)


def test_rows_that_see_nothing():
    """Output and gradient are exactly 0, also where every key is hidden."""
    for pattern in (Full(), FixedSummary(8, 2), Union([Local(4), Strided(4)]), Union([Strided(3), Strided(4)])):
        inputs = make_inputs(20, 20)
        key_valid = torch.ones(BATCH, 20, dtype=torch.bool)
        key_valid[0, :10] = False
        key_valid[1] = False
        where = {"causal": True, "scale": 0.5, "q_offset": 0, "key_valid": key_valid}
        output, *grads = with_gradients(
            block_sparse_attention, inputs, torch.ones(BATCH, 20, HEADS, 8), pattern=pattern, **where
        )
        assert (output[0, :10] == 0).all()
        assert (output[1] == 0).all()
        assert all((grad[1] == 0).all() for grad in grads)
        assert (grads[0][0, :10] == 0).all()
        assert all((grad[0, :10] == 0).all() for grad in grads[1:])


def test_strides():
    """Expanded and sliced inputs are read as they are."""
    query = torch.randn(BATCH, HEADS, 40, 16).transpose(1, 2)[..., :8]
    key = torch.randn(1, 40, 1, 8).expand(BATCH, 40, HEADS, 8)
    value = torch.randn(BATCH, 80, HEADS, 8)[:, ::2]
    for pattern in (Local(5), Union([Local(5), Strided(5)]), Fixed(8, 2, sub_blocks=2)):
        assert_as_exact_as_dense(pattern, [query, key, value], causal=True, scale=0.5, q_offset=0)


def test_empty_lengths():
    for num_queries, num_keys in ((0, 5), (5, 0)):
        inputs = make_inputs(num_queries, num_keys)
        output = block_sparse_attention(*inputs, Local(3), causal=True, scale=1.0, q_offset=0)
        assert output.shape == (BATCH, num_queries, HEADS, 8)
        assert (output == 0).all()
        output.sum().backward()


def test_wrong_inputs():
    query, key, value = make_inputs(5, 5)
    where = {"causal": True, "scale": 1.0, "q_offset": 0}
    with pytest.raises(ValueError, match="key must be"):
        block_sparse_attention(query, key[..., :4], value, Full(), **where)
    with pytest.raises(ValueError, match=r"value must be .* dtype of query"):
        block_sparse_attention(query, key, value.double(), Full(), **where)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3 key heads"):
        block_sparse_attention(query, key[:, :, :3], value[:, :, :3], Full(), **where)
    with pytest.raises(ValueError, match=r"key_valid must be bool \(2, 5\)"):
        block_sparse_attention(query, key, value, Full(), key_valid=torch.ones(2, 4, dtype=torch.bool), **where)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any one tensor's storage held."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "pattern",
    [Full(), Union([Local(16), Strided(32)]), Fixed(64, 8, sub_blocks=4), Union([Strided(32), Strided(48)])],
    ids=str,
)
def test_never_length_times_length(pattern, monkeypatch):
    monkeypatch.setattr(cpu, "_PIECE_SCORES", 1 << 16)
    monkeypatch.setattr(products, "_PIECE", 1 << 16)
    length = 1024
    query, key, value = (x.detach() for x in make_inputs(length, length, dim=4, value_dim=4, batch=1))
    where = (to_text(pattern), True, 0.5, 0, 0)
    cpu.plan_attention.cache_clear()
    with LargestTensor() as largest:  # it does not see inside the operator, so past it
        output, lse = cpu._forward(query, key, value, None, *where)
        cpu._backward(output, query, key, value, None, output, lse, *where)
    assert length * HEADS * 4 <= largest.elements <= length * length / 8


# ---------------------------------------------------------------------------------------------------------------------
# The operator: compile, export, and what it refuses

OPERATOR_PATTERNS = [Union([Local(5), Strided(5)]), PerHead([Local(4), Fixed(8, 2)])]


def call(query, key, value, pattern):
    return block_sparse_attention(
        query, key, value, pattern, causal=True, scale=0.5, q_offset=key.shape[1] - query.shape[1]
    )


@pytest.mark.parametrize("pattern", OPERATOR_PATTERNS, ids=str)
def test_opcheck(pattern):
    for key_valid in (None, torch.rand(BATCH, 20) > 0.3):
        inputs = make_inputs(12, 20, key_heads=2, value_dim=4)
        arguments = (*inputs, key_valid, to_text(pattern), True, 0.5, 8, 0)
        torch.library.opcheck(cpu.OPERATORS.attention.default, arguments)


def test_compile_does_not_recompile_for_each_length():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for pattern in OPERATOR_PATTERNS:
        counter.frame_count = 0
        compiled = torch.compile(call, backend=counter, fullgraph=True)
        for length, past in ((16, 0), (24, 0), (31, 7), (40, 3), (57, 21), (1, 60), (64, 0)):
            inputs = make_inputs(length, length + past)
            grad = torch.randn(BATCH, length, HEADS, 8)
            for ours, plain in zip(
                with_gradients(compiled, inputs, grad, pattern=pattern),
                with_gradients(call, inputs, grad, pattern=pattern),
            ):
                torch.testing.assert_close(ours, plain)
        assert counter.frame_count <= 5  # static, dynamic, no past, a single query, both


def test_export_with_dynamic_length():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return call(query, key, value, OPERATOR_PATTERNS[1])

    with torch.no_grad():
        length = torch.export.Dim("length", min=2, max=1024)
        inputs = make_inputs(16, 16)
        exported = torch.export.export(Attention(), tuple(inputs), dynamic_shapes=({1: length},) * 3)
        targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert cpu.OPERATORS.attention.default in targets
        for other in (5, 16, 100):
            inputs = make_inputs(other, other)
            torch.testing.assert_close(exported.module()(*inputs), call(*inputs, OPERATOR_PATTERNS[1]))


def test_second_derivative_is_refused():
    inputs = make_inputs(8, 8)
    output = call(*inputs, Local(3))
    (grad,) = torch.autograd.grad(output.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        grad.sum().backward()


def test_fixed_block_as_own_pattern_is_dense_per_block():
    """A known value: blocks of one attend to themselves alone."""
    query, key, value = make_inputs(7, 7)
    output = block_sparse_attention(query, key, value, FixedBlock(1), causal=False, scale=1.0, q_offset=0)
    torch.testing.assert_close(output, value)

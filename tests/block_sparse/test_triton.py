"""The Triton executor against dense masked attention: on a GPU, or in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from hf_tfamily.block_sparse.triton import attention, launch, views
from hf_tfamily.block_sparse.triton import call as call_module
from hf_tfamily.modeling.attention_patterns import (
    Block1D,
    Block2D,
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Intersection,
    Local,
    PerHead,
    Sink,
    Strided,
    Union,
    Window2D,
)
from tests.block_sparse.test_cpu import make_inputs, poisoned_memory, with_gradients
from tests.block_sparse.test_plan import EXTENTS, HEADS
from tests.block_sparse.triton_support import DEVICE, GivenBias, take_small_tiles, triton_attention
from tests.reference.attention import dense_attention

PATTERNS = [
    Full(),
    Local(40),
    Local(4, dilation=3),
    Union([Local(5), Local(4, dilation=4)]),
    Strided(4),
    FixedBlock(8),
    FixedSummary(8, 2, sub_blocks=4),
    Fixed(8, 2),
    Fixed(7, 2, sub_blocks=2, shift=1),
    Block1D(8, 5),
    Union([Local(5), Strided(5)]),
    Union([Local(9), FixedBlock(8)]),
    Union([Local(9), FixedSummary(8, 2, sub_blocks=4)]),
    Union([Strided(3), FixedBlock(4)]),
    Union([Strided(3), Strided(4)]),
    Union([Strided(3), Fixed(8, 2, sub_blocks=4)]),
    Union([Local(9), Sink(3)]),
    Sink(5),
    Intersection([Local(9), Strided(2)]),
    Block2D(2, 3, 1, 1).bind((12, 10, 3)),
    Window2D(4, 2).bind((12, 10)),
    PerHead([Local(5), Strided(5)]),
    PerHead([Local(3), Fixed(8, 2, sub_blocks=4), Union([Strided(3), Strided(4)]), Strided(4)]),
]
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}


def assert_as_exact_as_dense(pattern, inputs, **kwargs):
    """Our error against float64 is at most twice that of dense masked attention in the same dtype, plus rounding."""
    dtype = inputs[0].dtype
    grad_output = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], dtype=dtype)
    wide = [x.double() for x in inputs]
    exact = with_gradients(dense_attention, wide, grad_output.double(), pattern=pattern, **kwargs)
    dense = with_gradients(dense_attention, inputs, grad_output, pattern=pattern, **kwargs)
    with poisoned_memory():
        ours = with_gradients(triton_attention, inputs, grad_output, pattern=pattern, **kwargs)
    # Gradients of query and key are differences of dP and delta: where these cancel, to 0 even, their rounding stays.
    delta = (grad_output * exact[0]).sum(-1).abs().max()
    cancelled = [0, *(abs(kwargs["scale"]) * delta * x.abs().max() for x in (wide[1], wide[0])), 0]
    for name, ours_x, dense_x, exact_x, size in zip(("output", "query", "key", "value"), ours, dense, exact, cancelled):
        rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps * (exact_x.abs().max() + size)
        budget = 2 * (dense_x - exact_x).abs().max() + rounding
        error = (ours_x - exact_x).abs().max()  # NaN fails too
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e} for {pattern} {kwargs}"


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences have many of them; and no view takes the work away."""
    take_small_tiles(monkeypatch)
    monkeypatch.setattr(call_module, "view_of", lambda *_: None)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("number", range(len(PATTERNS)), ids=[str(pattern) for pattern in PATTERNS])
def test_equals_dense(number):
    """Odd lengths, offsets, grouped heads, Dqk != Dv, holes in the keys, causal or not; memory poisoned with NaN."""
    pattern = PATTERNS[number]
    num_queries, num_keys, q_offset, kv_offset = EXTENTS[3:][number % len(EXTENTS[3:])]
    dim, value_dim, key_heads = [(8, 8, HEADS), (8, 4, 2), (4, 8, 1)][number % 3]
    inputs = make_inputs(num_queries, num_keys, dim=dim, value_dim=value_dim, key_heads=key_heads, batch=2)
    key_valid = torch.rand(2, num_keys) > 0.4 if number % 2 else None
    where = {"q_offset": q_offset, "kv_offset": kv_offset, "key_valid": key_valid}
    assert_as_exact_as_dense(pattern, inputs, causal=number % 4 > 0, scale=0.5, **where)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_dense_in_every_extent(pattern):
    for case, (num_queries, num_keys, q_offset, kv_offset) in enumerate(EXTENTS):
        inputs = make_inputs(num_queries, num_keys, key_heads=(HEADS, 2)[case % 2], batch=1)
        where = {"q_offset": q_offset, "kv_offset": kv_offset}
        assert_as_exact_as_dense(pattern, inputs, causal=case % 3 > 0, scale=0.5, **where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "pattern",
    [Full(), Union([Local(33), Strided(16)]), Fixed(32, 8, sub_blocks=2), Union([Strided(5), Strided(7)])],
    ids=str,
)
def test_dtypes(pattern, dtype):
    """With the tiles that a GPU would get."""
    inputs = make_inputs(100, 120, dtype=dtype, dim=16, value_dim=24, key_heads=2, batch=1)
    assert_as_exact_as_dense(pattern, inputs, causal=True, scale=0.25, q_offset=20)


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (64, 128), (24, 8)], ids=str)
def test_head_dimensions(dims):
    inputs = make_inputs(40, 40, dtype=torch.bfloat16, dim=dims[0], value_dim=dims[1], key_heads=2, batch=1)
    assert_as_exact_as_dense(Fixed(16, 4), inputs, causal=True, scale=dims[0] ** -0.5, q_offset=0)


@pytest.mark.parametrize("dims", [(192, 192), (256, 256), (192, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wide_head_dimensions(dims, dtype):
    """Through both kinds of walks and a table, with the tiles that a GPU would get; padded keys."""
    inputs = make_inputs(20, 20, dtype=dtype, dim=dims[0], value_dim=dims[1], key_heads=2, batch=1)
    where = {"causal": True, "scale": dims[0] ** -0.5, "q_offset": 0, "key_valid": torch.arange(20)[None] > 2}
    for pattern in (Union([Local(5), FixedSummary(8, 2)]), Union([Strided(3), Strided(4)])):
        assert_as_exact_as_dense(pattern, inputs, **where)


def dense_on_a_cpu(query, key, value, causal, scale):
    """As the dense kernels of GPUs: attention of [B, H, N, D] over [B, Hk, N, D], with LSE [B, H, N]."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def dense_gradients_on_a_cpu(grad_output, query, key, value, output, lse, causal, scale):
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        found, _ = dense_on_a_cpu(*inputs, causal, scale)
    torch.testing.assert_close(found.detach(), output)
    return torch.autograd.grad(found, inputs, grad_output)


@pytest.mark.skipif(DEVICE == "cuda", reason="scripts/gpu_check.py checks the real ones")
def test_views_equal_dense(monkeypatch):
    """Full, Strided and FixedBlock go to a dense kernel, whatever the strides, with grouped heads."""
    stand_in = views._DenseKernel(dense_on_a_cpu, dense_gradients_on_a_cpu)
    monkeypatch.setitem(views.DENSE_KERNELS, "stand-in", stand_in)
    monkeypatch.setattr(views, "dense_kernel", lambda *_: "stand-in")
    for pattern, causal in ((Full(), True), (Strided(4), True), (Strided(4), False), (FixedBlock(8), True)):
        inputs = make_inputs(64, 64, dim=16, value_dim=16, key_heads=2)
        call = attention.Call.of(*inputs, None, text(pattern), causal, 0.5, 0, 0)
        assert call.view is not None
        assert_as_exact_as_dense(pattern, inputs, causal=causal, scale=0.5, q_offset=0)


def text(pattern):
    from hf_tfamily.block_sparse.patterns import to_text

    return to_text(pattern)


def test_one_query_reads_what_it_can_reach(monkeypatch):
    """Decoding: as many tiles of keys as the reach needs, whatever the length."""
    walks = []
    original = launch._row_walk
    monkeypatch.setattr(launch, "_row_walk", lambda *a: walks.append(original(*a)) or walks[-1])
    for pattern, tiles in ((Local(100), 2), (Strided(64), 1), (Union([Local(64), Strided(64)]), 2), (Fixed(64, 4), 2)):
        walks.clear()
        inputs = make_inputs(1, 1000, dtype=torch.bfloat16, dim=16, value_dim=16, key_heads=2, batch=1)
        assert_as_exact_as_dense(pattern, inputs, causal=True, scale=0.25, q_offset=999)
        items = torch.cat([walk.items for walk in walks[: len(walks) // 2]])  # the forward; the rest is the backward
        assert int(items[:, [8, 9, 10, 13, 14, 15]].sum()) <= tiles


def test_rows_that_see_nothing():
    """Output and gradient are exactly 0, also where every key is hidden; the LSE is +inf."""
    for pattern in (FixedSummary(8, 2), Union([Local(4), Strided(4)]), Union([Strided(3), Strided(4)])):
        inputs = make_inputs(20, 20)
        key_valid = torch.ones(2, 20, dtype=torch.bool)
        key_valid[0, :10] = False
        key_valid[1] = False
        where = {"causal": True, "scale": 0.5, "q_offset": 0, "key_valid": key_valid}
        with poisoned_memory():
            output, *grads = with_gradients(
                triton_attention, inputs, torch.ones(2, 20, HEADS, 8), pattern=pattern, **where
            )
        assert (output[0, :10] == 0).all()
        assert (output[1] == 0).all()
        assert all((grad[1] == 0).all() for grad in grads)
        assert (grads[0][0, :10] == 0).all()
        tensors = (x.detach().to(DEVICE) for x in (*inputs, key_valid))
        _, lse = attention.forward(*tensors, text(pattern), True, 0.5, 0, 0)
        assert (lse[1] == float("inf")).all()


def test_uneven_keys_are_split(monkeypatch):
    """Summary positions that all later queries see: several programs share a tile of keys, in a fixed order."""
    from hf_tfamily.block_sparse.triton import layout as layout_module

    monkeypatch.setattr(layout_module, "_SPLIT_TILES", 1)
    monkeypatch.setattr(layout_module, "_UNEVEN", 0)
    inputs = make_inputs(100, 100, dim=16, value_dim=16, key_heads=2, batch=1)
    for pattern in (Fixed(16, 4, sub_blocks=2), Union([Local(8), Strided(16)])):
        launch._key_walk.cache_clear()
        assert_as_exact_as_dense(pattern, inputs, causal=True, scale=0.25, q_offset=0)
    launch._key_walk.cache_clear()


def test_the_backward_is_deterministic():
    inputs = make_inputs(90, 90, key_heads=2)
    grad = torch.randn(2, 90, HEADS, 8)
    where = {"pattern": Fixed(8, 2, sub_blocks=2), "causal": True, "scale": 0.5, "q_offset": 0}
    first, second = (with_gradients(triton_attention, inputs, grad, **where) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_strides():
    """Expanded, sliced and permuted inputs are read as they are."""
    query = torch.randn(2, HEADS, 40, 16).transpose(1, 2)[..., :8]
    key = torch.randn(1, 40, 1, 8).expand(2, 40, HEADS, 8)
    value = torch.randn(8, 80, HEADS, 2).permute(3, 1, 2, 0)[:, ::2]
    for pattern in (Local(5), Union([Local(5), Strided(5)]), Fixed(8, 2, sub_blocks=2)):
        assert_as_exact_as_dense(pattern, [query, key, value], causal=True, scale=0.5, q_offset=0)


def test_empty_lengths():
    for num_queries, num_keys in ((0, 5), (5, 0)):
        inputs = make_inputs(num_queries, num_keys)
        output, *grads = with_gradients(
            triton_attention,
            inputs,
            torch.ones(2, num_queries, HEADS, 8),
            pattern=Local(3),
            causal=True,
            scale=1.0,
            q_offset=0,
        )
        assert all((x == 0).all() for x in (output, *grads))


@pytest.mark.parametrize(
    ("pattern", "dim"), [(Local(12), 8), (Union([Local(5), Strided(5)]), 8), (Local(12), 192)], ids=str
)
def test_bias_by_distance(pattern, dim):
    """A bias of each distance, read by strides, and its gradient: Transformer-XL's relative scores."""
    length, memory = 40 if dim == 8 else 20, 17
    scale = dim**-0.5
    inputs = make_inputs(length, length + memory, dim=dim, value_dim=dim, batch=2)
    call = attention.Call.of(*inputs, None, text(pattern), True, scale, memory, 0)
    launches = [launch for launches in call.launches for launch in launches]
    biases = [torch.randn(2, HEADS, length, (length + memory) // launch.step + 1) for launch in launches]
    wide = [bias.double().requires_grad_() for bias in biases]
    grad_output = torch.randn(2, length, HEADS, dim)

    def oracle(query, key, value):
        distance = memory + torch.arange(length)[:, None] - torch.arange(length + memory)
        scores = query.transpose(1, 2) @ key.transpose(1, 2).mT * scale
        seen = torch.zeros_like(distance, dtype=torch.bool)
        for part, bias in zip((Local(12),) if len(biases) == 1 else (Local(5), Strided(5)), wide):
            step = getattr(part, "stride", 1)
            mine = part.visible(0, distance, torch.tensor(0)) & (distance >= 0) & ~seen
            index = (distance.clamp(min=0) // step).expand(2, HEADS, -1, -1)
            scores = scores + torch.where(mine, bias.gather(3, index.clamp(max=bias.shape[3] - 1)), 0)
            seen = seen | mine
        return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)

    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = oracle(*exact_inputs)
    exact_grads = torch.autograd.grad(exact, [*exact_inputs, *wide], grad_output.double())
    biases = [bias.to(DEVICE) for bias in biases]
    where = {"causal": True, "scale": scale, "q_offset": memory, "bias": GivenBias(biases)}
    ours = with_gradients(triton_attention, inputs, grad_output, pattern=pattern, **where)
    for mine, true in zip((*ours, *(bias.grad.double().cpu() for bias in biases)), (exact.detach(), *exact_grads)):
        torch.testing.assert_close(mine, true, atol=2e-5, rtol=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and the operator


def test_wrong_inputs():
    def attend(inputs, pattern=None):
        where = (text(pattern or Local(3)), True, 1.0, 0, 0)
        attention.forward(*(x.to(DEVICE) for x in inputs), None, *where)

    with pytest.raises(
        ValueError, match=r"runs float16, bfloat16 and float32, got torch.float64; use 'eager' or 'sdpa'"
    ):
        attend(make_inputs(5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="head dimensions up to 256, got a head dimension of 264; use 'sdpa'"):
        attend(make_inputs(5, 5, dim=264))
    with pytest.raises(ValueError, match="head dimension of values of 264"):
        attend(make_inputs(5, 5, value_dim=264))
    with pytest.raises(ValueError, match="PerHead deals out 3 patterns"):
        attend(make_inputs(5, 5), PerHead([Local(3), Local(4), Local(5)]))
    with pytest.raises(ValueError, match="counts the elements of one sequence in 32 bits"):
        call_module._check(*(torch.empty(1, 1 << 16, 1, 1 << 15, device="meta")[..., :8],) * 3)


def run(code, **environment):
    import os

    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **environment})
    return result.stdout + result.stderr


@pytest.mark.slow
def test_triton_missing_old_or_without_a_gpu():
    code = """
import sys, types
{before}
import torch
from hf_tfamily.block_sparse.triton import attention
x = torch.zeros(1, 4, 1, 16)
try:
    attention.forward(x, x, x, None, '[{{"type": "local", "window": 2}}, null]', True, 1.0, 0, 0)
except (ImportError, ValueError) as error:
    print("refused:", error)
"""
    missing = run(code.format(before="sys.modules['triton'] = None"))
    assert "refused: attn_implementation='block_sparse' on a GPU needs triton; install triton>=3.6, or use" in missing
    old = run(code.format(before="import triton; triton.__version__ = '3.5.1'"))
    assert "needs triton>=3.6, got 3.5.1; upgrade it (with torch), or use 'sdpa'" in old
    if DEVICE == "cpu":
        assert "refused: Triton kernels run on cuda, got tensors on cpu" in run(code.format(before=""))


@pytest.mark.slow
def test_a_model_trains_on_the_executor():
    """The operator's implementation for a device, end to end: compile's fake, autograd, AMP; equal to eager."""
    code = """
import torch
from hf_tfamily.block_sparse.triton.attention import register_on
from hf_tfamily.modeling.configuration_sparse_transformer import SparseTransformerConfig
from hf_tfamily.modeling.modeling_sparse_transformer import SparseTransformerForCausalLM
register_on("cpu")
torch.manual_seed(0)
patterns = [{"type": "local", "window": 5}, {"type": "strided", "stride": 8}]
patterns.append({"type": "fixed", "block": 8, "summary": 2})
config = SparseTransformerConfig(vocab_size=17, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                                 attention_patterns=patterns, tie_word_embeddings=True)
model = SparseTransformerForCausalLM(config)
ids = torch.randint(17, (2, 48))
grads = {}
for name in ("block_sparse", "eager"):
    model.set_attn_implementation(name)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    grads[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
for ours, eager in zip(*grads.values()):
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)
model.set_attn_implementation("block_sparse")
compiled = torch.compile(model, backend="aot_eager")
torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
with torch.autocast("cpu", torch.bfloat16):
    assert torch.isfinite(model(ids, labels=ids).loss)
from hf_tfamily.block_sparse.triton import call
assert call.kernels.cache_info().hits > 3
print("equal")
"""
    output = run(code, TRITON_INTERPRET="1")
    assert "equal" in output, output[-3000:]

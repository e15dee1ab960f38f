"""A bias by distance in the Triton kernels against dense attention in float64: output, LSE and all four gradients."""

import pytest
import torch

pytest.importorskip("triton")

from transformers import AutoModelForCausalLM

from hf_tfamily.block_sparse.patterns import to_text
from hf_tfamily.block_sparse.triton import call
from hf_tfamily.block_sparse.triton import distance_bias as triton_distance_bias
from hf_tfamily.modeling.attention_patterns import (
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
)
from tests.block_sparse.test_cpu import poisoned_memory
from tests.block_sparse.test_distance_bias import BATCH, HEADS, NAMES, dense, make_inputs, ours, with_gradients
from tests.block_sparse.triton_support import DEVICE, assert_as_exact, models_on_triton, take_small_tiles
from tests.tiny_models import tiny_model

PATTERNS = [
    Full(),
    Local(9),
    Local(4, dilation=3),
    Strided(4),
    Union([Local(9), Strided(4)]),
    Union([Local(9), Sink(3)]),
    Fixed(8, 2, sub_blocks=2),
    FixedSummary(8, 2),
    PerHead([Local(5), FixedBlock(8)]),
    Union([Strided(3), Strided(4)]),
    Intersection([Local(20), Strided(2)]),
]
# Those of the quick tier have each kind of source, pass and table once.
QUICK = [(Local(9), True), (Fixed(8, 2, sub_blocks=2), True), (Local(4, dilation=3), False), (PATTERNS[-1], False)]
CASES = [
    pytest.param(pattern, causal, marks=[] if (pattern, causal) in QUICK else pytest.mark.slow)
    for pattern in PATTERNS
    for causal in (True, False)
]
ON_TRITON = {"biased_attention", "biased_attention_backward"}


def on_triton(*inputs, **kwargs):
    """As `ours`, on the device of the kernels."""
    tensors = [x.to(DEVICE) if i < 4 else x for i, x in enumerate(inputs)]
    valid = kwargs.pop("key_valid", None)
    output, lse = ours(*tensors, key_valid=None if valid is None else valid.to(DEVICE), **kwargs)
    return output.cpu(), lse.cpu()


def assert_as_exact_as_dense(pattern, *extent, dtype=torch.float32, causal=True, key_valid=None, **kwargs):
    """Our error against float64 is at most twice that of dense attention in the same dtype, plus rounding."""
    inputs, distances = make_inputs(*extent, dtype=dtype, **kwargs)
    how = {"scale": 0.4, "causal": causal, "q_offset": extent[2], "key_valid": key_valid}
    exact = with_gradients(dense, [x.double() for x in inputs], distances, pattern, **how)
    theirs = with_gradients(dense, inputs, distances, pattern, **how)
    with poisoned_memory(), models_on_triton() as ran:
        mine = with_gradients(on_triton, inputs, distances, pattern, **how)
    assert ran == ON_TRITON or DEVICE == "cuda"
    assert_as_exact(NAMES, mine, theirs, exact, dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    take_small_tiles(monkeypatch)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("pattern", "causal"), CASES, ids=str)
def test_equals_dense(pattern, causal):
    """Queries after a past, with holes in the keys, grouped heads, and keys ahead where it is not causal."""
    valid = torch.rand(BATCH, 57) > 0.3
    assert_as_exact_as_dense(pattern, 40, 57, 17, causal=causal, key_valid=valid, key_heads=2, dims=(6, 3))


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_dense_in_other_extents(pattern):
    for extent in ((1, 1, 0), (2, 30, 28), (33, 33, 0), (20, 40, 10)):
        for causal in (True, False):
            assert_as_exact_as_dense(pattern, *extent, causal=causal, rows=1 if causal else HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Union([Local(9), Strided(4)]), Fixed(8, 2)], ids=str)
def test_dtypes(pattern, dtype):
    """With the tiles that a GPU would get."""
    assert_as_exact_as_dense(pattern, 50, 70, 20, dtype=dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_queries_are_taken_some_at_a_time(monkeypatch):
    """However few gradients of scores may be held at once: the same gradients."""
    pattern = Union([Local(9), Strided(4)])
    inputs, distances = make_inputs(40, 57, 17, dtype=torch.float32, batch=1)
    how = {"scale": 0.4, "causal": True, "q_offset": 17}
    with models_on_triton():
        whole = with_gradients(on_triton, inputs, distances, pattern, **how)
        monkeypatch.setattr(triton_distance_bias, "_SCORES", 1)
        monkeypatch.setattr(triton_distance_bias, "_LEAST_ROWS", 16)
        pieces = with_gradients(on_triton, inputs, distances, pattern, **how)
    for name, one, other in zip(NAMES, whole, pieces):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.usefixtures("small_tiles")
def test_a_table_that_does_not_learn_costs_no_queries_times_keys(monkeypatch):
    """As ALiBi's: its bias is one row for all queries, and no gradient of scores is kept."""
    inputs, distances = make_inputs(40, 57, 17, dtype=torch.float32)
    largest = []
    of = triton_distance_bias._TableBias.of

    def noted(bias, launch):
        found = of(bias, launch)
        largest.append(found.untyped_storage().nbytes() // 4)
        return found

    monkeypatch.setattr(triton_distance_bias._TableBias, "of", noted)
    monkeypatch.setattr(
        triton_distance_bias._TableBias, "take_gradient", lambda *_: pytest.fail("a gradient that nobody asked for")
    )
    *tensors, table = inputs
    with models_on_triton():
        output, _ = on_triton(*tensors, table.detach(), distances, Full(), scale=0.4, causal=True, q_offset=17)
        output.sum().backward()
    assert tensors[0].grad is not None
    assert max(largest) == HEADS * 64


@pytest.mark.parametrize("causal", [True, False])
def test_distances_of_a_pass(causal):
    """No more than it reaches, in its own steps, rounded up to 16; ahead only where it is not causal."""
    for pattern, ranges in (
        (Local(20), [(range(32), range(-19, 29))]),
        (Strided(32), [(range(16), range(-3, 13))]),
        (Full(), [(range(256), range(-127, 257))]),
    ):
        query, key = torch.zeros(1, 128, 2, 16), torch.zeros(1, 256, 2, 16)
        made = call.Call.of(query, key, key, None, to_text(pattern), causal, 1.0, 128, 0)
        launches = [launch for launches in made.launches for launch in launches]
        assert [call.pass_distances(launch) for launch in launches] == [either[not causal] for either in ranges]


@pytest.mark.parametrize("position_encoding", ["alibi", pytest.param("t5", marks=pytest.mark.slow)])
def test_models(position_encoding):
    """Loss and gradients of a RoPE decoder with either bias, against eager."""
    model = tiny_model("rope_decoder", AutoModelForCausalLM, position_encoding=position_encoding).to(DEVICE)
    assert_equals_eager(model)


def assert_equals_eager(model):
    ids = torch.randint(1, model.config.vocab_size, (2, 24), device=DEVICE)
    mask, targets = torch.ones_like(ids), ids.clone()
    mask[0, :5], targets[0, :6] = 0, -100  # what padding predicts is anything
    found = {}
    for implementation in ("eager", "block_sparse"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with models_on_triton() as ran:
            loss = model(ids, attention_mask=mask, labels=targets).loss
            loss.backward()
        found[implementation] = {n: p.grad.clone() for n, p in model.named_parameters()} | {"loss": loss.detach()}
    assert ran >= ON_TRITON or DEVICE == "cuda"
    for name, theirs in found["eager"].items():
        torch.testing.assert_close(found["block_sparse"][name], theirs, atol=2e-5, rtol=1e-4, msg=name)

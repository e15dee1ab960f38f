"""Global tokens in the engine: outputs, gradients and log-sum-exps equal eager's, and no row costs queries x keys."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_tfamily.block_sparse import block_sparse_attention_forward
from hf_tfamily.block_sparse.global_tokens import pick
from hf_tfamily.modeling.attention import VisibleKeys, eager_attention_forward, visible_keys
from hf_tfamily.modeling.attention_patterns import Local
from tests.pattern_examples import EXAMPLES

BATCH, HEADS, LENGTH, DIM = 3, 4, 37, 8
CPU = torch.device("cpu")


def marks(*rows):
    """[B, T] bool, True at the places that each row lists."""
    marked = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for row, places in enumerate(rows):
        marked[row, list(places)] = True
    return marked


MARKS = {
    "different numbers": marks([0, 5, 36], [17], []),
    "all": torch.ones(BATCH, LENGTH, dtype=torch.bool),
    "none": marks([], [], []),
    "first": marks([0], [0], [0]),
}
PADDING = torch.ones(BATCH, LENGTH, dtype=torch.long)
PADDING[0, :5] = PADDING[1, 30:] = 0
PACKED = torch.cat([torch.arange(10), torch.arange(20), torch.arange(7)])[None]
ROWS = {"plain": {}, "padded": {"attention_mask": PADDING}, "packed": {"position_ids": PACKED}}


def seen_of(pattern, marked, causal=False, **rows) -> VisibleKeys:
    seen = visible_keys(pattern, HEADS, torch.empty(BATCH, LENGTH, 1), causal=causal, **rows)
    return replace(seen, global_tokens=marked)


def module():
    made = nn.Module().eval()
    made.config = SimpleNamespace(_attn_implementation="eager")
    return made


def run(function, mask, seen, dtype=torch.float64, key_heads=2):
    """Output and log-sum-exp of tokens, and gradients of a sum of both."""
    torch.manual_seed(0)
    sizes = [(BATCH, heads, LENGTH, DIM) for heads in (HEADS, key_heads, key_heads)]
    leaves = [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]
    output, lse = function(module(), *leaves, mask, scaling=0.5, return_lse=True)
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool) if seen.key_valid is None else seen.key_valid
    output, lse = output[valid], lse.transpose(1, 2)[valid]
    finite = lse.masked_fill(lse.isneginf(), 0.0)
    weighted = (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)).sum() + finite.sin().sum()
    weighted.backward()
    return [output.detach(), lse.detach(), *(leaf.grad for leaf in leaves)]


def assert_equal(seen, atol=1e-9, **how):
    ours = run(block_sparse_attention_forward, seen, seen, **how)
    law = run(eager_attention_forward, seen.dense(CPU), seen, key_heads=how.get("key_heads", 2))
    for found, expected in zip(ours, law):
        torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_eager_under_every_pattern(pattern, causal):
    assert_equal(seen_of(pattern, MARKS["different numbers"], causal))


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 1])
def test_equals_eager_in_every_row(name, rows, causal, key_heads):
    assert_equal(seen_of(Local(3), MARKS[name], causal, **ROWS[rows]), key_heads=key_heads)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("rows", ROWS)
def test_half_precision(dtype, atol, rows):
    assert_equal(seen_of(Local(3), MARKS["different numbers"], **ROWS[rows]), atol, dtype=dtype)


def test_a_bound_on_their_number_changes_nothing():
    seen = seen_of(Local(3), MARKS["different numbers"])
    assert_equal(replace(seen, most_global=3))
    assert_equal(replace(seen, most_global=9))


def test_picked_tokens_are_put_back():
    marked = MARKS["different numbers"]
    picked, states = pick(marked, 4), torch.randn(BATCH, LENGTH, 2)
    assert picked.index.shape == (BATCH, 4)
    assert torch.equal(picked.put(states, picked.of(states)), states)
    found = picked.put(states, torch.zeros(BATCH, 4, 2))
    assert torch.equal(found, states.masked_fill(marked[..., None], 0.0))


def test_no_tensor_is_queries_by_keys():
    """Of what a call makes, nothing has as many elements as there are pairs."""
    length, largest = 2048, 0
    query, key, value = (torch.randn(1, 2, length, 8) for _ in range(3))
    seen = visible_keys(Local(5), 2, torch.empty(1, length, 1), causal=False)
    marked = torch.zeros(1, length, dtype=torch.bool)
    marked[0, :2] = True

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return made

    with Largest():
        block_sparse_attention_forward(module(), query, key, value, replace(seen, global_tokens=marked))
    assert largest < length * length // 4

"""The PyTorch executor on a device that is neither a CPU nor CUDA: here a pretended one, whose tensors the host holds.

No operator may mix its tensors with the CPU's, as on a real device, nor reach for the flash kernel of CPUs; what comes
out, forward and backward, is what a CPU computes.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_tfamily.block_sparse import cpu, relative
from hf_tfamily.block_sparse.cpu import NAMESPACE, OPERATORS
from hf_tfamily.block_sparse.patterns import to_text
from hf_tfamily.modeling.attention_patterns import distances_met
from tests.block_sparse.test_plan import HEADS, PATTERNS
from tests.pattern_examples import EXAMPLES

EXECUTORS = {
    "attention": cpu._forward,
    "attention_backward": cpu._backward,
    "relative_attention": relative._forward,
    "relative_attention_backward": relative._backward,
}
MAY_MIX = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
BATCH, LENGTH, DIM = 2, 40, 8


class OnDevice(torch.Tensor):
    """A tensor that says it is on a device without a kernel of its own (meta, the only one that every torch knows)."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnDevice":
        where = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **where, device="meta")
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with PretendedDevice() as device:
            return device.run(func, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """Runs what concerns the device on what the host holds."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func.namespace == NAMESPACE:
            with self:
                return EXECUTORS[func.overloadpacket.__name__](*args, **kwargs)
        on_device = [isinstance(x, OnDevice) for x in given]
        mixed = any(on_device) and not all(mine or x.dim() == 0 for mine, x in zip(on_device, given))
        assert not mixed or func in MAY_MIX, f"{func} mixes devices"
        assert "for_cpu" not in func.overloadpacket.__name__ or not any(on_device), f"{func} is of CPUs"
        wanted = kwargs.get("device")
        leaves = any(on_device) if wanted is None else torch.device(wanted).type == "meta"
        kwargs = {**kwargs, "device": torch.device("cpu")} if wanted is not None else kwargs
        held = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, kwargs))
        result = func(*held[0], **held[1])
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        return tree_map(lambda x: OnDevice(x) if leaves and isinstance(x, torch.Tensor) else x, result)


def on_device(x):
    return OnDevice(x.clone()) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x


def assert_the_same(name, arguments, gradient, stays=()):
    """An operator and its backward, on both; `stays`: arguments that are on the CPU everywhere."""
    moved = [x if number in stays else on_device(x) for number, x in enumerate(arguments)]
    forward, backward = getattr(OPERATORS, name), getattr(OPERATORS, f"{name}_backward")
    tensors = sum(isinstance(x, torch.Tensor) or x is None for x in arguments)

    def run(given, grad_output):
        output, lse = forward(*given)
        return [output, lse, *backward(grad_output, *given[:tensors], output, lse, *given[tensors:])]

    with torch.no_grad():
        ours = run(arguments, gradient)
        with PretendedDevice():
            theirs = run(moved, on_device(gradient))
    assert all(isinstance(x, OnDevice) and x.device.type == "meta" for x in theirs)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(other.held, mine, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_attention(pattern):
    for causal, key_valid in ((True, None), (False, torch.rand(BATCH, LENGTH) > 0.3)):
        tensors = [torch.randn(BATCH, LENGTH, heads, DIM) for heads in (HEADS, 2, 2)]
        arguments = [*tensors, key_valid, to_text(pattern), causal, 0.5, 0, 0]
        assert_the_same("attention", arguments, torch.randn(BATCH, LENGTH, HEADS, DIM))


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
def test_attention_with_scores_by_distance(pattern):
    distances = distances_met(pattern, LENGTH)
    tensors = [torch.randn(BATCH, LENGTH, HEADS, DIM) for _ in range(4)]
    by_distance = torch.randn(HEADS, len(distances), DIM)
    arguments = [*tensors, by_distance, distances, None, to_text(pattern), 0.5, 0, 0]
    assert_the_same("relative_attention", arguments, torch.randn(BATCH, LENGTH, HEADS, DIM), stays=(5,))


def test_the_pretended_device_notices():
    tensor = OnDevice(torch.randn(1, 1, 4, 8))
    with pytest.raises(AssertionError, match="mixes devices"):
        tensor + torch.randn(1, 1, 4, 8)
    with pytest.raises(AssertionError, match="is of CPUs"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(tensor, tensor, tensor)


@pytest.mark.parametrize("device", ["CPU", "CUDA", "MPS", "XPU", "PrivateUse1", "HPU"])
def test_the_operators_are_registered_everywhere(device):
    for name in EXECUTORS:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device)

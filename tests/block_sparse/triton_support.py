"""Shared by the tests of the Triton executor: it as an autograd function, on a GPU or in Triton's interpreter."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_tfamily.block_sparse.cpu import NAMESPACE
from hf_tfamily.block_sparse.triton import attention, call, distance_bias
from hf_tfamily.block_sparse.triton import relative as triton_relative
from hf_tfamily.block_sparse.triton.tiles import Tile
from hf_tfamily.modeling.attention_patterns import grid_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

OPERATORS = {
    "attention": attention.forward,
    "attention_backward": attention.backward,
    "biased_attention": distance_bias.forward,
    "biased_attention_backward": distance_bias.backward,
    "relative_attention": triton_relative.forward,
    "relative_attention_backward": triton_relative.backward,
}


@contextmanager
def models_on_triton() -> Iterator[set[str]]:
    """On a CPU too the operators run Triton, as on a GPU; gives the names of those that ran (there: nothing)."""
    ran = set()

    def noted(name: str):
        def run(*args):
            ran.add(name)
            return OPERATORS[name](*args)

        return run

    with torch.library._scoped_library(NAMESPACE, "IMPL") as library:
        for name in OPERATORS if DEVICE == "cpu" else ():
            library.impl(name, noted(name), "CPU")
        yield ran


ROUNDINGS = {torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}


def take_small_tiles(monkeypatch) -> None:
    """Tiles so small that short sequences have many of them."""

    def tile_for(kernel, walk, *_):
        return Tile(16, 16 if "table" in walk else 32, 4, 1)

    monkeypatch.setattr(call, "tile_for", tile_for)


def assert_as_exact(names, ours, theirs, exact, dtype: torch.dtype) -> None:
    """Our errors against float64 are at most twice those of dense attention in the same dtype, plus rounding."""
    for name, mine, other, true in zip(names, ours, theirs, exact, strict=True):
        assert torch.equal(mine.isinf(), true.isinf()), name
        mine, other, true = (x.masked_fill(true.isinf(), 0.0) for x in (mine, other, true))
        budget = 2 * (other - true).abs().max() + ROUNDINGS[dtype] * torch.finfo(dtype).eps * (1 + true.abs().max())
        error = (mine - true).abs().max()  # NaN fails too
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"


class GivenBias:
    """A bias [B, H, T, distances] for each pass, in their order; gradients are left in their `.grad`."""

    has_gradient = True

    def __init__(self, biases):
        self.biases = biases
        self.launches = []

    def of(self, launch):
        if not any(launch is known for known in self.launches):
            self.launches.append(launch)
        return self.biases[self._number(launch)]

    def take_gradient(self, launch, gradient):
        self.biases[self._number(launch)].grad = gradient

    def _number(self, launch):
        return next(number for number, known in enumerate(self.launches) if known is launch)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_valid, bias, *rest):
        output, lse = attention.forward(query, key, value, key_valid, *rest, bias)
        ctx.save_for_backward(query, key, value, key_valid, output, lse)
        ctx.rest, ctx.bias = rest, bias
        ctx.mark_non_differentiable(lse)  # models_on_triton is for its gradient
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, _grad_lse):
        grads = attention.backward(grad_output, *ctx.saved_tensors, *ctx.rest, bias=ctx.bias)
        return *grads, *[None] * 7


def triton_attention(
    query, key, value, pattern, *, causal, scale, q_offset, kv_offset=0, key_valid=None, bias=None, return_lse=False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As cpu.block_sparse_attention."""
    text = json.dumps([pattern.to_dict(), grid_of(pattern)])
    where = (text, causal, scale, q_offset, kv_offset)
    inputs = (x if x is None else x.to(DEVICE) for x in (query, key, value, key_valid))
    output, lse = (x.to(query.device) for x in _Attention.apply(*inputs, bias, *where))
    return (output, lse) if return_lse else output

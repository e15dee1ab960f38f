"""Shared by the tests of the Triton executor: it as an autograd function, on a GPU or in Triton's interpreter."""

import json

import torch

from hf_tfamily.modeling import attention_triton
from hf_tfamily.modeling.attention_patterns import grid_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_valid, biases, *rest):
        output, lse = attention_triton.forward(query, key, value, key_valid, *rest, biases)
        ctx.save_for_backward(query, key, value, key_valid, output, lse)
        ctx.rest, ctx.biases = rest, biases
        return output

    @staticmethod
    def backward(ctx, grad_output):
        grads = attention_triton.backward(grad_output, *ctx.saved_tensors, *ctx.rest, ctx.biases)
        for bias, grad in zip(ctx.biases, grads[3:]):
            bias.grad = grad
        return *grads[:3], *[None] * 7


def triton_attention(
    query, key, value, pattern, *, causal, scale, q_offset, kv_offset=0, key_valid=None, biases=()
) -> torch.Tensor:
    """As attention_torch.block_sparse_attention; gradients of `biases` are left in their `.grad`."""
    text = json.dumps([pattern.to_dict(), grid_of(pattern)])
    where = (text, causal, scale, q_offset, kv_offset)
    inputs = (x if x is None else x.to(DEVICE) for x in (query, key, value, key_valid))
    return _Attention.apply(*inputs, biases, *where).to(query.device)

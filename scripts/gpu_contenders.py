"""What gpu_check.py compares with: dense SDPA pinned to one backend, and FlexAttention in every form that may help it.

A contender takes query, key, value [B, N, H, D] and gives the output [B, N, H, Dv]. Names that begin with "flex*" are
FlexAttention with other blocks than 128 x 128, or on a view. Learned sinks are applied to FlexAttention's output by its
log-sum-exp; SDPA has none, and its row is without them.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_shapes import Shape
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from hf_tfamily.modeling.attention import VisibleKeys
from hf_tfamily.modeling.attention_patterns import Full, Strided

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
HINTS = {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True, "BLOCKS_ARE_CONTIGUOUS": False}


def dense(query, key, value, backend: SDPBackend) -> torch.Tensor:
    with sdpa_kernel(backend):
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        grouped = {"enable_gqa": True} if query.shape[2] != key.shape[2] else {}
        return F.scaled_dot_product_attention(*tensors, is_causal=True, **grouped).transpose(1, 2)


def sdpa_contenders(is_gpu: bool) -> dict[str, Callable]:
    backends = SDPA if is_gpu else {"math": SDPBackend.MATH}
    return {f"sdpa {name}": partial(dense, backend=backend) for name, backend in backends.items()}


def _tiles(rows: int, columns: int) -> dict[str, int]:
    """Options for blocks of rows x columns, which FlexAttention's tiles must divide, forward and backward."""
    row, column = min(rows, 64), min(columns, 64)
    backward = {"bwd_BLOCK_M1": column, "bwd_BLOCK_N1": column, "bwd_BLOCK_M2": row, "bwd_BLOCK_N2": column}
    return {"fwd_BLOCK_M": rows, "fwd_BLOCK_N": column, **backward}


def flex_contenders(shape: Shape, heads: int, length: int, device: torch.device, every: bool) -> dict[str, Callable]:
    """Makers of contenders, likeliest first; nothing is built before a maker is called. Not `every`: as it comes."""
    pattern = shape.pattern
    views = {"flex* on the view": partial(_flex_on_view, pattern, length, device)} if _has_view(pattern, length) else {}
    by_block = partial(_flex, shape, heads, length, device)
    makers = {
        "flex": by_block,
        "flex, hints": partial(by_block, options=HINTS),
        "flex* 64 x 64": partial(by_block, block=(64, 64), options={**HINTS, **_tiles(64, 64)}),
        **views,
        "flex* 128 x 32": partial(by_block, block=(128, 32), options={**HINTS, **_tiles(128, 32)}),
        "flex, TMA": partial(by_block, options={**HINTS, "USE_TMA": True}),
        "flex, autotuned": partial(by_block, options=HINTS, mode="max-autotune-no-cudagraphs"),
    }
    return makers if every else {"flex": makers["flex"]}


def _flex(shape: Shape, heads: int, length: int, device, block=(128, 128), options=None, mode=None) -> Callable:
    seen = VisibleKeys(shape.pattern, heads, True, 1, length, length)
    mask_heads = heads if shape.pattern.head_period > 1 else None
    built = seen.block_mask(device)
    if block != (128, 128):  # 64k tokens eagerly would hold all pairs
        compiled = device.type == "cuda" and length > 16384
        build = torch.compile(create_block_mask) if compiled else create_block_mask
        built = build(seen.mask_mod(), None, mask_heads, length, length, device=device.type, BLOCK_SIZE=block)
    run = partial(_run_flex, compiled=_compiled(device, mode), mask=built, options=options)
    return partial(run, sinks=sinks_of(heads, device)) if shape.sinks else run


def sinks_of(heads: int, device: torch.device) -> torch.Tensor:
    """Learned sinks [H] as a shape has them."""
    return torch.linspace(-1, 2, heads, device=device)


def _run_flex(query, key, value, compiled, mask, options, sinks=None) -> torch.Tensor:
    tensors = (x.transpose(1, 2) for x in (query, key, value))
    grouped = {"enable_gqa": True} if query.shape[2] != key.shape[2] else {}
    if sinks is None:
        return compiled(*tensors, block_mask=mask, kernel_options=options, **grouped).transpose(1, 2)
    asked = {"kernel_options": options, "return_aux": AuxRequest(lse=True), **grouped}
    output, aux = compiled(*tensors, block_mask=mask, **asked)
    share = torch.sigmoid(aux.lse - sinks[:, None])[..., None]
    return (output * share.to(output.dtype)).transpose(1, 2)


def _has_view(pattern, length: int) -> bool:
    return isinstance(pattern, Strided) and length % pattern.stride == 0


def _flex_on_view(pattern: Strided, length: int, device: torch.device) -> Callable:
    """Columns as sequences: [B, N / l, l * H, D] under a causal mask."""
    stride, compiled = pattern.stride, _compiled(device, None)
    mask = VisibleKeys(Full(), 1, True, 1, length // stride, length // stride).block_mask(device)

    def run(query, key, value):
        folded = (x.reshape(x.shape[0], -1, stride * x.shape[2], x.shape[3]) for x in (query, key, value))
        return _run_flex(*folded, compiled, mask, HINTS).reshape(*query.shape[:3], value.shape[3])

    return run


def _compiled(device: torch.device, mode: str | None) -> Callable:
    """Compiled anew: options differ between contenders. On a CPU as it is."""
    return torch.compile(flex_attention, mode=mode, dynamic=False) if device.type == "cuda" else flex_attention

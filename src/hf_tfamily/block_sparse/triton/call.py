"""A call of the Triton kernels: what it is checked for, which passes it takes, which tiles they get.

Legend: B batch, H heads, Hk key heads, T queries, S keys, D head dimension (Dv of values).
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...modeling.attention_patterns import Pattern
from ..parts import Extent
from ..patterns import from_text
from .layout import Pass, layout, table_heads
from .tables import TablePass, table_pass
from .tiles import (
    BIASED,
    BIASED_TABLE,
    FEW,
    FORWARD,
    HEAD_DIMS,
    KEY_GRAD,
    NARROW,
    TABLE,
    WIDE,
    Tile,
    tile_for,
)
from .views import View, view_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MINIMUM_TRITON = (3, 6)
_NARROW_KEYS = 256  # mean keys of a query, up to which tiles are small
_FEW_QUERIES = 16
ROUNDED = 16  # distances of a bias are a multiple of this, so that kernels are not compiled anew


class Bias(Protocol):
    """What is added to the scaled scores by distance, made for one pass at a time.

    Attributes:
        has_gradient: whether the backward is to give one; then `of` returns dense tensors.
    """

    has_gradient: bool

    def of(self, launch: Pass | TablePass) -> Tensor:
        """[B, H, T, distances], an entry for each of `pass_distances(launch)`."""

    def take_gradient(self, launch: Pass | TablePass, gradient: Tensor) -> None:
        """The gradient of what `of` returned; 0 where no key was seen."""


@dataclass(eq=False)
class Call:
    """The tensors of a call as the kernels take them, and what is to be launched."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_valid: Tensor | None
    pattern: Pattern
    extent: Extent
    scale: float
    bias: Bias | None

    @classmethod
    def of(cls, query, key, value, key_valid, pattern, causal, scale, q_offset, kv_offset, bias=None) -> "Call":
        _check(query, key, value)
        pattern = from_text(pattern)
        pattern.check_heads(query.shape[2])
        extent = Extent(query.shape[1], key.shape[1], q_offset, kv_offset, causal)
        if key_valid is not None:
            key_valid = unit_stride(key_valid).view(torch.uint8)
        query, key, value = (unit_stride(x) for x in (query, key, value))
        return cls(query, key, value, key_valid, pattern, extent, scale, bias)

    @property
    def is_float32(self) -> bool:
        return self.query.dtype == torch.float32

    @property
    def head_dim(self) -> int:
        return max(padded(self.query.shape[3]), padded(self.value.shape[3]))

    @property
    def ratio(self) -> int:
        """Query heads of a key head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def view(self) -> View | None:
        """The view on which the pattern is dense attention, if there is one that a dense kernel takes."""
        if self.key_valid is not None or self.bias is not None:
            return None
        return view_of(self.pattern, self.extent, self.query, self.value)

    @cached_property
    def launches(self) -> list[tuple[Pass | TablePass, ...]]:
        num_heads = self.query.shape[2]
        found: list[tuple[Pass | TablePass, ...]] = list(layout(self.pattern, self.extent, num_heads))
        if heads := table_heads(self.pattern, num_heads):
            walk = TABLE if self.bias is None else BIASED_TABLE
            sides = tuple(self._tile_for(kernel, walk).block_m for kernel in (FORWARD, KEY_GRAD))
            found.append((table_pass(self.pattern, self.extent, tuple(heads), sides, self.query.device),))
        return found

    def tile(self, kernel: str, launch: Pass | TablePass) -> Tile:
        walk = _walk_kind(launch)
        if self.bias is not None:
            walk = BIASED_TABLE if walk == TABLE else BIASED
        return self._tile_for(kernel, walk)

    def _tile_for(self, kernel: str, walk: str) -> Tile:
        return tile_for(kernel, walk, self.head_dim, self.is_float32, _is_older(self.query.device))

    def constants(self, tile: Tile) -> dict:
        """Arguments of every kernel that it is compiled for."""
        dim, value_dim = self.query.shape[3], self.value.shape[3]
        return {
            "D": dim,
            "DV": value_dim,
            "BLOCK_D": padded(dim),
            "BLOCK_DV": padded(value_dim),
            "PRECISION": _precision(tile),
            "UPCAST": self.query.dtype == torch.bfloat16 and kernels().interpreted,
        }


def kernels_take(query: Tensor, value: Tensor) -> bool:
    """Are dtype and head dimensions those that kernels are for? Others are left to PyTorch where biases are added."""
    return query.dtype in DTYPES and max(query.shape[3], value.shape[3]) <= HEAD_DIMS[-1]


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in DTYPES:
        raise ValueError(
            f"attn_implementation='block_sparse' on {query.device.type} runs float16, bfloat16 and float32, "
            f"got {query.dtype}; use 'eager' or 'sdpa'."
        )
    for name, dim in (("head dimension", query.shape[3]), ("head dimension of values", value.shape[3])):
        if dim > HEAD_DIMS[-1]:
            raise ValueError(
                f"attn_implementation='block_sparse' on {query.device.type} runs head dimensions up to "
                f"{HEAD_DIMS[-1]}, got a {name} of {dim}; use 'sdpa'."
            )
    if query.device.type != "cuda" and not kernels().interpreted:
        raise ValueError(
            f"Triton kernels run on cuda, got tensors on {query.device.type} (only TRITON_INTERPRET=1 runs them there)."
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.shape[1] * x.stride(1) >= 1 << 31:
            raise ValueError(
                f"attn_implementation='block_sparse' counts the elements of one sequence in 32 bits, but {name} of "
                f"shape {tuple(x.shape)} has tokens {x.stride(1)} elements apart; shorten it or use 'sdpa'."
            )


class _Kernels(NamedTuple):
    forward: object
    delta: object
    query_grad: object
    key_grad: object
    key_grad_sum: object
    range: int
    picked: int
    table: int
    none: int
    interpreted: bool


@lru_cache(maxsize=1)
def kernels() -> _Kernels:
    from .kernels import NONE, PICKED, RANGE, forward_kernel, triton
    from .kernels import TABLE as TABLE_KIND
    from .key_gradients import key_grad_kernel, key_grad_sum_kernel
    from .query_gradients import delta_kernel, query_grad_kernel

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_TRITON:
        raise ImportError(
            f"attn_implementation='block_sparse' on a GPU needs triton>={'.'.join(map(str, MINIMUM_TRITON))}, "
            f"got {triton.__version__}; upgrade it (with torch), or use 'sdpa'."
        )
    return _Kernels(
        forward_kernel,
        delta_kernel,
        query_grad_kernel,
        key_grad_kernel,
        key_grad_sum_kernel,
        RANGE.value,
        PICKED.value,
        TABLE_KIND.value,
        NONE.value,
        not isinstance(forward_kernel, triton.JITFunction),
    )


@lru_cache(maxsize=16)
def _is_older(device: torch.device) -> bool:
    """Compute capability 8 or 12, with less shared memory and no wgmma or its successor."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10, 11)


@lru_cache(maxsize=512)
def pass_distances(launch: Pass | TablePass) -> range:
    """How far keys of a pass lie behind its queries, in its steps (in tokens in a table); negative if ahead.

    As many as a multiple of ROUNDED.
    """
    extent = launch.extent
    query = torch.arange(extent.num_queries) + extent.distance
    behind, ahead = 0, 0
    if isinstance(launch, TablePass):
        behind, ahead = int(query[-1]), 0 if extent.causal else extent.num_keys - 1 - int(query[0])
    else:
        for source in launch.sources:
            first, last = source.low.long(), source.high.long() - 1
            if source.picked is not None and source.picked.shape[1] == 0:
                continue  # no summary yet
            if source.picked is not None:
                picked = source.picked.long()
                first, last = (picked.gather(1, x.clamp(0, picked.shape[1] - 1)) for x in (first, last))
            seen = source.low < source.high
            behind = max(behind, int(torch.where(seen, query // launch.step - first, 0).max()))
            ahead = max(ahead, int(torch.where(seen, last - query // launch.step, 0).max()))
    first = -max(ahead, 0)
    return range(first, first - (-(max(behind, 0) + 1 - first) // ROUNDED) * ROUNDED)


def padded(dim: int) -> int:
    return next(size for size in HEAD_DIMS if dim <= size)


def _precision(tile: Tile) -> str:
    """Of float32 products: what the tile says, but one TF32 product instead of three where that is allowed."""
    may_be_less = tile.precision == "tf32x3" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if may_be_less else tile.precision


def unit_stride(x: Tensor) -> Tensor:
    """Kernels read the last dimension as neighbours; every other stride may be anything."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@lru_cache(maxsize=256)
def _walk_kind(launch: Pass | TablePass) -> str:
    """Which tiles suit a pass."""
    if isinstance(launch, TablePass):
        return TABLE
    if -(-launch.extent.num_queries // launch.step) <= _FEW_QUERIES:
        return FEW
    keys = sum(float((source.high - source.low).float().mean()) for source in launch.sources)
    return NARROW if keys <= _NARROW_KEYS else WIDE

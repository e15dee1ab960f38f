"""How a call becomes launches of the Triton kernels: its checks, its tiles, its arguments.

Layouts are cached by pattern and lengths, and their copies on a device by pass, so that layers share them.
Legend: B batch, H heads, Hk key heads, T queries, S keys, D head dimension (Dv of values).
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_patterns import Pattern, pattern_from_dict
from .attention_triton_configs import (
    BIASED,
    FEW,
    FORWARD,
    HEAD_DIMS,
    KEY_GRAD,
    NARROW,
    QUERY_GRAD,
    TABLE,
    WIDE,
    Tile,
    tile_for,
)
from .attention_triton_layout import Extent, Pass, Source, key_items, layout, row_items, table_heads
from .attention_triton_tables import Table, TablePass, table_pass
from .attention_triton_views import View, view_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MINIMUM_TRITON = (3, 6)
_NARROW_KEYS = 256  # mean keys of a query, up to which tiles are small
_FEW_QUERIES = 16
_LOG2E = math.log2(math.e)


# ---------------------------------------------------------------------------------------------------------------------
# A call


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
    biases: tuple[Tensor, ...]

    @classmethod
    def of(cls, query, key, value, key_valid, pattern, causal, scale, q_offset, kv_offset, biases) -> "Call":
        _check(query, key, value)
        pattern = _pattern(pattern)
        pattern.check_heads(query.shape[2])
        extent = Extent(query.shape[1], key.shape[1], q_offset, kv_offset, causal)
        if key_valid is not None:
            key_valid = unit_stride(key_valid).view(torch.uint8)
        query, key, value = (unit_stride(x) for x in (query, key, value))
        return cls(query, key, value, key_valid, pattern, extent, scale, tuple(map(unit_stride, biases)))

    @property
    def is_float32(self) -> bool:
        return self.query.dtype == torch.float32

    @property
    def head_dim(self) -> int:
        return max(_padded(self.query.shape[3]), _padded(self.value.shape[3]))

    @property
    def ratio(self) -> int:
        """Query heads of a key head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def view(self) -> View | None:
        """The view on which the pattern is dense attention, if there is one that a dense kernel takes."""
        if self.key_valid is not None or self.biases:
            return None
        return view_of(self.pattern, self.extent, self.query, self.value)

    @cached_property
    def launches(self) -> list[tuple[Pass | TablePass, ...]]:
        num_heads = self.query.shape[2]
        found: list[tuple[Pass | TablePass, ...]] = list(layout(self.pattern, self.extent, num_heads))
        if heads := table_heads(self.pattern, num_heads):
            sides = tuple(self._tile_for(kernel, TABLE).block_m for kernel in (FORWARD, KEY_GRAD))
            found.append((table_pass(self.pattern, self.extent, tuple(heads), sides, self.query.device),))
        return found

    def tile(self, kernel: str, launch: Pass | TablePass) -> Tile:
        return self._tile_for(kernel, BIASED if self.biases else _walk_kind(launch))

    def _tile_for(self, kernel: str, walk: str) -> Tile:
        return tile_for(kernel, walk, self.head_dim, self.is_float32, _is_older(self.query.device))

    @property
    def constants(self) -> dict:
        """Arguments of every kernel that it is compiled for."""
        dim, value_dim = self.query.shape[3], self.value.shape[3]
        return {
            "D": dim,
            "DV": value_dim,
            "BLOCK_D": _padded(dim),
            "BLOCK_DV": _padded(value_dim),
            "PRECISION": _precision(),
            "UPCAST": self.query.dtype == torch.bfloat16 and _kernels().interpreted,
        }


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
    if query.device.type != "cuda" and not _kernels().interpreted:
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
def _kernels() -> _Kernels:
    from .attention_triton_gradients import delta_kernel, key_grad_kernel, key_grad_sum_kernel, query_grad_kernel
    from .attention_triton_kernels import NONE, PICKED, RANGE, forward_kernel, triton
    from .attention_triton_kernels import TABLE as TABLE_KIND

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


@lru_cache(maxsize=256)
def _pattern(text: str) -> Pattern:
    values, grid = json.loads(text)  # as the operator of attention_torch.py takes it
    pattern = pattern_from_dict(values)
    return pattern if grid is None else pattern.bind(grid)


@lru_cache(maxsize=16)
def _is_older(device: torch.device) -> bool:
    """Compute capability below 9, with less shared memory and no wgmma."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9


def _padded(dim: int) -> int:
    return next(size for size in HEAD_DIMS if dim <= size)


def _precision() -> str:
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


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


# ---------------------------------------------------------------------------------------------------------------------
# Launches


class _Walk(NamedTuple):
    """What a launch reads of its layout, on its device."""

    items: Tensor
    low: Tensor
    high: Tensor
    listed: Tensor
    slots: Tensor
    bits: Tensor
    other_low: Tensor
    other_high: Tensor
    other_listed: Tensor
    kind: int
    other: int
    granule: int


@lru_cache(maxsize=512)
def _row_walk(launch: Pass | TablePass, block_m: int, block_n: int, keep_idle: bool, device: torch.device) -> _Walk:
    if isinstance(launch, TablePass):
        return _table_walk(launch.by_query)
    items = row_items(launch, block_m, block_n, keep_idle)
    first, *others = launch.sources
    kernels = _kernels()
    other = others[0] if others else None
    return _Walk(
        *(x.to(device) for x in (items, *_source_tensors(first, items, True), *_source_tensors(other, items, False))),
        kind=kernels.range if first.picked is None else kernels.picked,
        other=kernels.none if other is None else kernels.picked,
        granule=16,
    )


def _source_tensors(source: Source | None, unused: Tensor, with_bits: bool) -> tuple[Tensor, ...]:
    if source is None:
        return unused, unused, unused
    listed = unused if source.picked is None else source.picked
    return (source.low, source.high, listed, *((unused, unused) if with_bits else ()))


def _table_walk(table: Table) -> _Walk:
    unused = table.items
    tensors = (unused, unused, table.listed, table.slots, table.bits, unused, unused, unused)
    kernels = _kernels()
    return _Walk(table.items, *tensors, kind=kernels.table, other=kernels.none, granule=table.granule)


class _KeyWalk(NamedTuple):
    walk: _Walk
    sums: Tensor | None


@lru_cache(maxsize=512)
def _key_walk(
    launch: Pass | TablePass, source: Source | None, block_n: int, block_m: int, direct: bool, device: torch.device
) -> _KeyWalk:
    if isinstance(launch, TablePass):
        return _KeyWalk(_table_walk(launch.by_key), None)
    items, sums = key_items(launch, source, block_n, block_m, keep_idle=direct, split=not direct)
    kernels = _kernels()
    tensors = (items, *_source_tensors(source, items, True), items, items, items)
    walk = _Walk(
        *(x.to(device) for x in tensors),
        kind=kernels.range if source.picked is None else kernels.picked,
        other=kernels.none,
        granule=16,
    )
    return _KeyWalk(walk, None if sums is None else sums.to(device))


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, token and head of [B, N, H, D]."""
    return x.stride(0), x.stride(1), x.stride(2)


def _bias_of(call: Call, launch: Pass | TablePass) -> tuple[Tensor, tuple[int, ...]]:
    """The bias of a pass (any tensor if there is none); its strides of batch, head, query, distance; its distances."""
    if not call.biases:
        return call.query, (0, 0, 0, 0, 0)
    bias = call.biases[_pass_number(call, launch)]
    batch = bias.stride(0) if bias.shape[0] > 1 else 0
    return bias, (batch, bias.stride(1), bias.stride(2), bias.stride(3), bias.shape[3])


def _pass_number(call: Call, launch: Pass | TablePass) -> int:
    return [other for launches in call.launches for other in launches].index(launch)


def _rest(call: Call, launch: Pass | TablePass, num_heads: int) -> tuple[dict, int]:
    """Arguments about heads and places, and the programs of an item."""
    repeats = -(-num_heads // launch.period)
    copies = call.query.shape[0] * repeats
    return {
        "ratio": call.ratio,
        "copies": copies,
        "repeats": repeats,
        "period": launch.period,
        "step": getattr(launch, "step", 1),
        "first_distance": call.extent.distance,
    }, copies


def launch_forward(call: Call, launch, output: Tensor, lse: Tensor, merge: bool, final: bool) -> None:
    tile = call.tile(FORWARD, launch)
    walk = _row_walk(launch, tile.block_m, tile.block_n, not merge, call.query.device)
    bias, bias_strides = _bias_of(call, launch)
    rest, copies = _rest(call, launch, call.query.shape[2])
    valid = call.query if call.key_valid is None else call.key_valid
    grid = (len(walk.items) * copies,)
    if not grid[0]:
        return
    _kernels().forward[grid](
        call.query,
        call.key,
        call.value,
        output,
        lse,
        valid,
        bias,
        *walk[:9],
        *_strides(call.query),
        *_strides(call.key),
        *_strides(call.value),
        *_strides(output),
        valid.stride(0),
        *bias_strides,
        walk.listed.stride(0),
        walk.other_listed.stride(0),
        call.scale * _LOG2E,
        call.extent.num_queries,
        call.query.shape[2],
        **rest,
        **call.constants,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        KIND=walk.kind,
        OTHER=walk.other,
        GRANULE=walk.granule,
        HAS_VALID=call.key_valid is not None,
        HAS_BIAS=bool(call.biases),
        MERGE=merge,
        FINAL=final,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def launch_query_grad(call, launch, grad_output, lse, delta, grads: "Gradients", add: bool) -> None:
    tile = call.tile(QUERY_GRAD, launch)
    walk = _row_walk(launch, tile.block_m, tile.block_n, not add, call.query.device)
    bias, bias_strides = _bias_of(call, launch)
    rest, copies = _rest(call, launch, call.query.shape[2])
    valid = call.query if call.key_valid is None else call.key_valid
    grid = (len(walk.items) * copies,)
    if not grid[0]:
        return
    _kernels().query_grad[grid](
        call.query,
        call.key,
        call.value,
        grad_output,
        lse,
        delta,
        grads.query,
        valid,
        bias,
        grads.biases[_pass_number(call, launch)] if call.biases else bias,
        *walk[:9],
        *_strides(call.query),
        *_strides(call.key),
        *_strides(call.value),
        *_strides(grad_output),
        *_strides(grads.query),
        valid.stride(0),
        *bias_strides,
        walk.listed.stride(0),
        walk.other_listed.stride(0),
        call.scale,
        call.scale * _LOG2E,
        call.extent.num_queries,
        call.query.shape[2],
        **rest,
        **call.constants,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        KIND=walk.kind,
        OTHER=walk.other,
        GRANULE=walk.granule,
        HAS_VALID=call.key_valid is not None,
        HAS_BIAS=bool(call.biases),
        ADD=add,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def launch_key_grad(call, launch, source: Source | None, grad_output, lse, delta, grads: "Gradients") -> None:
    tile = call.tile(KEY_GRAD, launch)
    walk, sums = _key_walk(launch, source, tile.block_n, tile.block_m, grads.direct, call.query.device)
    bias, bias_strides = _bias_of(call, launch)
    rest, copies = _rest(call, launch, grads.key.shape[2])
    valid = call.query if call.key_valid is None else call.key_valid
    programs = len(walk.items) * copies
    if not programs:
        return
    dim, value_dim = call.query.shape[3], call.value.shape[3]
    workspace = grads.key
    if sums is not None:
        workspace = call.query.new_empty(programs, tile.block_n, dim + value_dim, dtype=torch.float32)
    _kernels().key_grad[(programs,)](
        call.query,
        call.key,
        call.value,
        grad_output,
        lse,
        delta,
        grads.key,
        grads.value,
        workspace,
        valid,
        bias,
        *walk[:6],
        *_strides(call.query),
        *_strides(call.key),
        *_strides(call.value),
        *_strides(grad_output),
        *_strides(grads.key),
        *_strides(grads.value),
        valid.stride(0),
        *bias_strides,
        walk.listed.stride(0),
        call.scale,
        call.scale * _LOG2E,
        call.extent.num_queries,
        call.query.shape[2],
        **rest,
        **call.constants,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        KIND=walk.kind,
        GRANULE=walk.granule,
        HAS_VALID=call.key_valid is not None,
        HAS_BIAS=bool(call.biases),
        SPLIT=sums is not None,
        ADD=not grads.direct,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if sums is None:
        return
    constants = {name: call.constants[name] for name in ("D", "DV", "BLOCK_D", "BLOCK_DV")}
    _kernels().key_grad_sum[(len(sums) * copies,)](
        workspace,
        grads.key,
        grads.value,
        sums,
        walk.listed,
        *_strides(grads.key),
        *_strides(grads.value),
        walk.listed.stride(0),
        grads.key.shape[2],
        **{name: rest[name] for name in ("copies", "repeats", "period", "step")},
        **constants,
        BLOCK_N=tile.block_n,
        KIND=walk.kind,
        num_warps=4,
    )


def delta_of(grad_output: Tensor, output: Tensor) -> Tensor:
    """Sum of dO * O over the head dimension, [B, T, H]."""
    delta = output.new_empty(output.shape[:3], dtype=torch.float32)
    block = 64
    _kernels().delta[(-(-delta.numel() // block),)](
        grad_output,
        output,
        delta,
        *_strides(grad_output),
        *_strides(output),
        output.shape[1],
        output.shape[2],
        delta.numel(),
        DV=output.shape[3],
        BLOCK_M=block,
        BLOCK_DV=_padded(output.shape[3]),
        num_warps=4,
    )
    return delta


class Gradients:
    """Where gradients are summed up: in float32 where several launches or heads add to them.

    `key` and `value` are [B, S, H, ...], one for each query head.
    """

    def __init__(self, call: Call) -> None:
        query, key, value = call.query, call.key, call.value
        several = any(len(launches) > 1 for launches in call.launches)
        self.shapes = [(x.shape, x.dtype) for x in (query, key, value)]
        self.direct = not any(_leaves_keys_out(launches) for launches in call.launches)
        self.query = query.new_empty(query.shape, dtype=torch.float32 if several else query.dtype)
        make = torch.empty if self.direct else torch.zeros
        dtype = key.dtype if self.direct and call.ratio == 1 else torch.float32
        self.key, self.value = (
            make((*x.shape[:2], query.shape[2], x.shape[3]), dtype=dtype, device=x.device) for x in (key, value)
        )
        self.biases = tuple(torch.zeros_like(bias) for bias in call.biases)

    def finished(self) -> tuple[Tensor, ...]:
        """The gradients of query, key, value and biases in their own shapes and dtypes."""
        grads = []
        for grad, (shape, dtype) in zip((self.query, self.key, self.value), self.shapes):
            if grad.shape != shape:  # query heads that share a key head
                grad = grad.unflatten(2, (shape[2], -1)).sum(3, dtype=torch.float32)
            grads.append(grad.to(dtype))
        return *grads, *self.biases


def _leaves_keys_out(launches: tuple[Pass | TablePass, ...]) -> bool:
    """Whether some key is written by no launch, or by several."""
    first = launches[0]
    if len(launches) > 1 or isinstance(first, TablePass):
        return len(launches) > 1
    return len(first.sources) > 1 or first.sources[0].picked is not None or first.step > first.extent.num_queries

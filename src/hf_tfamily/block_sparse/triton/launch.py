"""How the passes of a call (call.py) are launched: what they walk over, and their many arguments.

Layouts are cached by pattern and lengths, and their copies on a device by pass, so that layers share them.
Legend: B batch, H heads, Hk key heads, T queries, S keys, D head dimension (Dv of values).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call, kernels, padded, pass_distances
from .layout import Pass, Source, key_items, row_items
from .tables import Table, TablePass
from .tiles import FORWARD, KEY_GRAD, QUERY_GRAD, Tile, sum_warps

_LOG2E = math.log2(math.e)


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
    kinds = kernels()
    other = others[0] if others else None
    return _Walk(
        *(x.to(device) for x in (items, *_source_tensors(first, items, True), *_source_tensors(other, items, False))),
        kind=kinds.range if first.picked is None else kinds.picked,
        other=kinds.none if other is None else kinds.picked,
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
    kinds = kernels()
    return _Walk(table.items, *tensors, kind=kinds.table, other=kinds.none, granule=table.granule)


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
    kinds = kernels()
    tensors = (items, *_source_tensors(source, items, True), items, items, items)
    walk = _Walk(
        *(x.to(device) for x in tensors),
        kind=kinds.range if source.picked is None else kinds.picked,
        other=kinds.none,
        granule=16,
    )
    return _KeyWalk(walk, None if sums is None else sums.to(device))


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def launch_forward(call: Call, launch, bias: Tensor | None, output, lse, merge: bool, final: bool) -> None:
    tile = call.tile(FORWARD, launch)
    walk = _row_walk(launch, tile.block_m, tile.block_n, not merge, call.query.device)
    arguments = _arguments(call, launch, walk, tile, bias, call.query.shape[2])
    programs = len(walk.items) * arguments["copies"]
    if not programs:
        return
    kernels().forward[(programs,)](
        output_ptr=output,
        lse_ptr=lse,
        **_strides("o", output),
        **_other_source(walk),
        scale=call.scale * _LOG2E,
        MERGE=merge,
        FINAL=final,
        **arguments,
    )


def launch_query_grad(
    call: Call, launch, bias: Tensor | None, grad_bias: Tensor | None, grad_output, lse, delta, grads, add: bool
) -> None:
    tile = call.tile(QUERY_GRAD, launch)
    walk = _row_walk(launch, tile.block_m, tile.block_n, not add, call.query.device)
    arguments = _arguments(call, launch, walk, tile, bias, call.query.shape[2])
    programs = len(walk.items) * arguments["copies"]
    if not programs:
        return
    kernels().query_grad[(programs,)](
        grad_query_ptr=grads.query,
        grad_bias_ptr=call.query if grad_bias is None else grad_bias,
        GRAD_BIAS=grad_bias is not None,
        **_strides("g", grads.query),
        **_of_output(call, grad_output, lse, delta),
        **_other_source(walk),
        ADD=add,
        **arguments,
    )


def launch_key_grad(
    call: Call, launch, source: Source | None, bias: Tensor | None, grad_output, lse, delta, grads: "Gradients"
) -> None:
    tile = call.tile(KEY_GRAD, launch)
    walk, sums = _key_walk(launch, source, tile.block_n, tile.block_m, grads.direct, call.query.device)
    arguments = _arguments(call, launch, walk, tile, bias, grads.key.shape[2])
    programs = len(walk.items) * arguments["copies"]
    if not programs:
        return
    workspace = grads.key
    if sums is not None:
        width = call.query.shape[3] + call.value.shape[3]
        workspace = call.query.new_empty(programs, tile.block_n, width, dtype=torch.float32)
    of_keys = {
        **{"grad_key_ptr": grads.key, "grad_value_ptr": grads.value, "workspace_ptr": workspace},
        **_strides("gk", grads.key),
        **_strides("gv", grads.value),
    }
    kernels().key_grad[(programs,)](
        **of_keys,
        **_of_output(call, grad_output, lse, delta),
        SPLIT=sums is not None,
        ADD=not grads.direct,
        **arguments,
    )
    if sums is None:
        return
    shared = ("listed_ptr", "stride_listed", "copies", "repeats", "period", "step")
    constants = ("D", "DV", "BLOCK_N", "BLOCK_D", "BLOCK_DV", "KIND")
    kernels().key_grad_sum[(len(sums) * arguments["copies"],)](
        items_ptr=sums,
        num_out_heads=grads.key.shape[2],
        **of_keys,
        **{name: arguments[name] for name in (*shared, *constants)},
        num_warps=sum_warps(call.head_dim, tile.block_n),
    )


def _arguments(call: Call, launch, walk: _Walk, tile: Tile, bias: Tensor | None, num_heads: int) -> dict:
    """What all kernels take."""
    valid = call.query if call.key_valid is None else call.key_valid
    repeats = -(-num_heads // launch.period)
    return {
        **{"query_ptr": call.query, "key_ptr": call.key, "value_ptr": call.value, "valid_ptr": valid},
        **{f"{name}_ptr": getattr(walk, name) for name in ("items", "low", "high", "listed", "slots", "bits")},
        **_strides("q", call.query),
        **_strides("k", call.key),
        **_strides("v", call.value),
        **_bias_arguments(call, launch, bias),
        "stride_valid": valid.stride(0),
        "stride_listed": walk.listed.stride(0),
        "num_queries": call.extent.num_queries,
        "num_heads": call.query.shape[2],
        "ratio": call.ratio,
        "copies": call.query.shape[0] * repeats,  # programs of an item
        "repeats": repeats,
        "period": launch.period,
        "step": getattr(launch, "step", 1),
        **call.constants(tile),
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "KIND": walk.kind, "GRANULE": walk.granule},
        **{"HAS_VALID": call.key_valid is not None, "HAS_BIAS": bias is not None},
        **tile.options,
    }


def _strides(letter: str, x: Tensor) -> dict[str, int]:
    """Of batch, token and head of [B, N, H, D]."""
    return {f"stride_{letter}{axis}": stride for axis, stride in zip("bth", x.stride())}


def _bias_arguments(call: Call, launch, bias: Tensor | None) -> dict:
    """A bias [B, H, T, distances] (any tensor if there is none), its strides, how many distances it has, and the
    distance of query 0 from key 0, counted from the first of them."""
    strides, distances, first = (0, 0, 0, 0), 0, call.extent.distance
    if bias is not None:
        strides, distances = bias.stride(), bias.shape[3]
        first -= pass_distances(launch).start * getattr(launch, "step", 1)
    named = {f"stride_b{axis}": stride for axis, stride in zip("bhtr", strides)}
    bias = call.query if bias is None else bias
    return {"bias_ptr": bias, **named, "num_biases": distances, "first_distance": first}


def _other_source(walk: _Walk) -> dict:
    """The second source of kernels whose rows are queries."""
    names = ("other_low", "other_high", "other_listed")
    tensors = {f"{name}_ptr": getattr(walk, name) for name in names}
    return {**tensors, "stride_other": walk.other_listed.stride(0), "OTHER": walk.other}


def _of_output(call: Call, grad_output: Tensor, lse: Tensor, delta: Tensor) -> dict:
    """What gradients take beside."""
    tensors = {"grad_output_ptr": grad_output, "lse_ptr": lse, "delta_ptr": delta}
    return {**tensors, **_strides("o", grad_output), "scale": call.scale, "score_scale": call.scale * _LOG2E}


def delta_of(grad_output: Tensor, output: Tensor) -> Tensor:
    """Sum of dO * O over the head dimension, [B, T, H]."""
    delta = output.new_empty(output.shape[:3], dtype=torch.float32)
    block = 64
    kernels().delta[(-(-delta.numel() // block),)](
        grad_ptr=grad_output,
        output_ptr=output,
        delta_ptr=delta,
        **_strides("g", grad_output),
        **_strides("o", output),
        num_queries=output.shape[1],
        num_heads=output.shape[2],
        num_rows=delta.numel(),
        DV=output.shape[3],
        BLOCK_M=block,
        BLOCK_DV=padded(output.shape[3]),
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

    def finished(self) -> tuple[Tensor, ...]:
        """The gradients of query, key and value in their own shapes and dtypes."""
        grads = []
        for grad, (shape, dtype) in zip((self.query, self.key, self.value), self.shapes):
            if grad.shape != shape:  # query heads that share a key head
                grad = grad.unflatten(2, (shape[2], -1)).sum(3, dtype=torch.float32)
            grads.append(grad.to(dtype))
        return tuple(grads)


def _leaves_keys_out(launches: tuple[Pass | TablePass, ...]) -> bool:
    """Whether some key is written by no launch, or by several."""
    first = launches[0]
    if len(launches) > 1 or isinstance(first, TablePass):
        return len(launches) > 1
    return len(first.sources) > 1 or first.sources[0].picked is not None or first.step > first.extent.num_queries

"""How to compute a pattern cheaply: a few disjoint parts, each a view of the sequence and a simple rule.

Planning knows positions and lengths only: no tensors of a model, no device, no kernel. `plan_attention` says what an
executor runs (attention_torch.py); `decode_keys` and `kept_keys` say what decoding reads and what a cache must keep.

    part        what it covers                                   queries of a tile     keys of a tile
    columns     Strided(l), and Full as l = 1                    every l-th            every l-th
    blocks      FixedBlock with nothing taken out                one block             the same block
    band        Local, FixedBlock, summaries of the own block    a chunk               a window around the chunk
    summaries   FixedSummary in blocks other than the own        some blocks           compact: summary positions only
    flanges     Block1D, Block2D: keys around the own block      one block             before it; in 2-D compact
    table       any other union                                  64 queries            compact: the keys they see

A *tile* is a rectangle of queries and keys under one rule: everything, causal, or a small mask. Alike tiles at even
distances make one *part*. No two parts show the same key to the same query, so their outputs are merged by log-sum-exp.
Legend: H heads, T queries, S keys; I queries and J keys of one tile.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from .attention_parts import Extent, Group, in_halves, mark_writes, parts_of
from .attention_patterns import FixedBlock, FixedSummary, Full, Local, Strided
from .attention_patterns_base import Pattern
from .attention_patterns_images import Block1D, Block2D
from .attention_tiles import (
    MAX_MASK,
    Layout,
    band_tiles,
    block_tiles,
    column_tiles,
    local_block_groups,
    summary_groups,
    table_groups,
    window_of,
)


@dataclass(frozen=True, eq=False)
class Plan:
    """What an executor runs, in order.

    `complete`: each query of every head lies in a part that `writes`; `complete_keys`: each key in one that
    `writes_keys`, or among the `fresh_keys` of one.
    """

    groups: tuple[Group, ...]
    complete: bool
    complete_keys: bool


@lru_cache(maxsize=64)
def plan_attention(
    pattern: Pattern,
    num_queries: int,
    num_keys: int,
    *,
    num_heads: int,
    causal: bool,
    first_query: int = 0,
    first_key: int = 0,
    halved: bool = False,
) -> Plan:
    """The parts by which `num_queries` queries attend to `num_keys` keys under `pattern`.

    Query i stands at position `first_query + i`, key j at `first_key + j`. If `halved`, small causal tiles are cut in
    two for the flash kernel of CPUs. Cached, so that layers share one plan.
    Raises ValueError if the pattern cannot be dealt out to `num_heads` heads.
    """
    pattern.check_heads(num_heads)
    extent = Extent(num_queries, num_keys, first_query, first_key, causal)
    groups = _groups(pattern, range(num_heads), extent)
    if halved:
        groups = map(in_halves, groups)
    groups, complete, complete_keys = mark_writes(groups, num_queries, num_keys, num_heads)
    return Plan(tuple(groups), complete, complete_keys)


def decode_keys(pattern: Pattern, head: int, position: int) -> torch.Tensor:
    """Positions, ascending, of the keys up to `position` that a query at `position` reads in `head`."""
    keys = torch.arange(position + 1)
    return keys[pattern.visible(head, position, keys)]


def kept_keys(pattern: Pattern, head: int, position: int) -> torch.Tensor:
    """Positions, ascending, of the keys before `position` that a query at `position` or later can still read in `head`.

    A cache that has taken in `position` tokens may forget all others.
    """
    keys = torch.arange(position)
    kept = torch.zeros(position, dtype=torch.bool)
    for part in pattern.for_head(head).parts:
        if isinstance(part, (Block1D, Block2D)):
            kept |= part.last_query(keys) >= position
        elif isinstance(part, (Local, FixedBlock, FixedSummary)):  # what these show of the past never grows again
            kept |= part.visible(head, position, keys)
        else:  # may come back to any key
            kept |= True
    return keys[kept]


# ---------------------------------------------------------------------------------------------------------------------
# From a pattern to groups of parts


def _groups(pattern: Pattern, heads: range, extent: Extent) -> Iterator[Group]:
    """The groups of all heads, those that are planned together after each other."""
    groups = _view_groups(pattern, heads, extent)
    if groups is not None:
        yield from groups
    elif pattern.head_period == 1:
        yield from table_groups(pattern, heads, extent)
    else:
        for head_pattern, alike in _heads_alike(pattern, heads):
            yield from _groups(head_pattern, alike, extent)


def _heads_alike(pattern: Pattern, heads: range) -> Iterator[tuple[Pattern, range]]:
    """Evenly spaced heads that follow one and the same pattern."""
    period = pattern.head_period
    firsts: dict[Pattern, list[int]] = {}
    for head in heads[:period]:
        firsts.setdefault(pattern.for_head(head), []).append(head)
    for head_pattern, starts in firsts.items():
        members = sorted(head for start in starts for head in heads[start::period])
        step = members[1] - members[0] if len(members) > 1 else 1
        evenly = range(members[0], members[-1] + 1, step)
        for alike in [evenly] if list(evenly) == members else [heads[start::period] for start in starts]:
            yield head_pattern, alike


def _view_groups(pattern: Pattern, heads: range, extent: Extent) -> list[Group] | None:
    """The groups of a pattern made of views, or None if some leaf has none."""
    if isinstance(pattern, (Block1D, Block2D)):
        return local_block_groups(pattern, heads, extent)
    layout = _layout(pattern, extent)
    if layout is None:
        return None
    far, block, local = layout
    own_summaries = extent.causal and isinstance(far, FixedSummary)
    groups = []
    if isinstance(far, Strided):
        groups.append(Group(heads, parts_of(column_tiles(far.stride, extent))))
    if block and not local and (own_summaries or not far):
        groups.append(Group(heads, parts_of(block_tiles(block.block, extent))))
    elif block or local or own_summaries:
        mask_heads = heads if pattern.head_period > 1 else heads[:1]
        chunk, low, high = window_of(layout, extent.causal)
        if len(mask_heads) * chunk * (high - low) > MAX_MASK:
            return None
        groups.append(Group(heads, parts_of(band_tiles(pattern, layout, mask_heads, extent))))
    if isinstance(far, FixedSummary):
        groups += summary_groups(far, heads, extent)
    return groups


def _layout(pattern: Pattern, extent: Extent) -> Layout | None:
    """How the union falls apart into views, or None if it does not."""
    leaves = _simplify(pattern.parts, extent)
    kinds = {type(leaf): leaf for leaf in leaves}
    strided, summary, block, local = (kinds.get(kind) for kind in (Strided, FixedSummary, FixedBlock, Local))
    known = sum(leaf is not None for leaf in (strided, summary, block, local))
    if known < len(leaves) or (strided and summary) or (summary and block and summary.block != block.block):
        return None
    return Layout(strided or summary, block, local)


def _simplify(leaves: Iterable[Pattern], extent: Extent) -> list[Pattern]:
    """The leaves of a union without those that another one contains; what shows everything becomes Strided(1)."""
    leaves = dict.fromkeys(Strided(1) if _is_full(leaf, extent) else leaf for leaf in leaves)
    return [leaf for leaf in leaves if not any(other != leaf and _contains(other, leaf) for other in leaves)]


def _is_full(leaf: Pattern, extent: Extent) -> bool:
    return isinstance(leaf, Full) or (isinstance(leaf, Local) and leaf.window > extent.reach)


def _contains(outer: Pattern, inner: Pattern) -> bool:
    """Does `outer` show whatever `inner` shows? False also where it is not known."""
    match outer, inner:
        case Strided(1), _:
            return True
        case Strided() | FixedBlock(), Local(1):
            return True
        case Local(), Local():
            return outer.window >= inner.window
        case Strided(), Strided():
            return inner.stride % outer.stride == 0
        case FixedBlock(), FixedBlock():
            return outer.block % inner.block == 0
    return False

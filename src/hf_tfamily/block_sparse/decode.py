"""Attention of one new token: only keys that it can see are read, and nothing is asked of the device.

Each pattern has a list of positions where a query at position p may see a key, by arithmetic on p and just as long for
every p: a window's last w keys, an own block, a column, the summary positions of all blocks. Keys are gathered from
there, and a mask says which of them are seen indeed. So where the position is a tensor (a static cache counts in one),
a step is the same kernels on the same shapes for every position: one CUDA graph, one compilation.

Legend: B batch, H heads, Hk key heads, S keys, D head dimension (Dv of values); R rows: 1 where all rows of the batch
stand at the same position, else B; P heads that differ (after which they repeat), J positions to read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.attention import VisibleKeys
from ..modeling.attention_patterns import Pattern
from ..modeling.positions import DistanceBias
from .distance_bias import at_distances, dense_of


def attend_one(
    seen: VisibleKeys,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    with_lse: bool = False,
    bias: DistanceBias | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of [B, 1, H, D] to those of the keys [B, S, Hk, D] that `seen` shows -> [B, 1, H, Dv], LSE [B, H, 1].

    The keys are those of all slots from `seen.key_offset` on, in order. A query that sees no key gets 0. `bias` is
    added to the scaled scores, by head and distance.
    """
    num_heads, slots, position = query.shape[2], _Slots(seen), _position(seen, query.device)
    found = reachable(seen.pattern, num_heads, position, seen.key_length, slots.first)
    if found is None and bias is not None:
        return attend_biased(seen.dense(query.device), query, key, value, scaling, dense_of(seen, bias))
    if found is None:
        mask = seen.dense(query.device)
        return attend_masked(mask, ~mask.any(-1, keepdim=True), query, key, value, scaling, with_lse)
    slot, valid = slots.of(found[0])
    key, value = (_pick(x.transpose(1, 2), slot, num_heads).transpose(1, 2) for x in (key, value))
    mask = _by_head(found[1] & valid, num_heads)[:, :, None]  # [R, 1 or H, 1, J]
    if bias is not None:
        distances = position[:, None, None] - _by_head(found[0], num_heads)[:, :, None]
        return attend_biased(mask, query, key, value, scaling, at_distances(bias, distances))
    return attend_masked(mask, ~mask.any(-1, keepdim=True), query, key, value, scaling, with_lse)


def mask_of_step(seen: VisibleKeys, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The mask of what `seen` says and the rows where it is False alone, worked out once for all layers.

    On the CPU, where a look costs nothing: None for a mask that shows everything, and where there is no such row.
    """
    if "step" not in seen.memo:
        mask = seen.dense(device)
        blind = ~mask.any(-1, keepdim=True)
        looks = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and bool(mask.all()):
            mask = None
        seen.memo["step"] = mask, None if looks and not bool(blind.any()) else blind
    return seen.memo["step"]


def attend_masked(
    mask: Tensor | None,
    blind: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of [B, T, H, D] to keys [B, S, Hk, D] under a mask [B or 1, H or 1, T, S], where nothing is left to
    skip.

    None for a mask that shows everything; `blind` [B or 1, H or 1, T, 1] is True for rows that see nothing, None if
    there are none.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, T, D], as caches store them
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, **grouped)
    if blind is not None:
        output = output.masked_fill(blind, 0.0)
    output = output.transpose(1, 2)
    if not with_lse:
        return output, None
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask if blind is None else ~(mask | blind), float("-inf"))
    lse = scores.logsumexp(-1)
    return output, lse if blind is None else lse.masked_fill(blind[..., 0], float("-inf"))


def attend_biased(
    mask: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """As attend_masked, with a bias [B or 1, H or 1, T, S] on scaled scores, and always with the log-sum-exp [B, H, T];
    in at least float32."""
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2).to(wide) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.mT * scaling + bias).masked_fill(~mask, torch.finfo(wide).min)
    blind = ~mask.any(-1, keepdim=True)
    output = (scores.softmax(-1) @ value).masked_fill(blind, 0.0).to(dtype)
    return output.transpose(1, 2), scores.logsumexp(-1).masked_fill(blind[..., 0], float("-inf"))


def reachable(
    pattern: Pattern, num_heads: int, position: Tensor, num_keys: int, first: Tensor | int = 0
) -> tuple[Tensor, Tensor] | None:
    """Positions [R, P, J] that hold all keys a query at `position` [R, 1] sees in its past, and which it sees.

    There are keys from position `first` [R, 1] on, `num_keys` of them. None if there are no fewer positions to read.
    """
    variants = (pattern.for_head(head) for head in range(min(pattern.head_period, num_heads)))
    found = [_of_head(variant, position, num_keys, first) for variant in variants]
    longest = max(places.shape[-1] for places, _ in found)
    if longest >= num_keys:
        return None
    padded = ([F.pad(x, (0, longest - x.shape[-1])) for x in pair] for pair in found)
    places, shown = (torch.stack(tensors, dim=1) for tensors in zip(*padded))
    return places, shown


def _of_head(pattern: Pattern, position: Tensor, num_keys: int, first: Tensor | int) -> tuple[Tensor, Tensor]:
    """[R, J] twice, for a pattern that is the same for all heads; each key is shown once."""
    all_places, all_shown, before = [], [], []
    for part in pattern.parts:
        places = _places(part, position, num_keys, first)
        shown = (places >= first) & (places < first + num_keys) & (places <= position)
        shown = shown & part.visible(0, position, places)
        for other in before:
            shown = shown & ~other.visible(0, position, places)
        before.append(part)
        all_places.append(places)
        all_shown.append(shown)
    return torch.cat(all_places, -1), torch.cat(all_shown, -1)


def _places(part: Pattern, position: Tensor, num_keys: int, first: Tensor | int) -> Tensor:
    """[R, J] positions among which are all that `part` shows; J does not depend on `position`."""
    places = part.reads(position, first, num_keys)
    if places is not None:
        return places
    return (first + torch.arange(num_keys, device=position.device)[None]).expand(len(position), -1)


class _Slots:
    """Where in the buffer the key of a position lies: so many slots on, or looked up where rows are padded."""

    def __init__(self, seen: VisibleKeys):
        self.first: Tensor | int = seen.key_offset
        self.slot_of = None
        self.valid = seen.key_valid
        if seen.key_positions is None:
            return
        if self.valid is None:
            self.first = seen.key_positions[:, :1]
            return
        places = torch.arange(seen.key_length, device=self.valid.device).expand_as(self.valid)
        positions = seen.key_positions.expand_as(places).masked_fill(~self.valid, seen.key_length)
        slot_of = places.new_full((len(places), seen.key_length + 1), -1)
        self.slot_of = slot_of.scatter(1, positions, places)[:, :-1]

    def of(self, places: Tensor) -> tuple[Tensor, Tensor | bool]:
        """Slots [B or R, P, J] of positions [R, P, J], and which of them hold a key."""
        if self.slot_of is None:
            first = self.first if isinstance(self.first, int) else self.first[:, None]
            slot = (places - first).clamp(min=0)
            if self.valid is None:
                return slot, True
            slot = slot.clamp(max=self.valid.shape[1] - 1).expand(len(self.valid), -1, -1)
            return slot, self.valid[:, None].expand(-1, slot.shape[1], -1).gather(2, slot)
        table = self.slot_of[:, None].expand(-1, places.shape[1], -1)
        places = places.clamp(0, table.shape[-1] - 1).expand(len(table), -1, -1)
        slot = table.gather(2, places)
        return slot.clamp(min=0), slot >= 0


def _position(seen: VisibleKeys, device: torch.device) -> Tensor:
    """The query's position, [R, 1]."""
    if seen.query_positions is not None:
        return seen.query_positions
    if isinstance(seen.query_offset, Tensor):
        return seen.query_offset.view(1, 1)
    return torch.full((1, 1), seen.query_offset, device=device)


def _pick(x: Tensor, slot: Tensor, num_heads: int) -> Tensor:
    """From [B, Hk, S, D] the places `slot` [R, P, J] -> [B, Hk, J, D], or [B, H, J, D] where heads differ."""
    slot = slot.clamp(max=x.shape[2] - 1)
    if slot.shape[:2] == (1, 1):
        return x.index_select(2, slot[0, 0])
    groups = num_heads // x.shape[1] if slot.shape[1] > 1 else 1
    x = x[:, :, None].expand(-1, -1, groups, -1, -1)
    slot = _by_head(slot, num_heads) if slot.shape[1] > 1 else slot.expand(-1, x.shape[1], -1)
    slot = slot.unflatten(1, (-1, groups))[..., None]
    return x.gather(3, slot.expand(len(x), -1, -1, -1, x.shape[4])).flatten(1, 2)


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """[R, P, J] for heads that differ -> [R, 1 or H, J]: head h is as head h mod P."""
    period = x.shape[1]
    return x if period == 1 else x.repeat(1, -(-num_heads // period), 1)[:, :num_heads]

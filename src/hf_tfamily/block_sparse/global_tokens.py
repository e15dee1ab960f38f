"""Attention with global tokens, which see every key and which every query sees, at their own cost.

The pattern's part runs without the global keys; the few global keys are picked and attended to densely; both are merged
by their log-sum-exp (LSE). The few global queries are picked as well, attend to all keys, and are put back. Never
queries x keys: with G global tokens a row costs its pattern and 2 G N.

Legend: B batch, T queries, S keys, H heads, Hk key heads, D head dim (Dv of values); G picked tokens of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling.attention import VisibleKeys
from ..modeling.attention_patterns import Full, Pattern
from .cpu import block_sparse_attention
from .decode import attend_masked

Attended = tuple[Tensor, Tensor]  # outputs [B, T, H, Dv] and LSEs [B, T, H]


def most_global(seen: VisibleKeys) -> int:
    """At most so many global tokens are in a row; counted once for all layers of a step."""
    if seen.most_global is not None:
        return seen.most_global
    if "most_global" not in seen.memo:
        seen.memo["most_global"] = _count(seen.global_tokens)
    return seen.memo["most_global"]


@torch.compiler.disable  # how many there are is in the values
def _count(marked: Tensor) -> int:
    if torch.compiler.is_exporting():
        raise ValueError(
            "attn_implementation='block_sparse' cannot export a global_attention_mask, whose values say how many "
            "tokens are global; leave the choice to the config, or export under 'sdpa' or 'eager'."
        )
    return int(marked.sum(dim=1).max())


class Picked(NamedTuple):
    """Marked tokens of each row, at the front, and others behind them up to the same number.

    Attributes:
        index: [B, G], which tokens; none is there twice.
        marked: [B, G] bool, False for the others.
    """

    index: Tensor
    marked: Tensor

    def of(self, x: Tensor) -> Tensor:
        """From [B, N, ...] those tokens, [B, G, ...]."""
        return x.gather(1, self._index_like(x))

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """[B, N, ...] with `new` [B, G, ...] in the place of the marked tokens."""
        marked = self.marked.view(*self.marked.shape, *[1] * (x.dim() - 2))
        return x.scatter(1, self._index_like(x), torch.where(marked, new.to(x.dtype), self.of(x)))

    def _index_like(self, x: Tensor) -> Tensor:
        index = self.index.view(*self.index.shape, *[1] * (x.dim() - 2))
        return index.expand(-1, -1, *x.shape[2:])


def pick(marked: Tensor, most: int) -> Picked:
    """The marked of the tokens [B, N], of which no row has more than `most`."""
    index = marked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return Picked(index, marked.gather(1, index))


def attend_global(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    global_tokens: Tensor,
    most: int,
    causal: bool,
    scale: float,
    q_offset: int,
    kv_offset: int = 0,
    key_valid: Tensor | None = None,
) -> Attended:
    """Attention of [B, T, H, D] to those of the keys [B, S, Hk, D] that are seen, and its LSE, 0 and -inf where there
    are none.

    Args:
        global_tokens: [B, S] bool; the queries are among the keys' tokens.
        most: no row has more of them.

    The other arguments are those of cpu.block_sparse_attention.
    """
    where = {"causal": causal, "scale": scale, "q_offset": q_offset, "kv_offset": kv_offset, "return_lse": True}
    if most == 0:
        return block_sparse_attention(query, key, value, pattern, key_valid=key_valid, **where)
    valid = torch.ones_like(global_tokens) if key_valid is None else key_valid
    near = block_sparse_attention(query, key, value, pattern, key_valid=valid & ~global_tokens, **where)

    query_positions = (q_offset + torch.arange(query.shape[1], device=query.device)).expand(len(query), -1)
    key_positions = (kv_offset + torch.arange(key.shape[1], device=key.device)).expand(len(key), -1)
    keys = pick(global_tokens & valid, most)
    positions = (query_positions, keys.of(key_positions)) if causal else None
    far = _attend_all(query, keys.of(key), keys.of(value), keys.marked, positions, scale)
    output, lse = merge(near, far)

    first = q_offset - kv_offset
    queries = pick(global_tokens[:, first : first + query.shape[1]], most)
    positions = (queries.of(query_positions), key_positions) if causal else None
    rows, rows_lse = _attend_all(queries.of(query), key, value, valid, positions, scale)
    return queries.put(output, rows), queries.put(lse, rows_lse)


def _attend_all(
    query: Tensor, key: Tensor, value: Tensor, key_valid: Tensor, positions: tuple[Tensor, Tensor] | None, scale: float
) -> Attended:
    """Attention to all valid keys, of which one side is few; with `positions` [B, T] and [B, S] to none of a later
    one, which takes memory for each pair."""
    if positions is None:
        how = {"causal": False, "scale": scale, "q_offset": 0, "key_valid": key_valid, "return_lse": True}
        return block_sparse_attention(query, key, value, Full(), **how)
    mask = (positions[1][:, None, None, :] <= positions[0][:, None, :, None]) & key_valid[:, None, None, :]
    output, lse = attend_masked(mask, ~mask.any(-1, keepdim=True), query, key, value, scale, with_lse=True)
    return output, lse.transpose(1, 2)


def merge(first: Attended, second: Attended) -> Attended:
    """Two parts that show no key twice, as one."""
    blind = torch.isneginf(first[1]) & torch.isneginf(second[1])  # sees nothing in either
    ours, theirs = (lse.masked_fill(blind, 0.0) for lse in (first[1], second[1]))
    share = torch.sigmoid(ours - theirs)[..., None].to(first[0].dtype)
    output = first[0] * share + second[0] * (1 - share)
    return output, torch.logaddexp(ours, theirs).masked_fill(blind, float("-inf"))

"""What a query finally sees: its pattern, and causality, and padding, and packing.

`VisibleKeys` says it once, without building anything; each backend asks it for the form it takes: a dense boolean
mask (eager, sdpa), a BlockMask (flex_attention), or the object itself (block_sparse).

Shapes: B batch, H heads, T queries, S keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask

from .attention_patterns import Full
from .attention_patterns_base import Pattern

FLEX_BLOCK = 128


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """The keys each of T queries sees among S keys, as data.

    Places count slots of the key tensor, positions count tokens: they differ where a row is padded on the left, packs
    several documents, or where a cache keeps some keys only.

    Attributes:
        pattern: which positions see which.
        num_heads: number of query heads H.
        causal: a query sees no key at a later position.
        batch_size, query_length, key_length: B, T, S.
        query_offset: place of the first query; a tensor [] where a static cache counts in one and T is 1.
        key_offset: place of the first key (other than 0 in caches that dropped the oldest keys).
        key_valid: [B, S] or [B, H, S] bool, False for padding; None if all keys are tokens.
        query_positions, key_positions: [B, T] and [B, S] or [B, H, S] (heads with keys of their own) positions of
            tokens; None where places are positions.
        query_documents, key_documents: [B, T] and [B, S] document numbers of packed rows; None if a row is one.
        extra: [B or 1, H or 1, T, S] bool, the caller's own mask on top; None if there is none.
        all_places: the keys are those of all places from key_offset on, in order.
        awaits_pattern: made for a stock model; the attention function adds the layer's pattern to what is said here.
    """

    pattern: Pattern
    num_heads: int
    causal: bool
    batch_size: int
    query_length: int
    key_length: int
    query_offset: int | torch.Tensor = 0
    key_offset: int = 0
    key_valid: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    key_positions: torch.Tensor | None = None
    query_documents: torch.Tensor | None = None
    key_documents: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    all_places: bool = False
    awaits_pattern: bool = False
    _dense: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __getattr__(self, name: str):
        """Only for what is not there: a model that does not hand its mask on untouched."""
        raise AttributeError(
            f"attn_implementation='block_sparse' makes no mask tensor, but this model reads {name!r} of its mask; "
            "use 'eager' or 'sdpa'."
        )

    @property
    def is_plain(self) -> bool:
        """Does every row of the batch see the same, decided by places alone?"""
        tensors = (self.key_valid, self.query_positions, self.key_positions, self.key_documents, self.extra)
        return all(tensor is None for tensor in tensors)

    def dense(self, device: torch.device) -> torch.Tensor:
        """Boolean mask [B or 1, H or 1, T, S], True where a key is seen; worked out once for all layers."""
        if self._dense is None:
            object.__setattr__(self, "_dense", self.dense_rows(device, slice(None)))
        return self._dense

    def dense_rows(self, device: torch.device, rows: slice) -> torch.Tensor:
        """The same for the queries in `rows` only."""
        if self.query_positions is None:
            query = (torch.arange(self.query_length, device=device)[rows] + self.query_offset)[None, None, :, None]
            key = (torch.arange(self.key_length, device=device) + self.key_offset)[None, None, None, :]
        else:
            query = self.query_positions[:, None, rows, None]
            key = _by_head(self.key_positions)
        heads = self.num_heads if self.pattern.head_period > 1 else 1
        head = torch.arange(heads, device=device)[None, :, None, None]

        seen = self.pattern.visible(head, query, key)
        if self.causal:
            seen = seen & (key <= query)
        if self.key_valid is not None:
            seen = seen & _by_head(self.key_valid)
        if self.query_documents is not None:
            seen = seen & (self.query_documents[:, None, rows, None] == self.key_documents[:, None, None, :])
        if self.extra is not None:
            seen = seen & self.extra[:, :, rows]
        return seen

    def mask_mod(self) -> Callable:
        """The same as a FlexAttention `mask_mod(batch, head, query, key)`."""
        if self.extra is not None:
            raise ValueError("flex_attention takes no 4-D attention_mask beside a pattern; use 'eager' or 'sdpa'.")

        def visible(batch, head, query, key):
            def of_key(tensor):
                return tensor[batch, key] if tensor.ndim == 2 else tensor[batch, head, key]

            query_position, key_position = query + self.query_offset, key + self.key_offset
            if self.query_positions is not None:
                query_position, key_position = self.query_positions[batch, query], of_key(self.key_positions)
            seen = self.pattern.visible(head, query_position, key_position)
            if self.causal:
                seen = seen & (key_position <= query_position)
            if self.key_valid is not None:
                seen = seen & of_key(self.key_valid)
            if self.query_documents is not None:
                seen = seen & (self.query_documents[batch, query] == self.key_documents[batch, key])
            return seen

        return visible

    def block_mask(self, device: torch.device) -> BlockMask:
        """The same as a FlexAttention BlockMask; built one row of blocks at a time, so never [T, S] at once."""
        return _cached_block_mask(self, device) if self.is_plain else _build_block_mask(self, device)

    # Stock models handle masks as if they were 4-D tensors; these two let the object travel through them.
    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> "VisibleKeys":
        return self


def visible_keys(
    pattern: Pattern,
    num_heads: int,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_length: int | torch.Tensor = 0,
    key_length: int | None = None,
    key_offset: int = 0,
    causal: bool = True,
) -> VisibleKeys:
    """What the queries of `hidden_states` [B, T, hidden] see, from the arguments a model's forward gets.

    Args:
        attention_mask: [B, past + T], nonzero for tokens; or a 4-D mask [B or 1, H or 1, T, S], boolean or with 0 for
            "seen" and the dtype's minimum for "not seen", which is intersected with the pattern.
        position_ids: [B or 1, T] positions of the queries. Where they start anew within a row, and there is no mask
            and no past, the row packs several documents.
        past_length: tokens seen before these; for a single token it may be a tensor [] whose value nobody looks at.
        key_length, key_offset: how many keys the cache hands over and the place of the first; all of them by default.

    Raises:
        ValueError: if a mask or position_ids have another shape.
    """
    batch_size, query_length = hidden_states.shape[:2]
    key_length = past_length + query_length if key_length is None else key_length
    seen = VisibleKeys(
        pattern,
        num_heads,
        causal,
        batch_size,
        query_length,
        key_length,
        query_offset=past_length,
        key_offset=key_offset,
        all_places=True,
    )
    if position_ids is not None:
        position_ids = _check_position_ids(position_ids, batch_size, query_length)
    if attention_mask is not None and attention_mask.ndim == 4:
        seen = replace(seen, extra=_check_4d_mask(attention_mask, seen))
    elif attention_mask is not None:
        return with_padding(seen, _check_2d_mask(attention_mask, seen))
    elif position_ids is not None and isinstance(past_length, int) and past_length == 0:
        return with_packing(seen, _documents(position_ids), position_ids)
    if position_ids is not None:
        return _with_shift(seen, position_ids)
    return seen


def drop_trivial(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_length: int | torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """None for a padding mask that hides nothing and for positions that are places: backends are fastest without.

    The values are looked at, so this does nothing under compilation, or where the past is counted on the device. What
    has another shape is left to be refused.
    """
    batch_size, query_length = hidden_states.shape[:2]
    end = past_length + query_length
    if torch.compiler.is_compiling() or isinstance(past_length, torch.Tensor):
        return attention_mask, position_ids
    if attention_mask is not None and attention_mask.shape == (batch_size, end) and bool(attention_mask.all()):
        attention_mask = None
    if position_ids is not None and position_ids.shape[-1] == query_length:
        places = torch.arange(past_length, end, device=position_ids.device)
        if bool((position_ids == places).all()):
            position_ids = None
    return attention_mask, position_ids


def token_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, S] of the tokens that a padding mask [B, S] marks; padding gets the position of its neighbour."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def with_padding(seen: VisibleKeys, valid: torch.Tensor) -> VisibleKeys:
    """`valid` is [B, past + T]; keys beyond it (the free end of a static cache) are no tokens yet."""
    positions = token_positions(valid)
    free_end = max(seen.key_offset + seen.key_length - valid.shape[1], 0)
    held = slice(seen.key_offset, seen.key_offset + seen.key_length)
    pad = torch.nn.functional.pad
    return replace(
        seen,
        key_valid=pad(valid, (0, free_end))[:, held],
        query_positions=_of_queries(positions, seen),
        key_positions=pad(positions, (0, free_end))[:, held],
    )


def _of_queries(positions: torch.Tensor, seen: VisibleKeys) -> torch.Tensor:
    """From [B, past + T] those of the queries, [B, T]."""
    if isinstance(seen.query_offset, torch.Tensor):
        return positions.gather(1, seen.query_offset.expand(len(positions), 1))
    return positions[:, seen.query_offset : seen.query_offset + seen.query_length]


def with_packing(seen: VisibleKeys, documents: torch.Tensor, positions: torch.Tensor | None = None) -> VisibleKeys:
    """`documents` [B or 1, T] numbers the documents of each row, in ascending order; `positions` count from their
    starts unless given."""
    documents = documents.expand(seen.batch_size, -1)
    pad, free_end = torch.nn.functional.pad, (0, seen.key_length - seen.query_length)
    if positions is None:
        places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        begins = pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        positions = places - (places * begins).cummax(dim=-1).values
    return replace(
        seen,
        query_positions=positions,
        key_positions=pad(positions, free_end),
        query_documents=documents,
        key_documents=pad(documents, free_end, value=-1),
    )


def _documents(position_ids: torch.Tensor) -> torch.Tensor:
    """A position that does not follow its neighbour's begins a new document."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.nn.functional.pad(starts.long().cumsum(dim=-1), (1, 0))


def _with_shift(seen: VisibleKeys, position_ids: torch.Tensor) -> VisibleKeys:
    """With a past and no mask, the keys' positions run on without a gap up to the queries' own.

    What would stand before position 0 is of an earlier document, in a row that was packed.
    """
    key_places = torch.arange(seen.key_length, device=position_ids.device) + seen.key_offset
    key_positions = key_places + position_ids[:, :1] - seen.query_offset
    of_document = key_positions >= 0
    if not torch.compiler.is_compiling() and bool(of_document.all()):
        of_document = None
    return replace(seen, query_positions=position_ids, key_positions=key_positions, key_valid=of_document)


def _check_position_ids(position_ids: torch.Tensor, batch_size: int, query_length: int) -> torch.Tensor:
    if position_ids.ndim == 1:
        position_ids = position_ids[None]
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != query_length:
        raise ValueError(
            f"position_ids must have shape [{batch_size} or 1, {query_length}], got {list(position_ids.shape)}."
        )
    return position_ids.expand(batch_size, query_length)


def _check_2d_mask(mask: torch.Tensor, seen: VisibleKeys) -> torch.Tensor:
    if isinstance(seen.query_offset, torch.Tensor):  # nobody looks at how many tokens there are
        return mask.bool()
    tokens = seen.query_offset + seen.query_length
    if mask.ndim != 2 or mask.shape[0] != seen.batch_size or mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask must have shape [batch, past + new tokens] = [{seen.batch_size}, {tokens}] "
            f"(or 4 dimensions), got {list(mask.shape)}."
        )
    if mask.shape[1] > max(tokens, seen.key_offset + seen.key_length):
        raise ValueError(f"attention_mask covers {mask.shape[1]} tokens, but only {tokens} have been given.")
    return mask.bool()


def _check_4d_mask(mask: torch.Tensor, seen: VisibleKeys) -> torch.Tensor:
    wanted = ((1, seen.batch_size), (1, seen.num_heads), (seen.query_length,), (seen.key_length,))
    if any(size not in allowed for size, allowed in zip(mask.shape, wanted)):
        raise ValueError(
            f"A 4-D attention_mask must have shape [{seen.batch_size} or 1, {seen.num_heads} or 1, "
            f"{seen.query_length}, {seen.key_length}], got {list(mask.shape)}."
        )
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not torch.compiler.is_compiling() and not bool(((mask == 0) | hidden).all()):
        raise ValueError(
            "A 4-D attention_mask of floats may only hold 0 (seen) and the dtype's minimum (not seen); "
            "biases cannot be combined with a pattern."
        )
    return ~hidden


@lru_cache(maxsize=64)
def _cached_plain_block_mask(device, pattern, num_heads, causal, query_length, key_length, query_offset, key_offset):
    plain = VisibleKeys(pattern, num_heads, causal, 1, query_length, key_length, query_offset, key_offset)
    return _build_block_mask(plain, device)


def _cached_block_mask(seen: VisibleKeys, device: torch.device) -> BlockMask:
    sizes = (seen.query_length, seen.key_length, seen.query_offset, seen.key_offset)
    return _cached_plain_block_mask(device, seen.pattern, seen.num_heads, seen.causal, *sizes)


def _build_block_mask(seen: VisibleKeys, device: torch.device) -> BlockMask:
    block_rows = -(-seen.query_length // FLEX_BLOCK)
    block_columns = -(-seen.key_length // FLEX_BLOCK)
    some, every = [], []
    for row in range(block_rows):
        mask = seen.dense_rows(device, slice(row * FLEX_BLOCK, (row + 1) * FLEX_BLOCK))
        # Queries and keys past the end count as not seen, so that a block at the edge is never called full.
        edge = (0, block_columns * FLEX_BLOCK - mask.shape[-1], 0, FLEX_BLOCK - mask.shape[-2])
        tiles = torch.nn.functional.pad(mask, edge).unflatten(-1, (block_columns, FLEX_BLOCK))
        some.append(tiles.any(dim=-1).any(dim=-2))
        every.append(tiles.all(dim=-1).all(dim=-2))
    some, every = torch.stack(some, dim=-2), torch.stack(every, dim=-2)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=seen.mask_mod(),
        seq_lengths=(seen.query_length, seen.key_length),
    )


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number [B, H, rows] and column numbers [B, H, rows, columns] of the blocks marked in [B, H, rows, columns]."""
    counts = blocks.sum(dim=-1).int()
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts, columns


def _by_head(tensor: torch.Tensor) -> torch.Tensor:
    """[B, S] or [B, H, S], one for each key, as [B, 1 or H, 1, S]."""
    return tensor[:, None, None, :] if tensor.ndim == 2 else tensor[:, :, None, :]


def full_causal(seen: VisibleKeys) -> bool:
    """Is this just what a dense causal kernel computes without any mask?"""
    square = seen.query_offset == 0 and seen.key_offset == 0 and seen.query_length == seen.key_length
    return seen.causal and seen.is_plain and square and isinstance(seen.pattern, Full)


def sees_all(seen: VisibleKeys) -> bool:
    """Is this dense attention that is not causal, without any mask?"""
    return not seen.causal and seen.is_plain and isinstance(seen.pattern, Full)

"""Attention as Transformers' models call it: what a query sees (`VisibleKeys`), the eager law, masks for every backend.

What a query finally sees is its pattern AND causality AND the padding AND the packing. `VisibleKeys` says it once as
data, and each backend gets the form that it takes: a boolean mask (eager, sdpa), a BlockMask (flex_attention), or the
data itself (block_sparse, which the package hf_tfamily registers; model code knows it by name only).

Shapes: B batch, H heads, T queries, S keys, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .attention_patterns import Full, Pattern

BLOCK_SPARSE = "block_sparse"  # the name that hf_tfamily registers its engine under
SEAM = 2  # version of what crosses to the engine: VisibleKeys, a pattern's dict, what is added to scores
PROJECT = "https://github.com/hf-tfamily/hf-tfamily"
FLEX_BLOCK = 128

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """The keys each of T queries sees among S keys, as data.

    Offsets count slots of the key tensor, positions count tokens: they differ where a row is padded on the left, packs
    several documents, or where a cache keeps some keys only. An engine reads these fields by name, whichever copy of
    this file made the object, and by `seam` it knows which fields there are.

    Attributes:
        pattern: which positions see which.
        num_heads: number of query heads H.
        causal: a query sees no key at a later position.
        batch_size, query_length, key_length: B, T, S.
        query_offset: slot of the first query; a tensor [] where a static cache counts in one and T is 1.
        key_offset: slot of the first key (other than 0 in caches that dropped the oldest keys).
        key_valid: [B, S] or [B, H, S] bool, False for padding; None if all keys are tokens.
        query_positions, key_positions: [B, T] and [B, S] or [B, H, S] (heads with keys of their own) positions of
            tokens; None where slots are positions.
        query_documents, key_documents: [B, T] and [B, S] document numbers of packed rows; None if a row is one.
        extra: [B or 1, H or 1, T, S] bool, the caller's own mask on top; None if there is none.
        all_places: the keys are those of all slots from key_offset on, in order.
        awaits_pattern: made for a stock model; the attention function adds the layer's pattern to what is said here.
        global_tokens: [B, S] bool, tokens that see every key and that every query sees, whatever the pattern says;
            causality, padding and packing hold for them too. None if there are none.
        most_global: at most so many global tokens are in a row; None if that is still to be counted.
        memo: what a backend works out once for all layers of a step.
    """

    seam: ClassVar[int] = SEAM

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
    global_tokens: torch.Tensor | None = None
    most_global: int | None = None
    memo: dict = field(default_factory=dict, init=False, repr=False)

    def __getattr__(self, name: str):
        """Only for what is not there: a model that does not hand its mask on untouched."""
        raise AttributeError(
            f"attn_implementation='block_sparse' makes no mask tensor, but this model reads {name!r} of its mask: it "
            "cannot run under it, nor under a pattern."
        )

    def _read(self, *operands):
        self.__getattr__("values")

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __invert__ = _read

    @property
    def is_plain(self) -> bool:
        """Does every row of the batch see the same, decided by slots alone?"""
        tensors = (
            *(self.key_valid, self.query_positions, self.key_positions, self.key_documents),
            *(self.extra, self.global_tokens),
        )
        return all(tensor is None for tensor in tensors)

    def dense(self, device: torch.device) -> torch.Tensor:
        """Boolean mask [B or 1, H or 1, T, S], True where a key is seen; worked out once for all layers."""
        if "dense" not in self.memo:
            self.memo["dense"] = self.dense_rows(device, slice(None))
        return self.memo["dense"]

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
        if self.global_tokens is not None:
            seen = seen | self.global_queries[:, None, rows, None] | self.global_tokens[:, None, None, :]
        if self.causal:
            seen = seen & (key <= query)
        if self.key_valid is not None:
            seen = seen & _by_head(self.key_valid)
        if self.query_documents is not None:
            seen = seen & (self.query_documents[:, None, rows, None] == self.key_documents[:, None, None, :])
        if self.extra is not None:
            seen = seen & self.extra[:, :, rows]
        return seen

    @property
    def global_queries(self) -> torch.Tensor:
        """[B, T] bool, which of the queries are global tokens."""
        first = self.query_offset - self.key_offset
        return self.global_tokens[:, first : first + self.query_length]

    def distances(self, device: torch.device) -> torch.Tensor:
        """[B or 1, T, S], how many tokens a key lies before a query; negative for later ones."""
        queries, keys = self.query_positions, self.key_positions
        if queries is None:
            queries = torch.arange(self.query_offset, self.query_offset + self.query_length, device=device)[None]
            keys = torch.arange(self.key_offset, self.key_offset + self.key_length, device=device)[None]
        return queries[:, :, None] - keys[:, None, :]

    def mask_mod(self) -> Callable:
        """The same as a FlexAttention `mask_mod(batch, head, query, key)`."""
        if self.extra is not None:
            raise ValueError("flex_attention takes no 4-D attention_mask beside a pattern; use 'eager' or 'sdpa'.")

        global_queries = None if self.global_tokens is None else self.global_queries

        def visible(batch, head, query, key):
            def of_key(tensor):
                return tensor[batch, key] if tensor.ndim == 2 else tensor[batch, head, key]

            query_position, key_position = query + self.query_offset, key + self.key_offset
            if self.query_positions is not None:
                query_position, key_position = self.query_positions[batch, query], of_key(self.key_positions)
            seen = self.pattern.visible(head, query_position, key_position)
            if self.global_tokens is not None:
                seen = seen | global_queries[batch, query] | self.global_tokens[batch, key]
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
        key_length, key_offset: how many keys the cache hands over and the slot of the first; all of them by default.

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
    """None for a padding mask that hides nothing and for positions that are slots: backends are fastest without.

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
        slots = torch.arange(past_length, end, device=position_ids.device)
        if bool((position_ids == slots).all()):
            position_ids = None
    return attention_mask, position_ids


def token_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, S] of the tokens that a padding mask [B, S] marks; padding gets the position of its neighbour."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def new_positions(
    hidden_states: torch.Tensor,
    attention_mask=None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
) -> tuple[torch.Tensor, int | None]:
    """Positions [B or 1, T] of the new tokens in hidden_states [B, T, ...], and over how many slots they were counted.

    They are the caller's (None: not counted), or are counted from a padding mask [B, past + T], or from the past alone
    under any other mask.
    """
    if position_ids is not None:
        return position_ids, None
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    end = past_length + hidden_states.shape[1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return token_positions(attention_mask)[:, past_length:end], end
    return torch.arange(past_length, end, device=hidden_states.device)[None], end


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
        slots = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        begins = pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        positions = slots - (slots * begins).cummax(dim=-1).values
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
    key_slots = torch.arange(seen.key_length, device=position_ids.device) + seen.key_offset
    key_positions = key_slots + position_ids[:, :1] - seen.query_offset
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
    return seen.causal and seen.is_plain and square and seen.pattern.is_full


def sees_all(seen: VisibleKeys) -> bool:
    """Is this dense attention that is not causal, without any mask?"""
    return not seen.causal and seen.is_plain and seen.pattern.is_full


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    return_lse: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as its equation says; every other backend is held to it.

    Args:
        query, key, value: [B, H, T, D], [B, Hk, S, D], [B, Hk, S, Dv], with H a multiple of Hk.
        attention_mask: boolean, broadcastable to [B, H, T, S], True where a key is seen; None if all are.
        position_bias: [B or 1, H, T, S], added to the scaled scores.

        return_lse: return the log-sum-exp of each query's scores in place of the weights.

    Returns:
        The output [B, T, H, Dv], and the weights [B, H, T, S], or with `return_lse` the log-sum-exp [B, H, T]. A query
        that sees nothing has weights and output 0, and a log-sum-exp of -inf.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, 0.0)
    dropped = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    output = (dropped @ value).transpose(1, 2).contiguous()
    return output, (_log_sum_exp(scores, attention_mask) if return_lse else dropped)


def _log_sum_exp(scores: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[B, H, T] of scores [B, H, T, S], in at least float32; -inf where nothing is seen, without a gradient."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is None:
        return scores.logsumexp(dim=-1)
    blind = ~attention_mask.any(dim=-1)
    lse = scores.masked_fill(~attention_mask & ~blind[..., None], float("-inf")).logsumexp(dim=-1)
    return lse.masked_fill(blind, float("-inf"))


def attend_with_lse(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by the module's backend -> output [B, T, H, Dv] and log-sum-exp [B, H, T]; arguments as for `eager`.

    Raises:
        ValueError: if the backend hands out no log-sum-exp, naming those that do.
    """
    implementation = module.config._attn_implementation
    if implementation not in ("eager", BLOCK_SPARSE):
        raise ValueError(
            f"attn_implementation={implementation!r} hands out no log-sum-exp; use 'eager' or '{BLOCK_SPARSE}'."
        )
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    return attention(module, query, key, value, attention_mask, return_lse=True, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Which backend


def engine_version() -> int:
    """The seam that the registered block_sparse engine speaks; 0 if there is none."""
    return getattr(ALL_ATTENTION_FUNCTIONS.get(BLOCK_SPARSE), "version", 0)


def choose_backend(asked: str | None, follows_patterns: bool) -> str | None:
    """What a model's `attn_implementation` becomes: where patterns are followed and nothing is asked, the engine.

    Raises:
        ImportError: if block_sparse is asked for and no engine, or only an older one, is registered.
    """
    version = engine_version()
    upgraded = f" in a version that speaks seam {SEAM} (upgrade it: what is there speaks seam {version})"
    remedy = f"`import hf_tfamily`{upgraded if version else ''} before loading the model; see {PROJECT}"
    if asked == BLOCK_SPARSE and version < SEAM:
        raise ImportError(
            f"attn_implementation='{BLOCK_SPARSE}' is computed by the package hf_tfamily: {remedy}; "
            "or use 'sdpa' or 'eager'."
        )
    if asked is not None or not follows_patterns:
        return asked
    if version >= SEAM:
        return BLOCK_SPARSE
    logger.warning_once(
        "Attention patterns run as masks under sdpa, which costs memory for every pair of tokens (N x N). "
        f"For their own cost, {remedy}."
    )
    return "sdpa"


def check_whole_rows() -> None:
    """Rows are not dealt out to several processes: torch's context_parallel drops masks, so patterns and padding too.

    Raises:
        ValueError: if they are.
    """
    if _rows_are_dealt_out():
        raise ValueError(
            "Under torch's context_parallel each process holds a part of every row, and attention patterns, padding "
            "and positions would be wrong; use data parallelism or FSDP, with gradient checkpointing for long rows, or "
            "hf_tfamily.distributed.context_parallel."
        )


def check_heads_of_mask(attention_mask, num_heads: int) -> None:
    """A mask [B or 1, H or 1, T, S] with its heads apart is for just these heads.

    Raises:
        ValueError: if it is for all heads of a layer of which tensor parallelism left this process `num_heads`.
    """
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape[1] not in (1, num_heads):
        raise ValueError(
            f"Masks of {attention_mask.shape[1]} heads, as patterns that differ between heads make them, for the "
            f"{num_heads} heads that a process holds under tensor parallelism, but which it holds is not to be seen of "
            "its weights, which are no DTensors; load with tp_plan='auto', or use FSDP."
        )


class Heads(NamedTuple):
    """The query heads of a layer that this process computes: all, unless tensor parallelism deals them out.

    Attributes:
        first, count: which, of those that the layer has.
        mesh: the processes they are dealt out to, in order; None where this one has all.
    """

    first: int
    count: int
    mesh: Any = None

    def share(self, number: int) -> int:
        """How many this process has of `number` heads of another kind (keys)."""
        return number if self.mesh is None else number // self.mesh.size()

    def seen(self, pattern: Pattern) -> Pattern:
        """What these heads see of a layer's pattern, numbered from 0."""
        return pattern if self.mesh is None else pattern.of_heads(self.first, self.count)

    def own(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """These heads' part of a tensor that every process holds for all heads, along `dim`; a part of a mask without
        heads (size 1) is all of it."""
        if self.mesh is None or tensor.shape[dim] == 1:
            return tensor
        return self.shared(tensor).narrow(dim, self.first, self.count)

    def shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that every process holds alike and uses for its own heads: gradients are summed over processes."""
        if self.mesh is None or not tensor.requires_grad:
            return tensor
        from torch.distributed.tensor import DTensor, Partial, Replicate  # not every build of torch has it

        whole = DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def averaged(self, mean: torch.Tensor) -> torch.Tensor:
        """The mean over all heads from each process's mean over its own."""
        if self.mesh is None:
            return mean
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts = DTensor.from_local(mean / self.mesh.size(), self.mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()


def heads_of(attention: nn.Module | None, num_heads: int, num_key_heads: int | None = None) -> Heads:
    """Which of `num_heads` this process computes: those whose outputs its slice of `attention.o_proj` reads.

    A slice of rows is FSDP's and says nothing; a slice of columns is that of some heads.

    Raises:
        ValueError: if heads, or key heads, cannot be dealt out evenly.
    """
    weight = getattr(getattr(attention, "o_proj", None), "weight", None)
    mesh = getattr(weight, "device_mesh", None)  # plain tensors have none
    if mesh is None:
        return Heads(0, num_heads)
    axes = [axis for axis, placement in enumerate(weight.placements) if getattr(placement, "dim", None) in (1, -1)]
    if not axes:
        return Heads(0, num_heads)
    mesh = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[axes[0]]]
    for name, number in (("heads", num_heads), ("key heads", num_key_heads or num_heads)):
        if number % mesh.size():
            raise ValueError(
                f"Tensor parallelism cannot deal out {number} {name} to {mesh.size()} processes evenly; use a number "
                "of processes that divides it, or FSDP."
            )
    count = num_heads // mesh.size()
    return Heads(mesh.get_local_rank() * count, count, mesh)


@torch.compiler.assume_constant_result
def _rows_are_dealt_out() -> bool:
    """context_parallel puts a function of its own in the place of PyTorch's attention."""
    return nn.functional.scaled_dot_product_attention.__module__.startswith("torch.distributed")


class PatternBackend:
    """For models of ours, before PreTrainedModel: block_sparse by default where patterns are set, and by name."""

    _supports_context_parallel = False

    def follows_patterns(self) -> bool:
        return getattr(self.config, "attention_patterns", None) is not None

    @property
    def local_heads(self) -> Heads:
        """The heads of its layers that this process computes."""
        attentions = (layer.self_attn for layer in self.base_model.layers if hasattr(layer, "self_attn"))
        key_heads = getattr(self.config, "num_key_value_heads", None)
        return heads_of(next(attentions, None), self.config.num_attention_heads, key_heads)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        attn_implementation = choose_backend(attn_implementation, self.follows_patterns())
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


class CachingPatternBackend(PatternBackend):
    """And of those with a cache, which `forward` takes as `past_key_values`."""

    def __call__(self, *args, **kwargs):
        """From Transformers 5.24 on `past_key_values` may be called `cache`, as pages of continuous batching are."""
        if isinstance(kwargs.get("cache"), Cache):
            kwargs["past_key_values"] = kwargs.pop("cache")
        return super().__call__(*args, **kwargs)


# What `generate()` calls the cache it carries: from Transformers 5.24 on "cache".
CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"


class CacheNameGenerationMixin(GenerationMixin):
    """`generate()` of a model whose `forward` takes its cache as `past_key_values`."""

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if CACHE in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE)
        return inputs


# ---------------------------------------------------------------------------------------------------------------------
# Masks of a model's layers


def layer_masks(
    patterns: list[Pattern],
    config,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    causal: bool = True,
    heads: Heads | None = None,
    global_tokens: torch.Tensor | None = None,
    most_global: int | None = None,
) -> list:
    """The mask of every layer, in the form that the config's attention implementation takes.

    Transformers' own mask builders collapse heads, so patterns that differ between heads need this one. Layers of the
    same pattern share a mask. Arguments are those of `visible_keys`, the `heads` that this process computes (all if
    None), and what VisibleKeys says of global tokens.

    Raises:
        ValueError: as `visible_keys`, or where a cache was made for other heads than these.
    """
    heads = Heads(0, config.num_attention_heads) if heads is None else heads
    patterns = [heads.seen(pattern) for pattern in patterns]
    if (
        attention_mask is not None
        and attention_mask.ndim == 4
        and attention_mask.shape[1] == config.num_attention_heads
    ):
        attention_mask = heads.own(attention_mask, dim=1)
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    if isinstance(past_length, torch.Tensor):  # a static cache's, which moves on before a lazy mask is read
        one_token = hidden_states.shape[1] == 1 and config._attn_implementation == BLOCK_SPARSE and causal
        past_length = past_length.clone() if one_token else int(past_length)
    attention_mask, position_ids = drop_trivial(hidden_states, attention_mask, position_ids, past_length)
    arguments = (heads.count, hidden_states, attention_mask, position_ids, past_length)

    seen = {}
    if hasattr(past_key_values, "announce"):  # a PatternCache, perhaps of another copy of its file
        seen = past_key_values.announce(hidden_states, attention_mask, position_ids)
        _check_heads_of_cache(seen, heads)
    cases = patterns
    if not seen or (isinstance(past_length, int) and past_length == 0):
        cases = [(p, *_key_sizes(past_key_values, hidden_states, layer)) for layer, p in enumerate(patterns)]
        seen = {case: visible_keys(case[0], *arguments, *case[1:], causal=causal) for case in set(cases)}
    if global_tokens is not None:
        own = {"global_tokens": global_tokens, "most_global": most_global}
        seen = {case: replace(keys, **own) for case, keys in seen.items()}
    masks = {case: lower_mask(seen[case], config._attn_implementation, hidden_states.device) for case in set(cases)}
    return [masks[case] for case in cases]


def _check_heads_of_cache(seen: dict[Pattern, VisibleKeys], heads: Heads) -> None:
    if heads.mesh is not None and any(keys.num_heads != heads.count for keys in seen.values()):
        raise ValueError(
            f"past_key_values was made for all heads, but under tensor parallelism this process computes {heads.count} "
            "of them; give what model.new_pattern_cache() returns, or None."
        )


def _key_sizes(past_key_values: Cache | None, hidden_states: torch.Tensor, layer_idx: int) -> tuple[int, ...]:
    """How many keys the cache hands to a layer, and the slot of the first; nothing where there is no cache."""
    return () if past_key_values is None else past_key_values.get_mask_sizes(hidden_states.shape[1], layer_idx)


def lower_mask(seen: VisibleKeys, implementation: str, device: torch.device):
    """What `implementation` takes as attention_mask to show each query just the keys that `seen` says.

    Raises:
        ValueError: if the implementation cannot run patterns, naming those that can; under torch's context_parallel.
    """
    check_whole_rows()
    if implementation == "sdpa" and (full_causal(seen) or sees_all(seen)):
        return None
    if implementation in ("eager", "sdpa"):
        return seen.dense(device)
    if implementation == "flex_attention":
        return seen.block_mask(device)
    if implementation == BLOCK_SPARSE:
        return seen
    raise ValueError(
        f"attn_implementation={implementation!r} cannot run attention patterns; "
        f"use '{BLOCK_SPARSE}', 'sdpa', 'flex_attention' or 'eager'."
    )


def cross_attention_mask(
    config, hidden_states: torch.Tensor, key_states: torch.Tensor, key_mask: torch.Tensor | None = None
):
    """The mask of attention from [B, T, hidden] to another sequence [B, S, hidden], in its implementation's form.

    Args:
        key_mask: [B, S], nonzero for tokens; None if all are.

    Raises:
        ValueError: if key_mask has another shape.
    """
    batch_size, key_length = key_states.shape[:2]
    if key_mask is not None and key_mask.shape != (batch_size, key_length):
        raise ValueError(
            f"The attention_mask of the sequence attended to must have shape [{batch_size}, {key_length}], "
            f"got {list(key_mask.shape)}."
        )
    valid, _ = drop_trivial(key_states, key_mask, None, 0)
    seen = VisibleKeys(
        Full(),
        config.num_attention_heads,
        causal=False,
        batch_size=batch_size,
        query_length=hidden_states.shape[1],
        key_length=key_length,
        key_valid=None if valid is None else valid.bool(),
    )
    return lower_mask(seen, config._attn_implementation, hidden_states.device)


def query_and_key_positions(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the new tokens [B or 1, T] and of all keys [B or 1, S]: counted, unless the caller says."""
    length, device = hidden_states.shape[1], hidden_states.device
    past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if attention_mask is not None and attention_mask.ndim != 2:
        attention_mask = None  # it hides keys, but moves none
    attention_mask, position_ids = drop_trivial(hidden_states, attention_mask, position_ids, past_length)
    sizes = _key_sizes(past_key_values, hidden_states, 0)
    seen = visible_keys(Full(), 1, hidden_states, attention_mask, position_ids, past_length, *sizes)
    if seen.query_positions is not None:
        return seen.query_positions, seen.key_positions
    keys = torch.arange(seen.key_offset, seen.key_offset + seen.key_length, device=device)[None]
    return torch.arange(past_length, past_length + length, device=device)[None], keys


def in_float32(attention: Callable) -> Callable:
    """`attention` with queries, keys and values in float32 and the output in their own dtype.

    Query-key products can exceed the largest float16 when sampling (Child et al. 2019, section 5.6).
    """

    def upcast(module, query, key, value, attention_mask, **kwargs):
        dtype = value.dtype
        with torch.autocast(query.device.type, enabled=False):
            output, weights = attention(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
        return output.to(dtype), weights

    return upcast

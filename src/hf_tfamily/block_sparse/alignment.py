"""Rows that are padded or packed: a plan counts positions from the start of a document, so that tokens are first moved
to where their positions say, and outputs back.

Shapes: B batch, H heads, T queries, S keys, D head dim.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch

from ..modeling.attention import VisibleKeys

Tensors = tuple[torch.Tensor, ...]


class Span(NamedTuple):
    """Consecutive positions; a `range` would fix sizes that an export leaves open, as `len` would."""

    start: int
    length: int


def attend_padded(seen: VisibleKeys, queries: Tensors, key, value, execute: Callable) -> Tensors:
    """Each row is a document: a token at position p goes to slot p - first of its row, for queries and keys apart."""
    query_valid = None
    if seen.key_valid is not None:
        first_query = seen.query_offset - seen.key_offset
        query_valid = seen.key_valid[:, first_query : first_query + seen.query_length]
    bound = seen.key_offset + seen.key_length  # that holds for positions of padded rows
    query_slots, query_span = _slots(seen.query_positions.expand(seen.batch_size, -1), query_valid, bound)
    key_slots, key_span = _slots(seen.key_positions.expand(seen.batch_size, -1), seen.key_valid, bound)
    where = (query_slots, key_slots, seen.batch_size, query_span, key_span)
    return _attend_slots(queries, key, value, execute, *where, seen.global_tokens)


def _slots(positions: torch.Tensor, valid: torch.Tensor | None, bound: int) -> tuple[torch.Tensor, Span]:
    """Among rows of slots as long as the returned span of positions, which slot each token goes to; -1 for padding."""
    span = Span(0, bound)
    if not torch.compiler.is_compiling():
        real = positions if valid is None else positions[valid]
        lowest, highest = (int(real.min()), int(real.max())) if real.numel() else (0, 0)
        span = Span(lowest, highest + 1 - lowest)
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
    slots = rows * span.length + positions - span.start
    return slots if valid is None else slots.masked_fill(~valid, -1), span


@torch.compiler.disable  # how many calls there are, and of which sizes, is in the documents
def attend_packed(seen: VisibleKeys, queries: Tensors, key, value, execute: Callable) -> Tensors:
    """Each document becomes a row; those that end at similar positions, up to a power of two, are computed together."""
    if torch.compiler.is_exporting():
        raise ValueError(
            "attn_implementation='block_sparse' cannot export packed documents, which stock models look for where they "
            "are given no attention_mask; give a 2-D attention_mask, or export under 'sdpa' or 'eager'."
        )
    documents = seen.key_documents
    numbers = documents + torch.arange(len(documents), device=documents.device)[:, None] * (documents.max() + 1)
    numbers = numbers.masked_fill(documents < 0, -1)  # the free end of a static cache belongs to none
    real = numbers >= 0
    ends = numbers.new_zeros(int(numbers.max()) + 1)  # a document's first position need not be 0
    ends = ends.scatter_reduce(0, numbers[real], seen.key_positions[real] + 1, "amax")
    bounds = 2 ** ends.clamp(min=1).log2().ceil().long()
    found = []
    for bound in bounds[ends > 0].unique().tolist():
        chosen = (bounds == bound) & (ends > 0)
        rows = chosen.cumsum(0) - 1
        slots = rows[numbers] * bound + seen.key_positions
        slots = slots.masked_fill(~chosen[numbers] | (numbers < 0), -1)
        query_slots, span = slots[:, : seen.query_length], Span(0, bound)
        where = (query_slots, slots, int(chosen.sum()), span, span)
        found.append(_attend_slots(queries, key, value, execute, *where, seen.global_tokens))
    outputs, *lses = zip(*found)  # each query has a document in one of them
    return sum(outputs), *(reduce(torch.maximum, lse) for lse in lses)


def _attend_slots(
    queries: Tensors,
    key,
    value,
    execute: Callable,
    query_slots,
    key_slots,
    num_rows: int,
    query_span,
    key_span,
    global_tokens=None,
) -> Tensors:
    """Move tokens to their slots [B, T] and [B, S] among `num_rows` rows, attend, and move what comes of it back.

    The slots of a row stand at the positions of its span. Slot -1 is nowhere: such keys are seen by nobody, such
    queries get output 0 and log-sum-exp -inf.
    """

    def to_slots(tensor: torch.Tensor, slots: torch.Tensor, span: Span) -> torch.Tensor:
        nowhere = num_rows * span.length
        moved = tensor.new_zeros(nowhere + 1, *tensor.shape[2:])
        moved = moved.index_copy(0, slots.flatten() % (nowhere + 1), tensor.flatten(0, 1))
        return moved[:nowhere].unflatten(0, (num_rows, span.length))

    valid = torch.ones(key_slots.shape, dtype=torch.bool, device=key.device)
    marked = {} if global_tokens is None else {"global_tokens": to_slots(global_tokens, key_slots, key_span)}
    outputs = execute(
        tuple(to_slots(query, query_slots, query_span) for query in queries),
        to_slots(key, key_slots, key_span),
        to_slots(value, key_slots, key_span),
        q_offset=query_span.start,
        kv_offset=key_span.start,
        key_valid=to_slots(valid, key_slots, key_span),
        **marked,
    )
    batch, length = queries[0].shape[:2]

    def back(tensor: torch.Tensor, nowhere: float) -> torch.Tensor:
        tensor = tensor.flatten(0, 1)
        tensor = torch.cat([tensor, tensor.new_full((1, *tensor.shape[1:]), nowhere)])
        return tensor[query_slots.flatten() % tensor.shape[0]].unflatten(0, (batch, length))

    return tuple(back(tensor, nowhere) for tensor, nowhere in zip(outputs, (0.0, float("-inf"))))

"""Does a mask function of Transformers show what is said of it? It is evaluated, not read.

Shapes: B batch, H heads, T queries, S keys, P pairs of a query and a key.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, masking_utils

from ..modeling.attention import BLOCK_SPARSE as NAME
from ..modeling.attention import VisibleKeys, with_packing
from ..modeling.attention_patterns import Full, Local, Pattern

# Rows of up to so many pairs are compared whole; longer ones at their edges, and at so many pairs at random. What a
# caller brings may hide or show anything anywhere, so that it is compared whole as long as that is bearable.
ALL_PAIRS, ALL_CUSTOM_PAIRS, RANDOM_PAIRS = 2**12, 2**20, 2**11
REFUSAL = f"attn_implementation='{NAME}' cannot combine a pattern with this model's own mask ({{}}); use 'sdpa'."
ERRORS = (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


def refusal(what: str) -> ValueError:
    return ValueError(REFUSAL.format(what))


def window_pattern(size: int | None, causal: bool) -> Pattern:
    """Transformers' windows hold `size` keys where they are causal, else `size` on either side of the query's own."""
    if size is None:
        return Full()
    return Local(size if causal else size + 1)


def verify(
    seen: VisibleKeys,
    mask_function: Callable,
    may_be_packed: bool,
    use_vmap: bool,
    config: PreTrainedConfig | None,
    device: torch.device | str,
) -> VisibleKeys:
    """`seen`, with the documents of packed rows, if the mask function shows the same.

    Raises:
        ValueError: if it does not.
    """
    traced = torch.compiler.is_compiling()
    if traced or (isinstance(seen.query_offset, Tensor) and seen.query_offset.device.type != "cpu"):
        return _verify_unseen(seen, mask_function, may_be_packed, use_vmap, device)
    # At every call, as a mask function may read tensors of the call; Transformers' own on the CPU, to wait for no GPU.
    at = device if use_vmap else "cpu"
    said = replace(seen, query_offset=int(seen.query_offset))
    if may_be_packed and _could_be_packed(said):
        documents = _documents(said, mask_function, at)
        if bool(documents.any()):
            said, seen = with_packing(said, documents), with_packing(seen, documents.to(device))
    last_head = getattr(config, "num_attention_heads", None)
    heads = torch.tensor([0, last_head - 1 if isinstance(last_head, int) else 0], device=at)
    query, key = _pairs(said, ALL_CUSTOM_PAIRS if use_vmap else ALL_PAIRS, at)
    differ = _differences(said, mask_function, heads, query, key)
    if bool(differ.any()):
        row, _, pair = differ.expand(said.batch_size, 2, -1).nonzero()[0].tolist()
        where = f"query {query[pair]}, key {key[pair]} of row {row}"
        raise refusal(f"{mask_function!r} is not causal={said.causal}, {said.pattern} for {where}")
    return seen


def _could_be_packed(seen: VisibleKeys) -> bool:
    """Are there neighbours whom nothing but documents would hide? In windows of 1 there are none: tokens are alone."""
    whole = 1 < seen.query_length == seen.key_length and seen.query_offset == 0 and seen.key_offset == 0
    return whole and bool(seen.pattern.visible(0, 1, 0))


def _documents(seen: VisibleKeys, mask_function: Callable, device) -> Tensor:
    """Numbers [B or 1, T] of documents: one begins wherever a token does not see the token before."""
    slots = torch.arange(seen.query_length, device=device)
    follows = _evaluate(mask_function, seen, torch.zeros_like(slots[:1]), slots[1:], slots[:-1])[:, 0]
    return nn.functional.pad((~follows).long().cumsum(dim=-1), (1, 0))


def _pairs(seen: VisibleKeys, limit: int, device) -> tuple[Tensor, Tensor]:
    """Slots of queries and of keys [P] to compare."""
    num_queries, num_keys = seen.query_length, seen.key_length
    num_pairs = num_queries * num_keys
    if num_pairs <= limit:
        pairs = torch.arange(num_pairs, device=device)
        return pairs // num_keys, pairs % num_keys
    queries, keys = torch.arange(num_queries, device=device), torch.arange(num_keys, device=device)
    edge_queries, edge_keys = _edges(seen, queries)
    generator = torch.Generator(device).manual_seed(0)
    some = torch.randint(num_pairs, (RANDOM_PAIRS,), generator=generator, device=device)
    first_query, first_key = torch.zeros_like(keys), torch.zeros_like(queries)
    return (
        torch.cat([edge_queries, first_query, first_query + num_queries - 1, queries, queries, some // num_keys]),
        torch.cat([edge_keys, keys, keys, first_key, first_key + num_keys - 1, some % num_keys]),
    )


def _edges(seen: VisibleKeys, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Slots [P] of each query and the keys on either side of where causality and the window end."""
    steps = {0, 1}
    if isinstance(seen.pattern, Local):
        steps |= set(range(seen.pattern.window - 2, seen.pattern.window + 2))
    steps = torch.tensor(sorted(steps | {-step for step in steps}), device=queries.device)
    keys = queries + (seen.query_offset - seen.key_offset) - steps[:, None]
    return queries.repeat(len(steps)), keys.clamp(0, seen.key_length - 1).flatten()


def _differences(seen: VisibleKeys, mask_function: Callable, heads: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[B or 1, H or 1, P] bool, for which slots of queries and keys [P] the mask function shows something else."""
    rows = torch.arange(seen.batch_size, device=query.device)[:, None, None]
    return _evaluate(mask_function, seen, heads, query, key) != seen.mask_mod()(rows, heads[:, None], query, key)


def _evaluate(mask_function: Callable, seen: VisibleKeys, heads: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[B or 1, H or 1, P] bool, what the mask function says of slots of queries and keys [P]."""
    rows = torch.arange(seen.batch_size, device=query.device)[:, None, None]
    indices = rows, heads[None, :, None], (query + seen.query_offset)[None, None], (key + seen.key_offset)[None, None]
    shape = len(rows), len(heads), len(query)
    if torch.compiler.is_compiling():
        return torch.atleast_3d(mask_function(*indices))
    try:
        shown = torch.as_tensor(mask_function(*indices), device=query.device)
        shown.expand(shape)
    except ERRORS:  # it may be one for scalars
        try:
            shown = torch.vmap(mask_function)(*(index.expand(shape).flatten() for index in indices)).reshape(shape)
        except ERRORS as error:
            raise refusal(f"{mask_function!r} cannot be evaluated: {error}") from error
    return shown.bool().reshape((1,) * (3 - shown.ndim) + shown.shape)


def _verify_unseen(
    seen: VisibleKeys, mask_function: Callable, may_be_packed: bool, use_vmap: bool, device
) -> VisibleKeys:
    """`verify` where no value may be looked at: while a graph is made, and beside an offset on a GPU.

    What Transformers itself builds was evaluated when this file was imported; shapes tell what reads the batch.
    """
    blind = "which torch.compile, export and static caches on GPUs leave no look at"
    if use_vmap or not BUILDERS_AGREE[seen.causal, isinstance(seen.pattern, Local)]:
        raise refusal(f"a mask function of its own, {blind}")
    first = torch.zeros(2, 1, 1, dtype=torch.long, device=device)
    if mask_function(first, first[:1], first[:1], first[:1]).shape.numel() == 1:
        return seen
    if not may_be_packed or not _could_be_packed(seen):
        raise refusal(f"a mask function that reads the batch, {blind}")
    seen = with_packing(seen, _documents(seen, mask_function, device))
    edges = _edges(seen, torch.arange(seen.query_length, device=device))
    differ = _differences(seen, mask_function, first[0, 0], *edges)
    torch._assert_async(~differ.any(), REFUSAL.format("a mask function that reads the batch"))
    return seen


def _builder_agrees(causal: bool, windowed: bool) -> bool:
    """Does a small mask that Transformers builds show what is said of its kind?"""
    config = PreTrainedConfig(attn_implementation="sdpa", sliding_window=2)
    whole = {f"allow_is_{'causal' if causal else 'bidirectional'}_skip": False}
    built = BUILDERS[causal, windowed](config, torch.empty(1, 6, 1), attention_mask=None, past_key_values=None, **whole)
    seen = VisibleKeys(window_pattern(2 if windowed else None, causal), 1, causal, 1, 6, 6)
    return torch.equal(built, seen.dense(built.device).expand_as(built))


BUILDERS = {
    (True, False): masking_utils.create_causal_mask,
    (True, True): masking_utils.create_sliding_window_causal_mask,
    (False, False): masking_utils.create_bidirectional_mask,
    (False, True): masking_utils.create_bidirectional_sliding_window_mask,
}
BUILDERS_AGREE = {kind: _builder_agrees(*kind) for kind in BUILDERS}

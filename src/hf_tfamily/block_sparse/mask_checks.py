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

# Rows of up to so many pairs are compared whole, and longer ones where a caller brings a function of its own, that may
# hide or show anything anywhere. Else every query is compared with its neighbours, so many with what lies at the ends
# of window and row, and so many pairs at random.
ALL_PAIRS, ALL_CUSTOM_PAIRS = 2**12, 2**16
MOST_AT_ENDS, RANDOM_PAIRS = 512, 2048
REFUSAL = f"attn_implementation='{NAME}' cannot follow this model's own mask ({{}}); only without a pattern others can."
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
    valid: Tensor | None = None,
) -> VisibleKeys:
    """`seen`, with the documents of packed rows, if the mask function shows the same.

    Args:
        valid: [B, past + T], the tokens that it must be the same for, where it counts from the first of each row.

    Raises:
        ValueError: if it does not.
    """
    if not _can_look(seen.query_offset):
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
    if valid is not None:
        tokens = valid.to(at)
        slots = (query + said.query_offset, (key + said.key_offset).clamp(max=tokens.shape[1] - 1))
        differ = differ & tokens[:, None, slots[0]] & tokens[:, None, slots[1]]
    if bool(differ.any()):
        row, _, pair = differ.expand(said.batch_size, 2, -1).nonzero()[0].tolist()
        where = f"query {query[pair]}, key {key[pair]} of row {row}"
        raise refusal(f"{mask_function!r} is not causal={said.causal}, {said.pattern} for {where}")
    return seen


def _can_look(query_offset: int | Tensor) -> bool:
    """Are there values to look at, none of which a GPU would have to hand over?"""
    on_host = not isinstance(query_offset, Tensor) or query_offset.device.type == "cpu"
    return on_host and not torch.compiler.is_compiling() and tensors_have_values()


def tensors_have_values() -> bool:
    """Not so in a mode of fakes, which export has, too."""
    return type(torch.empty(0, device="cpu")) is Tensor


def _could_be_packed(seen: VisibleKeys) -> bool:
    """Are there neighbours whom nothing but documents would hide? In windows of 1 there are none: tokens are alone."""
    whole = 1 < seen.query_length == seen.key_length and seen.query_offset == 0 and seen.key_offset == 0
    return whole and bool(seen.pattern.visible(0, 1, 0))


def _documents(seen: VisibleKeys, mask_function: Callable, device) -> Tensor:
    """Numbers [B or 1, T] of documents: one begins wherever a token does not see the token before, but for chunks."""
    slots = torch.arange(seen.query_length, device=device)
    follows = _evaluate(mask_function, seen, torch.zeros_like(slots[:1]), slots[1:], slots[:-1])[:, 0]
    begins = ~follows & seen.pattern.visible(0, slots[1:], slots[:-1])
    return nn.functional.pad(begins.long().cumsum(dim=-1), (1, 0))


def _pairs(seen: VisibleKeys, limit: int, device) -> tuple[Tensor, Tensor]:
    """Slots of queries and of keys [P] to compare."""
    num_queries, num_keys = seen.query_length, seen.key_length
    num_pairs = num_queries * num_keys
    if num_pairs <= limit:
        every = torch.arange(num_pairs, device=device)
        return every // num_keys, every % num_keys
    some_queries, some_keys = _spread(num_queries, device), _spread(num_keys, device)
    first_query, first_key = torch.zeros_like(some_keys), torch.zeros_like(some_queries)
    generator = torch.Generator(device).manual_seed(0)
    some = torch.randint(num_pairs, (RANDOM_PAIRS,), generator=generator, device=device)
    pairs = [
        _neighbours(seen, device),
        _at_steps(seen, some_queries, _window_ends(seen)),
        (first_query, some_keys),
        (first_query + num_queries - 1, some_keys),
        (some_queries, first_key),
        (some_queries, first_key + num_keys - 1),
        (some // num_keys, some % num_keys),
    ]
    queries, keys = zip(*pairs)
    return torch.cat(queries), torch.cat(keys)


def _spread(length: int, device) -> Tensor:
    """So many of the slots, evenly spaced from the first to the last."""
    return torch.linspace(0, length - 1, min(length, MOST_AT_ENDS), device=device).round().long()


def _neighbours(seen: VisibleKeys, device) -> tuple[Tensor, Tensor]:
    return _at_steps(seen, torch.arange(seen.query_length, device=device), [-1, 0, 1])


def _window_ends(seen: VisibleKeys) -> list[int]:
    """The distances on either side of where windows end."""
    if seen.pattern.is_full:
        return []
    size = seen.pattern.window if seen.pattern.type == "local" else seen.pattern.block
    return [sign * step for step in range(size - 2, size + 2) for sign in (-1, 1)]


def _at_steps(seen: VisibleKeys, queries: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
    """Slots [P] of queries and the keys so many steps before each of them."""
    keys = (
        queries
        + (seen.query_offset - seen.key_offset)
        - torch.tensor(steps, dtype=torch.long, device=queries.device)[:, None]
    )
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
    if use_vmap or not BUILDERS_AGREE[seen.causal, not seen.pattern.is_full]:
        raise refusal(f"a mask function of its own, {blind}")
    first = torch.zeros(2, 1, 1, dtype=torch.long, device=device)
    if mask_function(first, first[:1], first[:1], first[:1]).shape.numel() == 1:
        return seen
    if not may_be_packed or not _could_be_packed(seen):
        raise refusal(f"a mask function that reads the batch, {blind}")
    seen = with_packing(seen, _documents(seen, mask_function, device))
    differ = _differences(seen, mask_function, first[0, 0], *_neighbours(seen, device))
    torch._assert_async(~differ.any(), REFUSAL.format("a mask function that reads the batch"))
    return seen


def _builder_agrees(causal: bool, windowed: bool) -> bool:
    """Does a small mask that Transformers builds show what is said of its kind?"""
    config = PreTrainedConfig(attn_implementation="sdpa", sliding_window=2)
    embeds = torch.empty(1, 6, 1, device="cpu")
    whole = {f"allow_is_{'causal' if causal else 'bidirectional'}_skip": False}
    built = BUILDERS[causal, windowed](config, embeds, attention_mask=None, past_key_values=None, **whole)
    seen = VisibleKeys(window_pattern(2 if windowed else None, causal), 1, causal, 1, 6, 6)
    return torch.equal(built, seen.dense(built.device).expand_as(built))


BUILDERS = {
    (True, False): masking_utils.create_causal_mask,
    (True, True): masking_utils.create_sliding_window_causal_mask,
    (False, False): masking_utils.create_bidirectional_mask,
    (False, True): masking_utils.create_bidirectional_sliding_window_mask,
}
BUILDERS_AGREE = {kind: _builder_agrees(*kind) for kind in BUILDERS}

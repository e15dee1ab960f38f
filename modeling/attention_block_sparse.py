"""`attn_implementation="block_sparse"`: attention that costs what its pattern shows, under our models and stock ones.

Two functions are registered with Transformers: the attention itself, and a mask function that builds no mask but says
as data what is seen (`VisibleKeys`). Between them and the plan lies alignment: a plan counts positions from the start
of a document, so padded and packed rows are first moved to where their positions say.

Shapes: B batch, H heads, T queries, S keys, D head dim of queries and keys, Dv of values.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from inspect import getclosurevars, signature
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .attention_decode import attend_one
from .attention_masks import VisibleKeys, with_packing, with_padding
from .attention_patterns import Full, Local, intersect, pattern_from_dict
from .attention_patterns_base import Pattern
from .attention_relative import relative_attention
from .attention_relative_plan import rows_by_distance
from .attention_torch import block_sparse_attention
from .attention_triton import register as register_triton
from .attention_triton_relative import register as register_triton_relative
from .attention_windows import window_attention

NAME = "block_sparse"
Tensors = tuple[torch.Tensor, ...]
# A copy of this file beside a checkpoint and the installed package may meet in one process: the newer one serves both.
VERSION = 2  # since 2: masks of windows that are already cut


def block_sparse_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: VisibleKeys | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention [B, T, H, Dv] of queries [B, H, T, D] to keys [B, Hk, S, D] and values [B, Hk, S, Dv].

    A bias comes as what it is computed from, `position_bias` being a positions.RelativeScores. Under a Window2D without
    a grid the batch is one of windows, the mask's `extra` [L, 1, T, T] holds for each picture's L, and the bias is a
    tensor [1, H, T, T].

    Raises:
        ValueError: for what the backend cannot do, naming what can.
    """
    if _is_window(attention_mask):
        return _attend_window(query, key, value, attention_mask.extra, scaling, dropout, **kwargs), None
    _refuse_unsupported(attention_mask, dropout if module.training else 0.0, kwargs)
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    seen = _bind(attention_mask, module, query, key, is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = kwargs.get("position_bias")
    if bias is not None:
        return attend_relative(seen, query, key, value, scaling, bias), None
    tensors = (tensor.transpose(1, 2) for tensor in _in_one_dtype(query, key, value))
    return attend(seen, *tensors, scaling), None


def _is_window(attention_mask: Any) -> bool:
    """Are the windows of a picture already cut? A pattern without a grid could show nothing else."""
    pattern = getattr(attention_mask, "pattern", None)  # its class may be that of another copy of these files
    return getattr(pattern, "type", None) == "window_2d" and pattern.grid is None


def _attend_window(query, key, value, mask, scaling, dropout, *, position_bias, output_attentions=False, **kwargs):
    if output_attentions:
        raise ValueError(f"attn_implementation='{NAME}' does not support output_attentions; use 'eager'.")
    tensors = _in_one_dtype(query, key, value)
    return window_attention(*tensors, position_bias[0], None if mask is None else mask[:, 0], scaling, dropout)


def attend(
    seen: VisibleKeys, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of [B, T, H, D] to the keys [B, S, Hk, D] that `seen` shows -> [B, T, H, Dv]."""

    def execute(queries: Tensors, key: torch.Tensor, value: torch.Tensor, **where) -> torch.Tensor:
        return block_sparse_attention(*queries, key, value, seen.pattern, causal=seen.causal, scale=scaling, **where)

    if _is_one_token(seen, key.device):
        return attend_one(seen, query, key, value, scaling)
    if seen.query_positions is None:
        where = {"q_offset": seen.query_offset, "kv_offset": seen.key_offset, "key_valid": seen.key_valid}
        return execute((query,), key, value, **where)
    if seen.query_length == 1 or seen.key_positions.ndim == 3:
        return _attend_masked(seen, query, key, value, scaling)
    if seen.query_documents is None:
        return _attend_padded(seen, (query,), key, value, execute)
    return _attend_packed(seen, (query,), key, value, execute)


def _is_one_token(seen: VisibleKeys, device: torch.device) -> bool:
    """Is this a step of decoding over all places, to be run without a look at where it stands?

    Where places are positions known to the host, a CPU is faster with a plan.
    """
    one = seen.query_length == 1 and seen.causal and seen.all_places and seen.extra is None
    if not one or seen.query_documents is not None or (seen.key_positions is not None and seen.key_offset):
        return False
    return seen.key_positions is not None or isinstance(seen.query_offset, torch.Tensor) or device.type == "cuda"


def attend_relative(
    seen: VisibleKeys, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, bias
) -> torch.Tensor:
    """Attention of [B, H, T, D] to keys [B, H, S, D] with scores for their distance -> [B, T, H, D]."""
    tensors = _in_one_dtype(query, bias.position_query, key, value, bias.relative_key)
    *tensors, relative_key = tensors
    query, position_query, key, value = (tensor.transpose(1, 2) for tensor in tensors)

    def execute(queries: Tensors, key: torch.Tensor, value: torch.Tensor, **where) -> torch.Tensor:
        return relative_attention(
            *queries, key, value, relative_key, bias.distances, seen.pattern, scale=scaling, **where
        )

    if seen.query_length == 1:
        return _attend_one(seen, query, position_query, key, value, scaling, relative_key, bias.distances)
    if seen.query_positions is None:
        where = {"q_offset": seen.query_offset, "kv_offset": seen.key_offset, "key_valid": seen.key_valid}
        return execute((query, position_query), key, value, **where)
    return _attend_padded(seen, (query, position_query), key, value, execute)


def block_sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> VisibleKeys:
    """What a stock model's own mask shows, as data; the layer's pattern is added by the attention function.

    Args:
        attention_mask: [B, past + T] bool, True for tokens; or a mask made here before, which is returned.

    Raises:
        ValueError: if the model's mask function is none that can be stated as causality, window and documents.
    """
    if getattr(attention_mask, "awaits_pattern", False):  # `generate` makes the masks of static caches beforehand
        return attention_mask
    if isinstance(q_offset, torch.Tensor):  # a static cache's, which moves on before the mask is read
        q_offset = q_offset.clone() if q_length == 1 else int(q_offset)
    seen = VisibleKeys(
        Full(),
        num_heads=1,
        causal=False,
        batch_size=batch_size,
        query_length=q_length,
        key_length=kv_length,
        query_offset=q_offset,
        key_offset=kv_offset,
        all_places=True,
        awaits_pattern=True,
    )
    for name, values in _conditions(mask_function):
        seen = _with_condition(seen, name, values)
    return seen if _hides_nothing(attention_mask, seen) else with_padding(seen, attention_mask.bool())


class BlockSparseByDefault:
    """For models of ours, before PreTrainedModel: `block_sparse` where patterns are set and nothing else is asked."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        if attn_implementation is None and self.config.attention_patterns is not None:
            attn_implementation = NAME
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


def register() -> None:
    """Make Transformers know the backend, unless a copy of at least this version has done so."""
    registered = ALL_ATTENTION_FUNCTIONS.get(NAME)
    if registered is not None and getattr(registered, "version", 0) >= VERSION:
        return
    block_sparse_attention_forward.version = VERSION
    AttentionInterface.register(NAME, block_sparse_attention_forward)
    AttentionMaskInterface.register(NAME, block_sparse_mask)


# ---------------------------------------------------------------------------------------------------------------------
# What is seen


def _refuse_unsupported(attention_mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    bias = kwargs.get("position_bias")
    reasons = {
        "dropout of attention weights; set it to 0 in the config, or use 'eager' or 'sdpa'": dropout > 0,
        "output_attentions; use 'eager'": kwargs.get("output_attentions"),
        "softcap; set attn_logit_softcapping to None in the config, or use 'eager'": kwargs.get("softcap") is not None,
        "attention sinks (s_aux); use 'eager'": kwargs.get("s_aux") is not None,
        "a position_bias that is a tensor; use 'eager' or 'sdpa'": isinstance(bias, torch.Tensor),
        "masks that are tensors, whether given as a 4-D attention_mask or built by the model itself; "
        "use 'eager' or 'sdpa'": isinstance(attention_mask, torch.Tensor),
        "a 4-D attention_mask; use 'eager' or 'sdpa'": getattr(attention_mask, "extra", None) is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"attn_implementation='{NAME}' does not support {reason}.")


def _hides_nothing(attention_mask: torch.Tensor | None, seen: VisibleKeys) -> bool:
    """Are all keys tokens, but for those after the queries where causality hides them?"""
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling() or isinstance(seen.query_offset, torch.Tensor):  # no look at values
        return False
    covers_keys = seen.causal or attention_mask.shape[1] >= seen.key_offset + seen.key_length
    return covers_keys and bool(attention_mask.all())


def _bind(seen: VisibleKeys | None, module: nn.Module, query, key, is_causal: bool) -> VisibleKeys:
    """Add the layer's pattern, which a mask made for a stock model still lacks."""
    batch_size, num_heads, query_length, key_length = *query.shape[:3], key.shape[2]
    if seen is not None and not seen.awaits_pattern:
        return seen
    pattern = layer_pattern(module, getattr(module.config, "attention_patterns", None), num_heads)
    if seen is None:
        past = key_length - query_length if is_causal else 0
        return VisibleKeys(
            pattern, num_heads, is_causal, batch_size, query_length, key_length, query_offset=past, all_places=True
        )
    seen = replace(seen, num_heads=num_heads, awaits_pattern=False)
    if _is_cross_attention(module):  # queries and keys belong to two sequences
        return replace(seen, query_offset=0, key_offset=0, query_positions=None, key_positions=None)
    own = seen.pattern
    if not isinstance(own, Pattern):  # another copy of these files made the mask
        own = pattern_from_dict(own.to_dict())
    return replace(seen, pattern=intersect(pattern, own))


def layer_pattern(module: nn.Module, patterns: dict | list[dict] | None, num_heads: int) -> Pattern:
    """The one of config.attention_patterns that holds for this layer of a stock model; cross-attention sees everything.

    Raises:
        ValueError: if there is none, or it does not fit the layer.
    """
    if not patterns:
        raise ValueError(
            f"attn_implementation='{NAME}' needs config.attention_patterns, such as "
            f"{{'type': 'local', 'window': 64}}, got {patterns!r}; {{'type': 'full'}} is dense attention."
        )
    if _is_cross_attention(module):
        return Full()
    if isinstance(patterns, dict):
        patterns = [patterns]
    layer_idx = getattr(module, "layer_idx", None) if len(patterns) > 1 else 0
    if layer_idx is None:
        raise ValueError(
            f"{type(module).__name__} does not know its layer, so config.attention_patterns must be one pattern "
            f"for all layers, not {len(patterns)}."
        )
    pattern = pattern_from_dict(patterns[layer_idx % len(patterns)])
    pattern.check_heads(num_heads)
    return pattern


def _is_cross_attention(module: nn.Module) -> bool:
    """Transformers has no one way to tell: models declare it, name it, or have decoders that are not causal."""
    declared = getattr(module, "is_cross_attention", None)
    if declared is not None:
        return declared
    if "CrossAttention" in type(module).__name__:
        return True
    if hasattr(module, "is_decoder"):
        return module.is_decoder and not getattr(module, "is_causal", True)
    if _takes_other_states(type(module)):
        raise ValueError(
            f"attn_implementation='{NAME}' cannot tell whether {type(module).__name__} is self- or cross-attention; "
            "use 'sdpa'."
        )
    return False


@cache
def _takes_other_states(module_class: type) -> bool:
    return not {"key_value_states", "encoder_hidden_states"}.isdisjoint(signature(module_class.forward).parameters)


def _conditions(mask_function: Callable) -> Iterator[tuple[str, dict[str, Any]]]:
    """The single conditions whose intersection one of Transformers' mask functions is: their names and values."""
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        yield repr(mask_function), {}
        return
    name = mask_function.__qualname__.split(".")[0]
    values = getclosurevars(mask_function).nonlocals
    if name == "and_masks":
        for inner in values["mask_functions"]:
            yield from _conditions(inner)
        return
    yield name, values
    if name == "remap_positions_for_packed_sequence":
        yield from _conditions(values["mask_function"])


def _with_condition(seen: VisibleKeys, name: str, values: dict[str, Any]) -> VisibleKeys:
    match name:
        case "causal_mask_function":
            return replace(seen, causal=True)
        case "bidirectional_mask_function":
            return seen
        case "sliding_window_overlay":
            return replace(seen, pattern=intersect(seen.pattern, Local(values["sliding_window"])))
        case "sliding_window_bidirectional_overlay":
            return replace(seen, pattern=intersect(seen.pattern, Local(values["sliding_window"] + 1)))
        case "packed_sequence_mask_function":
            return with_packing(seen, values["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            return seen  # its positions follow from the documents, which come as a condition of their own
    raise ValueError(
        f"attn_implementation='{NAME}' cannot combine a pattern with this model's own mask ({name}); use 'sdpa'."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Alignment


def _attend_masked(seen: VisibleKeys, query, key, value, scaling: float) -> torch.Tensor:
    """Queries of one token in each row, or keys that a cache kept for each head: there is nothing left to skip."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    mask = seen.dense(query.device)
    output = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, **grouped)
    return output.transpose(1, 2)


def _attend_one(
    seen: VisibleKeys, query, position_query, key, value, scaling: float, relative_key, distances
) -> torch.Tensor:
    """One query [B, 1, H, D] in each row, which reads only keys that it sees and scores only their distances."""
    mask = None
    key, value = key.transpose(1, 2), value.transpose(1, 2)  # [B, H, S, D], as memories store them
    if seen.query_positions is None and seen.key_valid is None and seen.pattern.head_period == 1:
        chosen, distance = _seen_by_one(seen.pattern, seen.query_offset, seen.key_offset, seen.key_length)
        if len(chosen) < seen.key_length:
            key, value = (tensor.index_select(2, chosen.to(tensor.device)) for tensor in (key, value))
    else:
        mask = seen.dense(query.device)
        distance = key_distances(seen, query.device)[:, 0]
    scores = torch.einsum("bohd,hld->bhol", position_query, relative_key) * scaling
    rows = rows_by_distance(distances, distance.cpu()).to(query.device)
    bias = scores.gather(3, rows[:, None, None].expand(*scores.shape[:3], -1))
    if mask is not None:
        bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    output = nn.functional.scaled_dot_product_attention(query.transpose(1, 2), key, value, bias, scale=scaling)
    if mask is not None:
        output = output.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return output.transpose(1, 2)


@lru_cache(maxsize=16)  # for the layers of a step
def _seen_by_one(pattern: Pattern, query: int, first_key: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys a query at a position sees [J], and their distances [1, J]."""
    positions = torch.arange(first_key, min(first_key + num_keys, query + 1))
    chosen = pattern.visible(0, query, positions).nonzero()[:, 0]
    return chosen, query - positions[None, chosen]


def key_distances(seen: VisibleKeys, device: torch.device) -> torch.Tensor:
    """[B or 1, T, S], how many tokens a key lies before a query; negative for later ones."""
    queries, keys = seen.query_positions, seen.key_positions
    if queries is None:
        queries = torch.arange(seen.query_offset, seen.query_offset + seen.query_length, device=device)[None]
        keys = torch.arange(seen.key_offset, seen.key_offset + seen.key_length, device=device)[None]
    return queries[:, :, None] - keys[:, None, :]


def _attend_padded(seen: VisibleKeys, queries: Tensors, key, value, execute: Callable) -> torch.Tensor:
    """Each row is a document: a token at position p goes to slot p - first of its row, for queries and keys apart."""
    query_valid = None
    if seen.key_valid is not None:
        first_query = seen.query_offset - seen.key_offset
        query_valid = seen.key_valid[:, first_query : first_query + seen.query_length]
    bound = seen.key_offset + seen.key_length  # that holds for positions of padded rows
    query_slots, query_span = _slots(seen.query_positions.expand(seen.batch_size, -1), query_valid, bound)
    key_slots, key_span = _slots(seen.key_positions.expand(seen.batch_size, -1), seen.key_valid, bound)
    return _attend_slots(queries, key, value, execute, query_slots, key_slots, seen.batch_size, query_span, key_span)


def _slots(positions: torch.Tensor, valid: torch.Tensor | None, bound: int) -> tuple[torch.Tensor, range]:
    """Among rows of slots as long as the returned range of positions, which slot each token goes to; -1 for padding."""
    span = range(bound)
    if not torch.compiler.is_compiling():
        real = positions if valid is None else positions[valid]
        span = range(int(real.min()), int(real.max()) + 1) if real.numel() else range(1)
    slots = torch.arange(len(positions), device=positions.device)[:, None] * len(span) + positions - span.start
    return slots if valid is None else slots.masked_fill(~valid, -1), span


def _attend_packed(seen: VisibleKeys, queries: Tensors, key, value, execute: Callable) -> torch.Tensor:
    """Each document becomes a row; those that end at similar positions, up to a power of two, are computed together."""
    documents = seen.key_documents
    numbers = documents + torch.arange(len(documents), device=documents.device)[:, None] * (documents.max() + 1)
    numbers = numbers.masked_fill(documents < 0, -1)  # the free end of a static cache belongs to none
    real = numbers >= 0
    ends = numbers.new_zeros(int(numbers.max()) + 1)  # a document's first position need not be 0
    ends = ends.scatter_reduce(0, numbers[real], seen.key_positions[real] + 1, "amax")
    bounds = 2 ** ends.clamp(min=1).log2().ceil().long()
    output = 0
    for bound in bounds[ends > 0].unique().tolist():
        chosen = (bounds == bound) & (ends > 0)
        rows = chosen.cumsum(0) - 1
        slots = rows[numbers] * bound + seen.key_positions
        slots = slots.masked_fill(~chosen[numbers] | (numbers < 0), -1)
        query_slots, span = slots[:, : seen.query_length], range(bound)
        output = output + _attend_slots(queries, key, value, execute, query_slots, slots, int(chosen.sum()), span, span)
    return output


def _attend_slots(
    queries: Tensors, key, value, execute: Callable, query_slots, key_slots, num_rows: int, query_span, key_span
) -> torch.Tensor:
    """Move tokens to their slots [B, T] and [B, S] among `num_rows` rows, attend, and move outputs back.

    The slots of a row stand at the positions of its span. Slot -1 is nowhere: such keys are seen by nobody, such
    queries get 0.
    """

    def to_slots(tensor: torch.Tensor, slots: torch.Tensor, span: range) -> torch.Tensor:
        nowhere = num_rows * len(span)
        moved = tensor.new_zeros(nowhere + 1, *tensor.shape[2:])
        moved = moved.index_copy(0, slots.flatten() % (nowhere + 1), tensor.flatten(0, 1))
        return moved[:nowhere].unflatten(0, (num_rows, len(span)))

    valid = torch.ones(key_slots.shape, dtype=torch.bool, device=key.device)
    output = execute(
        tuple(to_slots(query, query_slots, query_span) for query in queries),
        to_slots(key, key_slots, key_span),
        to_slots(value, key_slots, key_span),
        q_offset=query_span.start,
        kv_offset=key_span.start,
        key_valid=to_slots(valid, key_slots, key_span),
    )
    output = nn.functional.pad(output.flatten(0, 1), (0, 0, 0, 0, 0, 1))
    return output[query_slots.flatten() % len(output)].unflatten(0, queries[0].shape[:2])


def _in_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast, models mix float32 (rotated queries, say) with the autocast dtype."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    return tensors


register()
register_triton()
register_triton_relative()

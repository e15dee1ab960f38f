"""What a stock model's own mask means, as data, and which pattern holds for which of its layers.

Shapes: B batch, H heads, T queries, S keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from inspect import getclosurevars, signature
from typing import Any

import torch
from torch import nn
from transformers import masking_utils

from ..modeling.attention import BLOCK_SPARSE as NAME
from ..modeling.attention import VisibleKeys, with_packing, with_padding
from ..modeling.attention_patterns import Full, Local, Pattern, intersect, pattern_from_dict


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


def _hides_nothing(attention_mask: torch.Tensor | None, seen: VisibleKeys) -> bool:
    """Are all keys tokens, but for those after the queries where causality hides them?"""
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling() or isinstance(seen.query_offset, torch.Tensor):  # no look at values
        return False
    covers_keys = seen.causal or attention_mask.shape[1] >= seen.key_offset + seen.key_length
    return covers_keys and bool(attention_mask.all())


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


def bind(seen: VisibleKeys | None, module: nn.Module, query, key, is_causal: bool) -> VisibleKeys:
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

"""What a stock model's own mask means, as data, and which pattern holds for which of its layers.

Causality, the size of a window, and lengths come beside the mask function; whether it shows the same is checked.

Shapes: B batch, T queries, S keys.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from inspect import signature
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import causal_mask_function

from ..modeling.attention import BLOCK_SPARSE as NAME
from ..modeling.attention import VisibleKeys, with_padding
from ..modeling.attention_patterns import Full, Intersection, Local, Pattern, intersect, pattern_from_dict
from .mask_checks import refusal, tensors_have_values, verify, window_pattern


def block_sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> VisibleKeys:
    """What a stock model's own mask shows, as data; the layer's pattern is added by the attention function.

    Args:
        mask_function: True for (batch, head, query, key) that are seen; padding is not part of it.
        attention_mask: [B, past + T] bool, True for tokens; or a mask made here before, which is returned.
        local_size: the size of the window, if there is one.
        use_vmap: the mask function has parts that are the caller's own.
        kwargs: `allow_is_bidirectional_skip` among them says that the mask is not causal.

    Raises:
        ValueError: if the mask function shows anything but causality, window and documents.
    """
    if getattr(attention_mask, "awaits_pattern", False):  # `generate` makes the masks of static caches beforehand
        return attention_mask
    if isinstance(q_offset, Tensor):  # a static cache's, which moves on before the mask is read
        q_offset = q_offset.clone() if q_length == 1 else int(q_offset)
    causal = "allow_is_bidirectional_skip" not in kwargs
    if _is_chunked(local_size, config):
        raise refusal("chunked_overlay")
    seen = VisibleKeys(
        window_pattern(local_size, causal),
        num_heads=1,
        causal=causal,
        batch_size=batch_size,
        query_length=q_length,
        key_length=kv_length,
        query_offset=q_offset,
        key_offset=kv_offset,
        all_places=True,
        awaits_pattern=True,
    )
    seen = verify(seen, mask_function, attention_mask is None, use_vmap, config, device)
    return seen if _hides_nothing(attention_mask, seen) else with_padding(seen, attention_mask.bool())


def _is_chunked(local_size: int | None, config: PreTrainedConfig | None) -> bool:
    """Is `local_size` that of chunks? Where a model has windows of the same size, the mask function tells."""
    chunk, window = (getattr(config, name, None) for name in ("attention_chunk_size", "sliding_window"))
    return local_size is not None and local_size == chunk != window


def _hides_nothing(attention_mask: Tensor | None, seen: VisibleKeys) -> bool:
    """Are all keys tokens, but for those after the queries where causality hides them?"""
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling() or isinstance(seen.query_offset, Tensor):  # no look at values
        return False
    covers_keys = seen.causal or attention_mask.shape[1] >= seen.key_offset + seen.key_length
    return covers_keys and bool(attention_mask.all())


def layer_pattern(
    module: nn.Module, patterns: dict | list[dict] | None, num_heads: int, window: int | None = None
) -> Pattern:
    """The one of config.attention_patterns that holds for this layer of a stock model; cross-attention sees everything.

    `window` is that of the model itself.

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
    pattern = getattr(READ, _read(patterns[layer_idx % len(patterns)], window))
    pattern.check_heads(num_heads)
    return pattern


READ = SimpleNamespace()  # patterns by their text: torch.compile can neither read one nor take one, but find one here


@torch.compiler.assume_constant_result
def _read(values: dict, window: int | None) -> str:
    simplest = tensors_have_values()  # to find out which of two patterns contains the other
    text = json.dumps([values, window, simplest], sort_keys=True)
    if not hasattr(READ, text):
        pattern = pattern_from_dict(values)
        if window is not None:
            pattern = intersect(pattern, Local(window)) if simplest else Intersection((pattern, Local(window)))
        setattr(READ, text, pattern)
    return text


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


@torch.compiler.assume_constant_result
def _takes_other_states(module_class: type) -> bool:
    return not {"key_value_states", "encoder_hidden_states"}.isdisjoint(_arguments(module_class))


@cache
def _arguments(module_class: type) -> tuple[str, ...]:
    return tuple(signature(module_class.forward).parameters)


def bind(seen: VisibleKeys | None, module: nn.Module, query, key, is_causal: bool) -> VisibleKeys:
    """Add the layer's pattern, which a mask made for a stock model still lacks."""
    batch_size, num_heads, query_length, key_length = *query.shape[:3], key.shape[2]
    if seen is not None and not seen.awaits_pattern:
        return seen
    window = None if seen is None or seen.pattern.is_full else seen.pattern.window
    pattern = layer_pattern(module, getattr(module.config, "attention_patterns", None), num_heads, window)
    if seen is None:
        past = key_length - query_length if is_causal else 0
        return VisibleKeys(
            pattern, num_heads, is_causal, batch_size, query_length, key_length, query_offset=past, all_places=True
        )
    seen = replace(seen, pattern=pattern, num_heads=num_heads, awaits_pattern=False)
    if _is_cross_attention(module):  # queries and keys belong to two sequences
        return replace(seen, query_offset=0, key_offset=0, query_positions=None, key_positions=None)
    return seen

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
from ..modeling.attention_patterns import (
    FixedBlock,
    Full,
    Intersection,
    Local,
    Pattern,
    intersect,
    pattern_from_dict,
)
from .mask_checks import tensors_have_values, verify, window_pattern

FULL = Full()


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
        ValueError: if the mask function shows anything but causality, windows, chunks and documents.
    """
    if getattr(attention_mask, "awaits_pattern", False):  # `generate` makes the masks of static caches beforehand
        return attention_mask
    if isinstance(q_offset, Tensor):  # a static cache's, which moves on before the mask is read
        q_offset = q_offset.clone() if q_length == 1 else int(q_offset)
    causal = "allow_is_bidirectional_skip" not in kwargs
    valid = None if attention_mask is None else attention_mask.bool()
    chunked = _is_chunked(local_size, config)
    shows_nothing = causal and local_size == 0  # as in configs of models whose layers have no windows
    seen = VisibleKeys(
        FixedBlock(local_size) if chunked else window_pattern(None if shows_nothing else local_size, causal),
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
    if shows_nothing:
        return replace(seen, key_valid=torch.zeros(batch_size, kv_length, dtype=torch.bool, device=device))
    padded = seen if _hides_nothing(valid, seen) else with_padding(seen, valid)
    if chunked and valid is not None:  # chunks count from the first token of each row
        verify(padded, mask_function, False, use_vmap, config, device, valid)
        return padded
    seen = verify(seen, mask_function, valid is None, use_vmap, config, device)
    return seen if padded.key_valid is None else padded


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


def num_heads(attention: nn.Module) -> int:
    """Of this module: encoders and decoders may differ."""
    names = ("num_heads", "num_attention_heads")
    own = (getattr(attention, name) for name in names if hasattr(attention, name))
    return next(own, None) or attention.config.num_attention_heads


def layer_pattern(module: nn.Module, patterns: dict | list[dict], own: Pattern = FULL) -> Pattern:
    """The one of config.attention_patterns that holds for this layer of a stock model, and its `own` rule beside it;
    cross-attention sees everything.

    Raises:
        ValueError: if it does not fit the layer.
    """
    if _is_cross_attention(module):
        return FULL
    if isinstance(patterns, dict):
        patterns = [patterns]
    layer_idx = getattr(module, "layer_idx", None) if len(patterns) > 1 else 0
    if layer_idx is None:
        raise ValueError(
            f"{type(module).__name__} does not know its layer, so config.attention_patterns must be one pattern "
            f"for all layers, not {len(patterns)}."
        )
    pattern = getattr(READ, _read(patterns[layer_idx % len(patterns)], *_size(own)))
    pattern.check_heads(num_heads(module))
    return pattern


READ = SimpleNamespace()  # patterns by their text: torch.compile can neither read one nor take one, but find one here


def _size(own: Pattern) -> tuple[int | None, int | None]:
    """Of the window, or of the chunks, that a model's own rule has."""
    return (own.window, None) if own.type == "local" else (None, own.block if own.type == "fixed_block" else None)


@torch.compiler.assume_constant_result
def _read(values: dict, window: int | None, chunk: int | None) -> str:
    simplest = tensors_have_values()  # to find out which of two patterns contains the other
    text = json.dumps([values, window, chunk, simplest], sort_keys=True)
    if not hasattr(READ, text):
        pattern = pattern_from_dict(values)
        if window or chunk:
            both = pattern, Local(window) if window else FixedBlock(chunk)
            pattern = intersect(*both) if simplest else Intersection(both)
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
            f"attn_implementation='{NAME}' cannot tell whether {type(module).__name__} is self- or cross-attention, "
            "so it runs under no pattern."
        )
    return False


@torch.compiler.assume_constant_result
def _takes_other_states(module_class: type) -> bool:
    return not {"key_value_states", "encoder_hidden_states"}.isdisjoint(_arguments(module_class))


@cache
def _arguments(module_class: type) -> tuple[str, ...]:
    return tuple(signature(module_class.forward).parameters)


def bind(seen: VisibleKeys | None, module: nn.Module, query: Tensor, key: Tensor, is_causal: bool) -> VisibleKeys:
    """Add the layer's pattern, if the config has any, to what a mask made for a stock model says.

    Raises:
        ValueError: if the pattern does not fit the layer, or the heads that this process holds of it.
    """
    batch_size, local_heads, query_length, key_length = *query.shape[:3], key.shape[2]
    pattern = FULL if seen is None else seen.pattern
    if patterns := getattr(module.config, "attention_patterns", None):
        pattern = layer_pattern(module, patterns, pattern)
        pattern = local_pattern(pattern, module, num_heads(module), local_heads)
    if seen is None:
        past = key_length - query_length if is_causal else 0
        sizes = batch_size, query_length, key_length
        return VisibleKeys(pattern, local_heads, is_causal, *sizes, query_offset=past, all_places=True)
    seen = replace(seen, pattern=pattern, num_heads=local_heads, awaits_pattern=False)
    if pattern.is_full and not seen.causal and seen.query_documents is None:  # in cross-attention, of two sequences
        return replace(seen, query_offset=0, key_offset=0, query_positions=None, key_positions=None)
    return seen


def local_pattern(pattern: Pattern, module: nn.Module, num_heads: int, local_heads: int) -> Pattern:
    """What the `local_heads` of a layer's heads see that a process holds under tensor parallelism, numbered from 0.

    Raises:
        ValueError: if that depends on which heads they are, and no weight of the module tells.
    """
    period = pattern.head_period
    if local_heads == num_heads or local_heads % period == 0:  # equal parts, whole periods each
        return pattern
    rank = _rank_of(module, num_heads // local_heads)
    if rank is None or num_heads % local_heads:
        raise ValueError(
            f"{pattern!r} differs between heads with period {period}, which does not divide the {local_heads} of "
            f"{num_heads} heads that a process holds under tensor parallelism, and which it holds is not to be seen of "
            "its weights, which are no DTensors; load with tp_plan='auto', use fewer processes, or FSDP."
        )
    return pattern.of_heads(rank * local_heads, local_heads)


def of_local_heads(seen: VisibleKeys, module: nn.Module, local_heads: int) -> VisibleKeys:
    """What a mask made for all heads of a layer shows those that a process holds; errors as of `local_pattern`."""
    pattern = local_pattern(seen.pattern, module, seen.num_heads, local_heads)
    return seen if pattern is seen.pattern else replace(seen, pattern=pattern, num_heads=local_heads)


def _rank_of(attention: nn.Module, processes: int) -> int | None:
    """Which of so many processes, among which a layer's weights are cut, this one is; None if they are not."""
    for weight in attention.parameters():
        mesh = getattr(weight, "device_mesh", None)  # plain tensors have none
        for axis, placement in enumerate([] if mesh is None else weight.placements):
            if placement.is_shard() and mesh.size(axis) == processes:
                return mesh.get_local_rank(axis)
    return None

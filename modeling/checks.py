"""Clear errors for inputs that would otherwise fail deep inside a kernel, or not fail at all.

Values are looked at only where that is free: in plain tensors on the CPU, outside compilation and export.

Shapes: B batch, T tokens.
"""

import torch


def check_one_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Exactly one of input_ids [B, T] and inputs_embeds [B, T, hidden], and at least one token of it."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    name, given, axes = "input_ids", input_ids, "[batch, tokens]"
    if input_ids is None:
        name, given, axes = "inputs_embeds", inputs_embeds, "[batch, tokens, hidden_size]"
    if given.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} must have shape {axes}, got {list(given.shape)}.")
    if given.numel() == 0:
        raise ValueError(
            f"{name} is empty: got shape {list(given.shape)}; give at least one sequence of at least one token "
            "(the start)."
        )


def check_token_ids(input_ids: torch.Tensor, num_embeddings: int) -> None:
    """Every id is an integer that has an embedding."""
    _check_integers("input_ids", input_ids)
    if _values_are_free(input_ids) and (input_ids.min() < 0 or input_ids.max() >= num_embeddings):
        raise ValueError(
            f"input_ids must lie in [0, {num_embeddings - 1}] (vocab_size={num_embeddings}), "
            f"got values from {input_ids.min().item()} to {input_ids.max().item()}."
        )


def check_embeddings(inputs_embeds: torch.Tensor, hidden_size: int) -> None:
    """The caller's own embeddings are floats as wide as the model; a width of 1 would be broadcast without a word."""
    if inputs_embeds.shape[-1] != hidden_size:
        raise ValueError(
            f"inputs_embeds must have shape [batch, tokens, hidden_size={hidden_size}], "
            f"got {list(inputs_embeds.shape)}."
        )
    if not inputs_embeds.is_floating_point():
        raise ValueError(f"inputs_embeds must be floating point, got {inputs_embeds.dtype}.")


def check_positions(position_ids: torch.Tensor, num_positions: int, counted_to: int | None = None) -> None:
    """Every position is an integer that has an embedding.

    Args:
        position_ids: [B or 1, T].
        num_positions: how many positions the model has.
        counted_to: number of places the positions were counted over, None if they are the caller's own. Up to
            `num_positions` places no look at the values is needed; beyond, a look is worth its cost on any device.
    """
    _check_integers("position_ids", position_ids)
    if counted_to is None:
        look = _values_are_free(position_ids)
    else:
        look = counted_to > num_positions and not torch.compiler.is_compiling() and not position_ids.is_meta
    if look and (position_ids.min() < 0 or position_ids.max() >= num_positions):
        raise ValueError(
            f"The model has {num_positions} positions (max_position_embeddings), but the sequence reaches "
            f"from position {position_ids.min().item()} to {position_ids.max().item()}; shorten it."
        )


def _check_integers(name: str, ids: torch.Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be of dtype torch.int64 or torch.int32, got {ids.dtype}.")


def _values_are_free(ids: torch.Tensor) -> bool:
    return type(ids) is torch.Tensor and ids.device.type == "cpu" and not torch.compiler.is_compiling()

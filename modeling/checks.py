"""Clear errors for inputs that would otherwise fail deep inside a kernel, or not fail at all.

Values are looked at only where that is free: on the CPU, outside compilation and export.
"""

import torch


def check_one_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Exactly one of the two, and at least one token of it."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given.shape[1] == 0:
        raise ValueError(f"The sequence is empty: got shape {list(given.shape)}; give at least one token (the start).")


def check_token_ids(input_ids: torch.Tensor, num_embeddings: int) -> None:
    """Every id has an embedding."""
    if _values_are_free(input_ids) and (input_ids.min() < 0 or input_ids.max() >= num_embeddings):
        raise ValueError(
            f"input_ids must lie in [0, {num_embeddings - 1}] (vocab_size={num_embeddings}), "
            f"got values from {input_ids.min().item()} to {input_ids.max().item()}."
        )


def check_positions(position_ids: torch.Tensor, num_positions: int) -> None:
    """Every position has an embedding."""
    if _values_are_free(position_ids) and (position_ids.min() < 0 or position_ids.max() >= num_positions):
        raise ValueError(
            f"The model has {num_positions} positions (max_position_embeddings), but the sequence reaches "
            f"from position {position_ids.min().item()} to {position_ids.max().item()}; shorten it."
        )


def _values_are_free(ids: torch.Tensor) -> bool:
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()

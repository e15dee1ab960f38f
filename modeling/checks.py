"""Clear errors for inputs and fields of configs that would otherwise fail deep inside a kernel, or not fail at all.

Values of tensors are looked at only where that is free: in plain ones on the CPU, outside compilation and export.

Shapes: B batch, T tokens.
"""

import math

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Fields of a config


def check_sizes(config, *names: str) -> None:
    """Fields that are sizes are at least 1, and not left out."""
    for name in names:
        value = getattr(config, name)
        if value is None or value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def check_probabilities(config, *names: str) -> None:
    """Dropouts and the like are probabilities below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(config, name)}.")


def check_not_negative(config, *names: str) -> None:
    """Numbers such as epsilons and standard deviations are finite and at least 0."""
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            what = "at least 0" if value < 0 else "finite"
            raise ValueError(f"{name} must be {what}, got {value}.")


def check_buckets(config) -> None:
    """Raise ValueError unless there are buckets of distances for "t5" on both sides, and distances for all of them."""
    buckets, farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if buckets < 4 or buckets % 2:
        raise ValueError(f"relative_attention_num_buckets must be even and at least 4, got {buckets}.")
    if farthest <= buckets // 2:
        raise ValueError(
            f"relative_attention_max_distance={farthest} must be more than half of "
            f"relative_attention_num_buckets={buckets}, which hold a distance each."
        )


def check_heads_divide(config, instead: str | None = "head_dim") -> None:
    """hidden_size is dealt out evenly to the heads; `instead` is the field that gives their size otherwise."""
    if config.hidden_size % config.num_attention_heads:
        otherwise = "" if instead is None else f", or give {instead}"
        raise ValueError(
            f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_attention_heads}; "
            f"choose a number of heads that divides it{otherwise}."
        )


def check_left_out(config, *names: str, seen: str = "keys") -> None:
    """Fields that Transformers reserves for its own caches and masks stay empty: patterns say what they would."""
    for name in names:
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not a field of this model; "
                f"say which {seen} each layer sees with attention_patterns."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


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
        counted_to: number of slots the positions were counted over, None if they are the caller's own. Up to
            `num_positions` slots no look at the values is needed; beyond, a look is worth its cost on any device.
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


def check_token_types(token_type_ids: torch.Tensor | None, embeddings: torch.Tensor, type_vocab_size: int) -> None:
    """Types [B, T] of the tokens of embeddings [B, T, hidden] have embeddings of their own."""
    if token_type_ids is None:
        return
    if token_type_ids.shape != embeddings.shape[:2]:
        raise ValueError(
            f"token_type_ids must have shape {list(embeddings.shape[:2])}, got {list(token_type_ids.shape)}."
        )
    allowed = max(type_vocab_size, 1)  # without types all tokens are of type 0
    if _values_are_free(token_type_ids) and (token_type_ids.min() < 0 or token_type_ids.max() >= allowed):
        raise ValueError(
            f"token_type_ids must lie in [0, {allowed - 1}] (type_vocab_size={type_vocab_size}), "
            f"got values from {token_type_ids.min().item()} to {token_type_ids.max().item()}."
        )


def check_some_token(attention_mask: torch.Tensor | None) -> None:
    """Every row of a padding mask [B, S] has a token."""
    if attention_mask is None or attention_mask.ndim != 2 or not _values_are_free(attention_mask):
        return
    empty = (attention_mask == 0).all(dim=-1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"attention_mask has no token in row {', '.join(map(str, empty))}: a source of only padding says nothing; "
            "leave such rows out, or give them at least an end token."
        )


def check_pixels(pixel_values: torch.Tensor | None, num_channels: int, patch_size: tuple[int, int]) -> None:
    """Pictures [B, channels, height, width] of floats, at least one of them, and each no smaller than a patch."""
    if pixel_values is None:
        raise ValueError("Give pixel_values, [batch, channels, height, width]; an image processor makes them.")
    shape = list(pixel_values.shape)
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values must have shape [batch, channels, height, width], got {shape}.")
    if shape[1] != num_channels:
        raise ValueError(f"pixel_values must have num_channels={num_channels} channels, got {shape[1]} in {shape}.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be floating point, got {pixel_values.dtype}; an image processor turns pictures of "
            "0 to 255 into floats."
        )
    if shape[0] == 0:
        raise ValueError(f"pixel_values is an empty batch: got shape {shape}.")
    if shape[2] < patch_size[0] or shape[3] < patch_size[1]:
        raise ValueError(
            f"Pictures must be at least one patch of patch_size={patch_size} in size, got {shape[2]} x {shape[3]}."
        )


def check_patch_mask(bool_masked_pos: torch.Tensor, embeddings: torch.Tensor) -> None:
    """A mask [B, T] says for each of the T patches in embeddings [B, T, C] whether it is hidden."""
    if bool_masked_pos.shape != embeddings.shape[:2]:
        raise ValueError(
            f"bool_masked_pos must have shape [batch, patches] = {list(embeddings.shape[:2])}, "
            f"got {list(bool_masked_pos.shape)}."
        )


def check_labels(labels: torch.Tensor, logits: torch.Tensor, problem_type: str | None) -> None:
    """Labels are what the loss of `problem_type` takes for logits [B, K]: classes [B] (-100: none), or numbers [B, K].

    A problem without a name is told by K and by the labels, as in Transformers.
    """
    batch_size, num_labels = logits.shape
    if problem_type is None:
        kind = "multi_label" if labels.is_floating_point() else "single_label"
        problem_type = "regression" if num_labels == 1 else f"{kind}_classification"
    if problem_type == "single_label_classification":
        wanted = f"torch.int64 of shape [{batch_size}], a class for each picture,"
        fit = labels.dtype == torch.int64 and labels.numel() == batch_size
    else:
        wanted = f"floating point of shape [{batch_size}, {num_labels}]"
        flat = num_labels == 1 and labels.shape == (batch_size,)
        fit = labels.is_floating_point() and (flat or labels.shape == logits.shape)
    if not fit:
        raise ValueError(
            f"labels must be {wanted} for problem_type={problem_type!r}, "
            f"got {labels.dtype} of shape {list(labels.shape)}."
        )
    if problem_type == "single_label_classification" and _values_are_free(labels):
        wrong = labels[((labels < 0) & (labels != -100)) | (labels >= num_labels)]
        if len(wrong):
            raise ValueError(
                f"labels must lie in [0, {num_labels - 1}] (num_labels={num_labels}), got {wrong.tolist()}."
            )


def check_targets(targets: torch.Tensor | None, num_ids: int, ignored: int = -100) -> None:
    """Ids to predict lie in 0 ... num_ids - 1, or are ignored."""
    if targets is None or targets.numel() == 0 or not _values_are_free(targets):
        return
    real = targets[targets != ignored]
    if len(real) and (real.min() < 0 or real.max() >= num_ids):
        raise ValueError(
            f"labels must lie in [0, {num_ids - 1}], or be {ignored} to be ignored, "
            f"got values from {real.min().item()} to {real.max().item()}."
        )


def check_counted(position_ids: torch.Tensor | None, first: int, why: str) -> None:
    """Positions [B or 1, T] are None, or count on from `first`; `why` they must says the error."""
    if position_ids is None or not _values_are_free(position_ids):
        return
    if bool((position_ids != torch.arange(first, first + position_ids.shape[-1])).any()):
        raise ValueError(f"{why} takes no position_ids of its own: leave them out, or count on from {first}.")


def _check_integers(name: str, ids: torch.Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be of dtype torch.int64 or torch.int32, got {ids.dtype}.")


def _values_are_free(ids: torch.Tensor) -> bool:
    return type(ids) is torch.Tensor and ids.device.type == "cpu" and not torch.compiler.is_compiling()

"""What cannot be cut into slices is refused by its name, before anything is sent.

Shapes: B batch, N positions of a row.
"""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.attention import BLOCK_SPARSE

LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # of Transformers' layer_types
LENGTH_ROPES = {"dynamic", "longrope"}
NEXT_TOKENS = ("ForCausalLM", "LMHeadModel")
HEADS = (*NEXT_TOKENS, "ForMaskedLM", "ForTokenClassification", "Model")
OF_TOKENS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "shift_labels", "labels", "token_type_ids"}
ALONGSIDE = "use data parallelism or FSDP, with gradient checkpointing for long rows"


def learns_next_tokens(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith(NEXT_TOKENS)


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that would not equal one process."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"context_parallel takes a model of Transformers, got {name}; give the one inside.")
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ()) - LAYERS
    mixing = (nn.Conv1d, nn.Conv2d, nn.RNNBase)
    mixers = sorted({type(module).__name__ for module in model.modules() if isinstance(module, mixing)})
    ropes = _rope_types(getattr(config.get_text_config(), "rope_parameters", None)) & LENGTH_ROPES
    tuned = getattr(config.get_text_config(), "attn_temperature_tuning", False)
    pooler = [part for part, module in model.named_modules() if part.split(".")[-1] == "pooler"]
    backend = config._attn_implementation
    refused = [
        (config.is_encoder_decoder, f"{name} reads two sequences, which are not cut together; {ALONGSIDE}"),
        (
            not name.endswith(HEADS),
            f"the head of {name} may look at whole rows, of which a rank has a slice; {ALONGSIDE}",
        ),
        (
            pooler,
            f"{', '.join(pooler)} of {name} looks at each row's first token; load it with add_pooling_layer=False",
        ),
        (layers or mixers, f"{name} mixes positions by {', '.join([*sorted(layers), *mixers])}; {ALONGSIDE}"),
        (ropes, f"rope_type {', '.join(ropes)!r} looks at the length of a row; use 'yarn', 'linear' or 'default'"),
        (
            getattr(config, "global_tokens", None) is not None,
            f"{name} has global tokens, which every rank would need; {ALONGSIDE}",
        ),
        (tuned, f"attn_temperature_tuning of {name} counts positions from 0 on each rank; {ALONGSIDE}"),
        (
            "position_ids" not in inspect.signature(model.forward).parameters,
            f"{name} takes no position_ids, so it would number each rank's positions from 0; {ALONGSIDE}",
        ),
        (
            backend != BLOCK_SPARSE,
            f"attn_implementation={backend!r} exchanges no keys; model.set_attn_implementation('{BLOCK_SPARSE}') first",
        ),
    ]
    for applies, why in refused:
        if applies:
            raise ValueError(f"context_parallel: {why}.")


def _rope_types(parameters: Mapping | None) -> set[str]:
    """Of one set of rotary positions, or of several by kinds of layers."""
    inner = [value for value in (parameters or {}).values() if isinstance(value, Mapping)]
    return (
        {parameters.get("rope_type", "default")} if parameters and not inner else set().union(*map(_rope_types, inner))
    )


def check_batch(batch: Mapping, model: PreTrainedModel, ranks: int) -> Tensor:
    """The tensor [B, N, ...] of the tokens.

    Raises:
        ValueError: if the batch cannot be cut, naming why.
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        raise ValueError("A batch to cut needs input_ids or inputs_embeds.")
    unknown = [name for name, value in batch.items() if isinstance(value, Tensor) and name not in OF_TOKENS]
    unknown = [name for name in unknown if name not in ("num_items_in_batch", "logits_to_keep")]
    if unknown or isinstance(batch.get("logits_to_keep"), Tensor):
        raise ValueError(
            f"shard does not know how to cut {', '.join(unknown) or 'logits_to_keep'}; it knows "
            f"{', '.join(sorted(OF_TOKENS))}."
        )
    if batch.get("logits_to_keep"):
        raise ValueError("logits_to_keep counts from the end of the row, which is on the last rank; leave it out.")
    for name in OF_TOKENS & set(batch):
        shape = tuple(tokens.shape[:2]) if name != "position_ids" or batch[name].ndim == 2 else tokens.shape[1:2]
        if tuple(batch[name].shape[:2]) != shape and (name != "position_ids" or batch[name].shape[0] != 1):
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(batch[name].shape)}.")
    if ("labels" in batch or "shift_labels" in batch) and not learns_next_tokens(model):
        raise ValueError(
            f"{type(model).__name__} has a loss of its own, whose slices do not add up; leave the labels out, and "
            "compute it from the logits."
        )
    _check_positions(batch, tokens)
    if tokens.shape[1] < ranks:
        raise ValueError(f"Rows of {tokens.shape[1]} tokens cannot be cut for {ranks} ranks; pad them, or use fewer.")
    return tokens


def _check_positions(batch: Mapping, tokens: Tensor) -> None:
    positions = batch.get("position_ids")
    if positions is None:
        return
    valid = batch.get("attention_mask", torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)).bool()
    counted = valid.long().cumsum(dim=1) - 1
    if not bool(((positions == counted) | ~valid).all()):
        raise ValueError(
            "position_ids do not count the tokens of each row from 0: packed rows and shifted positions cannot be cut; "
            "give one document a row."
        )

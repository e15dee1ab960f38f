"""An encoder of short texts made one of long documents, as Longformer was made of RoBERTa.

Beltagy et al. 2020, section 5: every layer sees a window, the learned positions are written one behind the other until
they reach, and what global tokens see is projected by copies of the usual projections. Texts no longer than half a
window and the old positions come out as before; longer ones meet weights that never saw such, and want some training.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .bert_encoder import OUR_TYPE, shared_fields
from .mapping import require

TABLE = "positions.table.weight"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Length:
    """How long an encoder becomes.

    Attributes:
        max_positions: tokens that it has positions for.
        attention_window: tokens that a token sees, half of them on either side; even.
    """

    max_positions: int = 4096
    attention_window: int = 512

    def __post_init__(self) -> None:
        require(self.max_positions >= 1, f"max_positions must be at least 1, got {self.max_positions}.")
        require(
            self.attention_window > 0 and self.attention_window % 2 == 0,
            f"attention_window must be even and positive, got {self.attention_window}.",
        )


USUAL = Length()


def lengthened(
    stock: PreTrainedConfig, architecture: str, weights: dict[str, torch.Tensor], unused: int, length: Length
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Fields of ours, and weights under our names with positions and global projections written out.

    Args:
        weights: under our names, but for the positions, whose first `unused` rows no token has.
    """
    for field, needed in (("is_decoder", False), ("add_cross_attention", False)):
        value = getattr(stock, field)
        require(value == needed, f"This family needs {field}={needed}, but the model has {field}={value}.")
    relative = getattr(stock, "position_embedding_type", None) not in (None, "absolute")
    require(not relative, "The positions are relative ones, which cannot be copied.")
    positions = stock.max_position_embeddings - unused
    require(
        length.max_positions >= positions,
        f"max_positions={length.max_positions} is less than the {positions} that the model has.",
    )
    sep_token_id = getattr(stock, "sep_token_id", None)
    require(
        sep_token_id is not None or not architecture.endswith("ForQuestionAnswering"),
        "Which token ends a question is not in the config; give it a sep_token_id (the tokenizer's sep_token_id).",
    )
    ours = {
        **shared_fields(stock),
        "model_type": OUR_TYPE,
        "architectures": [architecture],
        "sep_token_id": sep_token_id,
        "max_position_embeddings": length.max_positions,
        "attention_patterns": {"type": "local", "window": length.attention_window // 2 + 1},
        "global_projections": True,
        "global_tokens": "by_task",
        "classifier_dropout": stock.hidden_dropout_prob
        if stock.classifier_dropout is None
        else stock.classifier_dropout,
    }
    return ours, _with_global_projections(_with_positions(weights, unused, length.max_positions))


def _with_positions(weights: dict[str, torch.Tensor], unused: int, most: int) -> dict[str, torch.Tensor]:
    name = next((name for name in weights if name.endswith(TABLE)), None)
    require(name is not None, "The model has no learned positions to be copied.")
    rows = weights[name][unused:]
    copies = rows.repeat(-(-most // len(rows)), 1)[:most]
    return {**weights, name: copies.clone()}


def _with_global_projections(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    copies = {
        name.replace(f"self_attn.{projection}", f"self_attn.global_{projection}"): tensor.clone()
        for name, tensor in weights.items()
        for projection in PROJECTIONS
        if f"self_attn.{projection}." in name
    }
    return {**weights, **copies}

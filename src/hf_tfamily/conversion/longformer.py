"""Longformer <-> long encoder: windows become Local patterns, and rows of positions that no token has are left out.

Longformer counts positions from pad_token_id + 1 on, as RoBERTa does. The rows before are read by padding alone, so
that they come back as zeros, as does the pooler of a bare model, which none of the heads reads.
"""

import torch
from transformers import LongformerConfig, PreTrainedConfig

from ..modeling.attention_patterns import pattern_from_dict, patterns_for_layers
from ..modeling.configuration_long_encoder import LongEncoderConfig
from .bert_encoder import OUR_TYPE, add_pooler, from_encoder, shared_fields, to_encoder
from .mapping import renamed, require

SOURCE_TYPE = "longformer"
HEADS = {
    "LongformerModel": "LongEncoderModel",
    "LongformerForMaskedLM": "LongEncoderForMaskedLM",
    "LongformerForSequenceClassification": "LongEncoderForSequenceClassification",
    "LongformerForTokenClassification": "LongEncoderForTokenClassification",
    "LongformerForQuestionAnswering": "LongEncoderForQuestionAnswering",
}
MODULES = {
    "attention.self.query_global": "self_attn.global_q_proj",
    "attention.self.key_global": "self_attn.global_k_proj",
    "attention.self.value_global": "self_attn.global_v_proj",
}
OF_HEADS = {
    "lm_head.dense.": "transform.",
    "lm_head.layer_norm.": "transform_norm.",
    "lm_head.decoder.": "lm_head.",
    "classifier.dense.": "pooler.",
    "classifier.out_proj.": "score.",
    "classifier.": "score.",
}
TABLE = "positions.table.weight"


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    stock = LongformerConfig.from_dict(config)
    architecture = renamed(stock.architectures, HEADS)
    check_activation(architecture, stock.hidden_act)
    if "lm_head.bias" in weights:  # the decoder's own, which files hold under one name or both
        weights = {**weights, "lm_head.decoder.bias": weights["lm_head.bias"]}
        weights.pop("lm_head.bias")
    weights = to_encoder(weights, "longformer", architecture, MODULES, OF_HEADS)
    unused = unused_rows(stock)
    weights = {name: x[unused:].contiguous() if name.endswith(TABLE) else x for name, x in weights.items()}
    windows = stock.attention_window
    windows = [windows] * stock.num_hidden_layers if isinstance(windows, int) else windows
    require(
        all(window > 0 and window % 2 == 0 for window in windows) and len(windows) == stock.num_hidden_layers,
        f"attention_window must be even and positive, one for each of {stock.num_hidden_layers} layers, got {windows}.",
    )
    ours = {
        **shared_fields(stock),
        "sep_token_id": stock.sep_token_id,
        "model_type": OUR_TYPE,
        "architectures": [architecture],
        "max_position_embeddings": stock.max_position_embeddings - unused,
        "attention_patterns": [{"type": "local", "window": window // 2 + 1} for window in windows],
        "global_projections": True,
        "global_tokens": "by_task",
        "classifier_dropout": stock.hidden_dropout_prob,
    }
    return ours, weights


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours = LongEncoderConfig.from_dict(config)
    built_in = {"global_projections": True, "global_tokens": "by_task", "pooler_act": "tanh"}
    architecture, stock, weights = from_encoder(
        ours, weights, "Longformer", HEADS, MODULES, OF_HEADS, built_in, "longformer"
    )
    check_activation(architecture, ours.hidden_act)
    patterns = patterns_for_layers(ours.attention_patterns, ours.num_hidden_layers)
    for pattern in map(pattern_from_dict, patterns):
        require(
            pattern.type == "local" and pattern.dilation == 1 and pattern.window > 1,
            f"Longformer has windows alone, {{'type': 'local', 'window': 2 or more}}, but this model has "
            f"{pattern.to_dict()}.",
        )
    stock |= {
        "model_type": SOURCE_TYPE,
        "architectures": [architecture],
        "sep_token_id": ours.sep_token_id,
        "attention_window": [2 * (pattern.window - 1) for pattern in patterns],
        "max_position_embeddings": ours.max_position_embeddings + unused_rows(ours),
    }
    table = next(name for name in weights if name.endswith("position_embeddings.weight"))
    rows = weights[table].new_zeros(unused_rows(ours), ours.hidden_size)
    weights[table] = torch.cat([rows, weights[table]])
    if architecture == "LongformerModel":
        weights = add_pooler(weights, "pooler.dense", ours.hidden_size)
    if "lm_head.decoder.bias" in weights:
        weights["lm_head.bias"] = weights["lm_head.decoder.bias"]
    return stock, weights


def unused_rows(config: PreTrainedConfig) -> int:
    """Rows of the table of positions that no token has."""
    require(config.pad_token_id is not None, "Longformer counts positions from pad_token_id on, which is None.")
    return config.pad_token_id + 1


def check_activation(architecture: str, activation: str) -> None:
    """Raise ValueError where a masked LM's head would have another activation than the model."""
    require(
        not architecture.endswith("ForMaskedLM") or activation == "gelu",
        f"Longformer's masked LM has a gelu in its head whatever hidden_act is, but the model has hidden_act="
        f"{activation!r}, which ours has there, too.",
    )


__all__ = ["OUR_TYPE", "SOURCE_TYPE", "to_ours", "to_stock"]

"""BigBird <-> long encoder: neighbouring blocks, random blocks as stock draws them in training, global edges.

Stock BigBird switches to full attention at up to (5 + 2 num_random_blocks) * block_size tokens, and stays there; in
evaluation it draws no blocks, so that the first counts num_random_blocks times more. Neither is copied. Of the pooler,
which no converted head reads, and of the next-sentence classifier nothing is kept; poolers come back as zeros.
"""

import torch
from transformers import BigBirdConfig

from ..modeling.attention_patterns import patterns_for_layers
from ..modeling.configuration_long_encoder import LongEncoderConfig
from .bert_encoder import OUR_TYPE, add_pooler, from_encoder, shared_fields, to_encoder
from .mapping import renamed, require

SOURCE_TYPE = "big_bird"
HEADS = {
    "BigBirdModel": "LongEncoderModel",
    "BigBirdForPreTraining": "LongEncoderForMaskedLM",
    "BigBirdForMaskedLM": "LongEncoderForMaskedLM",
    "BigBirdForSequenceClassification": "LongEncoderForSequenceClassification",
    "BigBirdForTokenClassification": "LongEncoderForTokenClassification",
}
OF_HEADS = {
    "cls.predictions.transform.dense.": "transform.",
    "cls.predictions.transform.LayerNorm.": "transform_norm.",
    "cls.predictions.decoder.": "lm_head.",
    "classifier.dense.": "pooler.",
    "classifier.out_proj.": "score.",
    "classifier.": "score.",
}
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    stock = BigBirdConfig.from_dict(config)
    architecture = renamed(stock.architectures, HEADS)
    for field, needed in (("use_bias", True), ("is_decoder", False), ("add_cross_attention", False)):
        value = getattr(stock, field)
        require(value == needed, f"This family needs {field}={needed}, but the model has {field}={value}.")
    if BIAS in weights:  # the decoder's own, which files hold under one name or both
        weights = {**weights, DECODER_BIAS: weights[BIAS]}
        weights.pop(BIAS)
    weights = {name: x for name, x in weights.items() if not name.startswith("cls.seq_relationship.")}
    sees_all = stock.attention_type == "original_full"
    classifier_dropout = stock.classifier_dropout
    ours = {
        **shared_fields(stock),
        "model_type": OUR_TYPE,
        "architectures": [architecture],
        "sep_token_id": stock.sep_token_id,
        "max_position_embeddings": stock.max_position_embeddings,
        "scale_embedding": stock.rescale_embeddings,
        "pooler_act": stock.hidden_act,
        "attention_patterns": {"type": "full"}
        if sees_all
        else _patterns(stock, stock.block_size, stock.num_random_blocks),
        "global_projections": False,
        "global_tokens": "none" if sees_all else "edges",
        "num_global_tokens": stock.block_size,
        "classifier_dropout": stock.hidden_dropout_prob if classifier_dropout is None else classifier_dropout,
    }
    return ours, to_encoder(weights, "bert", architecture, {}, OF_HEADS)


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours = LongEncoderConfig.from_dict(config)
    built_in = {"global_projections": False, "pooler_act": ours.hidden_act}
    architecture, stock, weights = from_encoder(ours, weights, "big_bird", HEADS, {}, OF_HEADS, built_in, "bert")
    patterns = [pattern.to_dict() for pattern in patterns_for_layers(ours.attention_patterns, ours.num_hidden_layers)]
    block, sees_all = ours.num_global_tokens, all(pattern == {"type": "full"} for pattern in patterns)
    drawn = [part for part in patterns[0].get("patterns", ()) if part["type"] == "big_bird_blocks"]
    count = drawn[0]["count"] if drawn else 3
    expected = {"type": "full"} if sees_all else _patterns(ours, block, count)
    require(
        sees_all or patterns == expected,
        f"BigBird sees neighbouring and big_bird_blocks of num_global_tokens={block} tokens, a seed a layer, but "
        f"this model has attention_patterns={ours.attention_patterns}.",
    )
    wanted = "none" if sees_all else "edges"
    require(
        ours.global_tokens == wanted,
        f"BigBird has global_tokens={wanted!r} built in, but this model has global_tokens={ours.global_tokens!r}.",
    )
    stock |= {
        "model_type": SOURCE_TYPE,
        "architectures": [architecture],
        "sep_token_id": ours.sep_token_id,
        "max_position_embeddings": ours.max_position_embeddings,
        "rescale_embeddings": ours.scale_embedding,
        "attention_type": "original_full" if sees_all else "block_sparse",
        "block_size": block,
        "num_random_blocks": count,
        "classifier_dropout": ours.classifier_dropout,
    }
    if DECODER_BIAS in weights:
        weights[BIAS] = weights[DECODER_BIAS]
    prefix = "" if architecture == "BigBirdModel" else "bert."
    return stock, add_pooler(weights, f"{prefix}pooler", ours.hidden_size)


def _patterns(config: BigBirdConfig | LongEncoderConfig, block: int, count: int) -> list[dict]:
    """Those of the layers: the seed of a draw is the layer's number."""
    near = {"type": "block_1d", "block": block, "flange": block, "flange_after": block}
    random = {
        "type": "big_bird_blocks",
        "block": block,
        "count": count,
        "heads": config.num_attention_heads,
        "longest": config.max_position_embeddings,
    }
    seeds = [{"seed": layer} if layer else {} for layer in range(config.num_hidden_layers)]
    return [{"type": "union", "patterns": [near, {**random, **seed}]} for seed in seeds]


__all__ = ["OUR_TYPE", "SOURCE_TYPE", "to_ours", "to_stock"]

"""BERT -> long encoder: see `lengthening`. Of BERT's pooler nothing is kept but where a classifier of rows reads it."""

import torch
from transformers import BertConfig

from . import longformer
from .bert_encoder import OUR_TYPE, to_encoder
from .lengthening import USUAL, Length, lengthened
from .mapping import renamed

SOURCE_TYPE = "bert"
ALSO_TO = {longformer.SOURCE_TYPE: longformer.to_stock}
HEADS = {
    "BertModel": "LongEncoderModel",
    "BertForMaskedLM": "LongEncoderForMaskedLM",
    "BertForPreTraining": "LongEncoderForMaskedLM",
    "BertForSequenceClassification": "LongEncoderForSequenceClassification",
    "BertForTokenClassification": "LongEncoderForTokenClassification",
    "BertForQuestionAnswering": "LongEncoderForQuestionAnswering",
}
OF_HEADS = {
    "cls.predictions.transform.dense.": "transform.",
    "cls.predictions.transform.LayerNorm.": "transform_norm.",
    "cls.predictions.decoder.": "lm_head.",
    "classifier.": "score.",
}
POOLER, POOLER_OF_ROWS = "bert.pooler.dense.", "row_pooler."
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


def to_ours(
    config: dict, weights: dict[str, torch.Tensor], length: Length = USUAL
) -> tuple[dict, dict[str, torch.Tensor]]:
    stock = BertConfig.from_dict(config)
    architecture = renamed(stock.architectures, HEADS)
    weights = {name: x for name, x in weights.items() if not name.startswith("cls.seq_relationship.")}
    if BIAS in weights:  # the decoder's own, which files hold under one name or both
        weights[DECODER_BIAS] = weights.pop(BIAS)
    of_heads = OF_HEADS
    if architecture.endswith("SequenceClassification"):
        weights = {_without_pooler(name): tensor for name, tensor in weights.items()}
        of_heads = {**OF_HEADS, POOLER_OF_ROWS: "pooler."}
    ours = to_encoder(weights, "bert", architecture, {}, of_heads)
    return lengthened(stock, architecture, ours, 0, length)


def _without_pooler(name: str) -> str:
    """The pooler under a name that is not left out with those that no head reads."""
    return POOLER_OF_ROWS + name.removeprefix(POOLER) if name.startswith(POOLER) else name


__all__ = ["ALSO_TO", "OUR_TYPE", "SOURCE_TYPE", "to_ours"]

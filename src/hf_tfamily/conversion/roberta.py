"""RoBERTa -> long encoder: see `lengthening`. Modules are named as Longformer's, which was made of it."""

import torch
from transformers import RobertaConfig

from . import longformer
from .bert_encoder import OUR_TYPE, to_encoder
from .lengthening import USUAL, Length, lengthened
from .mapping import renamed

SOURCE_TYPE = "roberta"
ALSO_TO = {longformer.SOURCE_TYPE: longformer.to_stock}
HEADS = {name.replace("Longformer", "Roberta"): ours for name, ours in longformer.HEADS.items()}


def to_ours(
    config: dict, weights: dict[str, torch.Tensor], length: Length = USUAL
) -> tuple[dict, dict[str, torch.Tensor]]:
    stock = RobertaConfig.from_dict(config)
    architecture = renamed(stock.architectures, HEADS)
    longformer.check_activation(architecture, stock.hidden_act)
    if "lm_head.bias" in weights:  # the decoder's own, which files hold under one name or both
        weights = {**weights, "lm_head.decoder.bias": weights["lm_head.bias"]}
        weights.pop("lm_head.bias")
    ours = to_encoder(weights, "roberta", architecture, {}, longformer.OF_HEADS)
    return lengthened(stock, architecture, ours, longformer.unused_rows(stock), length)


__all__ = ["ALSO_TO", "OUR_TYPE", "SOURCE_TYPE", "to_ours"]

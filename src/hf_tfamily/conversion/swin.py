"""Swin <-> Swin Transformer: the same architecture. The modules of both have the same names; files have older ones.

Transformers writes stock Swin under the names of its first version, whatever its modules are called now, so what is on
the Hub and what `save_pretrained` writes look alike. Files under the names of the modules are read as well.
"""

import re

import torch
from transformers import SwinConfig

from ..modeling.configuration_swin_transformer import SwinTransformerConfig
from .mapping import rename_in_blocks, require

SOURCE_TYPE = "swin"
OUR_TYPE = "swin_transformer"

FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "mlp_ratio",
    "qkv_bias",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "hidden_act",
    "use_absolute_embeddings",
    "initializer_range",
    "layer_norm_eps",
    "encoder_stride",
    "out_features",
    "out_indices",
    "id2label",
    "label2id",
    "problem_type",
)
# Written by the first version and read by nobody.
UNUSED_FIELDS = ("path_norm",)
HEADS = {
    "SwinModel": "SwinTransformerModel",
    "SwinForImageClassification": "SwinTransformerForImageClassification",
    "SwinForMaskedImageModeling": "SwinTransformerForMaskedImageModeling",
    "SwinBackbone": "SwinTransformerBackbone",
}
OLD_MODULES = {
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.self.relative_position_bias_table": "attention.relative_position_bias.relative_position_bias_table",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    swin = SwinConfig.from_dict(config)
    architecture = (swin.architectures or [_head_of(weights)])[0]
    require(architecture in HEADS, f"There is no counterpart of {architecture}; there is one of {', '.join(HEADS)}.")
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("relative_position_index")}
    weights = rename_in_blocks(weights, OLD_MODULES)
    if architecture == "SwinBackbone":
        weights = _backbone(weights, swin.hidden_size)
    return _config(swin, OUR_TYPE, HEADS[architecture]), weights


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours = SwinTransformerConfig.from_dict(config)
    require(
        ours.shifted_windows,
        "Swin moves the windows of every second block, but this model has shifted_windows=False.",
    )
    stock = {our_name: theirs for theirs, our_name in HEADS.items()}
    architecture = (ours.architectures or [HEADS[_head_of(weights)]])[0]
    require(architecture in stock, f"There is no counterpart of {architecture}; there is one of {', '.join(stock)}.")
    return _config(ours, SOURCE_TYPE, stock[architecture]), weights


def _config(source: SwinConfig | SwinTransformerConfig, model_type: str, architecture: str) -> dict:
    unused = {name: getattr(source, name) for name in UNUSED_FIELDS if hasattr(source, name)}
    fields = {name: getattr(source, name) for name in FIELDS}
    return {**fields, **unused, "model_type": model_type, "architectures": [architecture]}


def _backbone(weights: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """Backbones are written without the `swin.` before their parts, and once had no last norm; they do not use it."""
    weights = {re.sub(r"^(embeddings|encoder)\.", r"swin.\1.", name): tensor for name, tensor in weights.items()}
    dtype = next(iter(weights.values())).dtype
    norm = {"swin.layernorm.weight": torch.ones(width, dtype=dtype)}
    norm["swin.layernorm.bias"] = torch.zeros(width, dtype=dtype)
    return norm | weights


def _head_of(weights: dict[str, torch.Tensor]) -> str:
    """The class of a checkpoint that does not name it."""
    heads = {
        "hidden_states_norms.": "SwinBackbone",
        "decoder.": "SwinForMaskedImageModeling",
        "swin.": "SwinForImageClassification",
    }
    return next((heads[start] for start in heads if any(name.startswith(start) for name in weights)), "SwinModel")

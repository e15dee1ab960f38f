"""What the decoders with ALiBi, BLOOM and MPT, have in common beside the vanilla Transformer's decoder."""

import torch
from transformers import PreTrainedConfig

from ..modeling.configuration_vanilla_transformer import VanillaTransformerConfig
from .mapping import rename_in_blocks, require

OUR_TYPE = "vanilla_transformer"
HEAD = "VanillaTransformerForCausalLM"
TABLE = "embed_tokens.weight"

# Ours that both have built in.
BUILT_IN = {
    "position_encoding": "alibi",
    "norm_first": True,
    "scale_embedding": False,
    "attention_patterns": None,
    "decoder_attention_patterns": None,
    "output_bias": False,
    "add_cross_attention": False,
    "activation_dropout": 0.0,
}


def to_decoder(
    stock: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    blocks: str,
    names: dict[str, str],
    modules: dict[str, str],
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Our side, without the fields that one family has alone.

    Args:
        blocks: what their list of blocks is called.
        names: their modules beside the blocks, and ours.
        modules: their modules in a block, and ours.
    """
    theirs = f"{type(stock).__name__.removesuffix('Config')}ForCausalLM"
    architecture = (stock.architectures or [theirs])[0]
    require(architecture == theirs, f"There is no counterpart of {architecture}; there is one of {theirs}.")
    inner = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    output = inner.pop("lm_head.weight", None)
    inner = rename_in_blocks({_renamed(name, {blocks: "layers", **names}): x for name, x in inner.items()}, modules)
    ours = {
        **BUILT_IN,
        "model_type": OUR_TYPE,
        "architectures": [HEAD],
        "vocab_size": stock.vocab_size,
        "hidden_size": stock.hidden_size,
        "num_hidden_layers": stock.num_hidden_layers,
        "decoder_layers": stock.num_hidden_layers,
        "num_attention_heads": stock.num_attention_heads,
        "intermediate_size": 4 * stock.hidden_size,
        "layer_norm_eps": stock.layer_norm_epsilon,
        "use_cache": stock.use_cache,
        "bos_token_id": stock.bos_token_id,
        "eos_token_id": stock.eos_token_id,
        "pad_token_id": stock.pad_token_id,
        "tie_word_embeddings": stock.tie_word_embeddings,
        "is_encoder_decoder": False,
        "is_decoder": True,
    }
    if output is None or stock.tie_word_embeddings:
        output = inner[TABLE]
    return ours, {"lm_head.weight": output} | {f"model.decoder.{name}": tensor for name, tensor in inner.items()}


def from_decoder(
    config: dict,
    weights: dict[str, torch.Tensor],
    config_class: type,
    blocks: str,
    names: dict[str, str],
    modules: dict[str, str],
    built_in: dict,
) -> tuple[VanillaTransformerConfig, dict, dict[str, torch.Tensor]]:
    """Our config, and their side without the fields that one family has alone; `built_in` are more fields of ours."""
    ours = VanillaTransformerConfig.from_dict(config)
    family = config_class.__name__.removesuffix("Config")
    architecture = (ours.architectures or [HEAD])[0]
    require(architecture == HEAD, f"There is no counterpart of {architecture} in {family}; there is one of {HEAD}.")
    for field, needed in {**BUILT_IN, "intermediate_size": 4 * ours.hidden_size, **built_in}.items():
        value = getattr(ours, field)
        require(value == needed, f"{family} has {field}={needed!r} built in, but this model has {field}={value!r}.")
    output = weights["lm_head.weight"] if "lm_head.weight" in weights else weights[f"model.decoder.{TABLE}"]
    inner = {name.removeprefix("model.decoder."): x for name, x in weights.items() if name != "lm_head.weight"}
    inner = rename_in_blocks(inner, {our_name: theirs for theirs, our_name in modules.items()})
    back = {our_name: theirs for theirs, our_name in {blocks: "layers", **names}.items()}
    stock = {
        "model_type": config_class.model_type,
        "architectures": [f"{family}ForCausalLM"],
        "vocab_size": ours.vocab_size_of_decoder,
        "use_cache": ours.use_cache,
        "layer_norm_epsilon": ours.layer_norm_eps,
        "bos_token_id": ours.bos_token_id,
        "eos_token_id": ours.eos_token_id,
        "pad_token_id": ours.pad_token_id,
        "tie_word_embeddings": ours.tie_word_embeddings,
    }
    inner = {f"transformer.{_renamed(name, back)}": tensor for name, tensor in inner.items()}
    return ours, stock, {"lm_head.weight": output} | inner


def _renamed(name: str, modules: dict[str, str]) -> str:
    """The first module of a name exchanged."""
    first, rest = name.split(".", 1)
    return f"{modules.get(first, first)}.{rest}"

"""Marian <-> vanilla Transformer: the encoder-decoder of the OPUS translation models, under other names."""

import torch
from transformers import MarianConfig
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from ..modeling.configuration_vanilla_transformer import VanillaTransformerConfig
from .mapping import rename_in_blocks, require

SOURCE_TYPE = "marian"
OUR_TYPE = "vanilla_transformer"

# Theirs and ours.
FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "decoder_layers": "decoder_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
    "activation_function": "hidden_act",
    "scale_embedding": "scale_embedding",
    "max_position_embeddings": "max_position_embeddings",
    "share_encoder_decoder_embeddings": "share_embeddings",
    **{
        name: name
        for name in (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "use_cache",
            "decoder_start_token_id",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "tie_word_embeddings",
        )
    },
}
MODULES = {
    "self_attn.out_proj": "self_attn.o_proj",
    "encoder_attn.out_proj": "cross_attn.o_proj",
    "self_attn_layer_norm": "self_attn_residual.norm",
    "encoder_attn_layer_norm": "cross_attn_residual.norm",
    "final_layer_norm": "mlp_residual.norm",
    "encoder_attn": "cross_attn",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}
HEADS = {
    "MarianMTModel": "VanillaTransformerForConditionalGeneration",
    "MarianModel": "VanillaTransformerModel",
    "MarianForCausalLM": "VanillaTransformerForCausalLM",
}
TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    marian = MarianConfig.from_dict(config)
    for theirs in ("attention_heads", "ffn_dim"):
        one, other = (getattr(marian, f"{stack}_{theirs}") for stack in ("encoder", "decoder"))
        require(one == other, f"Both stacks must have the same {theirs}, but this model has {one} and {other}.")
    for stack in ("encoder", "decoder"):
        dropped = getattr(marian, f"{stack}_layerdrop")
        require(dropped == 0, f"This family drops no layers, but the model has {stack}_layerdrop={dropped}.")
    require(
        marian.tie_word_embeddings or not marian.share_encoder_decoder_embeddings,
        "This model says that its embeddings are shared and, by tie_word_embeddings=False, that they are not.",
    )
    shared, source, target = marian.share_encoder_decoder_embeddings, marian.vocab_size, marian.decoder_vocab_size
    require(
        source == target or not shared,
        f"Source and target share embeddings, but have vocab_size={source} and decoder_vocab_size={target}.",
    )
    _check_tables(weights, source, target)

    architecture = (marian.architectures or [_head_of(weights)])[0]
    require(architecture in HEADS, f"There is no counterpart of {architecture}; there is one of {', '.join(HEADS)}.")
    prefix = "" if architecture == "MarianModel" else "model."
    weights = rename_in_blocks(weights, MODULES)
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("embed_positions.weight")}
    table = weights.pop(f"{prefix}shared.weight", None)
    if table is not None:
        weights |= {prefix + name: table for name in TABLES}
    bias = weights.pop("final_logits_bias", None)
    output_bias = bias is not None and bool(bias.any())
    if output_bias:
        weights["lm_head.bias"] = bias.flatten()
    if architecture == "MarianForCausalLM":  # nothing of an encoder
        weights = {name: tensor for name, tensor in weights.items() if ".encoder." not in name}
    ours = {
        **{our_name: getattr(marian, name) for name, our_name in FIELDS.items()},
        "model_type": OUR_TYPE,
        "architectures": [HEADS[architecture]],
        "target_vocab_size": None if source == target else target,
        "sinusoid_layout": "halves",
        "output_bias": output_bias,
        "add_cross_attention": True,
        "is_encoder_decoder": architecture != "MarianForCausalLM",
        "is_decoder": architecture == "MarianForCausalLM",
    }
    return ours, _complete(weights, prefix, ours)


def to_stock(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    ours = VanillaTransformerConfig.from_dict(config)
    for field, needed in (
        ("position_encoding", "sinusoidal"),
        ("sinusoid_layout", "halves"),
        ("norm_first", False),
        ("layer_bias", True),
        ("embedding_norm", False),
        ("attention_patterns", None),
        ("decoder_attention_patterns", None),
        ("layer_norm_eps", 1e-5),
    ):
        value = getattr(ours, field)
        require(value == needed, f"Marian has {field}={needed!r} built in, but this model has {field}={value!r}.")
    heads = {ours_name: theirs for theirs, ours_name in HEADS.items()}
    architecture = heads[(ours.architectures or ["VanillaTransformerForConditionalGeneration"])[0]]
    alone = architecture == "MarianForCausalLM"
    require(
        not alone or ours.add_cross_attention,
        "MarianForCausalLM always has layers that attend to an encoder, but this model has add_cross_attention=False.",
    )
    require(not alone or not ours.output_bias, "MarianForCausalLM has no bias on its output, but this model has.")

    prefix = "" if architecture == "MarianModel" else "model."
    shared = ours.share_embeddings and ours.tie_word_embeddings  # shared tables are tied ones
    weights = dict(weights)
    table = weights.get(f"{prefix}decoder.embed_tokens.weight")
    bias = weights.pop("lm_head.bias", None)
    weights = rename_in_blocks(weights, {our_name: theirs for theirs, our_name in MODULES.items()})
    target = ours.vocab_size_of_decoder
    if architecture == "MarianMTModel":
        weights["final_logits_bias"] = torch.zeros(1, target) if bias is None else bias[None]
    if shared and not alone:
        weights |= {f"{prefix}shared.weight": table} | {prefix + name: table for name in TABLES}
    stacks = ("decoder",) if alone else ("encoder", "decoder")
    waves = MarianSinusoidalPositionalEmbedding(ours.max_position_embeddings, ours.hidden_size).create_weight()
    weights |= {f"{prefix}{stack}.embed_positions.weight": waves.clone() for stack in stacks}
    stock = {
        **{name: getattr(ours, our_name) for name, our_name in FIELDS.items()},
        "share_encoder_decoder_embeddings": shared,
        "model_type": SOURCE_TYPE,
        "architectures": [architecture],
        "decoder_attention_heads": ours.num_attention_heads,
        "decoder_ffn_dim": ours.intermediate_size,
        "decoder_vocab_size": target,
        "forced_eos_token_id": None,
        "is_encoder_decoder": not alone,
        "is_decoder": alone,
    }
    return stock, _complete(weights, prefix, stock)


def _check_tables(weights: dict[str, torch.Tensor], source: int, target: int) -> None:
    """The embeddings have the sizes that the config says."""
    for name, tensor in weights.items():
        wanted = {"shared.weight": source, "encoder.embed_tokens.weight": source, "decoder.embed_tokens.weight": target}
        for ending, size in wanted.items():
            if name.endswith(ending):
                require(
                    len(tensor) == size,
                    f"Mismatched vocabularies: {name} has {len(tensor)} rows, but the config says {size}.",
                )


def _head_of(weights: dict[str, torch.Tensor]) -> str:
    """The class of a checkpoint that does not name it."""
    if not any(name.startswith("model.") for name in weights):
        return "MarianModel"
    return "MarianMTModel" if any(name.startswith("model.encoder.") for name in weights) else "MarianForCausalLM"


def _complete(weights: dict[str, torch.Tensor], prefix: str, config: dict) -> dict[str, torch.Tensor]:
    """Tied tensors by each of their names, so that none is missing."""
    table = weights.get(f"{prefix}decoder.embed_tokens.weight")
    if prefix and config["tie_word_embeddings"] and table is not None:
        weights = {**weights, "lm_head.weight": table}
    return weights

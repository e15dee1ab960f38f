"""TransfoXL of Transformers 2 to 4 -> Transformer-XL.

Its quirk stays, as an option of the config: a text begins with `mem_len` zero hidden states that are attended to.
"""

import re

import torch

from ..modeling.adaptive_softmax import cluster_bounds
from ..modeling.configuration_transformer_xl import TransformerXLConfig

SOURCE_TYPE = "transfo-xl"
OUR_TYPE = "transformer_xl"

ARCHITECTURES = {
    "TransfoXLLMHeadModel": "TransformerXLForCausalLM",
    "TransfoXLModel": "TransformerXLModel",
    "TransfoXLForSequenceClassification": "TransformerXLForSequenceClassification",
}
# Our fields by theirs; early versions had other names for some.
FIELDS = {
    "vocab_size": "vocab_size",
    "n_token": "vocab_size",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "d_head": "head_dim",
    "d_inner": "intermediate_size",
    "d_embed": "embedding_size",
    "cutoffs": "cutoffs",
    "div_val": "div_val",
    "tie_projs": "tie_projections",
    "mem_len": "mem_len",
    "same_length": "same_length",
    "untie_r": "untie_r",
    "pre_lnorm": "norm_first",
    "dropout": "hidden_dropout",
    "dropatt": "attention_dropout",
    "layer_norm_epsilon": "layer_norm_eps",
    "init_std": "initializer_range",
    "proj_init_std": "projection_initializer_range",
    "tie_weight": "tie_word_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    **{name: name for name in ("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type")},
}
# What files may leave out; every one that Transformers wrote has them.
DEFAULTS = {"layer_norm_epsilon": 1e-5, "eos_token_id": 0, "same_length": False, "pre_lnorm": False}
LAYER_NAMES = {
    "dec_attn.o_net": "self_attn.o_proj",
    "dec_attn.r_net": "self_attn.r_proj",
    "dec_attn.layer_norm": "attention_{place}_norm",
    "pos_ff.CoreNet.0": "mlp.up_proj",
    "pos_ff.CoreNet.3": "mlp.down_proj",
    "pos_ff.layer_norm": "mlp_{place}_norm",
}
BIAS_NAMES = {"r_w_bias": "content", "r_r_bias": "position"}  # u and v


def to_ours(config: dict, weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    """See the package. Weights that nobody knows keep their names, and are refused with the rest left over."""
    ours = _config(config, weights)
    rename = _Renaming(TransformerXLConfig.from_dict(ours))
    return ours, {new: part for name, tensor in weights.items() for new, part in rename(name, tensor).items()}


def _config(config: dict, weights: dict) -> dict:
    if config.get("attn_type", 0) != 0:
        raise ValueError(f"attn_type={config['attn_type']}; only 0, the paper's attention, can be converted.")
    if config.get("mem_len", 0) < 1:
        raise ValueError(f"mem_len={config.get('mem_len')}; only a model with a memory can be converted.")
    config = {**DEFAULTS, **config}
    vocab_size = config.get("vocab_size", config.get("n_token"))
    cutoffs = [end for end in config.get("cutoffs", []) if end != vocab_size]
    share = config.get("proj_share_all_but_first", True)
    config.setdefault("tie_projs", [False, *[share] * len(cutoffs)])
    return {
        **{ours: config[theirs] for theirs, ours in FIELDS.items() if theirs in config},
        "model_type": OUR_TYPE,
        "architectures": [_architecture(config, weights)],
        "cutoffs": cutoffs,
        "tie_projections": config["tie_projs"][: len(cutoffs) + 1],
        "clamp_len": config["clamp_len"] if config.get("clamp_len", -1) > 0 else None,
        "zero_initial_memory": True,
    }


def _architecture(config: dict, weights: dict) -> str:
    """The class of the same head; without a known one the weights tell a language model from a bare one."""
    named = (config.get("architectures") or [None])[0]
    if named is None:
        named = "TransfoXLLMHeadModel" if any(name.startswith("crit.") for name in weights) else "TransfoXLModel"
    if named not in ARCHITECTURES:
        raise ValueError(f"architectures names {named}; what can be converted is {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[named]


class _Renaming:
    """What one of their tensors becomes here: {name: tensor}, several where one table holds several clusters."""

    def __init__(self, config: TransformerXLConfig):
        self.config = config
        self.bounds = cluster_bounds(config.vocab_size, config.cutoffs)
        self.body = "" if config.architectures[0] == "TransformerXLModel" else "model."

    def __call__(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        part = name.removeprefix("transformer.")
        if part == "pos_emb.inv_freq":
            return {}
        if part in BIAS_NAMES:  # one pair for all layers, repeated in each
            return {f"{self.body}biases.0.{BIAS_NAMES[part]}": tensor}
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", part):
            return self._layer(*match.groups(), tensor)
        if match := re.fullmatch(r"word_emb\.emb_layers\.(\d+)\.weight", part):
            return self._table(f"{self.body}embed_tokens", int(match[1]), "weight", tensor)
        if match := re.fullmatch(r"word_emb\.emb_projs\.(\d+)", part):
            return {f"{self.body}embed_tokens.projections.{match[1]}.weight": tensor}
        if match := re.fullmatch(r"crit\.out_layers\.(\d+)\.(weight|bias)", part):
            return self._table("lm_head", int(match[1]), match[2], tensor)
        if match := re.fullmatch(r"crit\.out_projs\.(\d+)", part):
            return {f"lm_head.projections.{match[1]}.weight": tensor}
        if match := re.fullmatch(r"crit\.cluster_(weight|bias)", part):
            return {f"lm_head.rare_clusters.{match[1]}": tensor}
        return {part: tensor}

    def _layer(self, number: str, part: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        prefix = f"{self.body}layers.{number}"
        kind, _, leaf = part.rpartition(".")
        if part == "dec_attn.qkv_net.weight":
            names = [f"{prefix}.self_attn.{letter}_proj.weight" for letter in "qkv"]
            return {name: third.clone() for name, third in zip(names, tensor.chunk(3))}
        if kind == "dec_attn" and leaf in BIAS_NAMES:
            return {f"{self.body}biases.{number}.{BIAS_NAMES[leaf]}": tensor} if self.config.untie_r else {}
        kind = LAYER_NAMES.get(kind, kind).format(place="pre" if self.config.norm_first else "post")
        return {f"{prefix}.{kind}.{leaf}": tensor}

    def _table(self, module: str, number: int, leaf: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A table of words; with div_val 1 theirs is one for all clusters."""
        if not self.config.is_adaptive:
            return {f"{module}.{leaf}": tensor}
        if self.config.div_val > 1:
            return {f"{module}.clusters.{number}.{leaf}": tensor}
        return {f"{module}.clusters.{i}.{leaf}": tensor[a:b].clone() for i, (a, b) in enumerate(self.bounds)}

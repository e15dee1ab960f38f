"""What Longformer and BigBird have in common, whose modules are named as BERT's."""

from transformers import PreTrainedConfig

from ..modeling.configuration_long_encoder import LongEncoderConfig
from .mapping import rename_in_blocks, renamed, require

OUR_TYPE = "long_encoder"
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "id2label",
    "label2id",
    "problem_type",
)
DROPOUTS = {"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout"}
EMBEDDINGS = {
    "embeddings.word_embeddings.": "embed_tokens.",
    "embeddings.position_embeddings.": "positions.table.",
    "embeddings.token_type_embeddings.": "embed_types.",
    "embeddings.LayerNorm.": "embedding_norm.",
    "encoder.layer.": "layers.",
}
MODULES = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.o_proj",
    "attention.output.LayerNorm": "self_attn_residual.norm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "mlp_residual.norm",
}
# Ours that both have built in.
BUILT_IN = {
    "position_encoding": "learned",
    "norm_first": False,
    "layer_bias": True,
    "embedding_norm": True,
    "activation_dropout": 0.0,
}


def shared_fields(stock: PreTrainedConfig) -> dict:
    """Fields of ours that both families give."""
    dropouts = {ours: getattr(stock, theirs) for theirs, ours in DROPOUTS.items()}
    return {**{name: getattr(stock, name) for name in SHARED_FIELDS}, **dropouts, **BUILT_IN}


def to_encoder(weights: dict, prefix: str, architecture: str, modules: dict, of_heads: dict) -> dict:
    """Our names; of a pooler that no head reads nothing is kept."""
    inner = "" if architecture == "LongEncoderModel" else "model."
    found = {}
    for name, tensor in rename_in_blocks(weights, {**modules, **MODULES}).items():
        bare = name.removeprefix(f"{prefix}.")
        if bare.startswith(("pooler.", "embeddings.position_ids", "embeddings.token_type_ids")):
            continue
        theirs = next((start for start in EMBEDDINGS if bare.startswith(start)), None)
        if theirs is not None:
            found[inner + EMBEDDINGS[theirs] + bare.removeprefix(theirs)] = tensor
            continue
        head = next((start for start in of_heads if bare.startswith(start)), "")
        found[of_heads.get(head, "") + bare.removeprefix(head)] = tensor
    return found


def from_encoder(
    ours: LongEncoderConfig,
    weights: dict,
    family: str,
    heads: dict,
    modules: dict,
    of_heads: dict,
    built_in: dict,
    prefix: str,
) -> tuple[str, dict, dict]:
    """Their class, the fields that both give, and weights under their names."""
    back = {our_name: theirs for theirs, our_name in heads.items()}
    architecture = renamed(ours.architectures, back)
    for field, needed in {**BUILT_IN, **built_in}.items():
        value = getattr(ours, field)
        require(value == needed, f"{family} has {field}={needed!r} built in, but this model has {field}={value!r}.")
    stock = {name: getattr(ours, name) for name in SHARED_FIELDS}
    stock |= {theirs: getattr(ours, name) for theirs, name in DROPOUTS.items()}
    is_bare = architecture.endswith("Model")
    found, outer = {}, "" if is_bare else f"{prefix}."
    embeddings = {our_name: theirs for theirs, our_name in EMBEDDINGS.items()}
    blocks = {our_name: theirs for theirs, our_name in {**modules, **MODULES}.items()}
    for name, tensor in rename_in_blocks(weights, blocks).items():
        bare = name.removeprefix("model.")
        our_start = next((start for start in embeddings if bare.startswith(start)), None)
        if our_start is not None:
            found[outer + embeddings[our_start] + bare.removeprefix(our_start)] = tensor
            continue
        for theirs, our_name in of_heads.items():
            if name.startswith(our_name) and _is_of(theirs, architecture):
                found[theirs + name.removeprefix(our_name)] = tensor
                break
        else:
            found[name] = tensor
    return architecture, stock, found


def _is_of(module: str, architecture: str) -> bool:
    """`classifier.` alone is that of tokens; with a layer inside, that of rows."""
    return module != "classifier.out_proj." or not architecture.endswith("TokenClassification")


def add_pooler(weights: dict, module: str, width: int) -> dict:
    """With a pooler of zeros, which no head reads."""
    like = next(iter(weights.values()))
    zeros = {"weight": like.new_zeros(width, width), "bias": like.new_zeros(width)}
    return {**weights, **{f"{module}.{name}": x for name, x in zeros.items()}}

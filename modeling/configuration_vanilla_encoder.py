"""Configuration of the vanilla encoder: BERT (Devlin et al. 2018, arXiv:1810.04805)."""

from huggingface_hub.dataclasses import strict

from .checks import check_not_negative, check_probabilities
from .configuration_vanilla_transformer import VanillaStackConfig


@strict
class VanillaEncoderConfig(VanillaStackConfig):
    """A stack of encoder blocks that reads tokens both ways. The defaults are BERT base.

    Args:
        type_vocab_size: number of token types, whose embeddings are added to those of the tokens; 0 for none.
        classifier_dropout: dropout before the classification layer.

    All other fields are those of VanillaTransformerConfig that are no decoder's.
    """

    model_type = "vanilla_encoder"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    scale_embedding: bool = False
    position_encoding: str = "learned"
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    type_vocab_size: int = 2
    embedding_norm: bool = True
    classifier_dropout: float | int = 0.1
    eos_token_id: int | list[int] | None = None

    def validate_encoder(self):
        """Token types are counted, and the dropout is a probability below 1."""
        check_not_negative(self, "type_vocab_size")
        check_probabilities(self, "classifier_dropout")


__all__ = ["VanillaEncoderConfig"]

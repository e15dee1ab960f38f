"""Configuration of the long encoder: Longformer (Beltagy et al. 2020, arXiv:2004.05150), BigBird (Zaheer et al. 2020,
arXiv:2007.14062) and the global-local attention of ETC (Ainslie et al. 2020, arXiv:2004.08483)."""

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .attention_patterns import check_known
from .checks import check_sizes
from .configuration_vanilla_encoder import VanillaEncoderConfig

GLOBAL_TOKENS = ("by_task", "first", "edges", "none")
# Encodings that tell nothing by distance, so that global tokens may have projections of their own.
OF_TOKENS = ("learned", "learned_per_layer", "sinusoidal", "none")


@strict
class LongEncoderConfig(VanillaEncoderConfig):
    """A vanilla encoder for long documents. The defaults are Longformer base.

    Args:
        attention_patterns: which tokens self-attention sees beside the global ones: one pattern dict, or a list of them
            cycled over the layers; 256 on either side if None, and {"type": "full"} for all tokens.
        global_projections: give global tokens queries, keys and values of their own (Longformer, section 3.1).
        global_tokens: which tokens are global where the caller gives no global_attention_mask: "by_task" as Longformer
            has it (the first token for classes of rows, the question for answers, else none), "first" ones of each row
            (ETC), "edges", the first and the last block of each row (BigBird), or "none".
        num_global_tokens: number of "first" tokens, or length of the blocks that "edges" are.
        sep_token_id: what ends a question.
        pooler_act: activation between the two layers of a classifier of rows.

    All other fields are those of VanillaEncoderConfig.
    """

    model_type = "long_encoder"

    vocab_size: int = 50265
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    type_vocab_size: int = 1
    global_projections: bool = True
    global_tokens: str = "by_task"
    num_global_tokens: int = 1
    sep_token_id: int | None = 2
    pooler_act: str = "tanh"
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.attention_patterns is None:
            self.attention_patterns = {"type": "local", "window": 257}
        super().__post_init__(**kwargs)

    def validate_global_tokens(self):
        """What is global is known, and can be told apart from other tokens."""
        check_known(self, "global_tokens", GLOBAL_TOKENS)
        check_known(self, "pooler_act", ACT2FN)
        check_sizes(self, "num_global_tokens")
        if self.global_projections and self.position_encoding not in OF_TOKENS:
            raise ValueError(
                f"position_encoding={self.position_encoding!r} scores distances, which global_projections=True do not "
                f"know; use one of {', '.join(OF_TOKENS)}, or set global_projections to False."
            )


__all__ = ["LongEncoderConfig"]

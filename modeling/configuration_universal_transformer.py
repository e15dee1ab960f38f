"""Configuration of the Universal Transformer (Dehghani et al. 2018, arXiv:1807.03819)."""

from huggingface_hub.dataclasses import strict

from .checks import check_not_negative
from .configuration_vanilla_transformer import VanillaTransformerConfig


@strict
class UniversalTransformerConfig(VanillaTransformerConfig):
    """An encoder and a decoder, each of one block that is applied again and again.

    Args:
        num_hidden_layers: how many steps the encoder's block is applied; with `adaptive`, at most.
        decoder_layers: the same for the decoder's; num_hidden_layers if None.
        attention_patterns, decoder_attention_patterns: one pattern dict, or a list of them cycled over the steps.
        adaptive: each position takes as many steps as it needs (section 2.3), instead of all.
        halting_threshold: with `adaptive`, the sum of halting probabilities, above 0 and at most 1, beyond which a
            position halts.
        ponder_cost: with `adaptive`, what a position pays in training for each step that it takes, in nats.

    All other fields are those of VanillaTransformerConfig.
    """

    model_type = "universal_transformer"

    adaptive: bool = False
    halting_threshold: float | int = 0.99
    ponder_cost: float | int = 0.01

    def validate_halting(self):
        """The threshold is a share above 0, and the cost not negative."""
        if not 0 < self.halting_threshold <= 1:
            raise ValueError(f"halting_threshold must be above 0 and at most 1, got {self.halting_threshold}.")
        check_not_negative(self, "ponder_cost")


__all__ = ["UniversalTransformerConfig"]

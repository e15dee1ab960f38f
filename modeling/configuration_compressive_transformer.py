"""Configuration of the Compressive Transformer (Rae et al. 2019, arXiv:1911.05507)."""

from huggingface_hub.dataclasses import strict

from .checks import check_sizes
from .configuration_transformer_xl import TransformerXLConfig

COMPRESSIONS = ("max_pool", "mean_pool", "conv", "dilated_conv", "most_used")
LEARNED = ("conv", "dilated_conv")
LOSSES = ("attention_reconstruction", "auto_encoding")


@strict
class CompressiveTransformerConfig(TransformerXLConfig):
    """A Transformer-XL's config (without same_length and zero_initial_memory) and what compresses its old memories.

    Args:
        compression: "max_pool", "mean_pool", "conv" (strided), "dilated_conv" or "most_used" (section 3.1).
        compression_rate: number of slots that become one (c in the paper).
        compressed_mem_len: number of compressed slots in every layer's memory.
        compression_dilation: distance between the slots that a dilated convolution sees.
        compression_loss: "attention_reconstruction" or "auto_encoding" (section 3.2), for convolutions; None for the
            others, which learn nothing. The first where there is something to learn, if "auto".
        compression_loss_weight: what it is multiplied by before it is added to the main loss. It trains nothing but
            the compression, so this is but a learning rate.
    """

    model_type = "compressive_transformer"

    compression: str = "conv"
    compression_rate: int = 4
    compressed_mem_len: int = 128
    compression_dilation: int = 2
    compression_loss: str | None = "auto"
    compression_loss_weight: float | int = 1.0

    def __post_init__(self, **kwargs):
        if self.compression_loss == "auto":
            self.compression_loss = LOSSES[0] if self.compression in LEARNED else None
        super().__post_init__(**kwargs)

    def validate_compression(self):
        """The compression is known, and learns if and only if there is something to learn."""
        for name, allowed in (("compression", COMPRESSIONS), ("compression_loss", (*LOSSES, None))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}.")
        if (self.compression in LEARNED) != (self.compression_loss is not None):
            raise ValueError(
                f"compression={self.compression!r} with compression_loss={self.compression_loss!r}: convolutions "
                f"({', '.join(LEARNED)}) learn by a compression loss alone, and nothing else has anything to learn."
            )
        check_sizes(self, "compression_rate", "compressed_mem_len", "compression_dilation")
        if self.compression_loss_weight <= 0:
            raise ValueError(f"compression_loss_weight must be above 0, got {self.compression_loss_weight}.")

    def validate_slots(self):
        """Compressed slots are not one token each."""
        for name in ("same_length", "zero_initial_memory"):
            if getattr(self, name):
                raise ValueError(f"{name}=True has no meaning with a compressed memory; leave it False.")


__all__ = ["CompressiveTransformerConfig"]

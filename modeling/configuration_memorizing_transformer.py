"""Configuration of the Memorizing Transformer (Wu et al. 2022, arXiv:2203.08913)."""

from huggingface_hub.dataclasses import strict

from .checks import check_not_negative, check_sizes
from .configuration_transformer_xl import TransformerXLConfig


@strict
class MemorizingTransformerConfig(TransformerXLConfig):
    """A Transformer-XL's config (without same_length and zero_initial_memory) and the store of one layer.

    Args:
        memory_layer: which layer looks up the store, from 0; three quarters of the way up if None (the paper's is the
            9th of 12).
        memory_size: the most tokens that the store has of each row, the newest; 0 for none. It may be another one than
            in training.
        num_neighbors: how many of them a query attends to (k in the paper).
    """

    model_type = "memorizing_transformer"

    memory_layer: int | None = None
    memory_size: int = 8192
    num_neighbors: int = 32

    def __post_init__(self, **kwargs):
        if self.memory_layer is None:
            self.memory_layer = (3 * self.num_hidden_layers - 1) // 4
        super().__post_init__(**kwargs)

    def validate_store(self):
        """There is such a layer, and the store can hold as many tokens as are looked up."""
        self.validate_sizes()
        if not 0 <= self.memory_layer < self.num_hidden_layers:
            raise ValueError(
                f"memory_layer must be 0 to {self.num_hidden_layers - 1} (num_hidden_layers={self.num_hidden_layers}), "
                f"got {self.memory_layer}."
            )
        check_not_negative(self, "memory_size")
        check_sizes(self, "num_neighbors")
        if 0 < self.memory_size < self.num_neighbors:
            raise ValueError(
                f"num_neighbors={self.num_neighbors} must be at most memory_size={self.memory_size}; give "
                "memory_size=0 for no store."
            )

    def validate_slots(self):
        """What leaves the short memory is a token, and no token is between it and the store."""
        for name in ("same_length", "zero_initial_memory"):
            if getattr(self, name):
                raise ValueError(f"{name}=True has no meaning with a store of what left the memory; leave it False.")


__all__ = ["MemorizingTransformerConfig"]

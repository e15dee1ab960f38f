"""Configuration of XLSparse: Transformer-XL (Dai et al. 2019) with factorised attention (Child et al. 2019)."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .attention_patterns import check_patterns, walk
from .configuration_transformer_xl import TransformerXLConfig


@strict
class XLSparseConfig(TransformerXLConfig):
    """A Transformer-XL's config (without zero_initial_memory) and the attention pattern of every layer.

    Patterns count tokens from the start of the text, whatever a segment or the memory begins with. The default is made
    for bytes of text: every layer sees its last 64 tokens, and before those every 32nd.

    Args:
        attention_patterns: the pattern dict of every layer, or a list of them cycled over the layers. A layer scores
            only the distances that its pattern can meet, and remembers only as far back as it reaches, so that
            "local" layers are cheapest and patterns with "fixed" summaries, which meet every distance, dearest.
        mem_len: number of slots in every layer's memory, at least 1; fewer where its pattern reaches less far.
        same_length: no query sees further back than its last mem_len tokens, itself included, so that nothing depends
            on where segments end. Without it the same holds wherever mem_len is at least as far as patterns reach.
    """

    model_type = "xl_sparse"

    attention_patterns: dict[str, Any] | list[dict[str, Any]] | None = None
    mem_len: int = 512

    def __post_init__(self, **kwargs):
        if self.attention_patterns is None:
            near, far = {"type": "local", "window": 64}, {"type": "strided", "stride": 32}
            self.attention_patterns = {"type": "union", "patterns": [near, far]}
        super().__post_init__(**kwargs)

    def validate_attention_patterns(self):
        """Every pattern is known, complete, can be dealt out to the heads, and is for text."""
        for pattern in check_patterns(self.attention_patterns, self.num_hidden_layers, self.num_attention_heads):
            if any(hasattr(inner, "grid") for inner in walk(pattern)):
                raise ValueError(f"attention_patterns: {pattern.to_dict()} is for pictures, not for text.")

    def validate_slots(self):
        """Slots before the text have no position."""
        if self.zero_initial_memory:
            raise ValueError("zero_initial_memory=True has no meaning where patterns count positions; leave it False.")


__all__ = ["XLSparseConfig"]

"""The Transformer family as Hugging Face models.

Importing this package registers every system with Transformers' Auto classes and `block_sparse` as an attention
implementation. Nothing heavy is imported until it is used: no triton, datasets, matplotlib or scikit-learn.

    from hf_tfamily import Local, SparseTransformerConfig, SparseTransformerForCausalLM, set_attention_patterns
"""

__version__ = "0.1.0"

from . import block_sparse, peft_defaults  # noqa: F401  block_sparse registers itself
from .auto import SYSTEMS, public_classes, register_all
from .modeling.attention_patterns import Fixed, Full, Local, PerHead, Strided, Union
from .stock_models import set_attention_patterns

register_all()
peft_defaults.register([system.name for system in SYSTEMS])
globals().update(public_classes())

__all__ = [
    "Fixed",
    "Full",
    "Local",
    "PerHead",
    "Strided",
    "Union",
    "set_attention_patterns",
    *public_classes(),
]

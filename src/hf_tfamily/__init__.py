"""The Transformer family as Hugging Face models.

Importing this package registers every system with Transformers' Auto classes and `block_sparse` as an attention
implementation. Nothing heavy is imported until it is used: no triton, datasets, matplotlib or scikit-learn.

    from hf_tfamily import Local, SparseTransformerConfig, SparseTransformerForCausalLM, set_attention_patterns
"""

__version__ = "0.1.0"

from . import block_sparse  # registers itself
from .auto import public_classes, register_all
from .modeling.attention_patterns import Fixed, Full, Local, PerHead, Strided, Union
from .peft_defaults import register_peft_defaults
from .stock_models import set_attention_patterns

register_all()
globals().update(public_classes())

__all__ = [
    "Fixed",
    "Full",
    "Local",
    "PerHead",
    "Strided",
    "Union",
    "block_sparse",
    "register_peft_defaults",
    "set_attention_patterns",
    *public_classes(),
]

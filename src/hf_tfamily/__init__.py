"""The Transformer family as Hugging Face models.

Importing this package registers every system with Transformers' Auto classes and `block_sparse` as an attention
implementation. Nothing heavy is imported until it is used: no triton, datasets, matplotlib or scikit-learn.
"""

__version__ = "0.1.0"

from .auto import register_all
from .stock_models import set_attention_patterns

__all__ = ["set_attention_patterns"]

register_all()

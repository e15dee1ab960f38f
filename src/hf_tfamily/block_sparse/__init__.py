"""Attention at the cost of its pattern: the engine behind `attn_implementation="block_sparse"`.

Importing this package registers the attention function, the mask function of stock models and the custom operators,
here and nowhere else. `attend` and `attend_varlen` are the engine without a model.
"""

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..modeling.attention import BLOCK_SPARSE, SEAM
from . import cpu, distance_bias, relative
from .engine import attend, attend_varlen
from .interface import block_sparse_attention_forward
from .stock_masks import block_sparse_mask
from .triton import attention as triton_attention
from .triton import distance_bias as triton_distance_bias
from .triton import relative as triton_relative

# A checkpoint of an earlier layout brings an engine of its own, which yields to a registered `version` as high as its.
block_sparse_attention_forward.version = SEAM
AttentionInterface.register(BLOCK_SPARSE, block_sparse_attention_forward)
AttentionMaskInterface.register(BLOCK_SPARSE, block_sparse_mask)

for module in (cpu, relative, distance_bias):
    module.register_operators()
for module in (triton_attention, triton_relative, triton_distance_bias):
    module.register_on("cuda")

__all__ = ["attend", "attend_varlen", "block_sparse_attention_forward", "block_sparse_mask"]

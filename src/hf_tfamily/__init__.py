"""The Transformer family as Hugging Face models.

Importing this package registers every system with Transformers' Auto classes and `block_sparse` as an attention
implementation. Nothing heavy is imported until it is used: no triton, datasets, matplotlib or scikit-learn.

    from hf_tfamily import Local, SparseTransformerConfig, SparseTransformerForCausalLM, set_attention_patterns
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import block_sparse, old_paths
from .auto import register_all
from .modeling.attention_patterns import (
    Block1D,
    Block2D,
    BlockTable,
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Intersection,
    Local,
    Pattern,
    PerHead,
    RandomBlocks,
    Sink,
    Strided,
    Union,
    Window2D,
)
from .modeling.cache_patterns import PatternCache
from .modeling.configuration_adaptive_span import AdaptiveSpanConfig
from .modeling.configuration_compressive_transformer import CompressiveTransformerConfig
from .modeling.configuration_image_transformer import ImageTransformerConfig
from .modeling.configuration_long_encoder import BigBirdBlocks, LongEncoderConfig
from .modeling.configuration_memorizing_transformer import MemorizingTransformerConfig
from .modeling.configuration_rope_decoder import RoPEDecoderConfig
from .modeling.configuration_sparse_transformer import SparseTransformerConfig
from .modeling.configuration_swin_transformer import SwinTransformerConfig
from .modeling.configuration_transformer_xl import TransformerXLConfig
from .modeling.configuration_universal_transformer import UniversalTransformerConfig
from .modeling.configuration_vanilla_encoder import VanillaEncoderConfig
from .modeling.configuration_vanilla_transformer import VanillaTransformerConfig
from .modeling.configuration_xl_sparse import XLSparseConfig
from .modeling.memory_segments import SegmentMemory
from .modeling.modeling_adaptive_span import (
    AdaptiveSpan,
    AdaptiveSpanForCausalLM,
    AdaptiveSpanModel,
    AdaptiveSpanPreTrainedModel,
)
from .modeling.modeling_compressive_transformer import (
    CompressiveMemory,
    CompressiveTransformerForCausalLM,
    CompressiveTransformerForSequenceClassification,
    CompressiveTransformerModel,
    CompressiveTransformerPreTrainedModel,
)
from .modeling.modeling_image_transformer import (
    ImageCache,
    ImageTransformerForCausalLM,
    ImageTransformerForSuperResolution,
    ImageTransformerModel,
    ImageTransformerPreTrainedModel,
)
from .modeling.modeling_long_encoder import (
    LongEncoder,
    LongEncoderForMaskedLM,
    LongEncoderForQuestionAnswering,
    LongEncoderForSequenceClassification,
    LongEncoderForTokenClassification,
    LongEncoderModel,
    LongEncoderPreTrainedModel,
)
from .modeling.modeling_memorizing_transformer import (
    MemorizingMemory,
    MemorizingTransformerForCausalLM,
    MemorizingTransformerModel,
    MemorizingTransformerPreTrainedModel,
)
from .modeling.modeling_rope_decoder import (
    RoPEDecoder,
    RoPEDecoderForCausalLM,
    RoPEDecoderForSequenceClassification,
    RoPEDecoderForTokenClassification,
    RoPEDecoderModel,
    RoPEDecoderPreTrainedModel,
)
from .modeling.modeling_sparse_transformer import (
    SparseTransformerForCausalLM,
    SparseTransformerForSequenceClassification,
    SparseTransformerModel,
    SparseTransformerPreTrainedModel,
)
from .modeling.modeling_swin_transformer import (
    SwinTransformerBackbone,
    SwinTransformerForImageClassification,
    SwinTransformerForMaskedImageModeling,
    SwinTransformerModel,
    SwinTransformerPreTrainedModel,
)
from .modeling.modeling_transformer_xl import (
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLModel,
    TransformerXLPreTrainedModel,
)
from .modeling.modeling_universal_transformer import (
    UniversalTransformer,
    UniversalTransformerForCausalLM,
    UniversalTransformerForConditionalGeneration,
    UniversalTransformerModel,
    UniversalTransformerPreTrainedModel,
)
from .modeling.modeling_vanilla_encoder import (
    VanillaEncoder,
    VanillaEncoderForMaskedLM,
    VanillaEncoderForSequenceClassification,
    VanillaEncoderModel,
    VanillaEncoderPreTrainedModel,
)
from .modeling.modeling_vanilla_transformer import (
    VanillaTransformer,
    VanillaTransformerForCausalLM,
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerModel,
    VanillaTransformerPreTrainedModel,
)
from .modeling.modeling_xl_sparse import (
    SparseSegmentMemory,
    XLSparseForCausalLM,
    XLSparseForSequenceClassification,
    XLSparseModel,
    XLSparsePreTrainedModel,
)
from .peft_defaults import register_peft_defaults
from .stock_models import set_attention_patterns

if TYPE_CHECKING:
    from .data import load_data
    from .hub import push
    from .recurrent_training import RecurrentTrainer

__version__ = "0.1.0"

register_all()
old_paths.register()

# What is imported when it is first used, since it needs accelerate, or much else.
_LATER = {"RecurrentTrainer": ".recurrent_training", "load_data": ".data", "push": ".hub"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "AdaptiveSpan",
    "AdaptiveSpanConfig",
    "AdaptiveSpanForCausalLM",
    "AdaptiveSpanModel",
    "AdaptiveSpanPreTrainedModel",
    "BigBirdBlocks",
    "Block1D",
    "Block2D",
    "BlockTable",
    "CompressiveMemory",
    "CompressiveTransformerConfig",
    "CompressiveTransformerForCausalLM",
    "CompressiveTransformerForSequenceClassification",
    "CompressiveTransformerModel",
    "CompressiveTransformerPreTrainedModel",
    "Fixed",
    "FixedBlock",
    "FixedSummary",
    "Full",
    "ImageCache",
    "ImageTransformerConfig",
    "ImageTransformerForCausalLM",
    "ImageTransformerForSuperResolution",
    "ImageTransformerModel",
    "ImageTransformerPreTrainedModel",
    "Intersection",
    "Local",
    "LongEncoder",
    "LongEncoderConfig",
    "LongEncoderForMaskedLM",
    "LongEncoderForQuestionAnswering",
    "LongEncoderForSequenceClassification",
    "LongEncoderForTokenClassification",
    "LongEncoderModel",
    "LongEncoderPreTrainedModel",
    "MemorizingMemory",
    "MemorizingTransformerConfig",
    "MemorizingTransformerForCausalLM",
    "MemorizingTransformerModel",
    "MemorizingTransformerPreTrainedModel",
    "Pattern",
    "PatternCache",
    "PerHead",
    "RandomBlocks",
    "RecurrentTrainer",
    "RoPEDecoder",
    "RoPEDecoderConfig",
    "RoPEDecoderForCausalLM",
    "RoPEDecoderForSequenceClassification",
    "RoPEDecoderForTokenClassification",
    "RoPEDecoderModel",
    "RoPEDecoderPreTrainedModel",
    "SegmentMemory",
    "Sink",
    "SparseSegmentMemory",
    "SparseTransformerConfig",
    "SparseTransformerForCausalLM",
    "SparseTransformerForSequenceClassification",
    "SparseTransformerModel",
    "SparseTransformerPreTrainedModel",
    "Strided",
    "SwinTransformerBackbone",
    "SwinTransformerConfig",
    "SwinTransformerForImageClassification",
    "SwinTransformerForMaskedImageModeling",
    "SwinTransformerModel",
    "SwinTransformerPreTrainedModel",
    "TransformerXLConfig",
    "TransformerXLForCausalLM",
    "TransformerXLForSequenceClassification",
    "TransformerXLModel",
    "TransformerXLPreTrainedModel",
    "Union",
    "UniversalTransformer",
    "UniversalTransformerConfig",
    "UniversalTransformerForCausalLM",
    "UniversalTransformerForConditionalGeneration",
    "UniversalTransformerModel",
    "UniversalTransformerPreTrainedModel",
    "VanillaEncoder",
    "VanillaEncoderConfig",
    "VanillaEncoderForMaskedLM",
    "VanillaEncoderForSequenceClassification",
    "VanillaEncoderModel",
    "VanillaEncoderPreTrainedModel",
    "VanillaTransformer",
    "VanillaTransformerConfig",
    "VanillaTransformerForCausalLM",
    "VanillaTransformerForConditionalGeneration",
    "VanillaTransformerModel",
    "VanillaTransformerPreTrainedModel",
    "Window2D",
    "XLSparseConfig",
    "XLSparseForCausalLM",
    "XLSparseForSequenceClassification",
    "XLSparseModel",
    "XLSparsePreTrainedModel",
    "block_sparse",
    "load_data",
    "push",
    "register_peft_defaults",
    "set_attention_patterns",
]

"""Registers every system with Transformers' Auto classes. A new system is one line in SYSTEMS."""

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ViTImageProcessorPil,
)

# Transformers 5.17 itself exports a stand-in that asks for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_vision_available

from .modeling.image_processing_tokens import ImageTokenProcessor


class System(NamedTuple):
    """One system: where its files are, and which class each Auto class loads."""

    name: str
    prefix: str
    heads: dict[type, str]
    image_processor: type | None = None


SYSTEMS = [
    System("adaptive_span", "AdaptiveSpan", {AutoModel: "Model", AutoModelForCausalLM: "ForCausalLM"}),
    System(
        "compressive_transformer",
        "CompressiveTransformer",
        {
            AutoModel: "Model",
            AutoModelForCausalLM: "ForCausalLM",
            AutoModelForSequenceClassification: "ForSequenceClassification",
        },
    ),
    System(
        "image_transformer",
        "ImageTransformer",
        {
            AutoModel: "Model",
            AutoModelForCausalLM: "ForCausalLM",
            AutoModelForSeq2SeqLM: "ForSuperResolution",
        },
        ImageTokenProcessor,
    ),
    System(
        "long_encoder",
        "LongEncoder",
        {
            AutoModel: "Model",
            AutoModelForMaskedLM: "ForMaskedLM",
            AutoModelForSequenceClassification: "ForSequenceClassification",
            AutoModelForTokenClassification: "ForTokenClassification",
            AutoModelForQuestionAnswering: "ForQuestionAnswering",
        },
    ),
    System(
        "memorizing_transformer",
        "MemorizingTransformer",
        {AutoModel: "Model", AutoModelForCausalLM: "ForCausalLM"},
    ),
    System(
        "rope_decoder",
        "RoPEDecoder",
        {
            AutoModel: "Model",
            AutoModelForCausalLM: "ForCausalLM",
            AutoModelForSequenceClassification: "ForSequenceClassification",
            AutoModelForTokenClassification: "ForTokenClassification",
        },
    ),
    System(
        "sparse_transformer",
        "SparseTransformer",
        {
            AutoModel: "Model",
            AutoModelForCausalLM: "ForCausalLM",
            AutoModelForSequenceClassification: "ForSequenceClassification",
        },
        ImageTokenProcessor,
    ),
    System(
        "swin_transformer",
        "SwinTransformer",
        {
            AutoModel: "Model",
            AutoModelForImageClassification: "ForImageClassification",
            AutoModelForMaskedImageModeling: "ForMaskedImageModeling",
            AutoBackbone: "Backbone",
        },
        ViTImageProcessorPil,
    ),
    System(
        "transformer_xl",
        "TransformerXL",
        {
            AutoModel: "Model",
            AutoModelForCausalLM: "ForCausalLM",
            AutoModelForSequenceClassification: "ForSequenceClassification",
        },
    ),
    System(
        "universal_transformer",
        "UniversalTransformer",
        {
            AutoModel: "Model",
            AutoModelForSeq2SeqLM: "ForConditionalGeneration",
            AutoModelForCausalLM: "ForCausalLM",
        },
    ),
    System(
        "vanilla_encoder",
        "VanillaEncoder",
        {
            AutoModel: "Model",
            AutoModelForMaskedLM: "ForMaskedLM",
            AutoModelForSequenceClassification: "ForSequenceClassification",
        },
    ),
    System(
        "vanilla_transformer",
        "VanillaTransformer",
        {
            AutoModel: "Model",
            AutoModelForSeq2SeqLM: "ForConditionalGeneration",
            AutoModelForCausalLM: "ForCausalLM",
        },
    ),
    System(
        "xl_sparse",
        "XLSparse",
        {
            AutoModel: "Model",
            AutoModelForCausalLM: "ForCausalLM",
            AutoModelForSequenceClassification: "ForSequenceClassification",
        },
    ),
]


def modules_of(system: System) -> tuple[ModuleType, ModuleType]:
    """The system's configuration and modeling modules."""
    names = (f".modeling.configuration_{system.name}", f".modeling.modeling_{system.name}")
    return tuple(import_module(name, __package__) for name in names)


def public_classes() -> dict[str, type]:
    """Every system's configuration and model classes by name."""
    modules = (module for system in SYSTEMS for module in modules_of(system))
    return {name: getattr(module, name) for module in modules for name in module.__all__}


def register(system: System) -> None:
    """Make AutoConfig, AutoModel and the others load `system` by its model type."""
    configuration, modeling = modules_of(system)
    config_class = getattr(configuration, f"{system.prefix}Config")
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, suffix in system.heads.items():
        auto_class.register(config_class, getattr(modeling, system.prefix + suffix), exist_ok=True)
    if system.image_processor is not None and is_vision_available():  # without Pillow stock processors are no classes
        AutoImageProcessor.register(
            config_class, image_processor_classes={"pil": system.image_processor}, exist_ok=True
        )


def register_all() -> None:
    for system in SYSTEMS:
        register(system)

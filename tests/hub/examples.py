"""One small model of every system, as it goes to the Hub: its repository, its main class, its processor."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, ViTImageProcessorPil

from hf_tfamily.auto import SYSTEMS, System
from hf_tfamily.data import byte_tokenizer
from hf_tfamily.modeling.image_processing_tokens import ImageTokenProcessor
from tests.tiny_models import batch_for, tiny_model

NAMES = [system.name for system in SYSTEMS]
MAIN_HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
)


def repository(name: str) -> str:
    """The Hub's name for a system's example."""
    return f"org/{name.replace('_', '-')}" + ("-cifar" if name == "sparse_transformer" else "")


def main_head(name: str) -> type:
    """The Auto class that a system is mostly used with."""
    heads = {auto_class.__name__: auto_class for auto_class in _system(name).heads}
    if name in ("universal_transformer", "vanilla_transformer"):  # which have a decoder alone as well
        return heads["AutoModelForSeq2SeqLM"]
    return next(heads[head] for head in MAIN_HEADS if head in heads)


def processor_class(name: str) -> str:
    """The Auto class that loads what is saved beside a system's example."""
    return "AutoTokenizer" if _system(name).image_processor is None else "AutoImageProcessor"


def example(name: str) -> tuple[PreTrainedModel, Any]:
    """A model, always of the same weights, and what is saved beside it."""
    torch.manual_seed(0)
    model = tiny_model(name, main_head(name))
    with torch.no_grad():
        for parameter in model.parameters():  # none stays at its initial 0 or 1
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.tie_weights()
    processor = _system(name).image_processor
    if processor is None:
        return model, byte_tokenizer()
    return model, ImageTokenProcessor() if processor is ImageTokenProcessor else ViTImageProcessorPil()


def write_expected(name: str, model: PreTrainedModel, folder: Path) -> None:
    """A batch and the model's answer to it, as a file for another process."""
    torch.manual_seed(1)
    batch = batch_for(name, main_head(name))
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    with torch.no_grad():
        answer = model.eval()(**inputs)[0]
    tensors = {**batch, "answer": answer}
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")


def _system(name: str) -> System:
    return next(system for system in SYSTEMS if system.name == name)

"""A small model of every system: what the tests that hold for all of them run on. A new system is one row in TINY."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedModel

from hf_tfamily.auto import SYSTEMS

VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


# Swin by its own fields, on pictures of 24 x 24.
SMALL_SWIN = {
    "image_size": 24,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "window_size": 3,
    "encoder_stride": 4,
    "drop_path_rate": 0.0,
}


def token_inputs(batch_size: int = 2, length: int = 13) -> dict[str, torch.Tensor]:
    """Ids of a batch of unpadded rows; the last ids of the vocabulary never occur."""
    return {"input_ids": torch.randint(1, VOCABULARY - 4, (batch_size, length))}


def translation_inputs(batch_size: int = 2, length: int = 13) -> dict[str, torch.Tensor]:
    """Source ids as above, and target ids behind a start token."""
    target = token_inputs(batch_size, length)["input_ids"]
    target[:, 0] = 0
    return {**token_inputs(batch_size, length), "decoder_input_ids": target}


def picture_inputs(batch_size: int = 2, side: int = 16) -> dict[str, torch.Tensor]:
    """Pictures as an image processor hands them over."""
    return {"pixel_values": torch.randn(batch_size, 3, side, side)}


class Tiny(NamedTuple):
    """How to make one system small.

    Attributes:
        config: fields of its config; SMALL for every model of sequences.
        inputs: makes a batch (batch size, length) of what the model's forward takes.
        recurrent: it reads text segment by segment and returns a memory.
        hierarchical: it has fewer hidden states or more than layers and one.
    """

    config: dict[str, Any] = SMALL
    inputs: Callable[..., dict[str, torch.Tensor]] = token_inputs
    recurrent: bool = False
    hierarchical: bool = False

    @property
    def takes_ids(self) -> bool:
        return "input_ids" in self.inputs()


TINY = {
    "adaptive_span": Tiny({**SMALL, "max_span": 6, "span_ramp": 3, "initial_span": 3}),
    "compressive_transformer": Tiny({**SMALL, "mem_len": 16, "compressed_mem_len": 8}, recurrent=True),
    "image_transformer": Tiny({**SMALL, "image_size": 8, "num_channels": 1}),
    "long_encoder": Tiny(
        {
            **SMALL,
            "attention_patterns": [{"type": "local", "window": 3}, {"type": "local", "window": 5}],
            "max_position_embeddings": 64,
            "global_tokens": "first",
            "num_global_tokens": 2,
        }
    ),
    "memorizing_transformer": Tiny({**SMALL, "mem_len": 16, "memory_size": 24, "num_neighbors": 4}, recurrent=True),
    "rope_decoder": Tiny(),
    "sparse_transformer": Tiny(),
    "swin_transformer": Tiny(
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 2,
            "window_size": 3,
            "encoder_stride": 4,
            "drop_path_rate": 0.0,
        },
        inputs=picture_inputs,
        hierarchical=True,
    ),
    "transformer_xl": Tiny({**SMALL, "mem_len": 16}, recurrent=True),
    "universal_transformer": Tiny({**SMALL, "adaptive": True}, inputs=translation_inputs),
    "vanilla_encoder": Tiny(),
    "vanilla_transformer": Tiny(inputs=translation_inputs),
    "xl_sparse": Tiny({**SMALL, "mem_len": 16}, recurrent=True),
}


def tiny_config(model_type: str, **changes: Any):
    """The small config of a system."""
    return AutoConfig.for_model(model_type, **{**TINY[model_type].config, **changes})


def tiny_model(model_type: str, auto_class: type, **changes: Any) -> PreTrainedModel:
    """A small model of a system, in evaluation mode, with new weights."""
    return auto_class.from_config(tiny_config(model_type, **changes)).eval()


def all_heads() -> Iterator[tuple[str, type]]:
    """(model type, Auto class) of every class that is registered."""
    for system in SYSTEMS:
        for auto_class in system.heads:
            yield system.name, auto_class


def batch_for(model_type: str, auto_class: type, labels: bool = True) -> dict[str, torch.Tensor]:
    """A batch of two rows for one class, with the targets it learns from."""
    inputs = TINY[model_type].inputs()
    head = auto_class.__name__
    if head == "AutoModelForSeq2SeqLM" and "decoder_input_ids" not in inputs:  # of a system of decoders else
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    if not labels or head in ("AutoModel", "AutoBackbone"):
        return inputs
    if head == "AutoModelForMaskedImageModeling":
        return {**inputs, "bool_masked_pos": torch.arange(64).repeat(2, 1) % 3 == 0}
    if head.endswith(("SequenceClassification", "ImageClassification")):
        return {**inputs, "labels": torch.tensor([0, 1])}
    if head.endswith("QuestionAnswering"):
        return {**inputs, "start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 9])}
    if head.endswith("TokenClassification"):
        return {**inputs, "labels": inputs["input_ids"] % 2}
    return {**inputs, "labels": inputs.get("decoder_input_ids", inputs["input_ids"]).clone()}

"""Every head with a loss, small and without dropout, and eight rows for it: what tests of training run on.

Rows have different numbers of labels that count, and of tokens that are no padding, so that a mean of means is wrong.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    default_data_collator,
)

from hf_tfamily.data import NextTokenCollator
from tests.tiny_models import TINY, all_heads, batch_for, tiny_config

ROWS, LENGTH, CLASSES = 8, 16, 3
# Long enough for a Compressive Transformer to compress something, and for a Memorizing one to look something up.
CHANGES = {
    "compressive_transformer": {"mem_len": 4, "compressed_mem_len": 2, "segment_length": 4},
    "memorizing_transformer": {"mem_len": 4, "segment_length": 4},
}
PROBLEMS = {
    "single_label_classification": (3, lambda: torch.tensor([0, 1, 2, -100, 1, 0, 2, 1])),
    "multi_label_classification": (3, lambda: torch.randint(2, (ROWS, CLASSES)).float()),
    "regression": (1, lambda: torch.randn(ROWS)),
    "regression_of_three": (3, lambda: torch.randn(ROWS, CLASSES)),
}


class Case(NamedTuple):
    """A head, its system, fields of its config, its eight rows, and how they are put together."""

    name: str
    head: type
    fields: dict[str, Any]
    rows: list[dict[str, torch.Tensor]]
    collate: Callable = default_data_collator

    def build(self, **changes) -> PreTrainedModel:
        """The same weights every time, none of them 0."""
        config = tiny_config(self.name, **{**CHANGES.get(self.name, {}), **self.fields})
        for field in dataclasses.fields(config):
            if "dropout" in field.name and field.name != "attn_dropout_type":
                setattr(config, field.name, 0.0)
        for field, value in changes.items():
            setattr(config, field, value)
        torch.manual_seed(0)
        model = self.head.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        return model


def cases() -> dict[str, Case]:
    """By what they are, such as "rope_decoder-CausalLM"."""
    torch.manual_seed(0)
    found = {}
    for name, head in all_heads():
        kind = head.__name__.removeprefix("AutoModelFor")
        if kind.startswith("Auto") or kind == "QuestionAnswering":  # which has two labels a row, as stock models
            continue
        if kind.endswith(("SequenceClassification", "ImageClassification")):
            for problem, (num_labels, labels) in PROBLEMS.items():
                kept = problem.removesuffix("_of_three")
                rows = _rows(name, head, labels())
                found[f"{name}-{problem}"] = Case(name, head, {"num_labels": num_labels, "problem_type": kept}, rows)
        else:
            found[f"{name}-{kind}"] = Case(name, head, {}, _rows(name, head))
    adaptive = {"cutoffs": [20, 50], "div_val": 2}
    for name in ("transformer_xl", "xl_sparse", "compressive_transformer"):
        rows = found[f"{name}-CausalLM"].rows
        found[f"{name}-adaptive"] = Case(name, AutoModelForCausalLM, adaptive, rows)
    mixture = {"output": "logistic_mixture", "num_values": 92}
    for head, kind in ((AutoModelForCausalLM, "CausalLM"), (AutoModelForSeq2SeqLM, "Seq2SeqLM")):
        found[f"image_transformer-mixture-{kind}"] = Case(
            "image_transformer", head, mixture, found[f"image_transformer-{kind}"].rows
        )
    for name in ("rope_decoder", "transformer_xl", "compressive_transformer"):
        rows = [{"input_ids": row["input_ids"]} for row in found[f"{name}-CausalLM"].rows]
        found[f"{name}-next_token"] = Case(name, AutoModelForCausalLM, {}, rows, NextTokenCollator())
    auto = {"compression": "conv", "compression_loss": "auto_encoding"}
    rows = found["compressive_transformer-CausalLM"].rows
    found["compressive_transformer-auto_encoding"] = Case("compressive_transformer", AutoModelForCausalLM, auto, rows)
    return found


def _rows(name: str, head: type, labels: torch.Tensor | None = None) -> list[dict[str, torch.Tensor]]:
    """Rows of one head; row i ends with i padding tokens, and another number of its labels is ignored."""
    inputs = TINY[name].inputs(ROWS, LENGTH) if TINY[name].takes_ids else TINY[name].inputs(ROWS)
    example = batch_for(name, head)
    if "decoder_input_ids" in example and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    padded = torch.arange(LENGTH) >= LENGTH - torch.arange(ROWS)[:, None]
    if TINY[name].takes_ids and name != "image_transformer":
        inputs["input_ids"] = inputs["input_ids"].masked_fill(padded, 0)
        inputs["attention_mask"] = (~padded).long()
    if head is not AutoModelForImageClassification and not TINY[name].takes_ids:
        inputs["bool_masked_pos"] = torch.stack([torch.randperm(64) < 20 for _ in range(ROWS)])
    elif head in (AutoModelForSequenceClassification, AutoModelForImageClassification):
        inputs["labels"] = labels
    else:
        target = inputs.get("decoder_input_ids", inputs["input_ids"])
        target = target % 2 if "TokenClassification" in head.__name__ else target
        ignored = padded | (torch.rand(ROWS, LENGTH) < torch.linspace(0, 0.5, ROWS)[:, None])
        inputs["labels"] = target.masked_fill(ignored, -100)
    return [{key: value[i] for key, value in inputs.items()} for i in range(ROWS)]

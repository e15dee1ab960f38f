"""Masked language modelling: a model that reads both ways says what stood in the places that are hidden.

As Devlin et al. 2018 (arXiv:1810.04805), section 3.1, have it: of 15 % of the places, 80 % are masked, 10 % hold
another token, and 10 % stay as they are.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from ..data import MaskedTexts
from ..prompts import NO_TOKENIZER, fill_in
from .base import Task, check_sizes, ids_in_words

SAMPLES, HIDDEN_PLACE = 6, "\N{LOW LINE}"
EVALUATION_SEED = 0


class MaskedTextTask(Task):
    """Filling in hidden tokens, measured in bits for each of them."""

    data_class = MaskedTexts
    auto_class = AutoModelForMaskedLM
    metric = "bits_per_hidden_token"
    metric_title = "Held-out bits per hidden token"
    loss_unit = "bits per hidden token"

    sampling_options = ("prompt",)

    def check_fit(self, config: PreTrainedConfig, data: MaskedTexts) -> None:
        check_sizes(config, data.vocab_size, data.length, ids_in_words(data), "an example has {} ids")

    def build_trainer(self, model: PreTrainedModel, arguments: TrainingArguments, data: MaskedTexts) -> Trainer:
        return Trainer(
            model=model,
            args=arguments,
            data_collator=DataCollatorForLanguageModeling(data.processor),
            train_dataset=data.train.with_format(None),
            eval_dataset=data.eval.with_format(None),
        )

    def uniform_loss(self, data: MaskedTexts) -> float:
        return math.log2(data.vocab_size)

    @torch.inference_mode()
    def evaluate(self, model: PreTrainedModel, data: MaskedTexts, batch_size: int, progress: bool) -> dict[str, float]:
        """The same places are hidden each time, whatever the batch."""
        model.eval()
        nats, right, count = 0.0, 0, 0
        for batch in tqdm(_hidden_batches(data, batch_size), desc="Evaluating", disable=not progress, leave=False):
            labels = batch["labels"].to(model.device)
            hidden = labels != -100
            logits = model(input_ids=batch["input_ids"].to(model.device)).logits[hidden].float()  # [places, V]
            nats += cross_entropy(logits, labels[hidden], reduction="none").double().sum().item()
            right += int((logits.argmax(dim=-1) == labels[hidden]).sum())
            count += int(hidden.sum())
        return {
            "bits_per_hidden_token": nats / count / math.log(2),
            "accuracy": right / count,
            "uniform_bits_per_hidden_token": self.uniform_loss(data),
        }

    def summary(self, metrics: dict[str, Any]) -> str:
        return f"{super().summary(metrics)} ({100 * metrics['accuracy']:.1f} % of them right)"

    @torch.inference_mode()
    def write_samples(self, model: PreTrainedModel, data: MaskedTexts, folder: Path) -> None:
        """samples.txt: held-out texts with hidden places, and what the model fills in."""
        model.eval()
        batch = next(iter(_hidden_batches(data, min(SAMPLES, len(data.eval)))))
        input_ids, labels = batch["input_ids"], batch["labels"]
        filled = model(input_ids=input_ids.to(model.device)).logits.argmax(dim=-1).cpu()
        filled = torch.where(labels == -100, input_ids, filled)
        blanks = data.processor(HIDDEN_PLACE, add_special_tokens=False)["input_ids"][0]
        shown = input_ids.masked_fill(input_ids == data.processor.mask_token_id, blanks)
        texts = zip(*(data.processor.batch_decode(ids[:, 1:]) for ids in (shown, filled)))
        between = "\n--- filled in ---\n"
        text = "\n\n==========\n\n".join(between.join(pair) for pair in texts)
        (folder / "samples.txt").write_text(text + "\n", encoding="utf-8")

    def sample(self, model: PreTrainedModel, processor: Any, output: Path, prompt: str | None = None) -> list[str]:
        """The prompt with its hidden places filled in."""
        if processor is None:
            raise ValueError(NO_TOKENIZER)
        if prompt is None:
            raise ValueError(f"Give a text with hidden places: --prompt 'In the {processor.mask_token}', say.")
        return [fill_in(model, processor, prompt)]

    def usage(self, data: MaskedTexts) -> str:
        return (
            f"Inputs are a start token (id {data.processor.bos_token_id}) and up to {data.length - 1} ids, hidden ones "
            f"replaced by id {data.processor.mask_token_id}; the logits of a place are those of the token in it."
        )


def _hidden_batches(data: MaskedTexts, batch_size: int) -> DataLoader:
    """Held-out examples; the same places are hidden each time."""
    collate = DataCollatorForLanguageModeling(data.processor, seed=EVALUATION_SEED)
    examples = [collate([row]) for row in data.eval.with_format(None)]
    return DataLoader(examples, batch_size, collate_fn=_joined)


def _joined(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([example[name] for example in examples]) for name in ("input_ids", "labels")}

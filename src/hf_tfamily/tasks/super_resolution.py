"""Super-resolution: an encoder-decoder reads a small picture and writes a large one, value by value.

Shapes: B pictures, S values of a small picture, N of a large one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from .. import plots
from ..data import EnlargementPairs
from ..data.sequences import require
from ..modeling.image_processing_tokens import PIL_MODES, ImageTokenProcessor
from .base import Task
from .token_sequences import check_order

PICTURES, TRIES = 8, 2
ROWS = ("small", "bicubic", *(f"model, {number + 1}" for number in range(TRIES)), "original")


class SuperResolutionTask(Task):
    """Small pictures made large, measured in bits per dimension of the large ones."""

    data_class = EnlargementPairs
    auto_class = AutoModelForSeq2SeqLM
    metric = "bits_per_dim"
    metric_title = "Held-out bits per dimension"
    loss_unit = "bits per dimension"
    sampling_options = ("pictures", "temperature")

    def build_model(self, config: PreTrainedConfig, data: EnlargementPairs) -> PreTrainedModel:
        large, small = data.processor, data.source_processor
        fields = {
            "image_size": [large.height, large.width],
            "source_image_size": [small.height, small.width],
            "num_channels": large.channels,
            "num_values": large.levels,
        }
        for name, value in fields.items():
            if getattr(config, name) != value:
                raise ValueError(f"{name}={getattr(config, name)} does not fit the data; it has {value}.")
        check_order(config, large)
        model = super().build_model(config, data)
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_length=1 + large.num_values,
            suppress_tokens=list(range(large.levels, config.vocab_size)),
            decoder_start_token_id=config.decoder_start_token_id,
        )
        return model

    def build_trainer(self, model: PreTrainedModel, arguments: TrainingArguments, data: EnlargementPairs) -> Trainer:
        return Trainer(
            model=model,
            args=arguments,
            data_collator=pair_collator,
            train_dataset=data.train,
            eval_dataset=data.eval,
        )

    def uniform_loss(self, data: EnlargementPairs) -> float:
        return math.log2(data.processor.levels)

    def evaluate(self, model, data: EnlargementPairs, batch_size: int, progress: bool) -> dict[str, float]:
        return {
            "bits_per_dim": bits_per_dim(model, data, batch_size, progress),
            "uniform_bits_per_dim": self.uniform_loss(data),
        }

    def summary(self, metrics: dict[str, Any]) -> str:
        return self.summary_with_uniform(metrics)

    def write_samples(self, model: PreTrainedModel, data: EnlargementPairs, folder: Path) -> None:
        """samples.png: held-out pictures before, after and as they were, beside what plain interpolation makes."""
        chosen = data.eval.select(range(0, len(data.eval), max(1, len(data.eval) // PICTURES))[:PICTURES])
        batch = pair_collator([chosen[index] for index in range(len(chosen))])
        smalls = _decode(data.source_processor, batch["input_ids"])
        originals = _decode(data.processor, batch["labels"])
        rows = comparison(model, data.processor, batch["input_ids"], smalls)
        plots.sample_grid([*rows, *originals], folder / "samples.png", columns=len(smalls), row_names=ROWS)

    def sample(
        self,
        model: PreTrainedModel,
        processor: ImageTokenProcessor,
        output: Path,
        pictures: Sequence[Path] = (),
        temperature: float = 1.0,
    ) -> list[str]:
        """Enlarge picture files; each is cut to the middle and averaged down to the size that the model reads."""
        if not pictures:
            raise ValueError("Give pictures to enlarge: --pictures FILE, as often as you like.")
        image, ops = require("PIL.Image"), require("PIL.ImageOps")
        height, width = model.config.source_image_size
        small = ImageTokenProcessor(height, width, processor.channels)
        opened = [image.open(path).convert(PIL_MODES[processor.channels]) for path in pictures]
        smalls = [ops.fit(picture, (width, height), method=image.Resampling.BOX) for picture in opened]
        values = small(smalls, return_tensors="pt")["input_ids"][:, 1:]
        rows = comparison(model, processor, values, smalls, temperature)
        plots.sample_grid(rows, output, columns=len(smalls), row_names=ROWS[:-1])
        return [f"Enlarged: {output}"]

    def usage(self, data: EnlargementPairs) -> str:
        small = data.source_processor
        return (
            f"Inputs are the {small.num_values} values of a picture of {small.height}x{small.width} pixels: "
            f"`ImageTokenProcessor({small.height}, {small.width}, {small.channels})(picture)` without its start token. "
            "`model.generate(ids)` samples a large picture, which the image processor beside the model decodes."
        )


def comparison(
    model: PreTrainedModel, processor: ImageTokenProcessor, values: torch.Tensor, smalls: list, temperature: float = 1.0
) -> list:
    """Pictures in rows of len(smalls): the small ones, interpolated, and TRIES samples of the model."""
    resampling = require("PIL.Image").Resampling
    size = (processor.width, processor.height)
    rows = [picture.resize(size, method) for method in (resampling.NEAREST, resampling.BICUBIC) for picture in smalls]
    for _ in range(TRIES):
        rows += processor.decode(enlarge(model, values, temperature))
    return rows


@torch.inference_mode()
def enlarge(model: PreTrainedModel, values: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Sample large pictures [B, 1 + N] of small ones [B, S], on the CPU."""
    model.eval()
    return model.generate(values.to(model.device), temperature=temperature).cpu()


@torch.inference_mode()
def bits_per_dim(model: PreTrainedModel, data: EnlargementPairs, batch_size: int, progress: bool = False) -> float:
    """Mean over all values of held-out large pictures of -log2 p(value | small picture, values before it)."""
    model.eval()
    nats, values = 0.0, 0
    batches = DataLoader(data.eval, batch_size=batch_size, collate_fn=pair_collator)
    for batch in tqdm(batches, desc="Evaluating", disable=not progress, leave=False):
        count = batch["labels"].numel()
        batch = {name: ids.to(model.device) for name, ids in batch.items()}
        nats += model(**batch, use_cache=False).loss.double().item() * count
        values += count
    return nats / values / math.log(2)


def pair_collator(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`input_ids` [B, S] and `labels` [B, N] of examples that are all of one size."""
    return {name: torch.stack([example[name] for example in examples]).long() for name in ("input_ids", "labels")}


def _decode(processor: ImageTokenProcessor, values: torch.Tensor) -> list:
    """PIL images of values [B, N] without a start token."""
    start = torch.full((len(values), 1), processor.start_token_ids[0])
    return processor.decode(torch.cat([start, values], dim=1))

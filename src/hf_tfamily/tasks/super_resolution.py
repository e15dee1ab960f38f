"""Super-resolution: an encoder-decoder reads a small picture and writes a large one, value by value.

Shapes: B pictures, S values of a small picture, N of a large one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
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
    set_seed,
)

from .. import plots
from ..data import EnlargementPairs
from ..data.enlargement import shrink
from ..data.sequences import require
from ..modeling.image_processing_tokens import PIL_MODES, ImageTokenProcessor
from ..trivial_predictors import evenly_spread, residual_bits
from .base import Task
from .token_sequences import check_order

PICTURES = 8
TEMPERATURES = (1.0, 0.8)  # the paper's go from 1.0 to 0.8 (table 6)


class SuperResolutionTask(Task):
    """Small pictures made large, measured in bits per dimension of the large ones."""

    data_class = EnlargementPairs
    auto_class = AutoModelForSeq2SeqLM
    metric = "bits_per_dim"
    metric_title = "Held-out bits per dimension"
    loss_unit = "bits per dimension"
    trivial_predictors = MappingProxyType({"what bicubic interpolation leaves": "bicubic_bits_per_dim"})
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
        """Figures; those in dB of PICTURES samples: how near to the originals, and, made small again, to the inputs."""
        batch = _examples(data)
        smalls, originals = _smalls(data, batch), data.processor.decode_values(_with_start(data, batch["labels"]))
        small_values = data.source_processor.decode_values(_with_start(data, batch["input_ids"]))
        set_seed(0)
        samples = data.processor.decode_values(enlarge(model, batch["input_ids"]))
        interpolated = np.stack([np.asarray(picture, np.int64) for picture in _bicubic(smalls, data.processor)])
        return {
            "bits_per_dim": bits_per_dim(model, data, batch_size, progress),
            "uniform_bits_per_dim": self.uniform_loss(data),
            "bicubic_bits_per_dim": bicubic_bits_per_dim(data),
            "psnr": psnr(samples, originals),
            "bicubic_psnr": psnr(interpolated, originals),
            "small_psnr": psnr(shrink(samples, small_values.shape[1]), small_values),
            "bicubic_small_psnr": psnr(shrink(interpolated, small_values.shape[1]), small_values),
        }

    def summary(self, metrics: dict[str, Any]) -> str:
        return self.summary_with_uniform(metrics)

    def write_samples(self, model: PreTrainedModel, data: EnlargementPairs, folder: Path) -> None:
        """samples.png: held-out pictures before, after and as they were, beside what plain interpolation makes."""
        batch = _examples(data)
        set_seed(0)
        rows = comparison(model, data.processor, batch["input_ids"], _smalls(data, batch), TEMPERATURES)
        rows["original"] = data.processor.decode(_with_start(data, batch["labels"]))
        _draw(rows, folder / "samples.png")

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
        _draw(comparison(model, processor, values, smalls, (temperature,)), output)
        return [f"Enlarged: {output}"]

    def usage(self, data: EnlargementPairs) -> str:
        small = data.source_processor
        return (
            f"Inputs are the {small.num_values} values of a picture of {small.height}x{small.width} pixels: "
            f"`ImageTokenProcessor({small.height}, {small.width}, {small.channels})(picture)` without its start token. "
            "`model.generate(ids)` samples a large picture, which the image processor beside the model decodes."
        )


def comparison(
    model: PreTrainedModel,
    processor: ImageTokenProcessor,
    values: torch.Tensor,
    smalls: list,
    temperatures: Sequence[float],
) -> dict[str, list]:
    """Rows of pictures by name: the small ones, interpolated, and a sample of each at every temperature."""
    nearest = require("PIL.Image").Resampling.NEAREST
    large = (processor.width, processor.height)
    rows = {"small": [small.resize(large, nearest) for small in smalls], "bicubic": _bicubic(smalls, processor)}
    for temperature in temperatures:
        rows[f"model, T={temperature:g}"] = processor.decode(enlarge(model, values, temperature))
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


def bicubic_bits_per_dim(data: EnlargementPairs, at_most: int = 2000) -> float:
    """What is left by bicubic interpolation, coded by how often each difference occurs in training pictures."""
    residuals = []
    for part in (data.train, data.eval):
        batch = _rows(part, evenly_spread(len(part), at_most))
        interpolated = _bicubic(_smalls(data, batch), data.processor)
        large = data.processor.decode_values(_with_start(data, batch["labels"]))
        residuals.append(large - np.stack([np.asarray(picture, np.int64) for picture in interpolated]))
    return residual_bits(*residuals)


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of values 0 ... 255."""
    return float(10 * np.log10(255**2 / max(np.square(found - expected).mean(), 1e-9)))


def pair_collator(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`input_ids` [B, S] and `labels` [B, N] of examples that are all of one size."""
    return {name: torch.stack([example[name] for example in examples]).long() for name in ("input_ids", "labels")}


def _rows(dataset, places: Sequence[int]) -> dict[str, torch.Tensor]:
    chosen = dataset.select(places)
    return pair_collator([chosen[index] for index in range(len(chosen))])


def _examples(data: EnlargementPairs) -> dict[str, torch.Tensor]:
    """PICTURES held-out pairs."""
    return _rows(data.eval, evenly_spread(len(data.eval), PICTURES))


def _smalls(data: EnlargementPairs, batch: dict[str, torch.Tensor]) -> list:
    """PIL pictures."""
    return data.source_processor.decode(_with_start(data, batch["input_ids"]))


def _bicubic(smalls: list, processor: ImageTokenProcessor) -> list:
    size = (processor.width, processor.height)
    return [small.resize(size, require("PIL.Image").Resampling.BICUBIC) for small in smalls]


def _with_start(data: EnlargementPairs, values: torch.Tensor) -> torch.Tensor:
    """Ids [B, 1 + N] of values [B, N]."""
    start = torch.full((len(values), 1), data.processor.levels)
    return torch.cat([start, values], dim=1)


def _draw(rows: dict[str, list], file: Path) -> None:
    pictures = [picture for row in rows.values() for picture in row]
    plots.sample_grid(pictures, file, columns=len(rows["small"]), row_names=list(rows))

"""Super-resolution: an encoder-decoder reads a small picture and writes a large one, value by value.

Shapes: B pictures, S values of a small picture, N of a large one.
"""

import math
import re
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
from ..data.pictures import open_picture
from ..data.sequences import require
from ..modeling.image_processing_tokens import PIL_MODES, ImageTokenProcessor
from ..trivial_predictors import evenly_spread, residual_bits
from .base import Task
from .token_sequences import check_order

PICTURES = 8
TEMPERATURES = (1.0, 0.8, 0.5)  # the paper's go from 1.0 to 0.8 (table 6)


class SuperResolutionTask(Task):
    """Small pictures made large, measured in bits per dimension of the large ones."""

    data_class = EnlargementPairs
    auto_class = AutoModelForSeq2SeqLM
    metric = "bits_per_dim"
    metric_title = "Held-out bits per dimension"
    loss_unit = "bits per dimension"
    trivial_predictors = MappingProxyType({"what bicubic interpolation leaves": "bicubic_bits_per_dim"})
    sampling_options = ("pictures", "temperature")

    def check_fit(self, config: PreTrainedConfig, data: EnlargementPairs) -> None:
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

    def build_model(self, config: PreTrainedConfig, data: EnlargementPairs) -> PreTrainedModel:
        model, large = super().build_model(config, data), data.processor
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
        """Bits per dimension; and how good PICTURES enlarged pictures are, by what enlarged them.

        For samples at each temperature and for plain interpolation: in dB how near they come to the originals, their
        structural similarity with these, and in dB how near, made small again, they come to the small pictures.
        """
        batch = _examples(data)
        originals = data.processor.decode_values(_with_start(data, batch["labels"]))
        small_values = data.source_processor.decode_values(_with_start(data, batch["input_ids"]))
        figures = {
            "bits_per_dim": bits_per_dim(model, data, batch_size, progress),
            "uniform_bits_per_dim": self.uniform_loss(data),
            "bicubic_bits_per_dim": bicubic_bits_per_dim(data),
        }
        for name, row in enlargements(model, data.processor, batch["input_ids"], _smalls(data, batch)).items():
            found = _values(row)
            figures[f"psnr_{name}"] = psnr(found, originals)
            figures[f"ssim_{name}"] = ssim(found, originals)
            figures[f"small_psnr_{name}"] = psnr(shrink(found, small_values.shape[1]), small_values)
        return figures

    def summary(self, metrics: dict[str, Any]) -> str:
        ratios = {name.removeprefix("psnr_"): ratio for name, ratio in metrics.items() if name.startswith("psnr_")}
        said = ", ".join(f"{_row_name(name)} {ratio:.2f} dB" for name, ratio in ratios.items())
        return f"{self.summary_with_uniform(metrics)}; peak signal-to-noise ratio: {said}"

    def write_samples(self, model: PreTrainedModel, data: EnlargementPairs, folder: Path) -> None:
        """samples.png: held-out pictures before, after and as they were, beside what plain interpolation makes."""
        batch = _examples(data)
        rows = enlargements(model, data.processor, batch["input_ids"], _smalls(data, batch))
        originals = data.processor.decode(_with_start(data, batch["labels"]))
        _draw(rows | {"original": originals}, folder / "samples.png")

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
        opened = [open_picture(path, PIL_MODES[processor.channels]) for path in pictures]
        smalls = [ops.fit(picture, (width, height), method=image.Resampling.BOX) for picture in opened]
        values = small(smalls, return_tensors="pt")["input_ids"][:, 1:]
        _draw(enlargements(model, processor, values, smalls, (temperature,), seed=None), output)
        return [f"Enlarged: {output}"]

    def usage(self, data: EnlargementPairs) -> str:
        small = data.source_processor
        return (
            f"Inputs are the {small.num_values} values of a picture of {small.height}x{small.width} pixels: "
            f"`ImageTokenProcessor({small.height}, {small.width}, {small.channels})(picture)` without its start token. "
            "`model.generate(ids)` samples a large picture, which the image processor beside the model decodes."
        )


def enlargements(
    model: PreTrainedModel,
    processor: ImageTokenProcessor,
    values: torch.Tensor,
    smalls: list,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int | None = 0,
) -> dict[str, list]:
    """PIL pictures of the large size, by what made them: interpolation, and sampling at every temperature.

    Args:
        values: [B, S] of the small pictures.
        smalls: the small pictures.
        seed: of the samples at each temperature; None for whatever comes.
    """
    methods = require("PIL.Image").Resampling
    size = (processor.width, processor.height)
    rows = {
        "nearest": [small.resize(size, methods.NEAREST) for small in smalls],
        "bicubic": [small.resize(size, methods.BICUBIC) for small in smalls],
    }
    for temperature in temperatures:
        if seed is not None:
            set_seed(seed)
        rows[f"t{temperature:g}"] = processor.decode(enlarge(model, values, temperature))
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
    residuals, size = [], (data.processor.width, data.processor.height)
    for part in (data.train, data.eval):
        batch = _rows(part, evenly_spread(len(part), at_most))
        large = data.processor.decode_values(_with_start(data, batch["labels"]))
        bicubic = require("PIL.Image").Resampling.BICUBIC
        residuals.append(large - _values([small.resize(size, bicubic) for small in _smalls(data, batch)]))
    return residual_bits(*residuals)


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of values 0 ... 255."""
    return float(10 * np.log10(255**2 / max(np.square(found - expected).mean(), 1e-9)))


def ssim(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean structural similarity (Wang et al. 2004) of pictures [n, H, W, C] of values 0 ... 255."""
    compare = require("skimage.metrics").structural_similarity
    return float(np.mean([compare(*pair, data_range=255, channel_axis=-1) for pair in zip(found, expected)]))


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


def _values(pictures: list) -> np.ndarray:
    """[n, H, W, C] of PIL pictures."""
    return np.stack([np.asarray(picture, np.int64) for picture in pictures])


def _with_start(data: EnlargementPairs, values: torch.Tensor) -> torch.Tensor:
    """Ids [B, 1 + N] of values [B, N]."""
    start = torch.full((len(values), 1), data.processor.levels)
    return torch.cat([start, values], dim=1)


def _row_name(made_by: str) -> str:
    return re.sub(r"^t([0-9.e-]+)$", r"model, T = \1", made_by).replace("nearest", "small, nearest")


def _draw(rows: dict[str, list], file: Path) -> None:
    pictures = [picture for row in rows.values() for picture in row]
    names = [_row_name(name) for name in rows]
    plots.sample_grid(pictures, file, columns=len(rows["nearest"]), row_names=names)

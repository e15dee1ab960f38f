"""Images, text and audio as token sequences: a causal model predicts every value from those before it."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from .. import plots
from ..data import NextTokenCollator, TokenSequences, write_wav
from ..evaluation import bits_per_dim
from ..prompts import GENERATION_OPTIONS, go_on
from ..sampling import makes_pictures, sample, start_ids, texts
from ..trivial_predictors import left_bits_per_dim
from .base import Task, check_sizes, ids_in_words

SAMPLES_PER_CLASS = 8
SAMPLES_WITHOUT_CLASSES = 16
SOUNDS = 2


class TokenSequenceTask(Task):
    """Density estimation, measured in bits per dimension."""

    data_class = TokenSequences
    auto_class = AutoModelForCausalLM
    metric = "bits_per_dim"
    metric_title = "Held-out bits per dimension"
    label_names = ("shift_labels",)
    loss_unit = "bits per dimension"
    trivial_predictors = MappingProxyType({"the pixel to the left and how values differ from it": "left_bits_per_dim"})
    sampling_options = ("classes", "count", "prompt", *GENERATION_OPTIONS)

    def check_fit(self, config: PreTrainedConfig, data: TokenSequences) -> None:
        check_sizes(config, data.vocab_size, data.dims, ids_in_words(data), "an example has {} values")
        check_order(config, data.processor)

    def build_model(self, config: PreTrainedConfig, data: TokenSequences) -> PreTrainedModel:
        model = super().build_model(config, data)
        model.generation_config = generation_config(config, data)
        return model

    def build_trainer(self, model: PreTrainedModel, arguments: TrainingArguments, data: TokenSequences) -> Trainer:
        return Trainer(
            model=model,
            args=arguments,
            data_collator=NextTokenCollator(),
            train_dataset=data.train,
            eval_dataset=data.eval,
        )

    def uniform_loss(self, data: TokenSequences) -> float:
        return math.log2(data.num_values)

    def evaluate(self, model, data: TokenSequences, batch_size: int, progress: bool) -> dict[str, float]:
        figures = {
            "bits_per_dim": bits_per_dim(model, data.eval, batch_size, progress),
            "uniform_bits_per_dim": self.uniform_loss(data),
        }
        if data.eval_bytes is not None:
            figures |= figures_of_text(figures["bits_per_dim"], data)
        if makes_pictures(data.processor):
            figures["left_bits_per_dim"] = left_bits_per_dim((data.train, data.eval), data.processor)
        return figures

    def summary(self, metrics: dict[str, Any]) -> str:
        line = self.summary_with_uniform(metrics)
        if "bits_per_byte" not in metrics:
            return line
        return (
            f"{line}, a dimension being a token; {metrics['bits_per_byte']:.4f} bits per byte,"
            f" perplexity {metrics['perplexity']:.2f} per token"
        )

    def write_samples(self, model: PreTrainedModel, data: TokenSequences, folder: Path) -> None:
        if data.sample_rate is not None:
            write_sounds(model, data, folder)
        if data.processor is None:
            return
        count = SAMPLES_PER_CLASS if data.class_names else SAMPLES_WITHOUT_CLASSES
        ids = sample(model, start_ids(data.processor, count), progress=True)
        if makes_pictures(data.processor):
            pictures, names = data.processor.decode(ids), data.class_names or ()
            plots.sample_grid(pictures, folder / "samples.png", columns=SAMPLES_PER_CLASS, row_names=names)
        else:
            (folder / "samples.txt").write_text("\n\n".join(texts(data.processor, ids)), encoding="utf-8")

    def sample(
        self,
        model: PreTrainedModel,
        processor: Any,
        output: Path,
        classes: Sequence[int] | None = None,
        count: int | None = None,
        temperature: float = 1.0,
        prompt: str | None = None,
        **options: Any,
    ) -> list[str]:
        """Pictures, or texts; or, printed as they are made, continuations of a prompt."""
        pictures = makes_pictures(processor)
        for name in ("prompt", "max_new_tokens", "repetition_penalty"):
            if pictures and (prompt if name == "prompt" else options.get(name)) is not None:
                raise ValueError(f"This model makes whole pictures; it takes no --{name.replace('_', '-')}.")
        if processor is not None and not pictures and classes is None and (prompt is not None or options):
            go_on(model, processor, prompt or "", count or 1, temperature=temperature, **options)
            return []
        count = SAMPLES_PER_CLASS if count is None else count
        ids = sample(model, start_ids(processor, count, classes), temperature, progress=True, **options)
        if not makes_pictures(processor):
            return texts(processor, ids)
        plots.sample_grid(processor.decode(ids), output, columns=min(count, 16))
        return [f"Samples: {output}"]

    def usage(self, data: TokenSequences) -> str:
        first, last = data.start_ids[0], data.start_ids[-1]
        start = f"id {first}" if first == last else f"ids {first} to {last}, one for each class"
        return (
            f"Inputs are `[start, x0 ... x(N-2)]`, N = {data.dims:,} values behind a start token ({start}); "
            "outputs are the logits of `[x0 ... x(N-1)]`. `model.generate(start_ids)` samples."
        )


def write_sounds(model: PreTrainedModel, data: TokenSequences, folder: Path) -> None:
    """samples-1.wav and so on: sounds as long as an example."""
    ids = sample(model, torch.full((SOUNDS, 1), data.start_ids[0]), progress=True)
    for number, levels in enumerate(ids[:, 1:].numpy(), 1):
        write_wav(folder / f"samples-{number}.wav", levels, data.sample_rate)


def figures_of_text(bits_per_token: float, data: TokenSequences) -> dict[str, float]:
    """What the bits of a token come to where a token is several bytes of text."""
    tokens = len(data.eval) * data.dims
    return {
        "bits_per_byte": bits_per_token * tokens / data.eval_bytes,
        "uniform_bits_per_byte": math.log2(data.num_values) * tokens / data.eval_bytes,
        "perplexity": 2.0 ** min(bits_per_token, 1000.0),
    }


def check_order(config: PreTrainedConfig, processor: Any) -> None:
    """Raise ValueError where a model takes an image's values in one order of generation and the data have another."""
    ours, theirs = getattr(config, "block_shape", None), getattr(processor, "block", None)
    if ours != theirs:
        raise ValueError(
            f"The model's blocks are {ours or 'none'}, those of the data {theirs or 'none'} (height and width): "
            "give data.block the height and width of 'block_2d' in model.attention_patterns, or neither."
        )


def generation_config(config: PreTrainedConfig, data: TokenSequences) -> GenerationConfig:
    """Ancestral sampling of one whole example."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_length=1 + data.dims,
        suppress_tokens=sorted({*range(data.num_values, config.vocab_size), *data.start_ids}),
        bos_token_id=None if data.class_names else data.start_ids[0],
    )

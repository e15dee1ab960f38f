"""Text as streams: a causal model reads on, segment by segment, and remembers as far as it can.

Models without a memory are trained and measured on the same segments, each by itself; so they are the baselines.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
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
from ..data import SegmentCollator, StreamDataset, TextStreams
from ..prompts import GENERATION_OPTIONS, NO_TOKENIZER, go_on
from ..recurrent_training import RecurrentTrainer
from ..stream_evaluation import (
    context_losses,
    empty_past,
    has_memory,
    has_rolling_cache,
    losses_by_position,
    stream_losses,
    with_attention_length,
)
from .base import Task, check_sizes, ids_in_words

PROMPTS, PROMPT_LENGTH, CONTINUATION_LENGTH = 4, 160, 240
GOES_ON, BETWEEN_TEXTS = "\n--- the model goes on ---\n", "\n\n==========\n\n"
CONTEXT_POSITIONS = 1000


class RecurrentTextTask(Task):
    """Language modelling, measured in bits per byte and in perplexity."""

    data_class = TextStreams
    auto_class = AutoModelForCausalLM
    metric = "bits_per_byte"
    metric_title = "Held-out bits per byte"
    label_names = ("shift_labels",)
    loss_unit = "bits per token"
    evaluation_options = ("attention_length", "context", "plot")
    sampling_options = ("count", "prompt", *GENERATION_OPTIONS)

    def check_fit(self, config: PreTrainedConfig, data: TextStreams) -> None:
        check_sizes(config, data.vocab_size, data.length, ids_in_words(data), "a segment has {} tokens")

    def build_model(self, config: PreTrainedConfig, data: TextStreams) -> PreTrainedModel:
        model = super().build_model(config, data)
        ends = {}
        if getattr(data.processor, "eos_token_id", None) not in (None, data.start_id):
            ends = {"eos_token_id": data.processor.eos_token_id, "pad_token_id": data.start_id}
        model.generation_config = GenerationConfig(do_sample=True, max_new_tokens=CONTINUATION_LENGTH, **ends)
        return model

    def build_trainer(self, model: PreTrainedModel, arguments: TrainingArguments, data: TextStreams) -> Trainer:
        """A RecurrentTrainer for a model with a memory; for others the stock Trainer, on shuffled segments."""

        def streams(ids: np.ndarray, batch_size: int) -> StreamDataset:
            return StreamDataset(ids, batch_size * arguments.world_size, data.length, data.start_id)

        trainer_class = RecurrentTrainer if has_memory(model) else Trainer
        return trainer_class(
            model=model,
            args=arguments,
            data_collator=SegmentCollator(),
            train_dataset=streams(data.train, arguments.train_batch_size),
            eval_dataset=streams(data.eval, arguments.eval_batch_size),
        )

    def uniform_loss(self, data: TextStreams) -> float:
        return math.log2(data.vocab_size)

    def evaluate(
        self,
        model: PreTrainedModel,
        data: TextStreams,
        batch_size: int,
        progress: bool,
        attention_length: int | None = None,
        context: tuple[int, ...] = (),
        plot: Path | None = None,
    ) -> dict[str, float]:
        """
        Args:
            batch_size: into how many streams the text is cut, each of which begins with an empty memory.
            attention_length: keys that each query sees; as in training if None.
            context: also measure single tokens with so much context and nothing else.
            plot: draw the loss at each place in a segment into this file.
        """
        if attention_length is not None:
            model = with_attention_length(model, attention_length, data.length)
        losses = stream_losses(model, data.eval, data.length, data.start_id, batch_size, progress)
        metrics = text_metrics(losses, data)
        for length in context:
            positions = np.unique(np.linspace(max(context), len(data.eval) - 1, CONTEXT_POSITIONS).astype(int))
            nats = context_losses(model, data.eval, positions, length, data.length, batch_size, progress).mean()
            metrics[f"bits_per_token_with_context_{length}"] = float(nats) / math.log(2)
        if plot is not None:
            bits = losses_by_position(losses, data.length, batch_size) / math.log(2)
            plots.loss_by_position(bits, self.loss_unit, plot)
        return metrics

    def summary(self, metrics: dict[str, Any]) -> str:
        lines = [
            f"{super().summary(metrics)} (perplexity {metrics['perplexity']:.2f} per token, "
            f"{metrics['word_perplexity']:,.1f} per word)"
        ]
        named = "bits_per_token_with_context_"
        contexts = {int(name.removeprefix(named)): bits for name, bits in metrics.items() if name.startswith(named)}
        lines += [f"Bits per token with {length:,} tokens of context: {bits:.4f}" for length, bits in contexts.items()]
        return "\n".join(lines)

    def write_samples(self, model: PreTrainedModel, data: TextStreams, folder: Path) -> None:
        """samples.txt: beginnings of held-out text, and how the model goes on."""
        if data.processor is None:
            return
        length = min(PROMPT_LENGTH, len(data.eval))
        starts = np.linspace(0, len(data.eval) - length, PROMPTS).astype(int)
        prompts = [data.eval[start : start + length].astype(np.int64) for start in starts]
        continuations = continue_texts(model, torch.from_numpy(np.stack(prompts)))
        decode = data.processor.decode
        texts = [f"{decode(prompt)}{GOES_ON}{decode(ids)}" for prompt, ids in zip(prompts, continuations)]
        (folder / "samples.txt").write_text(BETWEEN_TEXTS.join(texts) + "\n", encoding="utf-8")

    def sample(
        self,
        model: PreTrainedModel,
        processor: Any,
        output: Path,
        count: int | None = None,
        temperature: float = 1.0,
        prompt: str | None = None,
        **options: Any,
    ) -> list[str]:
        """Texts that begin where a stream does; or, printed as they are made, continuations of a prompt."""
        if processor is None:
            raise ValueError(NO_TOKENIZER)
        if prompt is not None or options:
            go_on(model, processor, prompt or "", count or 1, temperature=temperature, **options)
            return []
        count = PROMPTS if count is None else count
        start_id = processor.bos_token_id if processor.bos_token_id is not None else processor.eos_token_id
        start = processor("\n")["input_ids"] if start_id is None else [start_id]
        return processor.batch_decode(continue_texts(model, torch.tensor([start] * count), temperature))

    def usage(self, data: TextStreams) -> str:
        return (
            f"Inputs are token ids; a text begins behind id {data.start_id}. Logits at a place are those of the token "
            f"that follows. Training read segments of {data.length} tokens. A model with a memory returns it as "
            "`past_key_values`; hand it in again with the next segment. `model.generate(ids)` goes on with a text."
        )


def text_metrics(losses: np.ndarray, data: TextStreams) -> dict[str, float]:
    """What the losses of all held-out tokens, in nats, come to."""
    nats = float(losses.sum())
    return {
        "bits_per_byte": nats / data.eval_bytes / math.log(2),
        "perplexity": math.exp(min(nats / len(losses), 700.0)),
        "word_perplexity": math.exp(min(nats / max(1, data.eval_words), 700.0)),
        "uniform_bits_per_byte": math.log2(data.vocab_size) * len(losses) / data.eval_bytes,
    }


@torch.inference_mode()
def continue_texts(model: PreTrainedModel, prompts: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """[n, N] ids -> [n, CONTINUATION_LENGTH] sampled ids that follow, on the CPU.

    A model that can read no further than its positions go sees the second half of as many, and goes on for the rest.
    """
    model.eval()
    length, positions = CONTINUATION_LENGTH, getattr(model.config, "max_position_embeddings", None)
    if positions and not (has_memory(model) or has_rolling_cache(model)):
        prompts = prompts[:, -max(1, positions // 2) :]
        length = min(length, positions - prompts.shape[1])
    prompts = prompts.to(model.device)
    arguments = {"max_new_tokens": length, "temperature": temperature, "past_key_values": empty_past(model)}
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), **arguments)
    return ids[:, prompts.shape[1] :].cpu()

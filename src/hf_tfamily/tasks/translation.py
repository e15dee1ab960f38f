"""Translation: an encoder-decoder reads a sentence and writes it in another language.

Measured by BLEU (Papineni et al. 2002) and chrF (Popovic 2015) as sacrebleu computes them.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from ..data import TranslationPairs
from ..data.sequences import require
from ..data.text_lines import split_lines
from ..prompts import NEW_TOKENS, NO_TOKENIZER
from .base import Task, check_sizes, num_positions

SAMPLES, BEAMS, LENGTH_PENALTY, EXTRA_TOKENS = 12, 4, 0.6, 50
IDS = ("input_ids", "labels")


class TranslationTask(Task):
    """Sentences into another language, measured in BLEU and chrF."""

    data_class = TranslationPairs
    auto_class = AutoModelForSeq2SeqLM
    metric = "bleu"
    metric_title = "Held-out BLEU"
    loss_unit = "bits per token"

    sampling_options = ("prompt", "max_new_tokens", "repetition_penalty")

    def check_fit(self, config: PreTrainedConfig, data: TranslationPairs) -> None:
        tokenizer = data.processor
        check_sizes(config, len(tokenizer), data.longest, "the tokenizer has {} ids", "a text has {} tokens")
        for name in ("pad_token_id", "eos_token_id"):
            ours, theirs = getattr(tokenizer, name), getattr(config, name)
            if ours != theirs:
                raise ValueError(f"{name}={theirs}, but the tokenizer of the data has {ours}.")

    def build_model(self, config: PreTrainedConfig, data: TranslationPairs) -> PreTrainedModel:
        model = super().build_model(config, data)
        model.generation_config = generation_config(config, min(num_positions(config), data.longest + EXTRA_TOKENS))
        return model

    def build_trainer(self, model: PreTrainedModel, arguments: TrainingArguments, data: TranslationPairs) -> Trainer:
        return Trainer(
            model=model,
            args=arguments,
            data_collator=DataCollatorForSeq2Seq(data.processor, model),
            train_dataset=data.train.select_columns(list(IDS)),
            eval_dataset=data.eval.select_columns(list(IDS)),
        )

    def uniform_loss(self, data: TranslationPairs) -> float:
        return math.log2(len(data.processor))

    def evaluate(
        self, model: PreTrainedModel, data: TranslationPairs, batch_size: int, progress: bool
    ) -> dict[str, float]:
        references = [list(data.eval["target"])]
        translations = list(translate(model, data.processor, list(data.eval["source"]), batch_size, progress))
        sacrebleu = require("sacrebleu")
        return {
            "bleu": sacrebleu.corpus_bleu(translations, references).score,
            "chrf": sacrebleu.corpus_chrf(translations, references).score,
            "bits_per_token": bits_per_token(model, data, batch_size, progress),
            "uniform_bits_per_token": self.uniform_loss(data),
        }

    def summary(self, metrics: dict[str, Any]) -> str:
        return (
            f"{self.metric_title}: {metrics['bleu']:.2f} (chrF {metrics['chrf']:.2f}, "
            f"{metrics['bits_per_token']:.3f} bits per token)"
        )

    def write_samples(self, model: PreTrainedModel, data: TranslationPairs, folder: Path) -> None:
        """samples.txt: held-out sentences, how the model translates them, and how somebody did."""
        chosen = data.eval.select(range(0, len(data.eval), max(1, len(data.eval) // SAMPLES))[:SAMPLES])
        sources, targets = list(chosen["source"]), list(chosen["target"])
        rows = zip(sources, translate(model, data.processor, sources), targets)
        texts = [f"source:    {source}\nmodel:     {made}\nreference: {target}" for source, made, target in rows]
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")

    def sample(
        self, model: PreTrainedModel, processor: Any, output: Path, prompt: str | None = None, **options: Any
    ) -> Iterable[str]:
        """Translations of the lines of standard input; or of a prompt, one after the other."""
        if processor is None:
            raise ValueError(NO_TOKENIZER)
        if prompt is not None:
            lines = [line.strip() for line in split_lines(prompt)]
            return (next(translate(model, processor, [line], **options)) if line else "" for line in lines)
        if sys.stdin.isatty():
            print("Lines to translate, and Ctrl-D at the end:", file=sys.stderr)
        lines = [line.strip() for line in split_lines(sys.stdin.read().removeprefix("\ufeff"))]
        made = translate(model, processor, [line for line in lines if line], **options)
        return [next(made) if line else "" for line in lines]

    def usage(self, data: TranslationPairs) -> str:
        return (
            "`tokenizer(lines, padding=True, return_tensors='pt')` makes the source's ids, `model.generate(**batch)` "
            f"writes the target's ({BEAMS} beams), `tokenizer.batch_decode(ids, skip_special_tokens=True)` reads them. "
            "BLEU and chrF are sacrebleu's, with its default settings."
        )


def generation_config(config: PreTrainedConfig, max_length: int) -> GenerationConfig:
    """Beam search with the beams and the length penalty of Vaswani et al. 2017, section 6.1.

    Transformers divides a hypothesis' score by its length to the power of the penalty, the paper by ((5 + length) / 6)
    to the same power.
    """
    return GenerationConfig(
        max_length=max_length,
        num_beams=BEAMS,
        length_penalty=LENGTH_PENALTY,
        decoder_start_token_id=config.decoder_start_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
    )


def length_of_answers(model: PreTrainedModel) -> dict[str, int]:
    """What `generate` is to be told of the length; nothing where the model's generation config says it.

    Without that Transformers would break answers off at 20 tokens.
    """
    said = model.generation_config
    if said.max_new_tokens is not None or said.max_length not in (None, 20):
        return {}
    return {"max_new_tokens": int(min(NEW_TOKENS, num_positions(model.config) - 1))}


@torch.inference_mode()
def translate(
    model: PreTrainedModel,
    tokenizer: Any,
    lines: Sequence[str],
    batch_size: int = 32,
    progress: bool = False,
    **options: Any,
) -> Iterator[str]:
    """The translation of each line, in order. Lines of similar length are translated together.

    Args:
        options: what `generate` takes beyond, such as max_new_tokens.
    """
    model.eval()
    options = {**length_of_answers(model), **options}
    batch_of = sorted(range(len(lines)), key=lambda index: len(lines[index]), reverse=True)
    made: dict[int, str] = {}
    with tqdm(total=len(lines), desc="Translating", disable=not progress, leave=False) as bar:
        for start in range(0, len(lines), batch_size):
            indices = batch_of[start : start + batch_size]
            batch = tokenizer([lines[index] for index in indices], padding=True, return_tensors="pt").to(model.device)
            texts = tokenizer.batch_decode(model.generate(**batch, **options), skip_special_tokens=True)
            made.update(zip(indices, texts))
            bar.update(len(indices))
    return iter([made[index] for index in range(len(lines))])


@torch.inference_mode()
def bits_per_token(model: PreTrainedModel, data: TranslationPairs, batch_size: int, progress: bool = False) -> float:
    """Mean over all held-out target tokens of -log2 p(token | source, tokens before it)."""
    model.eval()
    collate = DataCollatorForSeq2Seq(data.processor, model)
    rows = data.eval.select_columns(list(IDS))
    nats, tokens = 0.0, 0
    for batch in tqdm(
        DataLoader(rows, batch_size, collate_fn=collate), "Evaluating", disable=not progress, leave=False
    ):
        count = int((batch["labels"] != -100).sum())
        nats += float(model(**batch.to(model.device)).loss) * count
        tokens += count
    return nats / tokens / math.log(2)

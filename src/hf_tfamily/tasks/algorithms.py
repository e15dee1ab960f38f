"""Algorithms learned from examples: an encoder-decoder reads a string and writes what an algorithm makes of it.

Measured by the share of symbols and of whole strings that are right, on strings as long as those trained on and on
longer ones (Dehghani et al. 2018, arXiv:1807.03819, section 3.3).
"""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..data import AlgorithmPairs
from .translation import SAMPLES, TranslationTask, bits_per_token, translate


class AlgorithmTask(TranslationTask):
    """Strings into what an algorithm makes of them, measured in symbols that are right."""

    data_class = AlgorithmPairs
    metric = "longer_symbols"
    metric_title = "Symbols right in longer strings"

    def build_model(self, config: PreTrainedConfig, data: AlgorithmPairs) -> PreTrainedModel:
        model = super().build_model(config, data)
        model.generation_config = GenerationConfig(
            max_length=data.longest + 1,
            do_sample=False,
            decoder_start_token_id=config.decoder_start_token_id,
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
        )
        return model

    def evaluate(
        self, model: PreTrainedModel, data: AlgorithmPairs, batch_size: int, progress: bool
    ) -> dict[str, float]:
        figures = {}
        for name, part in (("", data.eval), ("longer_", data.longer)):
            made = list(translate(model, data.processor, list(part["source"]), batch_size, progress))
            symbols, strings = shares_right(made, list(part["target"]))
            figures |= {f"{name}symbols": symbols, f"{name}strings": strings}
        return {
            **figures,
            "bits_per_token": bits_per_token(model, data, batch_size, progress),
            "uniform_bits_per_token": self.uniform_loss(data),
        }

    def summary(self, metrics: dict[str, Any]) -> str:
        return (
            f"{self.metric_title}: {metrics['longer_symbols']:.3f} (whole strings {metrics['longer_strings']:.3f}; in "
            f"strings as long as those trained on {metrics['symbols']:.3f} and {metrics['strings']:.3f})"
        )

    def write_samples(self, model: PreTrainedModel, data: AlgorithmPairs, folder: Path) -> None:
        """samples.txt: held-out strings, short and longer, what the model writes, and what is right."""
        texts = []
        for part in (data.eval, data.longer):
            chosen = part.select(range(min(SAMPLES // 2, len(part))))
            sources, targets = list(chosen["source"]), list(chosen["target"])
            rows = zip(sources, translate(model, data.processor, sources), targets)
            texts += [f"source: {source}\nmodel:  {made}\nright:  {target}" for source, made, target in rows]
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")

    def usage(self, data: AlgorithmPairs) -> str:
        return (
            "`tokenizer(lines, padding=True, return_tensors='pt')` makes the source's ids, `model.generate(**batch)` "
            "writes the answer's, `tokenizer.batch_decode(ids, skip_special_tokens=True)` reads them."
        )


def shares_right(made: list[str], targets: list[str]) -> tuple[float, float]:
    """Of all symbols of the targets, those that stand in their place; of all strings, those that are equal."""
    symbols = sum(mine == right for one, target in zip(made, targets) for mine, right in zip(one, target))
    strings = sum(one == target for one, target in zip(made, targets))
    return symbols / sum(map(len, targets)), strings / len(targets)

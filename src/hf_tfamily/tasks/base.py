"""What every kind of task answers; `hf_tfamily.training`, `hf_tfamily.finished` and the command line ask."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from ..data import LoadedData


class Task:
    """One kind of task.

    Attributes:
        data_class: what its sources return.
        auto_class: loads its models.
        metric: name of the figure that counts, a key of `evaluate`'s result.
        metric_title: the same in words.
        label_names: which entries of a batch are targets (see TrainingArguments).
        loss_unit, nats: how losses are shown, and how many nats one unit has.
        trivial_predictors: names of figures to compare `metric` with, by what they are in words.
        evaluation_options, sampling_options: names of the keywords that `evaluate` and `sample` take beyond the common
            ones; the command line refuses others.
        evaluation_picture: name, in a finished folder, of the picture that `evaluate(plot=...)` draws; None for none.
    """

    data_class: ClassVar[type[LoadedData]]
    auto_class: ClassVar[type]
    metric: ClassVar[str]
    metric_title: ClassVar[str]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    loss_unit: ClassVar[str] = "bits per value"
    nats: ClassVar[float] = math.log(2)
    trivial_predictors: ClassVar[Mapping[str, str]] = MappingProxyType({})
    evaluation_options: ClassVar[tuple[str, ...]] = ()
    sampling_options: ClassVar[tuple[str, ...]] = ()
    evaluation_picture: ClassVar[str | None] = None

    def check_fit(self, config: PreTrainedConfig, data: LoadedData) -> None:
        """Raise ValueError if a model of this config does not fit the data."""

    def build_model(self, config: PreTrainedConfig, data: LoadedData) -> PreTrainedModel:
        """A model with new weights and its generation config. Raises ValueError if it does not fit the data."""
        self.check_fit(config, data)
        return self.auto_class.from_config(config)

    def build_trainer(self, model: PreTrainedModel, arguments: TrainingArguments, data: LoadedData) -> Trainer:
        """A Trainer of `model` on the data."""
        raise NotImplementedError

    def uniform_loss(self, data: LoadedData) -> float | None:
        """What a uniform guess costs, in `loss_unit`; None where that means nothing."""
        return None

    def evaluate(self, model: PreTrainedModel, data: LoadedData, batch_size: int, progress: bool) -> dict[str, float]:
        """Figures on held-out data, `metric` among them; they go into metrics.json."""
        raise NotImplementedError

    def summary(self, metrics: dict[str, Any]) -> str:
        """One line about the figure that counts."""
        return f"{self.metric_title}: {metrics[self.metric]:.4f}"

    def write_samples(self, model: PreTrainedModel, data: LoadedData, folder: Path) -> None:
        """Pictures or texts that show what the model does, as samples.png or samples.txt."""

    def sample(self, model: PreTrainedModel, processor: Any, output: Path, **options: Any) -> Iterable[str]:
        """Write pictures to `output`, print what is streamed, and return further texts to print.

        Raises ValueError where there is nothing to show.
        """
        raise ValueError(f"{type(model).__name__} does not generate anything.")

    def summary_with_uniform(self, metrics: dict[str, Any]) -> str:
        """The same line, and what a uniform guess and other trivial predictors would cost."""
        predictors = {"a uniform guess": f"uniform_{self.metric}", **self.trivial_predictors}
        costs = [f"{words}: {metrics[name]:.4f}" for words, name in predictors.items() if name in metrics]
        return f"{Task.summary(self, metrics)} ({'; '.join(costs)})"

    def usage(self, data: LoadedData) -> str:
        """How inputs and outputs are to be read, for the model card."""
        return ""


def check_sizes(config: PreTrainedConfig, ids: int, length: int, whose_ids: str, whose_length: str) -> None:
    """Raise ValueError if a model has fewer ids or positions than its data.

    Args:
        ids, length: what the data needs.
        whose_ids, whose_length: the same in words, with {} for the number, such as "an example has {} values".
    """
    if config.vocab_size < ids:
        raise ValueError(f"vocab_size={config.vocab_size} is too small: {whose_ids.format(ids)}.")
    if num_positions(config) < length:
        raise ValueError(
            f"max_position_embeddings={num_positions(config)} is too small: {whose_length.format(length)}."
        )


def ids_in_words(data: LoadedData) -> str:
    """Whose ids a model needs, for `check_sizes`."""
    whose = f", those of its tokenizer ({data.description.partition(';')[0]})" if is_text(data.processor) else ""
    return f"the data has {{}} ids{whose}"


def is_text(processor: Any) -> bool:
    """Is it a tokenizer?"""
    return hasattr(processor, "get_vocab")


def num_positions(config: PreTrainedConfig) -> float:
    """How many positions a model has; infinitely many where its config says nothing of it."""
    return getattr(config, "max_position_embeddings", None) or math.inf

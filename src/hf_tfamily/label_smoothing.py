"""Label smoothing by the model itself: of each target once, with every part of its loss, in training alone.

The Trainer's own (TrainingArguments.label_smoothing_factor) is computed outside the model, of `labels` and logits. It
knows nothing of targets in `shift_labels`, of losses that are not of logits, or of a model that makes its decoder's
input of labels. A batch that holds `label_smoothing` asks the model instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Trainer


@dataclass(frozen=True)
class SmoothingCollator:
    """The batches of another collator, whose loss the model shall smooth.

        Trainer(model, arguments, SmoothingCollator(NextTokenCollator(), 0.1), data.train)

    Attributes:
        collate: makes batches with labels.
        label_smoothing: probability that the targets of a language model spread evenly over all ids.
    """

    collate: Callable[[list], dict[str, Any]]
    label_smoothing: float

    def __call__(self, examples: list) -> dict[str, Any]:
        batch = {**self.collate(examples), "label_smoothing": self.label_smoothing}
        if "shift_labels" in batch:
            batch.setdefault("labels", batch["shift_labels"])  # the Trainer counts targets only beside labels
        return batch


def smooth_inside(trainer: Trainer) -> None:
    """Let the model of `trainer` do what label_smoothing_factor asks for; nothing where there is another loss.

    Raises:
        ValueError: if the model has no logits of ids to smooth.
    """
    if trainer.label_smoother is not None and trainer.compute_loss_func is None:
        if getattr(trainer.model.config, "output", None) == "logistic_mixture":
            raise ValueError(
                f"label_smoothing_factor={trainer.args.label_smoothing_factor} is for output='categorical': a mixture "
                "of logistics is smooth over values already. Set it to 0."
            )
        trainer.data_collator = SmoothingCollator(trainer.data_collator, trainer.args.label_smoothing_factor)
        trainer.label_smoother = None

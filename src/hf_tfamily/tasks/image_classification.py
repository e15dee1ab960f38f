"""Image classification: a picture in, a class out.

Shapes: B pictures, C channels, H height, W width, K classes, N held-out pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from .. import plots
from ..data import LabelledImages
from ..data.augmentation import BICUBIC, Augmentation
from ..data.pictures import open_picture
from ..data.sequences import require
from ..modeling.image_processing_tokens import in_mode
from .base import Task

PICTURES, PICTURE_COLUMNS = 32, 8
BEST = 5  # classes that top-5 accuracy and `sample` look at


class ImageClassificationTask(Task):
    """Telling classes of pictures apart, measured by accuracy."""

    data_class = LabelledImages
    auto_class = AutoModelForImageClassification
    metric = "accuracy"
    metric_title = "Held-out accuracy"
    loss_unit = "nats per picture"
    nats = 1.0
    evaluation_options = ("plot",)
    evaluation_picture = "confusion.png"
    sampling_options = ("pictures",)

    def check_fit(self, config: PreTrainedConfig, data: LabelledImages) -> None:
        fields = {"num_labels": len(data.class_names), "num_channels": 3}
        for name, value in fields.items():
            if getattr(config, name) != value:
                raise ValueError(f"{name}={getattr(config, name)} does not fit the data; it needs {value}.")
        names = list((config.id2label or {}).values())
        if names != list(data.class_names) and not all(str(name).startswith("LABEL_") for name in names):
            raise ValueError(
                f"The model's classes are {', '.join(names)}; those of the data {', '.join(data.class_names)}."
            )
        patch = config.patch_size if isinstance(config.patch_size, (list, tuple)) else [config.patch_size] * 2
        if any(side < length for side, length in zip(data.size, patch)):
            raise ValueError(f"patch_size={config.patch_size} is larger than the pictures, {data.size}.")

    def build_model(self, config: PreTrainedConfig, data: LabelledImages) -> PreTrainedModel:
        self.check_fit(config, data)  # before the config says whose names its classes have
        config.id2label = dict(enumerate(data.class_names))
        config.label2id = {name: number for number, name in config.id2label.items()}
        return super().build_model(config, data)

    def build_trainer(self, model: PreTrainedModel, arguments: TrainingArguments, data: LabelledImages) -> Trainer:
        arguments.remove_unused_columns = False  # pictures become pixels only when they are asked for
        return Trainer(
            model=model,
            args=arguments,
            data_collator=default_data_collator,
            train_dataset=data.train.with_transform(TrainingPixels.of(data, arguments.label_smoothing_factor)),
            eval_dataset=data.eval.with_transform(HeldOutPixels(data.processor)),
            compute_loss_func=cross_entropy_of_shares,
        )

    def uniform_loss(self, data: LabelledImages) -> float:
        return float(np.log(len(data.class_names)))

    def evaluate(
        self, model, data: LabelledImages, batch_size: int, progress: bool, plot: Path | None = None
    ) -> dict[str, float]:
        """Figures of held-out pictures; `plot` is where a picture of what is taken for what shall go."""
        logits, labels = held_out_logits(model, data, batch_size, progress)
        if plot is not None:
            draw_confusion(logits, labels, data, plot)
        return figures(logits, labels)

    def summary(self, metrics: dict[str, Any]) -> str:
        shares = {
            "mean over classes": metrics["balanced_accuracy"],
            f"among the best {BEST}": metrics.get("top_5_accuracy"),
            "always the commonest class": metrics["commonest_class_accuracy"],
        }
        others = ", ".join(f"{what}: {100 * share:.1f} %" for what, share in shares.items() if share is not None)
        return f"{self.metric_title}: {100 * metrics['accuracy']:.2f} % ({others})"

    def write_samples(self, model: PreTrainedModel, data: LabelledImages, folder: Path) -> None:
        """samples.png: held-out pictures, what they are and what they are taken for."""
        chosen = np.linspace(0, len(data.eval) - 1, min(PICTURES, len(data.eval))).astype(int)
        shown = replace(data, eval=data.eval.select(chosen))
        logits, labels = held_out_logits(model, shown, batch_size=PICTURES, progress=False)
        taken_for = [data.class_names[number] for number in logits.argmax(axis=-1)]
        names = [data.class_names[number] for number in labels]
        plots.captioned_pictures(
            [in_mode(picture, "RGB") for picture in shown.eval["image"]],
            taken_for,
            [None if found == name else name for found, name in zip(taken_for, names)],
            folder / "samples.png",
            columns=PICTURE_COLUMNS,
        )

    @torch.inference_mode()
    def sample(self, model: PreTrainedModel, processor: Any, output: Path, pictures: Sequence[Path] = ()) -> list[str]:
        """The likeliest classes of picture files."""
        if not pictures:
            raise ValueError("Give pictures to classify: --pictures FILE, as often as you like.")
        names = model.config.id2label
        pixels = processor([open_picture(path) for path in pictures], return_tensors="pt")["pixel_values"]
        model.eval()
        shares = model(pixel_values=pixels.to(model.device, model.dtype)).logits.float().softmax(dim=-1).cpu()
        return [f"{path}: {_likeliest(row, names)}" for path, row in zip(pictures, shares)]

    def usage(self, data: LabelledImages) -> str:
        height, width = data.size
        return (
            f"The image processor beside the model turns any picture into RGB of {height}x{width} pixels. "
            '`pipeline("image-classification", model=...)` takes files and pictures, and names classes: '
            f"{len(data.class_names)} of them, such as {', '.join(data.class_names[:5])}. "
            "Files of transparent parts or 16 bits are opened by `hf_tfamily.data.open_picture(file)`, as in training."
        )


@dataclass(frozen=True)
class HeldOutPixels:
    """Rows with pictures and labels -> `pixel_values` and `labels`, as the processor beside the model makes them."""

    processor: Any

    def __call__(self, rows: dict[str, list]) -> dict[str, Any]:
        pictures = [in_mode(picture, "RGB") for picture in rows["image"]]
        return {"pixel_values": self.processor(pictures, return_tensors="pt")["pixel_values"], "labels": rows["label"]}


@dataclass(frozen=True)
class TrainingPixels:
    """The same with pictures changed and mixed as the augmentation says; labels are shares of classes, [B, K].

    Without augmentation pixels are those of `HeldOutPixels`.
    """

    processor: Any
    augmentation: Augmentation
    size: tuple[int, int]
    num_classes: int
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, data: LabelledImages, label_smoothing: float = 0.0) -> "TrainingPixels":
        return cls(data.processor, data.augmentation, data.size, len(data.class_names), label_smoothing)

    def __call__(self, rows: dict[str, list]) -> dict[str, torch.Tensor]:
        pictures, ready = [in_mode(picture, "RGB") for picture in rows["image"]], {}
        if self.augmentation.needs_pictures:
            if self.augmentation.resized_crop is None:
                pictures = [cut_like(self.processor, picture) for picture in pictures]
            pictures = [self.augmentation.redraw(picture, self.size) for picture in pictures]
            ready = {"do_resize": False, "do_center_crop": False}
        pixels = self.processor(pictures, return_tensors="pt", **ready)["pixel_values"]
        shares = F.one_hot(torch.as_tensor(rows["label"]), self.num_classes) * (1 - self.label_smoothing)
        shares = shares + self.label_smoothing / self.num_classes
        pixels, shares = self.augmentation.mix(self.augmentation.change(pixels), shares)
        return {"pixel_values": pixels, "labels": shares}


def cut_like(processor: Any, picture: Any) -> Any:
    """A PIL picture as large as the processor makes it, and the same part of it."""
    edge = processor.size.get("shortest_edge")
    if edge is None:
        return picture.resize((processor.size["width"], processor.size["height"]), BICUBIC)
    scale, crop = edge / min(picture.size), processor.crop_size
    picture = picture.resize((max(edge, int(picture.width * scale)), max(edge, int(picture.height * scale))), BICUBIC)
    left, top = (picture.width - crop["width"]) // 2, (picture.height - crop["height"]) // 2
    return picture.crop((left, top, left + crop["width"], top + crop["height"]))


def cross_entropy_of_shares(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean loss over pictures; labels are classes [B], or shares of classes [B, K].

    Args:
        num_items_in_batch: how many entries the labels of a whole step have, over all devices and micro-batches.
    """
    total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    if num_items_in_batch is None:
        return total / len(labels)
    return total * labels[0].numel() / num_items_in_batch


@torch.inference_mode()
def held_out_logits(
    model: PreTrainedModel, data: LabelledImages, batch_size: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, K] and labels [N] of held-out pictures."""
    model.eval()
    pixels = data.eval.with_transform(HeldOutPixels(data.processor))
    logits, labels = [], []
    batches = DataLoader(pixels, batch_size, collate_fn=default_data_collator)
    for batch in tqdm(batches, desc="Evaluating", disable=not progress, leave=False):
        pixel_values = batch["pixel_values"].to(model.device, model.dtype)
        logits.append(model(pixel_values=pixel_values).logits.float().cpu())
        labels.append(batch["labels"])
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()


def figures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, its mean over classes, that of always naming one class, the loss, and beyond five classes top-5."""
    measures = require("sklearn.metrics")
    predicted = logits.argmax(axis=-1)
    found = {
        "accuracy": float(measures.accuracy_score(labels, predicted)),
        "balanced_accuracy": float(measures.recall_score(labels, predicted, average="macro", labels=np.unique(labels))),
        "commonest_class_accuracy": float(np.bincount(labels).max() / len(labels)),
        "loss": F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item(),
    }
    if logits.shape[1] > BEST:
        classes = np.arange(logits.shape[1])
        found["top_5_accuracy"] = float(measures.top_k_accuracy_score(labels, logits, k=BEST, labels=classes))
    return found


def draw_confusion(logits: np.ndarray, labels: np.ndarray, data: LabelledImages, path: Path) -> None:
    """A picture of how often each class is taken for each."""
    classes = np.arange(len(data.class_names))
    counts = require("sklearn.metrics").confusion_matrix(labels, logits.argmax(axis=-1), labels=classes)
    plots.confusion_matrix(counts, data.class_names, path)


def _likeliest(shares: torch.Tensor, names: dict[int, str]) -> str:
    best = shares.topk(min(BEST, len(shares)))
    return ", ".join(
        f"{names[number]} {share:.3f}" for share, number in zip(best.values.tolist(), best.indices.tolist())
    )

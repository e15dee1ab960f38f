"""Samples of a finished model: start tokens in, pictures or text out.

Shapes: n samples, N values in a sample.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer


class _StepBar(BaseStreamer):
    """Progress of `generate`, one step for each token."""

    def __init__(self, steps: int, enabled: bool):
        self.bar = tqdm(total=steps, desc="Sampling", disable=not enabled, leave=False)

    def put(self, value: torch.Tensor) -> None:
        self.bar.update(1)

    def end(self) -> None:
        self.bar.close()


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    start_ids: torch.Tensor,
    temperature: float = 1.0,
    batch_size: int = 128,
    progress: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Continue each of `start_ids` [n, 1] as the model's generation config says: ids [n, 1 + N] on the CPU.

    Args:
        options: what `generate` takes beyond, such as top_k.
    """
    model.eval()
    samples = []
    for start in start_ids.split(batch_size):
        start = start.to(model.device)
        bar = _StepBar(model.generation_config.max_length, progress)
        attend = torch.ones_like(start)
        asked = {"attention_mask": attend, "temperature": temperature, "streamer": bar, **options}
        samples.append(model.generate(start, **asked).cpu())
    return torch.cat(samples)


def start_ids(processor: Any, count: int, classes: Sequence[int] | None = None) -> torch.Tensor:
    """[n, 1] ids to sample from: `count` of them, or `count` for each of `classes` (None: all of them, if any).

    Raises:
        ValueError: if `classes` holds one that the model does not know, or the model has none.
    """
    if makes_pictures(processor):
        if classes is None and processor.num_classes:
            classes = range(processor.num_classes)
        if classes is None:
            return processor.start_tokens(count=count, return_tensors="pt")["input_ids"]
        repeated = [label for label in classes for _ in range(count)]
        return processor.start_tokens(classes=repeated, return_tensors="pt")["input_ids"]
    if processor is None:
        raise ValueError(
            "There is neither an image processor nor a tokenizer beside this model to decode samples; for text give "
            "--tokenizer."
        )
    if classes is not None:
        raise ValueError(f"This model was trained without classes, got classes={list(classes)}.")
    return torch.full((count, 1), processor.bos_token_id)


def makes_pictures(processor: Any) -> bool:
    """Does the processor decode ids to pictures (and not to text)?"""
    return hasattr(processor, "start_tokens")


def texts(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    """The text of each row of `ids` [n, 1 + N], without its start token."""
    return tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=False)

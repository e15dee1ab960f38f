"""What trivial predictors of pictures cost: the least that a model should have learned.

Each guesses a value and codes the difference by how often that difference occurs in training pictures.

Shapes: n pictures, H height, W width, C channels.
"""

from collections.abc import Sequence

import numpy as np


def residual_bits(train: np.ndarray, held_out: np.ndarray) -> float:
    """Mean bits of the integers `held_out`, coded by the frequencies of `train` (each counted once more than seen)."""
    lowest, highest = (extreme([extreme(train), extreme(held_out)]) for extreme in (np.min, np.max))
    counts = np.bincount((train - lowest).ravel(), minlength=highest - lowest + 1) + 1
    return float(-np.log2(counts / counts.sum())[held_out - lowest].mean())


def left_residuals(values: np.ndarray) -> np.ndarray:
    """[n, H, W, C] less the same channel of the pixel to the left; in the first column, above; before the first, 0."""
    guess = np.zeros_like(values)
    guess[:, 1:, 0] = values[:, :-1, 0]
    guess[:, :, 1:] = values[:, :, :-1]
    return values - guess


def left_bits_per_dim(dataset_pair: Sequence, processor, at_most: int = 2000) -> float:
    """What the pixel to the left costs on the second of two data sets of `input_ids`, with frequencies of the first.

    Args:
        processor: the ImageTokenProcessor of both.
        at_most: so many pictures of each are looked at, evenly spread.
    """
    return residual_bits(*(left_residuals(processor.decode_values(_ids(part, at_most))) for part in dataset_pair))


def evenly_spread(length: int, at_most: int) -> list[int]:
    """At most so many of the places 0 ... length - 1."""
    return [length * place // at_most for place in range(at_most)] if length > at_most else list(range(length))


def _ids(dataset, at_most: int) -> np.ndarray:
    return np.stack([row for row in dataset.select(evenly_spread(len(dataset), at_most))["input_ids"]])

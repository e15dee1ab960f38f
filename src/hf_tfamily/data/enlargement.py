"""Pictures to enlarge: the values of small pictures, and those of the large ones they were made of.

Shapes: n pictures, H height, W width, C channels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..modeling.image_processing_tokens import ImageTokenProcessor
from .images import EVAL_PHOTOS, PHOTO_LICENCE, PHOTOS, crops_by_photo
from .sequences import LoadedData, require

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class EnlargementPairs(LoadedData):
    """Small pictures and large ones.

    Attributes:
        train, eval: data sets with the columns `input_ids`, the values of the small picture in raster order, and
            `labels`, the values of the large one in the order of generation; neither has a start token.
        processor: turns the large picture into ids and back.
        source_processor: the same for the small one.
    """

    processor: ImageTokenProcessor
    source_processor: ImageTokenProcessor


def photo_enlargements(
    size: int = 32,
    source_size: int = 8,
    stride: int | None = None,
    photos: tuple[str, ...] = PHOTOS,
    eval_photos: tuple[str, ...] = EVAL_PHOTOS,
    block: list[int] | None = None,
) -> EnlargementPairs:
    """RGB crops of photos as in `photo_crops`, and the same averaged down; split by photo.

    Args:
        size: height and width of the large pictures.
        source_size: height and width of the small ones, a divisor of `size`; each pixel is the mean of a square.
        stride, photos, eval_photos, block: as in `photo_crops`.
    """
    if source_size < 1 or size % source_size:
        raise ValueError(f"source_size must be a divisor of size={size}, got {source_size}.")
    order = "raster" if block is None else "blocks"
    large, small = (
        ImageTokenProcessor(size, size, 3, order=order, block=block),
        ImageTokenProcessor(source_size, source_size, 3),
    )
    train, held_out = (_pairs(crops, large, small) for crops in crops_by_photo(size, stride, photos, eval_photos))
    return EnlargementPairs(
        train=train,
        eval=held_out,
        processor=large,
        source_processor=small,
        description=f"{size}x{size} RGB crops of photos and their {source_size}x{source_size} means; "
        f"held out: {', '.join(eval_photos)}",
        licence=PHOTO_LICENCE,
    )


def shrink(pictures: np.ndarray, size: int) -> np.ndarray:
    """[n, H, H, C] -> [n, size, size, C], means of squares rounded to whole brightnesses."""
    patch = pictures.shape[1] // size
    means = pictures.reshape(-1, size, patch, size, patch, pictures.shape[-1]).mean(axis=(2, 4))
    return np.rint(means).astype(np.int64)


def _pairs(crops: np.ndarray, large: ImageTokenProcessor, small: ImageTokenProcessor) -> "Dataset":
    datasets = require("datasets")
    columns = {"input_ids": small(shrink(crops, small.height)), "labels": large(crops)}
    values = {name: ids["input_ids"][:, 1:].astype(np.int16) for name, ids in columns.items()}
    return datasets.Dataset.from_dict(values).with_format("torch")

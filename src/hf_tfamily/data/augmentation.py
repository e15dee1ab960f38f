"""How training pictures are changed, so that a model does not learn them by heart; what recipes call `augmentation`.

Random numbers are torch's, which the Trainer seeds and keeps in its checkpoints.

Shapes: B pictures, C channels, H height, W width, K classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..modeling.attention_patterns import nearest
from ..value_types import annotations_of, check_value
from .rand_augment import rand_augment

BICUBIC = 3  # of PIL
CROP_ASPECTS = (3 / 4, 4 / 3)
ERASED_AREAS, ERASED_ASPECTS = (0.02, 1 / 3), (0.3, 1 / 0.3)
TRIES = 10  # to find a rectangle that fits


@dataclass(frozen=True)
class Augmentation:
    """Changes of training pictures; none by default.

    Args:
        resized_crop: cut out a part with at least this share of the area and sides of 3:4 to 4:3, and make it as large
            as the model's pictures (Szegedy et al. 2015, arXiv:1409.4842).
        shift: move by up to so many pixels each way; the edges go on outwards.
        flip: probability of swapping left and right.
        rand_augment: two random changes of colours or proportions (Cubuk et al. 2020, arXiv:1909.13719).
        erase: probability of noise in place of a rectangle (Zhong et al. 2020, arXiv:1708.04896).
        mixup: two pictures shine through each other, in shares drawn from Beta(mixup, mixup), and so do their classes
            (Zhang et al. 2018, arXiv:1710.09412).
        cutmix: a rectangle comes from another picture, its share of the area from Beta(cutmix, cutmix) (Yun et al.
            2019, arXiv:1905.04899). Where mixup is on as well, one of the two is drawn for each batch.
    """

    resized_crop: float | None = None
    shift: int = 0
    flip: float = 0.0
    rand_augment: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> "Augmentation":
        """The augmentation that a recipe describes. Raises ValueError on unknown names and values of other types."""
        known = annotations_of(cls)
        for name, value in (settings or {}).items():
            if name not in known:
                raise ValueError(f"augmentation has no {name!r}{nearest(str(name), known)}")
            check_value(value, known[name], f"augmentation: {name}")
        return cls(**settings or {})

    def __post_init__(self):
        if self.resized_crop is not None and not 0 < self.resized_crop <= 1:
            raise ValueError(f"augmentation: resized_crop must be above 0 and at most 1, got {self.resized_crop}.")
        if self.shift != int(self.shift) or self.shift < 0:
            raise ValueError(f"augmentation: shift must be a whole number of at least 0, got {self.shift}.")
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation: {name} must be a probability from 0 to 1, got {getattr(self, name)}.")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"augmentation: {name} must be at least 0, got {getattr(self, name)}.")

    @property
    def needs_pictures(self) -> bool:
        """Does something happen to pictures before they become pixels?"""
        return self.rand_augment or self.resized_crop is not None

    def redraw(self, picture: Any, size: tuple[int, int]) -> Any:
        """A PIL picture in RGB, cut and changed and `size` (height, width) large."""
        picture = picture.resize(size[::-1], BICUBIC) if self.resized_crop is None else self._cut(picture, size)
        return rand_augment(picture) if self.rand_augment else picture

    def _cut(self, picture: Any, size: tuple[int, int]) -> Any:
        """A random part; the whole picture where none fits."""
        whole = (slice(0, picture.height), slice(0, picture.width))
        rows, columns = random_part(picture.height, picture.width, (self.resized_crop, 1.0), CROP_ASPECTS) or whole
        return picture.resize(size[::-1], BICUBIC, box=(columns.start, rows.start, columns.stop, rows.stop))

    def change(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, C, H, W], each picture changed by itself; a new tensor."""
        pixels = shifted(pixels, self.shift) if self.shift else pixels.clone()
        swapped = _drawn(self.flip, len(pixels))
        pixels[swapped] = pixels[swapped].flip(-1)
        for number in _drawn(self.erase, len(pixels)).tolist():
            part = random_part(*pixels.shape[2:], ERASED_AREAS, ERASED_ASPECTS)
            if part is not None:
                pixels[number][:, *part].normal_()
        return pixels

    def mix(self, pixels: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [B, C, H, W] and the shares of their classes [B, K], mixed with the same batch in reverse order."""
        kinds = [mix for mix, on in ((self._mixup, self.mixup), (self._cutmix, self.cutmix)) if on]
        if not kinds:
            return pixels, targets
        pixels, share = kinds[_below(len(kinds))](pixels)
        return pixels, share * targets + (1 - share) * targets.flip(0)

    def _mixup(self, pixels: torch.Tensor) -> tuple[torch.Tensor, float]:
        share = _beta(self.mixup)
        return share * pixels + (1 - share) * pixels.flip(0), share

    def _cutmix(self, pixels: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The rectangle has the picture's proportions, lies about any pixel, and is cut off at the picture's edges."""
        height, width = pixels.shape[2:]
        side = math.sqrt(1 - _beta(self.cutmix))
        rows, columns = (
            _around(_below(height), int(height * side), height),
            _around(_below(width), int(width * side), width),
        )
        mixed = pixels.clone()
        mixed[..., rows, columns] = pixels.flip(0)[..., rows, columns]
        return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def random_part(
    height: int, width: int, areas: tuple[float, float], aspects: tuple[float, float]
) -> tuple[slice, slice] | None:
    """Rows and columns of a random rectangle; None if none was found that fits.

    Args:
        areas: least and largest share of the area, drawn uniformly.
        aspects: least and largest width over height, their logarithm drawn uniformly.
    """
    for _ in range(TRIES):
        area = height * width * _between(*areas)
        aspect = math.exp(_between(*map(math.log, aspects)))
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = _below(height - rows + 1), _below(width - columns + 1)
            return slice(top, top + rows), slice(left, left + columns)
    return None


def shifted(pixels: torch.Tensor, most: int) -> torch.Tensor:
    """Pictures [B, C, H, W], each moved by -most to most pixels along both axes."""
    height, width = pixels.shape[2:]
    padded = F.pad(pixels, (most, most, most, most), mode="replicate")
    places = torch.randint(2 * most + 1, (len(pixels), 2)).tolist()
    moved = [one[:, top : top + height, left : left + width] for one, (top, left) in zip(padded, places)]
    return torch.stack(moved)


def _drawn(probability: float, count: int) -> torch.Tensor:
    """Numbers below `count`, each drawn with that probability."""
    return (torch.rand(count) < probability).nonzero().flatten()


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def _beta(alpha: float) -> float:
    """A number from Beta(alpha, alpha)."""
    return float(torch.distributions.Beta(alpha, alpha).sample())


def _around(place: int, length: int, end: int) -> slice:
    """`length` numbers around a place, cut off at 0 and `end`."""
    start = place - length // 2
    return slice(max(0, start), min(end, start + length))

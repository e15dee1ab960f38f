"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719): a few random changes of a picture, all of about one strength.

The changes and what a strength means for each are those that Swin's authors train with (timm's increasing set, written
rand-m9-mstd0.5-inc1): two changes, each left out half of the time, of a strength about 0.9.
"""

from typing import Any

import torch

from .sequences import require

CHANGES, PROBABILITY, STRENGTH, SPREAD = 2, 0.5, 0.9, 0.05
FILL = (124, 116, 104)  # ImageNet's mean colour, where a picture is moved away
BICUBIC = 3  # of PIL
DARK = 128  # solarize_add changes brightnesses below


def rand_augment(picture: Any) -> Any:
    """A PIL picture in RGB -> another of the same size."""
    for _ in range(CHANGES):
        change = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
        if torch.rand(()) < PROBABILITY:
            strength = STRENGTH + SPREAD * float(torch.randn(()))
            picture = change(picture, min(1.0, max(0.0, strength)))
    return picture


def auto_contrast(picture, strength):
    return require("PIL.ImageOps").autocontrast(picture)


def equalize(picture, strength):
    return require("PIL.ImageOps").equalize(picture)


def invert(picture, strength):
    return require("PIL.ImageOps").invert(picture)


def posterize(picture, strength):
    return require("PIL.ImageOps").posterize(picture, max(1, 4 - int(4 * strength)))


def solarize(picture, strength):
    return require("PIL.ImageOps").solarize(picture, 256 - int(256 * strength))


def solarize_add(picture, strength):
    """Dark values become lighter."""
    added = int(110 * strength)
    return picture.point([min(255, value + added) if value < DARK else value for value in range(256)] * 3)


def rotate(picture, strength):
    return picture.rotate(_either_way(30 * strength), BICUBIC, fillcolor=FILL)


def shear_x(picture, strength):
    return _affine(picture, (1, _either_way(0.3 * strength), 0, 0, 1, 0))


def shear_y(picture, strength):
    return _affine(picture, (1, 0, 0, _either_way(0.3 * strength), 1, 0))


def translate_x(picture, strength):
    return _affine(picture, (1, 0, _either_way(0.45 * strength) * picture.width, 0, 1, 0))


def translate_y(picture, strength):
    return _affine(picture, (1, 0, 0, 0, 1, _either_way(0.45 * strength) * picture.height))


def colour(picture, strength):
    return _enhanced(picture, "Color", strength)


def contrast(picture, strength):
    return _enhanced(picture, "Contrast", strength)


def brightness(picture, strength):
    return _enhanced(picture, "Brightness", strength)


def sharpness(picture, strength):
    return _enhanced(picture, "Sharpness", strength)


OPERATIONS = (
    *(auto_contrast, equalize, invert, posterize, solarize, solarize_add),
    *(rotate, shear_x, shear_y, translate_x, translate_y, colour, contrast, brightness, sharpness),
)


def _affine(picture, matrix: tuple[float, ...]):
    return picture.transform(picture.size, require("PIL.Image").Transform.AFFINE, matrix, BICUBIC, fillcolor=FILL)


def _enhanced(picture, kind: str, strength: float):
    """More or less of something; a factor of 1 changes nothing."""
    factor = max(0.1, 1 + _either_way(0.9 * strength))
    return getattr(require("PIL.ImageEnhance"), kind)(picture).enhance(factor)


def _either_way(amount: float) -> float:
    return amount if torch.rand(()) < 0.5 else -amount

"""Pictures as token sequences and back, for models that predict an image value by value.

An image of height x width x channels values becomes [start, x0 ... x(N-1)], N = height * width * channels: its values
in generation order (rows, in them columns, in them channels; or block by block) behind a start token. A value is one
of `levels` levels, ids 0 ... levels - 1; the start token is `levels`, or `levels + class` where there are classes.

Shapes: B images, H height, W width, C channels, N = H * W * C.
"""

from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

try:
    from PIL import Image, ImageOps
except ImportError:  # ids in, ids out works without; pictures do not
    Image = None

PIL_MODES = {1: "L", 3: "RGB"}
ORIENTATION = 0x0112  # EXIF's tag
GROUND = "white"  # behind what is transparent


def upright(picture):
    """A PIL picture turned as its EXIF orientation says, with 8 bits a channel: 16-bit grey is scaled, not clipped.

    Raises ValueError for grey values that are neither 8 nor 16 bits (modes I and F).
    """
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _grey_of_8_bits(picture)
    return picture


def in_mode(picture, mode: str):
    """A PIL picture as models see it: `upright`, transparent parts on white, converted to `mode` ("RGB" or "L")."""
    picture = upright(picture)
    if picture.mode == mode and not picture.has_transparency_data:
        return picture
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, GROUND), picture)
    return picture.convert(mode)


def _grey_of_8_bits(picture):
    """Modes I;16 and I hold 0 to 65,535; floating-point numbers are taken where they are whole brightnesses."""
    values = np.asarray(picture)
    highest = 255 if picture.mode == "F" else 65535
    if values.min() < 0 or values.max() > highest or (picture.mode == "F" and (values != np.rint(values)).any()):
        raise ValueError(
            f"A picture of mode {picture.mode!r} must hold whole numbers from 0 to {highest}, got values from "
            f"{values.min()} to {values.max()}; save it with 8 or 16 bits."
        )
    levels = values if picture.mode == "F" else (values.astype(np.int64) + 128) // 257
    return Image.fromarray(levels.astype(np.uint8))


def raster_order(height: int, width: int, channels: int, block: list[int] | None = None) -> np.ndarray:
    """[N] places in the flattened [H, W, C] array, in the order of generation: row by row."""
    return np.arange(height * width * channels)


def block_order(height: int, width: int, channels: int, block: list[int]) -> np.ndarray:
    """Block by block in raster order, inside a block pixel by pixel in raster order (Parmar et al. 2018, section 3.3).

    Blocks at the far edges are cut off where the image ends.
    """
    row, column = np.divmod(np.arange(height * width), width)
    (block_row, inner_row), (block_column, inner_column) = np.divmod(row, block[0]), np.divmod(column, block[1])
    pixels = np.lexsort((inner_column, inner_row, block_column, block_row))
    return (pixels[:, None] * channels + np.arange(channels)).reshape(-1)


# An order maps (height, width, channels, block) to a permutation of the N places.
GENERATION_ORDERS = {"raster": raster_order, "blocks": block_order}


class ImageTokenProcessorKwargs(ImagesKwargs, total=False):
    """What `from_pretrained` may change: the fields of ImageTokenProcessor."""

    height: int
    width: int
    channels: int
    levels: int
    num_classes: int
    order: str
    block: list[int] | None


class ImageTokenProcessor(BaseImageProcessor):
    """Turns images into token ids and ids into images; nothing is resized, converted or clipped.

    Pictures (PIL) are turned as their EXIF orientation says, and 16-bit grey is scaled to 8 bits.

    Args:
        height, width: size of the images in pixels.
        channels: 1 (grey) or 3 (RGB).
        levels: number of values of a channel, 2 to 256. Arrays hold levels; pictures (PIL) hold 0 to 255, of which the
            nearest of `levels` evenly spaced brightnesses is taken, so with 256 they are the same.
        num_classes: number of classes, each with a start token of its own; 0 for one start token.
        order: order of generation, "raster" or "blocks".
        block: height and width in pixels of the blocks of order "blocks"; a model's `config.block_shape`.
    """

    model_input_names = ["input_ids"]
    valid_kwargs = ImageTokenProcessorKwargs

    def __init__(
        self,
        height: int = 32,
        width: int = 32,
        channels: int = 3,
        levels: int = 256,
        num_classes: int = 0,
        order: str = "raster",
        block: list[int] | tuple[int, int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        _check_size("height", height, 1)
        _check_size("width", width, 1)
        _check_size("levels", levels, 2, 256)
        _check_size("num_classes", num_classes, 0)
        if channels not in PIL_MODES:
            raise ValueError(f"channels must be one of {sorted(PIL_MODES)}, got {channels!r}.")
        if order not in GENERATION_ORDERS:
            raise ValueError(f"order must be one of {sorted(GENERATION_ORDERS)}, got {order!r}.")
        if (block is not None) != (order == "blocks"):
            raise ValueError(f"block is for order='blocks', and needed there; got order={order!r}, block={block!r}.")
        if block is not None:
            _check_block(block)
        self.height, self.width, self.channels = height, width, channels
        self.levels, self.num_classes, self.order = levels, num_classes, order
        self.block = None if block is None else list(block)

    @property
    def num_values(self) -> int:
        """Number N of values in an image."""
        return self.height * self.width * self.channels

    @property
    def start_token_ids(self) -> list[int]:
        """Ids that begin an image, and that `generate` must not sample inside one (its `suppress_tokens`)."""
        return list(range(self.levels, self.levels + max(1, self.num_classes)))

    def __call__(self, images, classes=None, return_tensors: str | None = None) -> BatchFeature:
        """`input_ids` [B, 1 + N] of the images.

        Args:
            images: a PIL image, an integer array or tensor [H, W, C] ([H, W] where C = 1), a batch of them
                [B, H, W, C], or a list.
            classes: class of the image, or a list of B classes; required if and only if num_classes > 0.
            return_tensors: "pt" or "np"; None gives a numpy array.
        """
        values = self._batch(images)
        tokens = values.reshape(len(values), -1)[:, self._places()]
        starts = self._start_ids(len(tokens), classes)
        return BatchFeature({"input_ids": np.concatenate([starts, tokens], axis=1)}, tensor_type=return_tensors)

    preprocess = __call__

    def start_tokens(self, count: int | None = None, classes=None, return_tensors: str | None = None) -> BatchFeature:
        """`input_ids` [B, 1] to generate from: `count` start tokens, or one for each of `classes`."""
        return BatchFeature({"input_ids": self._start_ids(count, classes)}, tensor_type=return_tensors)

    def decode(self, ids, fill: int | None = None) -> list:
        """PIL images of `ids` [B, 1 + N] (or [1 + N], one image), start token included, as `generate` gives them.

        An image with fewer than N values is an error, unless `fill` is the level to put in place of the missing ones.
        """
        if Image is None:
            raise ImportError("Decoding to pictures needs Pillow: pip install pillow")
        levels = self.decode_values(ids, fill)
        brightness = (levels * 255 + (self.levels - 1) // 2) // (self.levels - 1)
        pictures = brightness.astype(np.uint8)
        return [Image.fromarray(picture[..., 0] if self.channels == 1 else picture) for picture in pictures]

    def decode_values(self, ids, fill: int | None = None) -> np.ndarray:
        """Levels [B, H, W, C] of `ids`; see `decode`."""
        ids = np.atleast_2d(_integers(ids, "ids"))
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= 1 + self.num_values:
            raise ValueError(f"ids must be [B, 1 + {self.num_values}], got shape {list(ids.shape)}.")
        starts, tokens = ids[:, 0], ids[:, 1:]
        if not np.isin(starts, self.start_token_ids).all():
            raise ValueError(f"The first id must be a start token, one of {_span(self.start_token_ids)}; got {starts}.")
        self._check_levels(tokens, "ids behind the start token")
        missing = self.num_values - tokens.shape[1]
        if missing and fill is None:
            raise ValueError(
                f"The images lack {missing} of {self.num_values} values; generate those, or give fill=<level> for them."
            )
        if missing:
            self._check_levels(np.asarray([fill]), "fill")
            tokens = np.pad(tokens, ((0, 0), (0, missing)), constant_values=fill)
        values = np.empty_like(tokens)
        values[:, self._places()] = tokens
        return values.reshape(-1, self.height, self.width, self.channels)

    def _places(self) -> np.ndarray:
        """[N] places in the flattened image, in the order of generation."""
        return GENERATION_ORDERS[self.order](self.height, self.width, self.channels, self.block)

    def _start_ids(self, count: int | None, classes) -> np.ndarray:
        """[B, 1] start ids, int64."""
        if not self.num_classes:
            if classes is not None or count is None:
                raise ValueError(
                    f"This processor knows no classes (num_classes=0): give count, not classes={classes!r}."
                )
            return np.full((count, 1), self.levels, np.int64)
        if classes is None:
            raise ValueError(f"Give classes: one from 0 to {self.num_classes - 1} for each image.")
        classes = np.atleast_1d(_integers(classes, "classes"))
        if classes.ndim != 1 or ((classes < 0) | (classes >= self.num_classes)).any():
            raise ValueError(f"classes must be from 0 to {self.num_classes - 1}, got {classes.tolist()}.")
        if count not in (None, len(classes)):
            raise ValueError(f"Got {count} images but {len(classes)} classes; give one class for each image.")
        return self.levels + classes[:, None]

    def _batch(self, images) -> np.ndarray:
        """Any accepted form of images -> levels [B, H, W, C], int64."""
        if isinstance(images, (list, tuple)):
            if not images:
                raise ValueError("The list of images is empty.")
            return np.concatenate([self._batch(image) for image in images])
        values = self._picture_levels(images) if hasattr(images, "getbands") else _integers(images, "images")
        if values.size == 0:
            raise ValueError(f"images is an empty batch: got shape {list(values.shape)}.")
        self._check_levels(values, "images")
        one = (self.height, self.width, self.channels)
        for shape in [one, one[:2]] if self.channels == 1 else [one]:
            if values.shape in (shape, (*values.shape[:1], *shape)):
                return values.reshape(-1, *one)
        raise ValueError(
            f"Images must be {list(one)} (height, width, channels) or a batch of those, got {list(values.shape)}."
        )

    def _picture_levels(self, picture) -> np.ndarray:
        """The nearest levels of a PIL image's 0 ... 255."""
        mode, picture = PIL_MODES[self.channels], upright(picture)
        if picture.mode != mode:
            raise ValueError(
                f"Pictures must be of mode {mode!r}, got {picture.mode!r}; use image.convert({mode!r}), or where parts "
                f"are transparent in_mode(image, {mode!r}), which stands beside this class in {__name__}."
            )
        return (np.asarray(picture, np.int64) * (self.levels - 1) + 127) // 255

    def _check_levels(self, values: np.ndarray, what: str) -> None:
        if values.size and (values.min() < 0 or values.max() >= self.levels):
            raise ValueError(
                f"{what} must lie in 0 to {self.levels - 1} (levels={self.levels}), "
                f"got values from {values.min()} to {values.max()}."
            )


def _integers(values, what: str) -> np.ndarray:
    """An int64 array of an integer array, tensor or list."""
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers, got {array.dtype}.")
    return array.astype(np.int64)


def _check_size(name: str, value: int, lowest: int, highest: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        allowed = f"at least {lowest}" if highest == float("inf") else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}.")


def _check_block(block) -> None:
    if len(block) != 2:
        raise ValueError(f"block must be a height and a width in pixels, got {block!r}.")
    for name, value in zip(("block height", "block width"), block):
        _check_size(name, value, 1)


def _span(ids: list[int]) -> str:
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"


__all__ = ["ImageTokenProcessor"]

"""Pictures and their classes: each source gives `datasets.Dataset`s with the columns `image` (PIL) and `label`.

Pictures are RGB, grey ones too, because that is what `pipeline("image-classification")` hands to a model.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import ViTImageProcessorPil

from .augmentation import Augmentation
from .hub_parts import load_parts
from .images import FASHION_MNIST_CLASSES, FASHION_MNIST_PATH, check_columns, read_fashion_mnist
from .pictures import check_pictures
from .sequences import LoadedData, require
from .text_lines import read_text, split_lines

if TYPE_CHECKING:
    from datasets import Dataset

EMOJI_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_LIST = "/usr/share/unicode/emoji/emoji-test.txt"
EMOJI_GROUPS = (
    *("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places"),
    *("Activities", "Objects", "Symbols", "Flags"),
)
GLYPH_SIZE, GLYPH_BOX, GLYPH_HEIGHT = 109, 136, 128  # the one size that the font has pictures for; their extent
EMOJI_HELD_OUT = 5  # of each group, every fifth emoji
# What makes variants of one emoji: skin tones, the form of presentation, and signs of gender behind a joiner.
VARIANT = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]|\u200d[\u2640\u2642]")
PERSON, MAN_OR_WOMAN = "\U0001f9d1", re.compile("[\U0001f468\U0001f469]")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
BICUBIC = 3


@dataclass(frozen=True, kw_only=True)
class LabelledImages(LoadedData):
    """Pictures with classes.

    Attributes:
        train, eval: data sets with the columns `image`, a PIL picture of any mode and size, and `label`.
        class_names: names of the classes, in the order of their numbers.
        size: height and width of the pictures that a model sees.
        processor: turns pictures into `pixel_values`; an image processor of Transformers.
        augmentation: how training pictures are changed.
    """

    class_names: tuple[str, ...]
    size: tuple[int, int]
    processor: Any
    augmentation: Augmentation


def digit_classes(augmentation: dict[str, Any] | None = None) -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits, 8x8, to be told apart; inside its wheel. Split as in `digits`.

    Args:
        augmentation: fields of `Augmentation`.
    """
    bunch = require("sklearn.datasets").load_digits()
    brightness = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return _small_pictures(
        train=(brightness[:1500], bunch.target[:1500]),
        held_out=(brightness[1500:], bunch.target[1500:]),
        class_names=tuple("0123456789"),
        augmentation=augmentation,
        description="scikit-learn's handwritten digits, 8x8; 1,500 train, the last 297 are held out",
        licence="BSD-3-Clause (scikit-learn); the images are part of UCI's Optical Recognition of Handwritten Digits",
    )


def fashion_mnist_classes(path: str = FASHION_MNIST_PATH, augmentation: dict[str, Any] | None = None) -> LabelledImages:
    """Zalando's Fashion-MNIST, 60,000 and 10,000 grey pictures of clothes, 28x28, in 10 classes, split as published.

    Args:
        path: as in `fashion_mnist`.
        augmentation: fields of `Augmentation`.
    """
    train, held_out = read_fashion_mnist(path)
    return _small_pictures(
        train=train,
        held_out=held_out,
        class_names=FASHION_MNIST_CLASSES,
        augmentation=augmentation,
        description="Fashion-MNIST at 28x28, split as published: 60,000 train, 10,000 are held out",
        licence="MIT",
    )


def emoji(
    size: int = 32, font: str = EMOJI_FONT, listing: str = EMOJI_LIST, augmentation: dict[str, Any] | None = None
) -> LabelledImages:
    """Noto's colour emoji on white, in the nine groups of Unicode's list; people are more than half of them.

    Variants of an emoji in skin tone or gender lie on the same side of the split. Of the emoji of each group, every
    fifth is held out with all its variants.

    Args:
        size: height and width in pixels.
        font: NotoColorEmoji.ttf, of the Debian package fonts-noto-color-emoji.
        listing: emoji-test.txt, of the Debian package unicode-data.
        augmentation: fields of `Augmentation`.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    _check_emoji_files(font, listing)
    rows = list(_emoji_of_list(listing))
    if not rows:
        raise ValueError(f"{listing} lists no emoji.")
    place, counts = {}, dict.fromkeys(EMOJI_GROUPS, 0)  # of each emoji without its variants, in its group
    for group, text in rows:
        if base_emoji(text) not in place:
            place[base_emoji(text)] = counts[group]
            counts[group] += 1
    pictures = np.stack([picture for picture in _draw_emoji([text for _, text in rows], font, size)])
    labels = np.asarray([EMOJI_GROUPS.index(group) for group, _ in rows])
    is_held_out = np.asarray([place[base_emoji(text)] % EMOJI_HELD_OUT == EMOJI_HELD_OUT - 1 for _, text in rows])
    return _small_pictures(
        train=(pictures[~is_held_out], labels[~is_held_out]),
        held_out=(pictures[is_held_out], labels[is_held_out]),
        class_names=EMOJI_GROUPS,
        augmentation=augmentation,
        description=f"{len(rows):,} Noto colour emoji at {size}x{size} in Unicode's groups; every fifth emoji of a "
        f"group is held out, with its skin tones and genders: {is_held_out.sum():,} pictures",
        licence="OFL-1.1 and Apache-2.0 (the font); Unicode's terms of use (the groups)",
    )


def hub_labelled_images(
    dataset: str,
    image_column: str = "image",
    label_column: str = "label",
    train_split: str = "train",
    eval_split: str | None = None,
    size: int = 224,
    resize: int | Literal["auto"] | None = "auto",
    augmentation: dict[str, Any] | None = None,
    name: str | None = None,
    revision: str | None = None,
    eval_share: float | None = None,
    seed: int = 0,
) -> LabelledImages:
    """Any data set of pictures and classes that `datasets.load_dataset` reads: a Hub name, or a local image folder.

    Args:
        dataset, name, revision: as in load_dataset; a folder with a folder of pictures for each class is a dataset.
        image_column: column of pictures, of any size; they become RGB, transparent parts white.
        label_column: column of classes (datasets.ClassLabel).
        train_split, eval_split: splits in load_dataset's notation; "validation" is held out if eval_split and
            eval_share are None. Slices such as "train[90%:]" go by order, in a folder that of the classes, and are
            refused where one part lacks classes of the other.
        eval_share: instead of eval_split, hold out this share of each class of train_split.
        seed: draws the held-out pictures of eval_share.
        size: height and width that the model sees.
        resize: held-out pictures' shorter side is made so long before the middle is cut out; "auto" for 256/224 of the
            size, as is usual for 224; if None, pictures are squeezed to the size. Training pictures too, unless the
            augmentation cuts out parts of its own.
        augmentation: fields of `Augmentation`.
    """
    changes = Augmentation.of(augmentation)
    resize = size * 256 // 224 if resize == "auto" else resize
    if not 1 <= size <= (resize or size):
        raise ValueError(f"size must be at least 1, and at most resize={resize}, got {size}.")
    found = load_parts(
        *(dataset, name, revision, train_split, eval_split),
        **{"default_eval_split": "validation", "eval_share": eval_share, "seed": seed, "label_column": label_column},
    )
    parts = (found.train, found.eval)
    check_columns(parts[0], [image_column, label_column], dataset)
    class_names = tuple(getattr(parts[0].features[label_column], "names", None) or ())
    if not class_names:
        raise ValueError(
            f"The column {label_column!r} of {dataset} holds no classes (datasets.ClassLabel); "
            "name another label_column, or give the data set one with class_encode_column."
        )
    for part, where in zip(parts, found.names):
        _check_labels(part, label_column, len(class_names), where)
        check_pictures(part, image_column, where)
    train, held_out = (
        part.select_columns([image_column, label_column])
        .rename_columns({image_column: "image", label_column: "label"})
        .cast_column("image", require("datasets").Image())
        for part in parts
    )
    return LabelledImages(
        train=train,
        eval=held_out,
        class_names=class_names,
        size=(size, size),
        processor=_processor(size, size, resize, IMAGENET_MEAN, IMAGENET_STD),
        augmentation=changes,
        description=f"{dataset} at {size}x{size}; {found.how}",
        licence=parts[0].info.license or "see the data set's own page",
    )


def base_emoji(text: str) -> str:
    """What variants of an emoji have in common."""
    return MAN_OR_WOMAN.sub(PERSON, VARIANT.sub("", text))


def _small_pictures(train, held_out, class_names, augmentation, description, licence) -> LabelledImages:
    """LabelledImages of two pairs (uint8 pictures [n, H, W] or [n, H, W, 3], labels [n]), all of one size."""
    height, width = train[0].shape[1:3]
    return LabelledImages(
        train=_picture_dataset(*train, class_names),
        eval=_picture_dataset(*held_out, class_names),
        class_names=class_names,
        size=(height, width),
        processor=_processor(height, width, None, HALF, HALF),
        augmentation=Augmentation.of(augmentation),
        description=description,
        licence=licence,
    )


def _picture_dataset(pictures: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> "Dataset":
    datasets = require("datasets")
    height, width = pictures.shape[1:3]
    # A netpbm file is a line and the raw bytes; compressing so many small pictures would take many seconds.
    head = f"P{5 if pictures.ndim == 3 else 6} {width} {height} 255\n".encode()
    columns = {"image": [{"bytes": head + picture.tobytes()} for picture in pictures], "label": labels.tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(class_names))})
    return datasets.Dataset.from_dict(columns, features=features)


def _processor(
    height: int, width: int, resize: int | None, mean: Sequence[float], std: Sequence[float]
) -> ViTImageProcessorPil:
    """Pictures -> normalised RGB of one size: squeezed to it, or the middle of what has a shorter side of `resize`."""
    cut = {"do_center_crop": True, "crop_size": {"height": height, "width": width}} if resize else {}
    return ViTImageProcessorPil(
        size={"shortest_edge": resize} if resize else {"height": height, "width": width},
        resample=BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
        **cut,
    )


def _check_labels(part: "Dataset", column: str, num_classes: int, where: str) -> None:
    """Every label is a class; -1, which data sets have where labels are kept back, is none."""
    labels = part.with_format("numpy").select_columns([column])[:][column]
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"Labels must be from 0 to {num_classes - 1}; {where} has {len(wrong)} others, the first "
            f"{labels[wrong[0]]} in row {wrong[0]}. (-1 says that labels are kept back: take another split.)"
        )


def _check_emoji_files(font: str, listing: str) -> None:
    for file, package, key in ((font, "fonts-noto-color-emoji", "font"), (listing, "unicode-data", "listing")):
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"The file {file} is missing: apt-get install fonts-noto-color-emoji unicode-data. Or unpack it with "
                f"`apt-get download {package} && dpkg -x {package}_*.deb .`, and give its place as data.{key}."
            )


def _emoji_of_list(listing: str) -> Iterator[tuple[str, str]]:
    """(group, emoji) of every emoji in Unicode's list that is written in full."""
    group = ""
    for number, line in enumerate(split_lines(read_text(listing)), 1):
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        code_points, _, status = line.partition("#")[0].partition(";")
        if status.strip() == "fully-qualified" and group in EMOJI_GROUPS:
            try:
                yield group, "".join(chr(int(point, 16)) for point in code_points.split())
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{listing}, line {number}: {code_points.strip()!r} are no code points.") from error


def _draw_emoji(texts: Sequence[str], font: str, size: int) -> Iterator[np.ndarray]:
    """[size, size, 3] uint8 of each text, on white."""
    image, draw, fonts = require("PIL.Image"), require("PIL.ImageDraw"), require("PIL.ImageFont")
    if not require("PIL.features").check("raqm"):
        raise ValueError("Emoji of several characters need Pillow with libraqm, which its wheels for Linux bring.")
    try:
        face = fonts.truetype(font, GLYPH_SIZE, layout_engine=fonts.Layout.RAQM)
        for text in texts:
            canvas = image.new("RGB", (GLYPH_BOX, GLYPH_BOX), "white")
            draw.Draw(canvas).text((0, (GLYPH_BOX - GLYPH_HEIGHT) // 2), text, font=face, embedded_color=True)
            yield np.asarray(canvas.resize((size, size), image.Resampling.BOX))
    except OSError as error:
        raise ValueError(f"{font} is no font that emoji can be drawn with: {error}.") from error

"""Pictures as token sequences: each source gives arrays of levels [n, H, W, C], an ImageTokenProcessor the ids."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.image_processing_tokens import PIL_MODES, ImageTokenProcessor, in_mode
from .hub_parts import load_parts
from .pictures import check_pictures
from .sequences import TokenSequences, require, token_dataset

PHOTO_LICENCE = "single photos have their own terms, in the documentation of skimage.data and of sklearn.datasets"
FASHION_MNIST_PATH = "/usr/share/datasets/fashion-mnist"
FASHION_MNIST_HUB = "zalando-datasets/fashion_mnist"
FASHION_MNIST_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")

# Photos of scikit-image (names of functions in skimage.data) and of scikit-learn (names of files).
PHOTOS = (
    *("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket"),
    *("stereo_motorcycle", "china.jpg", "flower.jpg"),
)
EVAL_PHOTOS = ("coffee", "flower.jpg")


def digits(class_conditional: bool = True) -> TokenSequences:
    """scikit-learn's 1,797 handwritten digits: 8x8, 17 levels, 10 classes; inside its wheel.

    The first 1,500 images train and the last 297 are held out, in the order in which scikit-learn hands them out, so
    there is no seed to choose.
    """
    bunch = require("sklearn.datasets").load_digits()
    values, labels = bunch.images.astype(np.int64)[..., None], bunch.target
    return _image_data(
        train=(values[:1500], labels[:1500]),
        held_out=(values[1500:], labels[1500:]),
        levels=17,
        class_names=tuple("0123456789"),
        class_conditional=class_conditional,
        description="scikit-learn's handwritten digits, 8x8, 17 levels; 1,500 train, the last 297 are held out",
        licence="BSD-3-Clause (scikit-learn); the images are part of UCI's Optical Recognition of Handwritten Digits",
    )


def photo_crops(
    size: int = 32,
    stride: int | None = None,
    photos: tuple[str, ...] = PHOTOS,
    eval_photos: tuple[str, ...] = EVAL_PHOTOS,
    block: list[int] | None = None,
) -> TokenSequences:
    """RGB crops of the colour photos inside scikit-image's and scikit-learn's wheels, split by photo.

    Args:
        size: height and width of a crop.
        stride: pixels from one training crop to the next; `size` (disjoint crops) if None. Held-out crops are disjoint.
        photos: photos to use, of PHOTOS.
        eval_photos: those of them that are held out.
        block: height and width of the blocks in whose order values follow each other; None for row by row.
    """
    train, held_out = crops_by_photo(size, stride, photos, eval_photos)
    return _image_data(
        train=(train, None),
        held_out=(held_out, None),
        levels=256,
        block=block,
        description=f"{size}x{size} RGB crops of photos; held out: {', '.join(eval_photos)}",
        licence=PHOTO_LICENCE,
    )


def crops_by_photo(
    size: int, stride: int | None, photos: Sequence[str], eval_photos: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Crops [n, size, size, 3] to train on, and held-out ones; see `photo_crops`."""
    unknown = sorted({*photos, *eval_photos} - set(PHOTOS))
    if unknown:
        raise ValueError(f"photos and eval_photos may hold {', '.join(PHOTOS)}; got {', '.join(unknown)}.")
    train_photos = [photo for photo in photos if photo not in eval_photos]
    if not train_photos or not eval_photos:
        raise ValueError(f"Both sides need a photo: photos={list(photos)}, eval_photos={list(eval_photos)}.")
    stride = size if stride is None else stride
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}.")
    return (
        np.concatenate([_crops(_photo(photo), size, stride) for photo in train_photos]),
        np.concatenate([_crops(_photo(photo), size, size) for photo in eval_photos]),
    )


def fashion_mnist(
    path: str = FASHION_MNIST_PATH,
    size: int = 28,
    levels: int = 256,
    class_conditional: bool = True,
    block: list[int] | None = None,
) -> TokenSequences:
    """Zalando's Fashion-MNIST, 60,000 and 10,000 grey pictures of clothes in 10 classes, split as published.

    Read from the files of the Debian package dataset-fashion-mnist in `path`; if that folder is missing, from the Hub.

    Args:
        path: folder of train-images-idx3-ubyte.gz and its three companions.
        size: height and width, a divisor of 28; smaller than 28 takes means of square patches.
        levels: number of brightnesses; fewer than 256 takes the nearest of that many evenly spaced ones.
        class_conditional: begin with the class.
        block: as in `photo_crops`.
    """
    if size < 1 or 28 % size:
        raise ValueError(f"size must be a divisor of 28, got {size}.")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels must be from 2 to 256, got {levels}.")
    train, held_out = [
        (_quantise(_shrink(values, size), levels)[..., None], labels) for values, labels in read_fashion_mnist(path)
    ]
    return _image_data(
        train=train,
        held_out=held_out,
        levels=levels,
        class_names=FASHION_MNIST_CLASSES,
        class_conditional=class_conditional,
        block=block,
        description=f"Fashion-MNIST at {size}x{size} with {levels} levels, split as published",
        licence="MIT",
    )


def hub_images(
    dataset: str,
    image_column: str = "image",
    label_column: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    height: int = 32,
    width: int = 32,
    channels: int = 3,
    levels: int = 256,
    fit: bool = False,
    block: list[int] | None = None,
    name: str | None = None,
    revision: str | None = None,
    eval_share: float | None = None,
    seed: int = 0,
) -> TokenSequences:
    """Any image data set that `datasets.load_dataset` reads: a Hub name such as uoft-cs/cifar10, or a local folder.

    Args:
        dataset, name, revision: as in load_dataset.
        image_column: column of images; they must be height x width, with `channels` channels, unless `fit`.
        label_column: column of classes, whose start tokens begin the sequences; None for one start token.
        train_split, eval_split: splits in load_dataset's notation, such as "train[:48000]" and "train[48000:]"; "test"
            is held out if eval_split and eval_share are None. Slices go by order, in a folder that of file names.
        eval_share: instead of eval_split, hold out this share of train_split (of each class, where there are classes).
        seed: draws the held-out pictures of eval_share.
        fit: convert pictures to grey or RGB, transparent parts on white, cut out the largest centred part with the
            right proportions, and average it down (box filter).
        block: as in `photo_crops`.
    """
    found = load_parts(
        *(dataset, name, revision, train_split, eval_split),
        **{"default_eval_split": "test", "eval_share": eval_share, "seed": seed, "label_column": label_column},
    )
    parts = (found.train, found.eval)
    check_columns(parts[0], [image_column, label_column], dataset)
    for part, where in zip(parts, found.names):
        check_pictures(part, image_column, where)
    class_names = _class_names(parts[0], label_column)
    order = "raster" if block is None else "blocks"
    processor = ImageTokenProcessor(height, width, channels, levels, len(class_names), order, block)

    def tokens(rows: dict[str, list]) -> dict[str, Any]:
        pictures = rows[image_column]
        if fit:
            pictures = [_fit(picture, processor) for picture in pictures]
        ids = processor(pictures, classes=rows[label_column] if class_names else None)["input_ids"]
        return {"input_ids": ids, "label": rows[label_column]} if class_names else {"input_ids": ids}

    features = token_dataset(np.zeros((1, 1 + processor.num_values)), [0], class_names).features
    train, held_out = (
        part.map(tokens, batched=True, batch_size=100, remove_columns=part.column_names, features=features)
        for part in parts
    )
    return TokenSequences(
        train=train.with_format("numpy"),
        eval=held_out.with_format("numpy"),
        processor=processor,
        num_values=levels,
        dims=processor.num_values,
        class_names=class_names or None,
        description=f"{dataset} at {height}x{width}x{channels}; {found.how}",
        licence=parts[0].info.license or "see the data set's own page",
    )


def _image_data(
    train, held_out, levels, description, licence, class_names=(), class_conditional=True, block=None
) -> TokenSequences:
    """TokenSequences of two pairs (levels [n, H, W, C], labels [n] or None)."""
    classes = class_names if class_conditional else ()
    order = "raster" if block is None else "blocks"
    processor = ImageTokenProcessor(*train[0].shape[1:], levels, len(classes), order, block)
    train_set, eval_set = (
        token_dataset(processor(values, classes=labels if classes else None)["input_ids"], labels, class_names)
        for values, labels in (train, held_out)
    )
    return TokenSequences(
        train=train_set,
        eval=eval_set,
        processor=processor,
        num_values=levels,
        dims=processor.num_values,
        class_names=classes or None,
        description=description,
        licence=licence,
    )


def _photo(photo: str) -> np.ndarray:
    """[H, W, 3] uint8."""
    if photo.endswith(".jpg"):
        return require("sklearn.datasets").load_sample_image(photo)
    picture = getattr(require("skimage.data"), photo)()
    return picture[0] if photo == "stereo_motorcycle" else picture  # that one is (left, right, disparity)


def _crops(picture: np.ndarray, size: int, stride: int) -> np.ndarray:
    """[n, size, size, 3] crops of [H, W, 3], row by row."""
    if not 1 <= size <= min(picture.shape[:2]):
        raise ValueError(f"size must be from 1 to {min(picture.shape[:2])}, the shorter side of a photo, got {size}.")
    windows = np.lib.stride_tricks.sliding_window_view(picture, (size, size), axis=(0, 1))[::stride, ::stride]
    return windows.transpose(0, 1, 3, 4, 2).reshape(-1, size, size, 3)


def read_fashion_mnist(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(pictures [n, 28, 28], labels [n]) to train on, and held out; of the folder `path`, or if it is none the Hub."""
    read = _fashion_mnist_files if Path(path).is_dir() else _fashion_mnist_hub
    return read(path)


def _fashion_mnist_files(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (_read_idx(Path(path) / f"{part}-images-idx3-ubyte.gz"), _read_idx(Path(path) / f"{part}-labels-idx1-ubyte.gz"))
        for part in ("train", "t10k")
    ]


def _fashion_mnist_hub(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
    datasets = require("datasets")
    try:
        parts = [datasets.load_dataset(FASHION_MNIST_HUB, split=split) for split in ("train", "test")]
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is neither in the folder {path} nor to be had from the Hub ({error}). Either install the "
            f"Debian package dataset-fashion-mnist (or unpack it with `apt-get download dataset-fashion-mnist && "
            f"dpkg -x dataset-fashion-mnist_*.deb .` and give its folder as data.path), or go online once, so that "
            f"datasets can fetch {FASHION_MNIST_HUB}."
        ) from error
    return [(np.stack([np.asarray(image) for image in part["image"]]), np.asarray(part["label"])) for part in parts]


def _read_idx(file: Path) -> np.ndarray:
    """The array in a gzipped idx file: 0, 0, 8 (bytes), number of axes, their lengths as big-endian int32, the data."""
    if not file.is_file():
        raise FileNotFoundError(f"The file {file} is missing; data.path must hold all four idx files of Fashion-MNIST.")
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is no whole gzip file: {error}") from error
    axes = content[3] if content[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * axes
    shape = np.frombuffer(content[4:header], ">i4")
    if not axes or len(content) - header != shape.prod():
        raise ValueError(f"{file} is no whole idx file of unsigned bytes.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _shrink(pictures: np.ndarray, size: int) -> np.ndarray:
    """[n, H, H] -> [n, size, size] means of square patches, rounded to whole brightnesses."""
    patch = pictures.shape[1] // size
    return np.rint(pictures.reshape(-1, size, patch, size, patch).mean(axis=(2, 4))).astype(np.int64)


def _quantise(brightness: np.ndarray, levels: int) -> np.ndarray:
    """0 ... 255 -> the nearest of `levels` evenly spaced levels, as the processor does with pictures."""
    return (brightness * (levels - 1) + 127) // 255


def check_columns(part, columns: list[str | None], dataset: str) -> None:
    """Raise ValueError unless a data set has the columns (None: not asked for)."""
    for column in columns:
        if column is not None and column not in part.column_names:
            raise ValueError(f"{dataset} has no column {column!r}; it has {', '.join(part.column_names)}.")


def _class_names(part, label_column: str | None) -> tuple[str, ...]:
    if label_column is None:
        return ()
    names = getattr(part.features[label_column], "names", None)
    if names is None:
        raise ValueError(f"The column {label_column!r} holds no classes (datasets.ClassLabel); use label_column=None.")
    return tuple(names)


def _fit(picture, processor: ImageTokenProcessor):
    """A PIL image in the processor's mode; its largest centred part with these proportions, averaged to the size."""
    ops, image = require("PIL.ImageOps"), require("PIL.Image")
    picture = in_mode(picture, PIL_MODES[processor.channels])
    return ops.fit(picture, (processor.width, processor.height), method=image.Resampling.BOX)

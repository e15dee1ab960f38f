"""Sources of labelled pictures: splits, counts, classes, and what is refused; and how training pictures are changed."""

import gzip
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_tfamily.data import LabelledImages, load_data, rand_augment
from hf_tfamily.data.augmentation import Augmentation, random_part
from hf_tfamily.data.images import FASHION_MNIST_PATH
from hf_tfamily.data.labelled_images import EMOJI_FONT, EMOJI_GROUPS, EMOJI_LIST, base_emoji

needs_fashion_mnist = pytest.mark.skipif(
    not Path(FASHION_MNIST_PATH).is_dir(), reason="needs the Debian package dataset-fashion-mnist"
)
needs_emoji = pytest.mark.skipif(
    not (Path(EMOJI_FONT).exists() and Path(EMOJI_LIST).exists()),
    reason="needs the Debian packages fonts-noto-color-emoji and unicode-data",
)


def test_digits_are_scikit_learns():
    data = load_data({"source": "digit_classes"})
    assert isinstance(data, LabelledImages)
    assert (len(data.train), len(data.eval), data.size) == (1500, 297, (8, 8))
    assert data.class_names == tuple("0123456789")
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    for part, number, row in ((data.train, 7, 7), (data.eval, 3, 1503)):
        brightness = np.asarray(part[number]["image"])
        np.testing.assert_array_equal(np.rint(brightness / 255 * 16), bunch.images[row])
        assert part[number]["label"] == bunch.target[row]
    assert min(Counter(data.eval["label"]).values()) >= 27


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_fashion_mnist_pictures_are_those_of_the_files(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28))
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pictures)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(20) % 10)
    data = load_data({"source": "fashion_mnist_classes", "path": str(tmp_path)})
    np.testing.assert_array_equal(np.asarray(data.eval[11]["image"]), pictures[11])
    assert data.eval[11]["label"] == 1


@needs_fashion_mnist
def test_whole_fashion_mnist_is_balanced():
    data = load_data({"source": "fashion_mnist_classes"})
    assert set(Counter(data.train["label"]).values()) == {6000}
    assert set(Counter(data.eval["label"]).values()) == {1000}
    assert data.size == (28, 28)


@needs_emoji
def test_emoji_are_split_by_what_they_show():
    data = load_data({"source": "emoji", "size": 8})
    assert len(data.train) + len(data.eval) == 3655
    assert (data.class_names, data.size) == (EMOJI_GROUPS, (8, 8))
    train, held_out = Counter(data.train["label"]), Counter(data.eval["label"])
    assert train[1] > sum(train.values()) / 2  # people
    assert all(0.15 < held_out[group] / (held_out[group] + train[group]) < 0.3 for group in range(9))
    assert np.asarray(data.eval[0]["image"]).shape == (8, 8, 3)


def test_variants_of_an_emoji_have_one_base():
    runner = "\N{RUNNER}"
    variants = [f"{runner}\N{EMOJI MODIFIER FITZPATRICK TYPE-5}", f"{runner}\u200d\N{FEMALE SIGN}\ufe0f"]
    variants.append(f"{runner}\N{EMOJI MODIFIER FITZPATRICK TYPE-3}\u200d\N{MALE SIGN}\ufe0f")
    assert {base_emoji(variant) for variant in variants} == {runner}
    assert base_emoji("\N{MAN}\u200d\N{ROCKET}") == base_emoji("\N{WOMAN}\u200d\N{ROCKET}")
    assert base_emoji("\N{SWIMMER}") != base_emoji(runner)


def test_missing_emoji_name_their_packages(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-noto-color-emoji unicode-data"):
        load_data({"source": "emoji", "font": str(tmp_path / "none.ttf")})


@pytest.fixture
def folder(tmp_path):
    """Pictures of several sizes and modes in a folder for each class."""
    for label, (name, colour) in enumerate({"apples": "red", "leaves": "green"}.items()):
        (tmp_path / name).mkdir()
        for number, mode in enumerate(("RGB", "L", "RGBA", "RGB")):
            Image.new(mode, (20 + 10 * number, 30 - label), colour).save(tmp_path / name / f"{number}.png")
    return tmp_path


def from_folder(folder, **arguments):
    return load_data({"source": "hub_labelled_images", "dataset": str(folder), "eval_share": 0.25, **arguments})


def test_an_image_folder_is_a_data_set(folder):
    data = from_folder(folder, size=16, resize=20)
    assert data.class_names == ("apples", "leaves")
    assert (len(data.train), len(data.eval)) == (6, 2)
    pixels = data.processor([row["image"] for row in data.train], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (6, 3, 16, 16)  # grey and transparent ones are RGB as well
    assert pixels[0, 0].mean() > pixels[0, 1].mean()  # red
    squeezed = from_folder(folder, size=16, resize=None)
    assert squeezed.processor(data.train[0]["image"], return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_column": "kind"}, "has no column 'kind'; it has image, label"),
        ({"label_column": "image"}, "holds no classes"),
        ({"size": 300, "resize": 256}, "size must be at least 1, and at most resize=256, got 300"),
        ({"size": 0, "resize": None}, "size must be at least 1"),
        ({"augmentation": {"flip": 2}}, "flip must be a probability"),
    ],
)
def test_unfit_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_folder(folder, **arguments)


def test_labels_that_are_no_classes_are_refused(monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.new("RGB", (8, 8))] * 3, "label": [0, -1, 1]}
    part = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: part)
    with pytest.raises(ValueError, match=r"from 0 to 1; x, split train has 1 others, the first -1 in row 1"):
        load_data({"source": "hub_labelled_images", "dataset": "x"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resized_crop": 0.0}, "resized_crop must be above 0 and at most 1, got 0.0"),
        ({"shift": -1}, "shift must be a whole number of at least 0, got -1"),
        ({"shift": 0.5}, "shift must be a whole number"),
        ({"erase": 1.5}, "erase must be a probability from 0 to 1, got 1.5"),
        ({"mixup": -0.1}, "mixup must be at least 0, got -0.1"),
    ],
)
def test_unfit_augmentation_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)


def test_no_augmentation_changes_nothing():
    pixels, shares = torch.randn(4, 3, 6, 8), torch.eye(4)
    assert torch.equal(Augmentation().change(pixels), pixels)
    assert all(torch.equal(*pair) for pair in zip(Augmentation().mix(pixels, shares), (pixels, shares)))


def test_pictures_move_flip_and_lose_parts():
    pixels = torch.arange(5 * 3 * 6 * 8.0).view(5, 3, 6, 8)
    assert torch.equal(Augmentation(flip=1.0).change(pixels), pixels.flip(-1))
    moved = Augmentation(shift=2).change(pixels.expand(5, -1, -1, -1))
    inner = {(row, column) for row in range(5) for column in range(5)}
    for before, after in zip(pixels, moved):
        padded = torch.nn.functional.pad(before[None], (2, 2, 2, 2), mode="replicate")[0]
        assert any(torch.equal(after, padded[:, r : r + 6, c : c + 8]) for r, c in inner)
    before = pixels.clone()
    erased = (Augmentation(erase=1.0).change(pixels) != pixels).any(dim=1)
    assert torch.equal(pixels, before)
    for picture in erased:
        rows, columns = picture.any(dim=1), picture.any(dim=0)
        assert picture.sum() == rows.sum() * columns.sum()  # a rectangle
        assert 0 < picture.float().mean() <= 0.5


def test_random_parts_have_the_areas_and_proportions_asked_for():
    for _ in range(200):
        rows, columns = random_part(60, 80, (0.25, 1.0), (3 / 4, 4 / 3))
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert 0 <= rows.start < rows.stop <= 60
        assert 0 <= columns.start < columns.stop <= 80
        assert 0.24 < height * width / 4800 <= 1
        assert 0.72 < width / height < 1.39
    assert random_part(1, 1000, (1.0, 1.0), (1.0, 1.0)) is None
    cut = Augmentation(resized_crop=1.0).redraw(Image.new("RGB", (1000, 1), "red"), (4, 6))
    assert (cut.size, cut.getpixel((0, 0))) == ((6, 4), (255, 0, 0))


@pytest.mark.parametrize("change", rand_augment.OPERATIONS, ids=lambda change: change.__name__)
def test_every_change_of_rand_augment_gives_another_picture(change):
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 200, (24, 32, 3), dtype=np.uint8))
    changed = change(picture, 0.9)
    assert (changed.size, changed.mode) == ((32, 24), "RGB")
    assert changed != picture
    if change.__name__.startswith(("rotate", "shear", "translate", "colour", "contrast", "bright", "sharp")):
        assert change(picture, 0.0) == picture


def test_rand_augment_follows_the_seed():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    drawn = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        drawn.append(Augmentation(rand_augment=True).redraw(picture, (8, 8)).tobytes())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 2


@pytest.mark.parametrize("fields", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_classes_are_mixed_in_the_shares_of_their_pixels(fields):
    pixels = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 16, 16)
    for _ in range(20):
        mixed, shares = Augmentation(**fields).mix(pixels, torch.eye(2))
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), shares[:, 1])
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(2))
        if "cutmix" in fields:
            assert set(mixed.unique().tolist()) <= {0.0, 1.0}


def test_emoji_files_that_are_none_are_named(tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"no font")
    groups = "\n".join(f"# group: {group}\n{0x1F600 + n:X} ; fully-qualified" for n, group in enumerate(EMOJI_GROUPS))
    for listing, message in (
        ("", r"list.txt lists no emoji"),
        (groups.replace("1F600", "1F6x0"), r"list.txt, line 2: '1F6x0' are no code points"),
        (groups, r"font.ttf is no font that emoji can be drawn with|libraqm"),
    ):
        (tmp_path / "list.txt").write_text(listing)
        with pytest.raises(ValueError, match=message):
            load_data({"source": "emoji", "font": str(tmp_path / "font.ttf"), "listing": str(tmp_path / "list.txt")})

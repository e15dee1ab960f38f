"""Sources of pictures: their values, splits and classes against the originals."""

import gzip
import math

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from hf_tfamily.data import load_data
from hf_tfamily.data.images import FASHION_MNIST_CLASSES, PHOTOS


def test_digits_are_scikit_learns_in_order():
    data = load_data({"source": "digits"})
    original = load_digits()
    assert (data.train.num_rows, data.eval.num_rows) == (1500, 297)
    assert (data.num_values, data.dims, data.vocab_size) == (17, 64, 27)
    assert data.class_names == tuple("0123456789")
    ids = np.concatenate([data.train["input_ids"][:], data.eval["input_ids"][:]])
    np.testing.assert_array_equal(ids[:, 1:], original.data)
    np.testing.assert_array_equal(ids[:, 0], 17 + original.target)
    np.testing.assert_array_equal(data.eval["label"][:], original.target[1500:])


def test_digits_held_out_figures_of_the_readme():
    """4.09 bits per dimension for a uniform guess; independent pixels learn a good deal, but not the shapes."""
    data = load_data({"source": "digits"})
    assert math.log2(data.num_values) == pytest.approx(4.09, abs=0.005)
    train, held_out = data.train["input_ids"][:][:, 1:], data.eval["input_ids"][:][:, 1:]
    counts = np.stack([np.bincount(pixel, minlength=17) for pixel in train.T]) + 0.5
    log_probability = np.log2(counts / counts.sum(axis=1, keepdims=True))
    assert -log_probability[np.arange(64), held_out].mean() == pytest.approx(2.36, abs=0.005)


def test_digits_without_classes():
    data = load_data({"source": "digits", "class_conditional": False})
    assert (data.class_names, data.vocab_size, data.processor.num_classes) == (None, 18, 0)
    assert set(data.train["input_ids"][:][:, 0]) == {17}


def test_digits_come_back_as_pictures():
    data = load_data({"source": "digits"})
    (picture,) = data.processor.decode(data.eval[0]["input_ids"])
    expected = np.rint(load_digits().images[1500] * 255 / 16)
    np.testing.assert_array_equal(np.asarray(picture), expected)


def test_photo_crops_are_split_by_photo():
    photos = ["rocket", "flower.jpg"]
    data = load_data({"source": "photo_crops", "photos": photos, "eval_photos": ["flower.jpg"]})
    flower = load_sample_image("flower.jpg")
    rows, columns = flower.shape[0] // 32, flower.shape[1] // 32
    assert (data.train.num_rows, data.eval.num_rows) == (260, rows * columns)
    assert (data.dims, data.vocab_size, data.class_names) == (3072, 257, None)
    second_row = data.eval[columns + 1]["input_ids"]
    assert second_row[0] == 256
    np.testing.assert_array_equal(second_row[1:].reshape(32, 32, 3), flower[32:64, 32:64])


def test_photo_crops_overlap_by_stride_in_training_only():
    arguments = {"source": "photo_crops", "photos": ["rocket", "flower.jpg"], "eval_photos": ["flower.jpg"]}
    data = load_data({**arguments, "size": 64, "stride": 32})
    assert (data.train.num_rows, data.eval.num_rows) == (12 * 19, 6 * 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"photos": ["me"]}, "got me"),
        ({"eval_photos": []}, "Both sides need a photo"),
        ({"eval_photos": list(PHOTOS)}, "Both sides need a photo"),
        ({"size": 1000}, "size must be from 1 to"),
        ({"stride": 0}, "stride must be"),
    ],
)
def test_photo_crops_refuse_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data({"source": "photo_crops", **arguments})


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path):
    """A folder like the Debian package's, of 20 and 10 random pictures; and what is in it."""
    rng = np.random.default_rng(0)
    content = {}
    for part, count in (("train", 20), ("t10k", 10)):
        content[part] = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", content[part][0])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", content[part][1])
    return tmp_path, content


def test_fashion_mnist_is_read_from_idx_files(fashion):
    path, content = fashion
    data = load_data({"source": "fashion_mnist", "path": str(path)})
    pictures, labels = content["t10k"]
    assert (data.train.num_rows, data.eval.num_rows) == (20, 10)
    assert (data.vocab_size, data.dims, data.class_names) == (266, 784, FASHION_MNIST_CLASSES)
    np.testing.assert_array_equal(data.eval["input_ids"][:][:, 1:], pictures.reshape(10, 784))
    np.testing.assert_array_equal(data.eval["input_ids"][:][:, 0], 256 + labels)


def test_fashion_mnist_made_smaller_takes_means_and_nearest_levels(fashion):
    path, content = fashion
    data = load_data({"source": "fashion_mnist", "path": str(path), "size": 14, "levels": 16})
    picture = content["train"][0][3]
    for row, column in ((0, 0), (5, 9), (13, 13)):
        mean = round(picture[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean())
        expected = min(range(16), key=lambda level: abs(mean - level * 255 / 15))
        assert data.train[3]["input_ids"][1 + 14 * row + column] == expected
    assert (data.num_values, data.dims) == (16, 196)


def test_fashion_mnist_from_the_hub_where_the_folder_is_missing(fashion, monkeypatch):
    path, content = fashion

    def load_dataset(name, split):
        assert name == "zalando-datasets/fashion_mnist"
        pictures, labels = content["train" if split == "train" else "t10k"]
        images = [Image.fromarray(picture.astype(np.uint8)) for picture in pictures]
        return datasets.Dataset.from_dict({"image": images, "label": labels})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_hub = load_data({"source": "fashion_mnist", "path": "/nowhere"})
    from_files = load_data({"source": "fashion_mnist", "path": str(path)})
    np.testing.assert_array_equal(from_hub.train["input_ids"][:], from_files.train["input_ids"][:])


def test_missing_fashion_mnist_says_both_ways_to_get_it(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"dataset-fashion-mnist[\s\S]*zalando-datasets/fashion_mnist"):
        load_data({"source": "fashion_mnist", "path": "/nowhere"})


def test_half_a_fashion_mnist_is_refused(fashion):
    path, _ = fashion
    (path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\.gz is missing"):
        load_data({"source": "fashion_mnist", "path": str(path)})
    (path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc"))
    with pytest.raises(ValueError, match="no whole idx file"):
        load_data({"source": "fashion_mnist", "path": str(path)})


@pytest.mark.parametrize(("key", "value"), [("size", 10), ("size", 0), ("levels", 1), ("levels", 257)])
def test_fashion_mnist_refuses_odd_sizes(fashion, key, value):
    with pytest.raises(ValueError, match=f"{key} must be .* got {value}"):
        load_data({"source": "fashion_mnist", "path": str(fashion[0]), key: value})


@pytest.fixture
def image_folder(tmp_path, tmp_path_factory, monkeypatch):
    """A data set of 4 training and 2 test pictures of 4x4 RGB in 2 classes, as parquet files; and the pictures."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    for split, rows in (("train", range(4)), ("test", range(4, 6))):
        columns = {"img": [Image.fromarray(pictures[i]) for i in rows], "label": [i % 2 for i in rows]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    return {"source": "hub_images", "dataset": str(tmp_path), "image_column": "img", "height": 4, "width": 4}, pictures


def test_hub_images_of_a_local_folder(image_folder):
    arguments, pictures = image_folder
    data = load_data({**arguments, "label_column": "label"})
    assert (data.vocab_size, data.dims, data.class_names) == (258, 48, ("cat", "dog"))
    ids = data.train["input_ids"][:]
    np.testing.assert_array_equal(ids[:, 1:], pictures[:4].reshape(4, 48))
    assert ids[:, 0].tolist() == [256, 257, 256, 257]
    assert data.eval["label"][:].tolist() == [0, 1]


def test_hub_images_without_classes_and_with_other_splits(image_folder):
    arguments, pictures = image_folder
    data = load_data({**arguments, "train_split": "train[:3]", "eval_split": "train[3:]"})
    assert (data.train.num_rows, data.eval.num_rows, data.vocab_size) == (3, 1, 257)
    assert data.eval.column_names == ["input_ids"]
    np.testing.assert_array_equal(data.eval[0]["input_ids"], [256, *pictures[3].ravel()])


def test_hub_images_fitted_to_a_size(image_folder):
    arguments, pictures = image_folder
    data = load_data({**arguments, "height": 2, "width": 2, "channels": 1, "levels": 4, "fit": True})
    assert (data.dims, data.num_values) == (4, 4)
    grey = np.asarray(Image.fromarray(pictures[0]).convert("L"), float)
    brightness = grey[:2, :2].mean()
    assert data.train[0]["input_ids"][1] == min(range(4), key=lambda level: abs(brightness - level * 85))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_column": "image"}, "no column 'image'; it has img, label"),
        ({"label_column": "labels"}, "no column 'labels'"),
        ({"height": 8}, r"Images must be \[8, 4, 3\]"),
        ({"channels": 1}, r"mode 'L', got 'RGB'"),
    ],
)
def test_hub_images_refuse_what_does_not_fit(image_folder, change, message):
    with pytest.raises(ValueError, match=message):
        load_data({**image_folder[0], **change})


def test_hub_labels_must_be_classes(image_folder, tmp_path):
    arguments, _ = image_folder
    for split in ("train", "test"):
        part = datasets.Dataset.from_parquet(str(tmp_path / f"{split}.parquet"))
        part.cast_column("label", datasets.Value("int64")).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="holds no classes"):
        load_data({**arguments, "label_column": "label"})

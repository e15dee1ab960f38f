"""Splits by share: of each class, drawn with a seed; slices that leave a part without classes are refused."""

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_tfamily.data import load_data
from hf_tfamily.data.hub_parts import divided
from hf_tfamily.tasks.image_classification import HeldOutPixels, TrainingPixels

COLOURS = {"apples": "red", "leaves": "green", "skies": "blue"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures of each of three classes, each picture of another brightness."""
    place = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(COLOURS):
        (place / name).mkdir()
        for number in range(10):
            colour = [0, 0, 0]
            colour[label] = 255 - 10 * number
            Image.new("RGB", (4, 4), tuple(colour)).save(place / name / f"{number}.png")
    return str(place)


def hub_source(source, folder, **arguments):
    own = {"hub_labelled_images": {"size": 4}, "hub_images": {"height": 4, "width": 4, "label_column": "label"}}
    return load_data({"source": source, "dataset": folder, **own[source], **arguments})


def labels_of(part):
    return Counter(int(label) for label in part["label"])


def rows_of(part):
    """What tells the rows of one part from each other."""
    if "input_ids" in part.column_names:
        return {tuple(row) for row in part["input_ids"][:].tolist()}
    return {row["image"].tobytes() for row in part}


@pytest.mark.parametrize("source", ["hub_labelled_images", "hub_images"])
def test_a_share_of_each_class_is_held_out(source, folder):
    data = hub_source(source, folder, eval_share=0.2)
    assert labels_of(data.train) == dict.fromkeys(range(3), 8)
    assert labels_of(data.eval) == dict.fromkeys(range(3), 2)
    assert not rows_of(data.train) & rows_of(data.eval)
    assert len(rows_of(data.train) | rows_of(data.eval)) == 30
    assert "held out: 0.2 of each class of train, drawn with seed 0" in data.description
    again, other = (hub_source(source, folder, eval_share=0.2, seed=seed) for seed in (0, 1))
    assert rows_of(again.eval) == rows_of(data.eval) != rows_of(other.eval)


def test_a_folder_is_divided_by_class_where_classes_are_not_asked_for(folder):
    data = hub_source("hub_images", folder, label_column=None, eval_share=0.1)
    brightest = data.eval["input_ids"][:][:, 1:].reshape(3, 16, 3)[:, 0].argmax(axis=1)
    assert sorted(brightest) == [0, 1, 2]


@pytest.mark.parametrize("source", ["hub_labelled_images", "hub_images"])
@pytest.mark.parametrize("label_column", ["label", None])
def test_slices_of_a_sorted_folder_are_refused(source, label_column, folder):
    if source == "hub_labelled_images" and label_column is None:
        pytest.skip("has classes always")
    arguments = {"label_column": label_column}
    with pytest.raises(
        ValueError, match=r"held-out part \(train\[90%:\]\) has none of apples, leaves.*eval_share: 0.1"
    ):
        hub_source(source, folder, **arguments, train_split="train[:90%]", eval_split="train[90%:]")
    with pytest.raises(ValueError, match=r"the training part \(train\[:50%\]\) has none of skies"):
        hub_source(source, folder, **arguments, train_split="train[:50%]", eval_split="train[50%:]")


def test_slices_that_hold_all_classes_are_taken(folder):
    slices = {"train_split": "train[:8]+train[10:18]+train[20:28]", "eval_split": "train[8:10]+train[18:20]+train[28:]"}
    data = hub_source("hub_labelled_images", folder, **slices)
    assert labels_of(data.eval) == dict.fromkeys(range(3), 2)


def test_published_splits_that_lack_classes_are_taken_with_a_warning(monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"train": [0, 1], "validation": [0]}
    parts = {
        split: datasets.Dataset.from_dict(
            {"image": [Image.new("RGB", (8, 8))] * len(labels), "label": labels}, features=features
        )
        for split, labels in columns.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split, **kwargs: parts[split])
    with pytest.warns(UserWarning, match=r"held-out part \(validation\) has none of b"):
        assert len(load_data({"source": "hub_labelled_images", "dataset": "x"}).eval) == 1


def test_labels_that_are_kept_back_are_no_matter_where_none_are_asked_for(monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.new("RGB", (4, 4))] * 4, "label": [None, 0, -1, None]}
    part = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: part)
    data = hub_source("hub_images", "x", label_column=None, train_split="train[:2]", eval_split="train[2:]")
    assert (len(data.train), data.class_names) == (4, None)


def test_rows_on_both_sides_are_named(folder, tmp_path):
    with pytest.warns(UserWarning, match=r"12 rows of train\[9:21\] are trained on as well \(train\)"):
        hub_source("hub_images", folder, label_column=None, train_split="train", eval_split="train[9:21]")
    (tmp_path / "train.txt").write_text("a line\n" * 10)
    with pytest.warns(UserWarning, match=r"1 rows of train\[8:\] are trained on as well \(train\[:9\]\)"):
        load_data(
            {
                **{"source": "hub_text", "dataset": str(tmp_path), "length": 2},
                **{"train_split": "train[:9]", "eval_split": "train[8:]"},
            }
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_share": 0.1, "eval_split": "test"}, "Give eval_split or eval_share, not both"),
        ({"eval_share": 1.0}, "eval_share must lie between 0 and 1"),
        ({"eval_share": 0}, "eval_share must lie between 0 and 1"),
    ],
)
def test_shares_that_are_none_are_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        hub_source("hub_labelled_images", folder, **arguments)


def test_every_class_is_on_both_sides():
    labels = np.repeat([0, 1, 2], [100, 2, 3])
    for share in (0.01, 0.5, 0.99):
        train, held_out = divided(labels, share, seed=0, names=["a", "b", "c"])
        assert set(labels[train]) == set(labels[held_out]) == {0, 1, 2}
        assert sorted([*train, *held_out]) == list(range(105))
    with pytest.raises(ValueError, match=r"at least two rows of each class.* of b there is one"):
        divided(np.array([0, 0, 1]), 0.5, seed=0, names=["a", "b"])


@pytest.mark.parametrize("size", [32, 64, 224, 300])
@pytest.mark.parametrize("augmentation", [None, {"rand_augment": False, "flip": 1.0}])
def test_the_model_sees_all_of_a_picture_at_any_size(tmp_path, size, augmentation):
    """Four coloured quadrants: all four are in what comes out, at about a quarter each."""
    quadrants = np.zeros((512, 512, 3), np.uint8)
    quadrants[:256, :256], quadrants[:256, 256:] = (255, 0, 0), (0, 255, 0)
    quadrants[256:, :256], quadrants[256:, 256:] = (0, 0, 255), (255, 255, 255)
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(quadrants).save(tmp_path / name / f"{number}.png")
    arguments = {"augmentation": augmentation} if augmentation else {}
    data = load_data(
        {"source": "hub_labelled_images", "dataset": str(tmp_path), "size": size, "eval_share": 0.5, **arguments}
    )
    mean, std = (torch.tensor(getattr(data.processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    for part, pixels in ((data.eval, HeldOutPixels(data.processor)), (data.train, TrainingPixels.of(data))):
        seen = pixels(part[:1])["pixel_values"][0] * std + mean
        assert seen.shape == (3, size, size)
        colours = Counter(tuple(pixel) for pixel in seen.round().int().flatten(1).T.tolist())
        for colour in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            assert colours[colour] > 0.2 * size**2


def test_random_augmentation_sees_the_same_part_of_a_picture(tmp_path, monkeypatch):
    from hf_tfamily.data import augmentation

    monkeypatch.setattr(augmentation, "rand_augment", lambda picture: picture)
    smooth = np.linspace(0, 255, 60)[None, :, None] + np.zeros((40, 1, 3))
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / name / f"{number}.png")
    arguments = {"dataset": str(tmp_path), "size": 16, "eval_share": 0.5, "augmentation": {"rand_augment": True}}
    for resize in ("auto", None):
        data = load_data({"source": "hub_labelled_images", **arguments, "resize": resize})
        trained = TrainingPixels.of(data)(data.train[:1])["pixel_values"]
        torch.testing.assert_close(
            trained, HeldOutPixels(data.processor)(data.train[:1])["pixel_values"], atol=0.02, rtol=0
        )

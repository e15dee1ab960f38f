"""Pictures to ids and back: exact, in the order it says, and nothing silently bent into shape."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import hf_tfamily  # noqa: F401
from hf_tfamily.modeling.image_processing_tokens import ImageTokenProcessor
from tests.reference import image_transformer as loops


@pytest.fixture
def digits():
    """8x8 grey, 17 levels, 10 classes."""
    return ImageTokenProcessor(height=8, width=8, channels=1, levels=17, num_classes=10)


@pytest.fixture
def colours():
    """2x3 RGB, 256 levels, no classes."""
    return ImageTokenProcessor(height=2, width=3, channels=3)


def random_levels(processor, count, seed=0):
    shape = (count, processor.height, processor.width, processor.channels)
    return np.random.default_rng(seed).integers(0, processor.levels, shape)


def test_order_is_row_column_channel(colours):
    image = np.arange(18).reshape(2, 3, 3)
    ids = colours(image)["input_ids"]
    expected = [256]
    for row in range(2):
        for column in range(3):
            for channel in range(3):
                expected.append(image[row, column, channel])
    assert ids.tolist() == [expected]


def test_every_form_of_image_gives_the_same_ids(colours):
    values = random_levels(colours, 2).astype(np.uint8)
    expected = colours(values)["input_ids"]
    assert expected.shape == (2, 19)
    pictures = [Image.fromarray(value) for value in values]
    for images in (list(values), pictures, torch.from_numpy(values), tuple(pictures)):
        np.testing.assert_array_equal(colours(images)["input_ids"], expected)
    np.testing.assert_array_equal(colours(pictures[0])["input_ids"], expected[:1])


def test_grey_images_need_no_channel_axis(digits):
    values = random_levels(digits, 3)
    classes = [0, 9, 4]
    with_axis = digits(values, classes=classes)["input_ids"]
    np.testing.assert_array_equal(digits(values[..., 0], classes=classes)["input_ids"], with_axis)
    np.testing.assert_array_equal(digits(values[1, ..., 0], classes=9)["input_ids"], with_axis[1:2])
    assert with_axis[:, 0].tolist() == [17, 26, 21]


def test_pictures_come_back_exactly_with_any_number_of_levels():
    for levels in range(2, 257):
        processor = ImageTokenProcessor(height=1, width=levels, channels=1, levels=levels)
        ids = processor(np.arange(levels)[None])["input_ids"]
        (picture,) = processor.decode(ids)
        assert (picture.getpixel((0, 0)), picture.getpixel((levels - 1, 0))) == (0, 255)
        np.testing.assert_array_equal(processor(picture)["input_ids"], ids)


def test_return_tensors(digits):
    ids = digits(random_levels(digits, 2), classes=[1, 2], return_tensors="pt")["input_ids"]
    assert ids.dtype == torch.int64
    assert ids.shape == (2, 65)


def test_start_tokens(digits, colours):
    assert digits.start_tokens(classes=[3, 0], return_tensors="pt")["input_ids"].tolist() == [[20], [17]]
    assert colours.start_tokens(2)["input_ids"].tolist() == [[256], [256]]
    assert digits.start_token_ids == list(range(17, 27))
    assert colours.start_token_ids == [256]


def test_decode_drops_the_start_token(colours):
    values = random_levels(colours, 2)
    pictures = colours.decode(torch.from_numpy(colours(values)["input_ids"]))
    for picture, value in zip(pictures, values):
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), value)


def test_incomplete_images_are_refused_or_filled_on_request(colours):
    ids = colours(np.full((2, 3, 3), 9))["input_ids"][:, :10]
    with pytest.raises(ValueError, match="lack 9 of 18 values"):
        colours.decode(ids)
    assert colours.decode_values(ids, fill=7).ravel().tolist() == [9] * 9 + [7] * 9
    with pytest.raises(ValueError, match=r"fill must lie in 0 to 255"):
        colours.decode(ids, fill=256)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1] * 19], "first id must be a start token, one of 256"),
        ([[256, 256] + [0] * 17], "behind the start token must lie in 0 to 255"),
        ([[256] + [0] * 19], r"must be \[B, 1 \+ 18\]"),
        ([[]], "must be"),
        ([[256.0] + [0.0] * 18], "ids must be integers"),
    ],
)
def test_decode_names_bad_ids(colours, ids, message):
    with pytest.raises(ValueError, match=message):
        colours.decode(ids)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((2, 3, 3), 256), "must lie in 0 to 255"),
        (np.full((2, 3, 3), -1), "must lie in 0 to 255"),
        (np.zeros((2, 3, 3)), "images must be integers, got float64"),
        (np.zeros((3, 2, 3), int), r"must be \[2, 3, 3\]"),
        (np.zeros((2, 3), int), r"must be \[2, 3, 3\]"),
        (np.zeros((2, 3, 4), int), r"must be \[2, 3, 3\]"),
        (Image.new("L", (3, 2)), r"mode 'RGB', got 'L'; use image.convert\('RGB'\)"),
        (Image.new("RGB", (2, 3)), r"must be \[2, 3, 3\]"),
        ([], "list of images is empty"),
        (np.zeros((0, 2, 3, 3), int), r"empty batch: got shape \[0, 2, 3, 3\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(colours, image, message):
    with pytest.raises(ValueError, match=message):
        colours(image)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, "Give classes: one from 0 to 9"),
        ([10], r"from 0 to 9, got \[10\]"),
        ([-1], r"from 0 to 9, got \[-1\]"),
        ([1.0], "classes must be integers"),
        ([1, 2], "1 images but 2 classes"),
    ],
)
def test_classes_that_do_not_fit_are_refused(digits, classes, message):
    with pytest.raises(ValueError, match=message):
        digits(np.zeros((8, 8), int), classes=classes)


def test_classes_where_there_are_none_are_refused(colours):
    with pytest.raises(ValueError, match="knows no classes"):
        colours(np.zeros((2, 3, 3), int), classes=[0])
    with pytest.raises(ValueError, match="knows no classes"):
        colours.start_tokens()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 0),
        ("width", 1.5),
        ("channels", 2),
        ("levels", 257),
        ("levels", 1),
        ("num_classes", -1),
        ("order", "z"),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*{value!r}"):
        ImageTokenProcessor(**{field: value})


def test_save_and_load(digits, tmp_path):
    digits.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ImageTokenProcessor
    assert loaded.to_dict() == digits.to_dict()
    assert AutoImageProcessor.from_pretrained(tmp_path, levels=16).levels == 16
    assert "auto_map" not in json.loads((tmp_path / "preprocessor_config.json").read_text())


WITHOUT_PACKAGE = """
import sys
sys.modules["hf_tfamily"] = None  # importing it fails
import numpy as np
from transformers.models.auto.image_processing_auto import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert processor.__module__.startswith("transformers_modules"), processor.__module__
ids = processor(np.full((8, 8), 16), classes=[3], return_tensors="pt")["input_ids"]
assert ids.tolist() == [[20] + [16] * 64], ids
assert processor.decode(ids)[0].getpixel((0, 0)) == 255
processor.save_pretrained(sys.argv[2])
AutoImageProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
"""


@pytest.mark.slow
def test_loads_without_the_package(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageTokenProcessor, "_auto_class", None)  # put back what the next line sets
    ImageTokenProcessor.register_for_auto_class()
    digits.save_pretrained(tmp_path / "first")
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "first")) is ImageTokenProcessor
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, tmp_path / "first", tmp_path / "second"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("height", "width", "channels", "block"), [(4, 6, 1, [2, 3]), (5, 7, 3, [2, 3])])
def test_blocks_are_undone(height, width, channels, block, tmp_path):
    """Block by block, pixel by pixel inside, also where blocks do not divide the image; and back."""
    processor = ImageTokenProcessor(height, width, channels, order="blocks", block=block)
    values = random_levels(processor, 2)
    ids = processor(values)["input_ids"]
    order = loops.block_order(height, width, channels, *block)
    assert ids[0, 1:].tolist() == [values[0][place] for place in order]
    np.testing.assert_array_equal(processor.decode_values(ids), values)
    processor.save_pretrained(tmp_path)
    np.testing.assert_array_equal(ImageTokenProcessor.from_pretrained(tmp_path)(values)["input_ids"], ids)
    filled = processor.decode_values(ids[:1, :4], fill=7)
    assert (filled != 7).sum() <= 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": "blocks"}, "block is for order='blocks', and needed there"),
        ({"block": [2, 2]}, "block is for order='blocks'"),
        ({"order": "blocks", "block": [2]}, "block must be a height and a width"),
        ({"order": "blocks", "block": [0, 2]}, "block height must be an integer at least 1, got 0"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageTokenProcessor(4, 4, 1, **fields)

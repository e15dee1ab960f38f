"""Pictures are opened in one way: the same file gives the same tensor by every path, and broken ones are named."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from hf_tfamily.data import load_data, open_picture
from hf_tfamily.data.images import ImageTokenProcessor
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.tasks.image_classification import HeldOutPixels, TrainingPixels
from hf_tfamily.training import train

SIZE = 8
DARK = 16  # of 255
RAMP = np.linspace(0, 255, SIZE * SIZE).astype(np.uint8).reshape(SIZE, SIZE)


def upright_colours():
    """Left red, right blue; upper half bright, lower half dark."""
    colours = np.zeros((SIZE, SIZE, 3), np.uint8)
    colours[:, : SIZE // 2, 0] = colours[:, SIZE // 2 :, 2] = 255
    colours[SIZE // 2 :] //= 4
    return colours


def write_turned(file):
    """Lying on its side, with the note that it wants to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.fromarray(np.rot90(upright_colours()).copy()).save(file, exif=exif)


def write_half_transparent(file):
    """Red below, whose upper half is transparent; what the file holds there is black."""
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[SIZE // 2 :] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(file)


def write_transparent_palette(file):
    picture = Image.new("P", (SIZE, SIZE), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.paste(0, (0, 0, SIZE, SIZE // 2))
    picture.save(file, transparency=0)


def white_over_red():
    pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
    pixels[SIZE // 2 :] = (255, 0, 0)
    return pixels


def grey(levels):
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, axis=-1)


def write_16_bits(file):
    Image.fromarray(np.full((SIZE, SIZE), DARK * 257, np.uint16)).save(file)


# Name of the file -> what writes it, and what is to be seen, [H, W, 3].
FILES = {
    "turned.png": (write_turned, upright_colours()),
    "turned.webp": (lambda file: write_turned_losslessly(file), upright_colours()),
    "dark_16_bits.png": (write_16_bits, grey(np.full((SIZE, SIZE), DARK))),
    "dark_16_bits.tif": (write_16_bits, grey(np.full((SIZE, SIZE), DARK))),
    "dark_16_bits.pgm": (
        lambda file: file.write_bytes(f"P5 {SIZE} {SIZE} 65535\n".encode() + bytes([DARK, DARK]) * SIZE**2),
        grey(np.full((SIZE, SIZE), DARK)),
    ),
    "grey.png": (lambda file: Image.fromarray(RAMP).save(file), grey(RAMP)),
    "one_bit.png": (
        lambda file: Image.fromarray(RAMP > 127).save(file),
        grey(np.where(RAMP > 127, 255, 0)),
    ),
    "half_transparent.png": (write_half_transparent, white_over_red()),
    "half_transparent.PNG": (write_half_transparent, white_over_red()),
    "transparent_palette.png": (write_transparent_palette, white_over_red()),
    "palette.gif": (lambda file: Image.fromarray(white_over_red()).quantize(4).save(file), white_over_red()),
    "cmyk.tif": (lambda file: Image.fromarray(white_over_red()).convert("CMYK").save(file), white_over_red()),
}


def write_turned_losslessly(file):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright_colours()).copy()).save(file, exif=exif, lossless=True)


@pytest.fixture(params=FILES)
def seen(request, tmp_path):
    """(a folder of two classes with the same picture in four files, one of the files, what is to be seen)."""
    write, expected = FILES[request.param]
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            write(tmp_path / name / f"{number}{request.param}")
    return tmp_path, tmp_path / "a" / f"0{request.param}", expected


def test_the_same_file_is_the_same_tensor_by_every_path(seen, tmp_path):
    folder, file, expected = seen
    np.testing.assert_array_equal(np.asarray(open_picture(file)), expected)
    np.testing.assert_array_equal(np.asarray(load_image(open_picture(file))), expected)  # as pipelines do

    labelled = load_data(
        {"source": "hub_labelled_images", "dataset": str(folder), "size": SIZE, "resize": None, "eval_share": 0.5}
    )
    pixels = labelled.processor(Image.fromarray(expected), return_tensors="pt")["pixel_values"]
    for part in (labelled.train, labelled.eval):
        for transform in (HeldOutPixels(labelled.processor), TrainingPixels.of(labelled)):
            torch.testing.assert_close(transform(part[:2])["pixel_values"], pixels.expand(2, -1, -1, -1))
    sampled = labelled.processor([open_picture(file)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(sampled, pixels)

    tokens = load_data(
        {"source": "hub_images", "dataset": str(folder), "height": SIZE, "width": SIZE, "fit": True, "eval_share": 0.5}
    )
    for ids in (*tokens.train["input_ids"][:], *tokens.eval["input_ids"][:]):
        np.testing.assert_array_equal(ids[1:], expected.ravel())
    np.testing.assert_array_equal(tokens.processor(open_picture(file))["input_ids"][0, 1:], expected.ravel())


@pytest.mark.parametrize("name", ["turned.png", "dark_16_bits.png", "dark_16_bits.pgm"])
def test_the_token_processor_takes_pictures_as_they_are_opened(name, tmp_path):
    write, expected = FILES[name]
    write(tmp_path / name)
    channels = 3 if name == "turned.png" else 1
    ids = ImageTokenProcessor(SIZE, SIZE, channels)(Image.open(tmp_path / name))["input_ids"]
    np.testing.assert_array_equal(ids[0, 1:], expected[..., :channels].ravel())


def test_the_token_processor_names_what_converts():
    with pytest.raises(ValueError, match=r"mode 'RGB', got 'RGBA'; .* in_mode\(image, 'RGB'\)"):
        ImageTokenProcessor(SIZE, SIZE, 3)(Image.new("RGBA", (SIZE, SIZE)))


@pytest.mark.parametrize(
    ("values", "bits"), [(np.float32(0.5), 8), (np.float32(-1), 8), (np.int32(70000), 16), (np.int32(-1), 16)]
)
def test_grey_values_of_unknown_range_are_refused(values, bits, tmp_path):
    Image.fromarray(np.full((SIZE, SIZE), values)).save(tmp_path / "a.tif")
    with pytest.raises(
        ValueError, match=rf"a\.tif cannot be .* whole numbers from 0 to {2**bits - 1}, got values from"
    ):
        open_picture(tmp_path / "a.tif")


# ---------------------------------------------------------------------------------------------------------------------
# Broken files


def jpeg():
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(content, "JPEG")
    return content.getvalue()


BROKEN = {
    "cut_off.jpg": (jpeg()[:1500], "truncated"),
    "cut_off.JPG": (jpeg()[:1500], "truncated"),
    "cut_off.png": (None, "truncated|broken|end"),
    "text.jpg": (b"this is a letter", "in no format that Pillow knows"),
    "empty.png": (b"", "in no format that Pillow knows"),
}


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path):
    """A folder one of whose held-out files is broken, and its name and what is wrong with it."""
    content, reason = BROKEN[request.param]
    if content is None:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(buffer, "PNG")
        content = buffer.getvalue()[:4000]
    for split in ("train", "validation"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "whole.jpg").write_bytes(jpeg())
    (tmp_path / "validation" / "b" / request.param).write_bytes(content)
    return tmp_path, request.param, reason


@pytest.mark.parametrize("source", ["hub_labelled_images", "hub_images"])
def test_broken_held_out_pictures_are_named(source, broken):
    folder, name, reason = broken
    own = {"size": 16} if source == "hub_labelled_images" else {"fit": True}
    with pytest.raises(ValueError, match=rf"validation/b/{name} cannot be read as a picture: .*({reason})"):
        load_data({"source": source, "dataset": str(folder), "eval_split": "validation", **own})


def test_broken_pictures_are_named_before_training_begins(broken, tmp_path):
    folder, name, _ = broken
    overrides = [f"data.dataset={folder}", "data.size=16", "model.num_labels=2", "model.image_size=16"]
    recipe = load_recipe("swin_transformer/tiny", overrides)
    with pytest.raises(RecipeError, match=f"data: .*{name} cannot be read as a picture"):
        train(recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


def test_broken_pictures_inside_tables_are_named_by_row(monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": jpeg()}, {"bytes": jpeg()[:1500]}, None], "label": [0, 1, 0]}
    part = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: part)
    with pytest.raises(ValueError, match=r"x, split train: row 1 cannot be read as a picture: .*truncated"):
        load_data({"source": "hub_labelled_images", "dataset": "x"})
    part = part.select([0, 2])
    with pytest.raises(ValueError, match="x, split train: row 1 cannot be read as a picture: there is none"):
        load_data({"source": "hub_labelled_images", "dataset": "x"})


def test_pictures_to_sample_from_are_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg()[:1500])
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as a picture: .*truncated"):
        open_picture(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"none\.jpg cannot be read as a picture: there is no such file"):
        open_picture(tmp_path / "none.jpg")

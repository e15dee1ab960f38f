"""Enlarging pictures: the data, what does not fit them, and a run from training to samples."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from hf_tfamily import training
from hf_tfamily.card import folder_card
from hf_tfamily.data import EnlargementPairs, enlargement, load_data
from hf_tfamily.data.enlargement import shrink
from hf_tfamily.finished import evaluate, load_finished
from hf_tfamily.recipes import load_recipe
from hf_tfamily.tasks import task_of
from hf_tfamily.tasks.super_resolution import SuperResolutionTask, bicubic_bits_per_dim, pair_collator, psnr, ssim
from hf_tfamily_cli import app

TINY = [
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_encoder_layers=1",
    "model.num_attention_heads=2",
    "model.intermediate_size=16",
    "model.num_mixtures=2",
    "model.image_size=8",
    "model.source_image_size=4",
    "model.attention_patterns={type: block_2d, height: 4, width: 4, flange_height: 2, flange_width: 2}",
    "data.size=8",
    "data.source_size=4",
    "data.block=[4, 4]",
    "data.stride=8",
    "data.photos=[astronaut, coffee]",
    "data.eval_photos=[coffee]",
    "training.max_steps=2",
    "training.per_device_eval_batch_size=8",
]


@pytest.fixture(autouse=True)
def small_photos(monkeypatch):
    """Two pictures of 16x24 pixels instead of the photos."""
    pictures = {name: np.random.default_rng(i).integers(0, 256, (16, 24, 3)) for i, name in enumerate(["a", "c"])}
    monkeypatch.setattr("hf_tfamily.data.images._photo", lambda name: pictures[name[0]])


def recipe(*overrides):
    return load_recipe("image_transformer/super_resolution", [*TINY, *overrides])


def test_pairs_are_pictures_and_their_means():
    data = load_data(recipe().data)
    assert isinstance(data, EnlargementPairs)
    assert (len(data.train), len(data.eval)) == (6, 6)
    batch = pair_collator([data.train[0], data.train[5]])
    assert {name: list(ids.shape) for name, ids in batch.items()} == {"input_ids": [2, 48], "labels": [2, 192]}
    start = torch.full((2, 1), 256)
    large = data.processor.decode_values(torch.cat([start, batch["labels"]], dim=1))
    small = data.source_processor.decode_values(torch.cat([start, batch["input_ids"]], dim=1))
    np.testing.assert_array_equal(small, shrink(large, 4))
    assert small[0, 1, 2, 0] == round(large[0, 2:4, 4:6, 0].mean())


def test_psnr_is_that_of_an_error_of_one_step():
    """20 log10(255) dB."""
    assert psnr(np.full((2, 3), 7), np.full((2, 3), 8)) == pytest.approx(48.1308, abs=1e-4)


def test_structural_similarity_is_that_of_each_picture():
    picture = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3))
    assert ssim(picture, picture) == pytest.approx(1)
    assert ssim(np.concatenate([picture, picture]), np.concatenate([picture, 255 - picture])) < 0.5


def test_bicubic_interpolation_costs_less_on_smooth_pictures_than_on_noise(monkeypatch):
    data = load_data(recipe().data)
    ramp = np.broadcast_to(np.arange(24) * 5, (16, 24))[..., None].repeat(3, axis=-1)
    monkeypatch.setattr("hf_tfamily.data.images._photo", lambda name: ramp)
    smooth = load_data(recipe().data)
    assert bicubic_bits_per_dim(smooth) < 5 < 8 < bicubic_bits_per_dim(data)


def test_the_class_of_data_chooses_the_task():
    assert isinstance(task_of(recipe()), SuperResolutionTask)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image_size=16", r"image_size=\[16, 16\] does not fit the data; it has \[8, 8\]"),
        ("model.source_image_size=8", r"source_image_size=\[8, 8\] does not fit the data; it has \[4, 4\]"),
        ("data.block=null", r"blocks are \[4, 4\], those of the data none"),
        ("data.block=[4, 2]", r"blocks are \[4, 4\], those of the data \[4, 2\]"),
    ],
)
def test_models_that_do_not_fit_are_refused(override, message):
    changed = recipe(override)
    with pytest.raises(ValueError, match=message):
        SuperResolutionTask().build_model(AutoConfig.for_model(**changed.model), load_data(changed.data))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="source_size must be a divisor of size=8, got 3"):
        enlargement.photo_enlargements(size=8, source_size=3)


def test_from_training_to_enlarged_pictures(tmp_path):
    folder = training.train(recipe(), tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["bits_per_dim"] < 20
    assert metrics["psnr_nearest"] < 48 < metrics["small_psnr_nearest"]
    assert {"psnr_bicubic", "ssim_bicubic", "psnr_t0.5", "ssim_t1", "small_psnr_t0.8"} <= set(metrics)
    for name, figure in evaluate(folder, progress=False).items():
        assert figure == pytest.approx(metrics[name], abs=1e-4), name
    assert Image.open(folder / "samples.png").size[0] > 100
    card = ModelCard.load(folder / "README.md")
    assert "ImageTokenProcessor(4, 4, 3)" in card.text
    assert "what bicubic interpolation leaves: " in card.text
    assert "model, T = 0.5 " in card.text
    assert card.data.pipeline_tag == "image-to-image"
    assert folder_card(folder, with_code=True).data.pipeline_tag == "image-to-image"
    assert load_finished(folder).processor.block == [4, 4]

    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    run = CliRunner().invoke(
        app, ["sample", str(folder), "--pictures", str(tmp_path / "red.png"), "--output", str(tmp_path / "large.png")]
    )
    assert run.exit_code == 0, run.output
    assert (tmp_path / "large.png").exists()
    nothing = CliRunner().invoke(app, ["sample", str(folder)])
    assert nothing.exit_code == 2
    assert "--pictures FILE" in nothing.output
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).config.is_encoder_decoder

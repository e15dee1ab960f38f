"""Masked language modelling from the recipe to the figures."""

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_tfamily.data import load_data
from hf_tfamily.modeling.modeling_vanilla_encoder import VanillaEncoderForMaskedLM
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.tasks import task_of
from hf_tfamily.tasks.masked_text import MaskedTextTask, _hidden_batches
from hf_tfamily.training import train

MICRO = [
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "data.length=31",
    "data.eval_books=[Ruth]",
    "training.max_steps=4",
    "training.per_device_train_batch_size=8",
    "training.eval_steps=4",
    "training.logging_steps=2",
    "training.save_steps=4",
]


def micro(*overrides):
    return load_recipe("vanilla_encoder/bible", [*MICRO, *overrides])


@pytest.fixture(scope="module")
def data():
    return load_data(micro().data)


def test_a_run_leaves_figures_and_samples(tmp_path):
    folder = train(micro(), tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["bits_per_hidden_token"] < 12
    assert 0 <= metrics["accuracy"] <= 1
    assert type(AutoModelForMaskedLM.from_pretrained(folder)) is VanillaEncoderForMaskedLM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.mask_token_id, tokenizer.bos_token_id) == (257, 256)
    assert (folder / "samples.txt").read_text().count("--- filled in ---") == 6
    assert "Held-out bits per hidden token" in (folder / "README.md").read_text()


def test_figures_do_not_depend_on_the_batch(data):
    torch.manual_seed(0)
    recipe = micro()
    assert isinstance(task_of(recipe), MaskedTextTask)
    model = VanillaEncoderForMaskedLM(VanillaEncoderForMaskedLM.config_class(**{**recipe.model, "dropout": 0.0}))
    task = MaskedTextTask()
    found = [task.evaluate(model, data, batch_size, progress=False) for batch_size in (7, 64, 64)]
    assert found[1] == found[2]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_starts_are_never_hidden(data):
    batches = list(_hidden_batches(data, 64))
    labels = torch.cat([batch["labels"] for batch in batches])
    input_ids = torch.cat([batch["input_ids"] for batch in batches])
    assert (input_ids[:, 0] == 256).all()
    assert (labels[:, 0] == -100).all()
    hidden = labels != -100
    assert 0.13 < hidden[:, 1:].float().mean() < 0.17
    assert 0.75 < (input_ids[hidden] == 257).float().mean() < 0.85


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=257", "vocab_size=257 is too small: the data has 258 ids"),
        ("model.max_position_embeddings=31", "max_position_embeddings=31 is too small: an example has 32 ids"),
    ],
)
def test_unfit_recipes_are_refused(override, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        train(micro(override), tmp_path / "run")

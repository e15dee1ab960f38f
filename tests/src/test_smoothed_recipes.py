"""`label_smoothing_factor` in a recipe: what training smooths, whatever the task; what is held out is not smoothed."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Trainer

from hf_tfamily import training
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.training import train
from tests.src.test_masked_text import MICRO as MASKED
from tests.src.test_recurrent_text import MODELS
from tests.src.test_recurrent_text import RECIPE as STREAM
from tests.src.test_super_resolution import TINY as ENLARGED

SMOOTHING = 0.1
OPTIONS = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "logging_steps": 1,
    "eval_steps": 1,
    "eval_strategy": "steps",
    "save_strategy": "no",
    "label_smoothing_factor": SMOOTHING,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}


def one_step(name, overrides, folder, monkeypatch):
    """The Trainer and the batches of a run of one step that changes no weight."""
    config = AutoConfig.for_model(load_recipe(name, overrides).model["model_type"])
    rates = [f"model.{field.name}=0.0" for field in dataclasses.fields(config) if field.name.endswith("dropout")]
    recipe = load_recipe(name, [*overrides, *rates, *(f"training.{key}={value}" for key, value in OPTIONS.items())])
    seen, stepping = [], Trainer.training_step

    def remember(self, model, inputs, *args, **kwargs):
        seen.append((self, dict(inputs)))
        return stepping(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", remember)
    monkeypatch.setattr(training, "_finish", lambda *args: None)
    train(recipe, folder / "run")
    return seen[0][0], [batch for _, batch in seen]


def losses_written_out(model, batches, smoothing):
    """Of every target of batches [B, T], in order; a memory goes on from batch to batch."""
    found, memory = [], {}
    for batch in batches:
        targets = batch.get("shift_labels", batch["labels"])
        inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(targets)
        with torch.no_grad():
            outputs = model(**inputs, **memory)
        if hasattr(model.config, "mem_len"):
            memory = {"past_key_values": outputs.past_key_values, "use_cache": True}
        nats = -outputs.logits.double().log_softmax(dim=-1)
        own = nats.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        found.append(((1 - smoothing) * own + smoothing * nats.mean(dim=-1))[targets != -100])
    return torch.cat(found)


@pytest.fixture
def recipe_of(micro_file, tmp_path, monkeypatch):
    """File and overrides by task."""

    def stream(model, *fields):
        file = tmp_path / f"{model}.yaml"
        file.write_text(STREAM.format(model=model, field=MODELS[model]))
        return str(file), list(fields)

    pictures = {name: np.random.default_rng(i).integers(0, 256, (16, 24, 3)) for i, name in enumerate(["a", "c"])}
    monkeypatch.setattr("hf_tfamily.data.images._photo", lambda name: pictures[name[0]])
    return {
        "token sequences": (str(micro_file), ["model.tie_word_embeddings=true"]),  # untied logits are 0 at first
        "segments without a memory": stream("rope_decoder"),
        "adaptive softmax": stream("transformer_xl", "model.cutoffs=[40, 100]", "model.div_val=2"),
        "recurrence": stream("xl_sparse"),
        "masked text": ("vanilla_encoder/bible", MASKED),
        "categorical super-resolution": (
            "image_transformer/super_resolution",
            [*ENLARGED, "model.output=categorical", "model.predict_residual=false"],
        ),
        "mixture": ("image_transformer/super_resolution", ENLARGED),
    }


TASKS = ["token sequences", "segments without a memory", "adaptive softmax", "recurrence", "masked text"]


@pytest.mark.parametrize("task", [*TASKS, "categorical super-resolution"])
def test_a_run_smooths_every_target_once(task, recipe_of, tmp_path, monkeypatch):
    trainer, batches = one_step(*recipe_of[task], tmp_path, monkeypatch)
    assert len(batches) == 2
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    expected = losses_written_out(model, batches, SMOOTHING).mean().item()
    plain = losses_written_out(model, batches, 0.0).mean().item()
    history = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert history["loss"] == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert abs(expected - plain) > 1e-4
    held_out = next(iter(trainer.get_eval_dataloader()))
    unsmoothed = losses_written_out(model, [{key: held_out[key] for key in held_out}], 0.0).mean().item()
    assert model(**held_out).loss.item() == pytest.approx(unsmoothed, abs=1e-5, rel=1e-5)


def test_a_mixture_of_logistics_is_refused_before_training(recipe_of, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"label_smoothing_factor.*is for output='categorical'"):
        one_step(*recipe_of["mixture"], tmp_path, monkeypatch)

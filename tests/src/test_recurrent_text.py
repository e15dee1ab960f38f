"""The task of reading on: what a run leaves, what is measured, and what is refused."""

import json
import math

import pytest
from typer.testing import CliRunner

from hf_tfamily.data import load_data
from hf_tfamily.finished import evaluate, load_finished
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.stream_evaluation import stream_losses
from hf_tfamily.training import train
from hf_tfamily_cli import app

RECIPE = """
title: The Bible by a model of a few thousand parameters
model:
  model_type: {model}
  vocab_size: 257
  hidden_size: 16
  num_hidden_layers: 2
  num_attention_heads: 2
  {field}
data: {{source: bible_stream, length: 16, eval_books: [Jude]}}
training:
  max_steps: 3
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 8
  learning_rate: 1e-2
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 3
  save_steps: 2
"""
MODELS = {
    "transformer_xl": "mem_len: 12",
    "compressive_transformer": "mem_len: 12",
    "memorizing_transformer": "mem_len: 12\n  memory_size: 40\n  num_neighbors: 4",
    "xl_sparse": "mem_len: 12",
    "rope_decoder": "max_position_embeddings: 32",
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """A finished run; do not write into it."""
    file = tmp_path_factory.mktemp("recipes") / "micro.yaml"
    file.write_text(RECIPE.format(model=request.param, field=MODELS[request.param]))
    return train(load_recipe(file), tmp_path_factory.mktemp("runs") / "micro")


def test_a_run_measures_bits_per_byte_and_goes_on_with_verses(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    finished = load_finished(folder)
    data = load_data(finished.recipe.data)
    losses = stream_losses(finished.model, data.eval, 16, 256, num_streams=8)
    assert metrics["bits_per_byte"] == pytest.approx(losses.mean() / math.log(2), abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(losses.sum() / data.eval_words), rel=1e-3)
    assert evaluate(folder, batch_size=8, progress=False)["bits_per_byte"] == pytest.approx(metrics["bits_per_byte"])
    assert f"{metrics['bits_per_byte']:.4f}" in (folder / "README.md").read_text()
    samples = (folder / "samples.txt").read_text(errors="replace")
    assert samples.startswith("Jude, the servant of Jesus Christ")
    assert samples.count("--- the model goes on ---") == 4


def test_command_line(folder, tmp_path):
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    arguments = ["evaluate", str(folder), "--context", "8,24", "--plot", str(tmp_path / "places.png")]
    if model_type == "compressive_transformer":  # the compressed memory alone is 128
        arguments += ["--attention-length", "140"]
    else:
        arguments += ["--attention-length", "20"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for expected in ("Held-out bits per byte: ", "with 8 tokens of context: ", "with 24 tokens of context: "):
        assert expected in result.output
    assert (tmp_path / "places.png").stat().st_size > 1000
    result = CliRunner().invoke(app, ["sample", str(folder), "--count", "1"])
    assert result.exit_code == 0, result.output


def test_says_what_does_not_fit(tmp_path):
    file = tmp_path / "micro.yaml"
    file.write_text(RECIPE.format(model="transformer_xl", field=MODELS["transformer_xl"]))
    for override, message in (
        ("model.vocab_size=100", "vocab_size=100 is too small: the data has 257 ids"),
        ("training.auto_find_batch_size=true", "auto_find_batch_size would mix up the streams"),
    ):
        with pytest.raises(RecipeError, match=message):
            train(load_recipe(file, [override]), tmp_path / "run")
    file.write_text(RECIPE.format(model="rope_decoder", field="max_position_embeddings: 8"))
    with pytest.raises(RecipeError, match="max_position_embeddings=8 is too small: a segment has 16 tokens"):
        train(load_recipe(file), tmp_path / "run")


def test_options_of_other_tasks_are_refused(finished_once):
    with pytest.raises(ValueError, match="This model cannot be evaluated with --attention-length; options here: none"):
        evaluate(finished_once, attention_length=20, progress=False)


BIBLE = (
    *("transformer_xl/bible", "compressive_transformer/bible", "memorizing_transformer/bible", "xl_sparse/bible"),
    "rope_decoder/bible",
)
BASELINE = "sparse_transformer/bible_no_memory"
PAPER_MILLIONS = {
    "transformer_xl/enwik8_12l": 41.06,
    "transformer_xl/enwik8_24l": 277.2,
    "transformer_xl/wikitext103_base": 151.1,
    "transformer_xl/wikitext103_large": 285.2,
}


def test_recipes_on_the_bible_share_one_budget():
    """As many steps, bytes in a step, and parameters to 0.1 %, the baseline without memory included."""
    recipes = [load_recipe(name) for name in (*BIBLE, BASELINE)]
    assert len({recipe.training["max_steps"] for recipe in recipes}) == 1
    rows = [recipe.training["per_device_train_batch_size"] for recipe in recipes]
    assert {recipe.data["length"] * count for recipe, count in zip(recipes, rows)} == {2048}
    parameters = [recipe.parameters for recipe in recipes]
    assert max(parameters) / min(parameters) < 1.001
    assert len({tuple(load_data(recipe.data).eval[:100]) for recipe in recipes}) == 1


@pytest.mark.parametrize(("name", "millions"), PAPER_MILLIONS.items())
def test_paper_recipes_read_streams_and_say_their_size(name, millions):
    recipe = load_recipe(name)
    assert recipe.parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert f"{millions}M" in recipe.notes[0]
    assert recipe.data["length"] == recipe.model["mem_len"]

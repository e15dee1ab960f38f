"""Recipes: those that come with the package hold what they say; changes and mistakes are told apart."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, TrainingArguments

import hf_tfamily  # noqa: F401
from hf_tfamily.data import load_data
from hf_tfamily.recipes import RecipeError, list_recipes, load_recipe
from hf_tfamily.tasks import task_of

DIGITS = "sparse_transformer/digits"
PAPER_MILLIONS = {"cifar10": 59, "enwik8": 95, "imagenet64": 152, "music": 152}


def build(recipe):
    """The recipe's model without memory for its weights."""
    with torch.device("meta"):
        return task_of(recipe).auto_class.from_config(AutoConfig.for_model(**recipe.model))


def write(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_states_its_exact_number_of_parameters(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.title
    assert recipe.reference
    assert recipe.parameters == sum(p.numel() for p in build(recipe).parameters())


@pytest.mark.parametrize(("name", "millions"), PAPER_MILLIONS.items())
def test_paper_recipes_have_the_papers_size(name, millions):
    recipe = load_recipe(f"sparse_transformer/{name}")
    assert round(recipe.parameters / 1e6) == millions
    assert f"{recipe.parameters / 1e6:.1f}M" in recipe.notes[0]
    assert re.search(r"section 7\.\d", recipe.reference)


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_accepted_by_the_stock_training_arguments(name, tmp_path):
    TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none", **load_recipe(name).training)


@pytest.mark.parametrize("name", ["digits", "photo_crops", "bible"])
def test_recipes_on_installed_data_fit_it(name):
    recipe = load_recipe(f"sparse_transformer/{name}", ["data.stride=32"] if name == "photo_crops" else [])
    data = load_data(recipe.data)
    config = AutoConfig.for_model(**recipe.model)
    assert (config.vocab_size, config.max_position_embeddings) == (data.vocab_size, data.dims)


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe(DIGITS).title = "mine"


def test_overrides_are_yaml_and_reach_into_lists():
    recipe = load_recipe(
        DIGITS,
        [
            "model.num_hidden_layers=2",
            "model.attention_patterns.0.window=4",
            "model.attention_patterns.1={type: local, window: 3}",
            "model.qk_head_dim=null",
            "training.learning_rate=1e-3",
            "training.eval_strategy=no",
            "training.bf16=true",
            "data.class_conditional=false",
        ],
    )
    assert recipe.model["num_hidden_layers"] == 2
    assert recipe.model["attention_patterns"] == [{"type": "local", "window": 4}, {"type": "local", "window": 3}]
    assert recipe.model["qk_head_dim"] is None
    assert recipe.training["learning_rate"] == 1e-3
    assert recipe.training["eval_strategy"] == "no"
    assert recipe.training["bf16"] is True
    assert recipe.data["class_conditional"] is False
    assert recipe.parameters is None
    assert load_recipe(DIGITS).model["num_hidden_layers"] != 2


def test_the_stated_number_of_parameters_stays_where_the_model_stays():
    assert load_recipe(DIGITS, ["training.max_steps=1"]).parameters == load_recipe(DIGITS).parameters


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=2", "'num_layers'; did you mean 'num_hidden_layers'"),
        ("training.learning_rat=1", "did you mean 'learning_rate'"),
        ("data.class_condition=true", "did you mean 'class_conditional'"),
        ("data.source=digit", "unknown data source 'digit'; did you mean 'digits'"),
        ("modle.hidden_size=1", "no section 'modle'; did you mean 'model'"),
        ("title=mine", "written section.key=value"),
        ("model.hidden_size", "written section.key=value"),
        ("model.=1", "written section.key=value"),
        ("model.attention_patterns.2.window=1", "'2' is no place in a list of 2; use 0 to 1"),
        ("model.attention_patterns.x=1", "'x' is no place in a list"),
        ("model.hidden_size.x=1", "model.hidden_size is 128; nothing is inside it"),
        ("training.lr_scheduler_kwargs.min_lr=1", "no key 'lr_scheduler_kwargs'"),
        ("model.model_type=sparse_tranformer", "did you mean 'sparse_transformer'"),
        ("model.hidden_size=[1", "not readable as YAML"),
    ],
)
def test_mistaken_overrides_are_named(override, message):
    with pytest.raises(RecipeError, match=f"(?i){re.escape(message)}"):
        load_recipe(DIGITS, [override])


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'sparse_transformer/digits'"):
        load_recipe("sparse_transformer/digit")


def test_a_users_own_file(tmp_path):
    file = write(
        tmp_path,
        "title: mine\nmodel: {model_type: llama, hidden_size: 8}\ndata: {source: digits}\ntraining: {max_steps: 1}\n",
    )
    recipe = load_recipe(file, ["training.max_steps=2"])
    assert (recipe.name, recipe.title, recipe.notes, recipe.parameters) == (str(file), "mine", (), None)
    assert recipe.training == {"max_steps": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "a recipe is a mapping"),
        ("title: x\nmodel: {model_type: llama}\ndata: {source: digits}", "'training' is missing"),
        ("title: x\nmodel: 3\ndata: {}\ntraining: {}", "model must be a mapping"),
        ("title: x\nmodels: {}", "no key 'models'; did you mean 'model'"),
        ("title: x\nmodel: {}\ndata: {source: digits}\ntraining: {}", "unknown model.model_type 'None'"),
        ("title: x\nmodel: {model_type: llama}\ndata: {source: text_file}\ntraining: {}", "needs the argument 'path'"),
        ("title: [", "not readable as YAML"),
        ("title: x\nnotes: one\nmodel: {}\ndata: {}\ntraining: {}", "notes must be a list, got 'one'"),
    ],
)
def test_mistaken_files_are_named(tmp_path, text, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(write(tmp_path, text))


@pytest.mark.slow
def test_reading_recipes_imports_no_data_package():
    code = (
        "import sys; from hf_tfamily.recipes import *; [load_recipe(name) for name in list_recipes()];"
        "print([m for m in ('datasets', 'sklearn', 'skimage', 'pythonbible', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

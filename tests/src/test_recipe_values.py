"""Values of recipes: YAML 1.2's types and no key twice, and the type that every field is annotated as."""

import inspect
import json
from dataclasses import fields

import pytest
import yaml
from transformers import TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

import hf_tfamily_cli
from hf_tfamily.auto import SYSTEMS
from hf_tfamily.data import SOURCES, check_data, load_data
from hf_tfamily.data.augmentation import Augmentation
from hf_tfamily.pattern_views import parse_pattern
from hf_tfamily.recipe_yaml import read_yaml, write_yaml
from hf_tfamily.recipes import RecipeError, list_recipes, load_recipe
from hf_tfamily.tasks import task_of
from hf_tfamily.training import recipe_yaml, train
from hf_tfamily.value_types import annotations_of, fits

DIGITS = "sparse_transformer/digits"
MINE = """title: mine
model: {model_type: llama, hidden_size: 8}
data:
  source: text_file
  path: a
training: {max_steps: 1}
"""


def refused(name, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{MINE}data: {{source: digits}}\n", "line 7: the key 'data' is given twice, first in line 3"),
        (
            MINE.replace("  path: a\n", "  path: a\n  path: b\n"),
            "line 6: the key 'path' is given twice, first in line 5",
        ),
        (MINE.replace("size: 8", "size: 8, 'hidden_size': 9"), "line 2: the key 'hidden_size' is given twice"),
        (MINE.replace("max_steps: 1", "lr_scheduler_kwargs: {a: 1, a: 2}"), "line 6: the key 'a' is given twice"),
    ],
)
def test_keys_that_are_given_twice_are_refused_by_name_and_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert message in refused(tmp_path / "mine.yaml")


def test_what_is_no_yaml_is_said_in_one_line():
    assert "not readable as YAML" in refused(DIGITS, "model.hidden_size=[1")


def test_keys_given_twice_on_the_command_line():
    assert "the key 'window' is given twice" in refused(DIGITS, "model.attention_patterns.0={window: 1, window: 2}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1:30", "1:30"), ("1:30.5", "1:30.5"), ("no", "no"), ("on", "on"), ("y", "y"), ("2024-01-01", "2024-01-01")),
        *(("010", 10), ("0o10", 8), ("0x1F", 31), ("0b11", 3), ("-3", -3), ("1_000", 1000), ("+7", 7)),
        *(("1e-3", 1e-3), ("1.5e3", 1500.0), (".5", 0.5), ("-.inf", -float("inf")), ("true", True), ("False", False)),
        *(("null", None), ("~", None), ("", None), ("'010'", "010"), ("=", "=")),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read_yaml(f"key: {text}")["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "value",
    [
        "1e-3",
        "1:30",
        "no",
        "0o17",
        "2024-01-01",
        "true",
        "null",
        "",
        "010",
        "1_0",
        10,
        -1,
        1e-5,
        3e20,
        True,
        None,
        "=",
        [],
    ],
)
def test_what_is_written_is_read_back(value):
    found = read_yaml(write_yaml({"key": value}))["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_of_the_package_come_back_from_their_file(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert (again.model, again.data, again.training, again.notes) == (
        *(recipe.model, recipe.data, recipe.training, recipe.notes),
    )
    yaml.safe_load(recipe_yaml(recipe))  # by YAML 1.1 as well


# ---------------------------------------------------------------------------------------------------------------------
# Types

# One value of every type that YAML has.
VALUES = ["sixteen", "no", 16.5, 16.0, 3, True, None, [1.5], ["a"], {"a": 1}]


@pytest.mark.parametrize("source", SOURCES)
def test_every_argument_of_every_source_has_its_type(source):
    parameters, hints = inspect.signature(SOURCES[source]).parameters, annotations_of(SOURCES[source])
    needed = {name: "x" for name, parameter in parameters.items() if parameter.default is parameter.empty}
    for name in parameters:
        assert name in hints
        wrong = [value for value in VALUES if not fits(value, hints[name])]
        assert wrong
        for value in wrong:
            with pytest.raises(ValueError, match=rf"{source}.*{name} must be .*, got "):
                check_data({"source": source, **needed, name: value})


def test_the_types_that_are_meant():
    assert fits("no", bool) is fits(1, bool) is False
    assert fits(16.0, int) is fits(True, int) is fits("16", int) is False
    assert fits(16, float) is fits(16.5, float) is True
    assert fits(True, float) is fits("1e-3", float) is False
    assert fits(None, int | None) is True
    assert fits(None, int) is fits([1], int) is fits(3, str) is False
    assert fits([1, 2, 3], tuple[int, int, int]) is True
    assert fits([1, 2.5, 3], tuple[int, int, int]) is fits("abc", tuple[str, ...]) is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.length=16.0", "length must be a number without a fraction, got 16.0"),
        ("data.length=sixteen", "length must be a number without a fraction, got 'sixteen'"),
        ("data.length=[1]", "length must be a number without a fraction, got [1]"),
        ("data.length=null", "length must be a number without a fraction, got None"),
        ('data.own_bytes="no"', "own_bytes must be true or false, got 'no'"),
        ("data.own_bytes=no", "own_bytes must be true or false, got 'no'"),
        ("data.path=3", "path must be text or a list, each entry text, got 3"),
        ("data.sizes=3", "sizes must be a list, each entry a number without a fraction or null, got 3"),
        (
            "data.sizes=[1, 2, 1:30]",
            "sizes must be a list, each entry a number without a fraction or null, got [1, 2, '1:30']",
        ),
        ("model.hidden_size=16.0", "model.hidden_size must be a number without a fraction, got 16.0"),
        ("model.hidden_size=[16]", "model.hidden_size must be a number without a fraction, got [16]"),
        ("model.dtype=float61", "model.dtype must be float32, float64, float16 or bfloat16, got 'float61'"),
        ("model.dtype=int8", "model.dtype must be float32, float64, float16 or bfloat16, got 'int8'"),
        ("model.dtype=nn", "model.dtype must be float32, float64, float16 or bfloat16, got 'nn'"),
        ("training.max_steps=4.0", "training.max_steps must be a number without a fraction, got 4.0"),
        ("training.max_steps=1:30", "training.max_steps must be a number without a fraction, got '1:30'"),
        ("training.bf16=yes", "training.bf16 must be true or false or null, got 'yes'"),
        ("training.learning_rate=null", "training.learning_rate must be a number, got None"),
        ("training.lr_scheduler_kwargs=3", "training.lr_scheduler_kwargs must be"),
    ],
)
def test_overrides_of_another_type_are_refused(override, message):
    found = refused("transformer_xl/enwik8_12l", override)
    if override == "training.bf16=yes":
        message = message.replace(" or null", "")
    assert message in found


def wrong_values(field, hint):
    """Two values that are not of the annotated type; some fields take anything."""
    return [value for value in VALUES if not fits(value, hint) and value != field.default][:2]


@pytest.mark.parametrize("system", [*(system.name for system in SYSTEMS), "llama", "bert", "swin"])
def test_every_field_of_a_config_has_its_type(system, tmp_path):
    hints, checked, file = annotations_of(CONFIG_MAPPING[system]), 0, tmp_path / "mine.yaml"
    file.write_text(f"title: mine\nmodel: {{model_type: {system}}}\ndata: {{source: digits}}\ntraining: {{}}\n")
    for field in fields(CONFIG_MAPPING[system]):
        for value in wrong_values(field, hints[field.name]) if field.name in hints else []:
            assert f"model.{field.name} must be " in refused(file, f"model.{field.name}={json.dumps(value)}")
            checked += 1
    assert checked > 20


def test_every_field_of_the_training_arguments_has_its_type():
    hints = annotations_of(TrainingArguments)
    assert set(hints) >= {field.name for field in fields(TrainingArguments)}
    for field in fields(TrainingArguments):
        for value in wrong_values(field, hints[field.name]):
            message = refused(DIGITS, f"training.{field.name}={json.dumps(value)}")
            assert f"training.{field.name} must be " in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": "0.5"}, "augmentation: flip must be a number, got '0.5'"),
        ({"shift": 1.5}, "augmentation: shift must be a number without a fraction, got 1.5"),
        ({"rand_augment": "no"}, "augmentation: rand_augment must be true or false, got 'no'"),
        ({"flop": 0.5}, "augmentation has no 'flop'; did you mean 'flip'"),
    ],
)
def test_augmentation_is_checked_before_anything_is_read(settings, message):
    with pytest.raises(ValueError, match=message):
        check_data({"source": "digit_classes", "augmentation": settings})
    with pytest.raises(ValueError, match=message):
        Augmentation.of(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINE.replace("title: mine", "title: 3"), "title must be text, got 3"),
        (f"{MINE}notes: [1]\n", "notes must be a list, each entry text, got [1]"),
        (f"{MINE}parameters: many\n", "parameters must be a number without a fraction or null, got 'many'"),
        (MINE.replace("size: 8", "size: 8, num_attention_heads: two"), "model.num_attention_heads must be"),
    ],
)
def test_a_file_of_other_types_is_refused(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert message in refused(tmp_path / "mine.yaml")


def test_two_names_of_one_field_are_refused():
    recipe = load_recipe("swin_transformer/tiny")
    aliases = CONFIG_MAPPING["swin_transformer"].attribute_map
    alias = next(alias for alias, name in aliases.items() if name in recipe.model)
    message = f"model.{alias} and model.{aliases[alias]} are two names of one field"
    assert message in refused("swin_transformer/tiny", f"model.{alias}=3")


@pytest.mark.parametrize(
    "override", ["model.dtype=float61", "model.hidden_act=floatu", "data.length=16.0", "training.optim=adamm"]
)
def test_the_command_says_it_in_one_line(override, tmp_path):
    arguments = ["train", "rope_decoder/bible", "--output", str(tmp_path / "run"), "--set", override]
    run = CliRunner().invoke(hf_tfamily_cli.app, arguments)
    assert (run.exit_code, len(run.stderr.strip().splitlines())) == (2, 1)
    assert run.stderr.startswith("Error: ")
    assert override.partition("=")[2] in run.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What a model's card says


def test_the_card_is_about_the_data_that_were_used(micro_file, tmp_path):
    text = micro_file.read_text().replace(
        "title: Digits", "reference: A paper, table 1\nnotes: [Of 1797 digits.]\ntitle: Digits"
    )
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "letters").write_text("abcdefgh " * 400)
    overrides = ["data.source=text_file", f"data.path={tmp_path / 'letters'}", "data.length=16"]
    model = ["model.vocab_size=257", "model.position_shape=[4, 4]", "model.attention_patterns=null"]
    recipe = load_recipe(tmp_path / "mine.yaml", [*overrides, *model, "training.max_steps=1"])
    assert "Digits" not in recipe.title
    folder = train(recipe, tmp_path / "run")
    card = (folder / "README.md").read_text()
    assert f"data.path={tmp_path / 'letters'}" in card
    assert "Digits by a model" not in card
    assert f"The model of {tmp_path / 'mine.yaml'} with data.source=text_file" in card
    assert "changed from: A paper, table 1" in card
    assert card.index("The notes that follow were written for the recipe's own.") < card.index("Of 1797 digits.")
    assert load_recipe(folder / "recipe.yaml").title == recipe.title
    assert load_data(load_recipe(folder / "recipe.yaml").data).description in card
    assert task_of(recipe).metric == "bits_per_dim"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("local:window=8", {"type": "local", "window": 8}),
        ('["local:window=8", "fixed:block=8,summary=2"]', ["local:window=8", "fixed:block=8,summary=2"]),
        ("local:window=8+sink:count=2", "local:window=8+sink:count=2"),
    ],
)
def test_patterns_may_be_written_as_show_takes_them(short, long):
    found = load_recipe(DIGITS, [f"model.attention_patterns={short}"]).model["attention_patterns"]
    if isinstance(long, str):
        long = parse_pattern(long).to_dict()
    elif isinstance(long, list):
        long = [parse_pattern(pattern).to_dict() for pattern in long]
    assert found == long
    with pytest.raises(RecipeError, match=r"attention_patterns: .*windows.*window"):
        load_recipe(DIGITS, ["model.attention_patterns=local:windows=8"])


@pytest.mark.parametrize("overrides", [["data.limit=9"], ["model.num_hidden_layers=1", "data.limit=9"]])
def test_what_was_changed_is_said_first(overrides):
    recipe = load_recipe(DIGITS, [*overrides, "training.max_steps=1"])
    assert recipe.title == f"The model of {DIGITS} with {', '.join(overrides)}"
    assert recipe.notes[0].startswith(f"Changed from {DIGITS}: {', '.join(overrides)}.")


def test_without_a_change_of_data_or_model_the_card_is_the_recipes():
    model = load_recipe(DIGITS).model
    overrides = ["training.max_steps=1", "data.source=digits", f"model.hidden_size={model['hidden_size']}"]
    recipe = load_recipe(DIGITS, overrides)
    assert (recipe.title, recipe.notes) == (load_recipe(DIGITS).title, load_recipe(DIGITS).notes)

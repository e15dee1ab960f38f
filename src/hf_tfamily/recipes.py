"""Recipes: a model, its data and its training in one YAML file (configs/<system>/<recipe>.yaml).

    recipe = load_recipe("sparse_transformer/digits", ["model.num_hidden_layers=4", "training.max_steps=100"])

A recipe's keys are checked when it is read: those of `model` against the config class of its `model_type`, those of
`data` against the source's parameters, those of `training` against `TrainingArguments`; values against their types.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .data import check_data
from .data.text_lines import read_text
from .kept_activations import KEPT_ACTIVATIONS
from .modeling.attention_patterns import nearest
from .pattern_views import looks_like_pattern, parse_pattern
from .recipe_yaml import read_yaml
from .secret_values import refuse_secrets, without_secrets
from .value_types import annotations_of, check_value

SECTIONS = ("model", "data", "training")
# Keys of `training` that are no TrainingArguments, and their values.
OWN_TRAINING = {"ddp_comm_hook": ("bf16",), "kept_activations": tuple(KEPT_ACTIVATIONS)}
# A folder of configs/ without recipes: configuration files of `accelerate launch`.
LAUNCHER_FILES = "accelerate"


class RecipeError(ValueError):
    """A recipe, or a change to one, that does not exist or does not fit."""


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how.

    Attributes:
        name: "<system>/<recipe>", or the path of a user's file.
        title: one line.
        reference: the paper, with its table or section.
        notes: where the recipe differs from the paper, and what the paper leaves open.
        parameters: exact number of the model's parameters; None where unknown or where an override touched the model.
        model: `model_type` and fields of its config class; `attn_implementation` chooses a backend.
        data: `source` and its arguments (see hf_tfamily.data).
        training: fields of transformers.TrainingArguments, and `ddp_comm_hook: bf16`: under DDP, gradients cross from
            process to process in bfloat16, half the bytes; and `kept_activations`: "memory", "disk" or "bfloat16" (see
            hf_tfamily.kept_activations).
    """

    name: str
    title: str
    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    reference: str = ""
    notes: tuple[str, ...] = ()
    parameters: int | None = None


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package, such as "sparse_transformer/digits"."""
    systems = [entry for entry in _configs().iterdir() if entry.is_dir() and entry.name != LAUNCHER_FILES]
    files = [(system.name, file.name) for system in systems for file in system.iterdir()]
    return sorted(f"{system}/{file.removesuffix('.yaml')}" for system, file in files if file.endswith(".yaml"))


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of that name (see `list_recipes`) or in that YAML file, changed by `section.key=value` overrides.

    Values are YAML (`training.learning_rate=1e-3`); deeper places are reached by further dots and list indices
    (`model.attention_patterns.0.window=8`). Raises RecipeError, naming the nearest names, on anything unknown, and on
    what looks like a secret.
    """
    name = str(name_or_path)
    overrides, content = list(overrides), _parse(_read(name), name)
    refuse_secrets([override.partition("=")[2] for override in overrides], "--set", RecipeError)
    refuse_secrets(content, name, RecipeError)
    content = _check_layout(name, content)
    own = deepcopy(content)
    for override in overrides:
        _apply(override, content)
    refuse_secrets(content, name, RecipeError)
    _write_out_patterns(content["model"], name)
    _check_model(content["model"], name)
    _check_data(content["data"], name)
    _check_training(content["training"], name)
    if any(override.startswith("model.") for override in overrides):
        content["parameters"] = None
    changed = [section for section in ("data", "model") if content[section] != own[section]]
    if changed:
        _say_what_changed(content, name, changed, overrides)
    return Recipe(name=name, **{**content, "notes": tuple(content.get("notes", ()))})


def data_settings(settings: Iterable[str]) -> dict[str, Any]:
    """A recipe's data section from `key=value`s such as "source=bible_stream", checked like a recipe's own."""
    content: dict[str, Any] = {"data": {}}
    for setting in settings:
        _apply(f"data.{setting}", content)
    refuse_secrets(content, "--data", RecipeError)
    _check_data(content["data"], "--data")
    return content["data"]


def _configs():
    return resources.files("hf_tfamily.configs")


def _read(name: str) -> str:
    if name in list_recipes():
        return (_configs() / f"{name}.yaml").read_text(encoding="utf-8")
    if Path(name).is_file():
        return _read_file(name)
    raise RecipeError(f"No recipe and no file is called {name!r}{nearest(name, list_recipes())}")


def _read_file(name: str) -> str:
    try:
        return read_text(name)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _parse(text: str, where: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        said = without_secrets(f"{where}: not readable as YAML: {' '.join(str(error).split())}")
        raise RecipeError(said) from error


def _check_layout(name: str, content: Any) -> dict[str, Any]:
    """The file's top level: known keys, and every section a mapping."""
    if not isinstance(content, dict):
        raise RecipeError(f"{name}: a recipe is a mapping with the keys {', '.join(SECTIONS)}, got {content!r}.")
    _check_keys(content, [f.name for f in fields(Recipe) if f.name != "name"], name)
    for key in ("title", *SECTIONS):
        if key not in content:
            raise RecipeError(f"{name}: the key {key!r} is missing.")
    for section in SECTIONS:
        if not isinstance(content[section], dict):
            raise RecipeError(f"{name}: {section} must be a mapping, got {content[section]!r}.")
    if not isinstance(content.get("notes", []), list):
        raise RecipeError(f"{name}: notes must be a list, got {content['notes']!r}.")
    _check_types(content, Recipe, f"{name}: ")
    return content


def _say_what_changed(content: dict[str, Any], name: str, changed: list[str], overrides: list[str]) -> None:
    """Title and notes, which a model's card shows, were written about the recipe's own data and model."""
    said = ", ".join(override for override in overrides if override.partition(".")[0] in changed)
    content["title"] = f"The model of {name} with {said}"
    content["reference"] = f"changed from: {content['reference']}" if content.get("reference") else ""
    first = f"Changed from {name}: {said}."
    if content.get("notes"):
        first += " The notes that follow were written for the recipe's own."
    content["notes"] = [first, *content.get("notes", ())]


def _apply(override: str, content: dict[str, Any]) -> None:
    """Carry out one `section.key=value`, in place."""
    place, equals, text = override.partition("=")
    section, *path = place.split(".")
    if not equals or not path or not all(path):
        raise RecipeError(f"An override is written section.key=value, such as model.hidden_size=64; got {override!r}.")
    if section not in SECTIONS:
        raise RecipeError(f"{override!r}: no section {section!r}{nearest(section, SECTIONS)}")
    target = content[section]
    for step, key in enumerate(path[:-1]):
        target = _descend(target, key, override)
        if not isinstance(target, (dict, list)):
            raise RecipeError(
                f"{override!r}: {'.'.join([section, *path[: step + 1]])} is {target!r}; nothing is inside it."
            )
    key = _index(target, path[-1], override) if isinstance(target, list) else path[-1]
    target[key] = _parse(text, override)


def _descend(target: dict | list, key: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, key, override)]
    if key not in target:
        raise RecipeError(f"{override!r}: no key {key!r}{nearest(key, target)}")
    return target[key]


def _index(target: list, key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(target):
        raise RecipeError(f"{override!r}: {key!r} is no place in a list of {len(target)}; use 0 to {len(target) - 1}.")
    return int(key)


def _write_out_patterns(model: dict[str, Any], name: str) -> None:
    """Patterns in the short form of `show`, such as local:window=8, become the mappings that configs hold."""
    patterns = model.get("attention_patterns")
    try:
        if isinstance(patterns, str) and looks_like_pattern(patterns):
            model["attention_patterns"] = parse_pattern(patterns).to_dict()
        elif isinstance(patterns, list):
            model["attention_patterns"] = [parse_pattern(p).to_dict() if isinstance(p, str) else p for p in patterns]
    except ValueError as error:
        raise RecipeError(f"{name}: model.attention_patterns: {error}") from error


def _check_model(model: dict[str, Any], name: str) -> None:
    keys = dict(model)
    model_type = str(keys.pop("model_type", None))
    if model_type not in CONFIG_MAPPING:
        systems = {recipe.partition("/")[0] for recipe in list_recipes()}
        hint = nearest(model_type, systems)
        raise RecipeError(
            f"{name}: unknown model.model_type {model_type!r}{hint} Transformers' own are allowed as well."
        )
    config_class = CONFIG_MAPPING[model_type]
    for key in ("num_labels", "attn_implementation"):  # every config takes them, and none has a field for them
        keys.pop(key, None)
    aliases = config_class.attribute_map
    _check_keys(keys, [*(f.name for f in fields(config_class)), *aliases], f"{name}: model")
    for key in keys:
        if aliases.get(key, key) != key and aliases[key] in keys:
            raise RecipeError(f"{name}: model.{key} and model.{aliases[key]} are two names of one field; keep one.")
    _check_types({aliases.get(key, key): value for key, value in keys.items()}, config_class, f"{name}: model.")
    _check_names(keys, name)


def _check_names(model: dict[str, Any], name: str) -> None:
    """Values that are names of things in torch and Transformers, which otherwise say no more than KeyError."""
    dtype, activation = model.get("dtype"), model.get("hidden_act")
    found = getattr(torch, str(dtype), None)
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
        raise RecipeError(f"{name}: model.dtype must be float32, float64, float16 or bfloat16, got {dtype!r}.")
    if activation is not None and activation not in ACT2FN:
        raise RecipeError(f"{name}: model.hidden_act cannot be {activation!r}{nearest(str(activation), ACT2FN)}")


def _check_training(training: dict[str, Any], name: str) -> None:
    _check_keys(training, [*(f.name for f in fields(TrainingArguments)), *OWN_TRAINING], f"{name}: training")
    _check_types(training, TrainingArguments, f"{name}: training.")
    for key, allowed in OWN_TRAINING.items():
        if training.get(key) not in (None, *allowed):
            words = ", ".join(map(repr, allowed))
            raise RecipeError(f"{name}: training.{key} must be {words} or null, got {training[key]!r}.")


def _check_data(data: dict[str, Any], name: str) -> None:
    try:
        check_data(data)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error


def _check_types(values: dict[str, Any], fields_of: type, where: str) -> None:
    """Values are what the fields of a data class are annotated as, or their defaults."""
    hints, defaults = annotations_of(fields_of), {field.name: field.default for field in fields(fields_of)}
    try:
        for key, value in values.items():
            if key in hints and not (type(value) is type(defaults.get(key)) and value == defaults.get(key)):
                check_value(value, hints[key], f"{where}{key}")
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _check_keys(keys: Iterable[str], allowed: Iterable[str], where: str) -> None:
    allowed = list(allowed)
    for key in keys:
        if key not in allowed:
            raise RecipeError(f"{where} has no key {key!r}{nearest(str(key), allowed)}")

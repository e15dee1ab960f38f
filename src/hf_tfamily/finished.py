"""Models to measure and to sample: the folder that a finished run leaves, and any other folder or Hub repository.

A finished run's `recipe.yaml` says what the model is for and on what it is measured. Of any other model the
architecture says the first; the second has to be said: `evaluate(folder, data=["source=bible_stream", "length=128"])`.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .data import SOURCES, LoadedData, load_data
from .data.sequences import require
from .data.streams import WORDS
from .data.text_tokenizers import BYTE_CHOICES, MASK, check_tokenizer, load_tokenizer
from .model_folders import auto_class_of, local_folder, read_config
from .recipes import Recipe, RecipeError, data_settings, load_recipe
from .stream_evaluation import has_memory
from .tasks import MaskedTextTask, Task, task_of, task_of_model, task_of_source
from .value_types import check_arguments

RECIPE_FILE = "recipe.yaml"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Finished:
    """A model, with its recipe (or None), its task, and the image processor or tokenizer beside it (or None)."""

    recipe: Recipe | None
    task: Task
    model: PreTrainedModel
    processor: Any


def load_finished(folder: str | Path, overrides: Iterable[str] = ()) -> Finished:
    """What is in `folder`, the model on the best device.

    Args:
        overrides: changes to its recipe, such as "data.path=/data/fashion".

    Raises:
        RecipeError: where the folder holds no recipe, or an override does not fit.
    """
    recipe = load_recipe(Path(folder) / RECIPE_FILE, overrides)
    task = task_of(recipe)
    model = task.auto_class.from_pretrained(folder).to(best_device())
    return Finished(recipe, task, model, load_processor(folder))


def task_in(folder: str | Path) -> Task:
    """The task of a model, which is not loaded: what its recipe's data are for, or else its architecture."""
    folder = local_folder(folder)
    if (folder / RECIPE_FILE).is_file():
        return task_of(load_recipe(folder / RECIPE_FILE))
    config = read_config(folder)
    return task_of_model(auto_class_of(folder, config), (folder / "preprocessor_config.json").is_file())


def open_model(folder: str | Path, tokenizer: str | None = None) -> Finished:
    """A model to sample: of a folder, or of a Hub repository.

    A model with a memory reads prompts in segments as long as those it was trained on, or as its memory.

    Args:
        tokenizer: in place of the one beside the model; "bytes", a folder or a name on the Hub.
    """
    folder = local_folder(folder)
    task = task_in(folder)
    recipe = load_recipe(folder / RECIPE_FILE) if (folder / RECIPE_FILE).is_file() else None
    processor = load_processor(folder)
    if tokenizer is not None:
        check_tokenizer(tokenizer, "--tokenizer")
        if (folder / "preprocessor_config.json").is_file():
            raise RecipeError("--tokenizer: this model's data are pictures.")
        processor = load_tokenizer(tokenizer, "--tokenizer", mask=isinstance(task, MaskedTextTask))
        _check_ids(read_config(folder), processor, tokenizer)
    model = task.auto_class.from_pretrained(folder).to(best_device())
    if has_memory(model) and model.config.segment_length is None:
        model.config.segment_length = model.config.mem_len if recipe is None else _length_of(recipe.data)
    return Finished(recipe, task, model, processor)


def evaluate(
    folder: str | Path,
    overrides: Iterable[str] = (),
    batch_size: int = 32,
    progress: bool = True,
    data: Iterable[str] = (),
    tokenizer: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """Figures of a model, in a folder or of the Hub, on the held-out part of what it was trained on, or of `data`.

    Args:
        overrides: as in `load_finished`.
        data: what to measure on: "source=bible_stream" and the source's arguments, such as "length=128". Without a
            source they change the recipe's data.
        tokenizer: the text's, in place of the one beside the model.
        options: what the task takes beyond (its `evaluation_options`).

    Raises:
        ValueError: in one line, where something is missing or does not fit.
    """
    return measure(folder, overrides, batch_size, progress, data, tokenizer, **options)[1]


def measure(
    folder: str | Path,
    overrides: Iterable[str] = (),
    batch_size: int = 32,
    progress: bool = True,
    data: Iterable[str] = (),
    tokenizer: str | None = None,
    **options: Any,
) -> tuple[Task, dict[str, float]]:
    """The task, and the figures; arguments as of `evaluate`."""
    folder, data = local_folder(folder), list(data)
    has_recipe, own = (folder / RECIPE_FILE).is_file(), any(setting.startswith("source=") for setting in data)
    settings = _data_of(folder, list(overrides), data, own)
    task = task_of_source(settings["source"])
    check_options(options, task.evaluation_options, "evaluated")
    check_arguments(task.evaluate, options)
    settings = _with_tokenizer(settings, folder, tokenizer, trained_on=has_recipe and not own)
    if own or not has_recipe:
        _check_kind(folder, task, settings["source"])
    loaded = load_data(settings)
    if tokenizer is None and not has_same_ids(folder, loaded):
        raise RecipeError(
            f"The data's tokenizer ({len(loaded.processor)} ids) is not the one beside the model: ids mean other "
            f"tokens; leave data.tokenizer out, or give --tokenizer {folder}."
        )
    if own or not has_recipe or tokenizer is not None:
        task.check_fit(AutoConfig.from_pretrained(folder), loaded)
    model = task.auto_class.from_pretrained(folder).to(best_device())
    return task, task.evaluate(model, loaded, batch_size=batch_size, progress=progress, **options)


def _data_of(folder: Path, overrides: list[str], data: list[str], own: bool) -> dict[str, Any]:
    """A recipe's data section: what `data` says, or that of the folder's recipe with changes."""
    for setting in data:
        if "=" not in setting:
            raise RecipeError(f"--data is written key=value, such as length=128; got {setting!r}.")
    if (folder / RECIPE_FILE).is_file():
        changes = [] if own else [f"data.{setting}" for setting in data]
        recipe = load_recipe(folder / RECIPE_FILE, [*overrides, *changes])
        return data_settings(data) if own else recipe.data
    config = read_config(folder)
    if overrides:
        raise RecipeError(f"--set changes a recipe, and {folder} holds no {RECIPE_FILE}; say with --data what to use.")
    if not own:
        example = "--data source=bible_stream --data length=128"
        raise RecipeError(
            f"{folder} holds no {RECIPE_FILE} that says on what to measure this {config.model_type}; say it: {example}."
        )
    return data_settings(data)


def _with_tokenizer(data: dict[str, Any], folder: Path, asked: str | None, trained_on: bool) -> dict[str, Any]:
    """The data section with the tokenizer that the model's ids are of.

    One that would be trained, or that came from elsewhere, gives way to the one beside the model.

    Args:
        trained_on: the data are those of the model's recipe, which say how ids were made.
    """
    parameters = inspect.signature(SOURCES[data["source"]]).parameters
    if "tokenizer" not in parameters:
        if asked is not None:
            raise RecipeError(f"--tokenizer: the source {data['source']!r} takes none.")
        return data
    others = {key: value for key, value in data.items() if key != "vocab_size"}  # of one that would be trained
    if asked is not None:
        check_tokenizer(asked, "--tokenizer")
        return {**others, "tokenizer": asked}
    usual = parameters["tokenizer"].default
    chosen = data.get("tokenizer", usual if trained_on else None)
    is_beside = any((folder / name).is_file() for name in TOKENIZER_FILES)
    of_the_run = trained_on and is_beside and chosen == load_recipe(folder / RECIPE_FILE).data.get("tokenizer")
    if isinstance(chosen, str) and (chosen in (*BYTE_CHOICES, WORDS) or not of_the_run):
        return data
    if not is_beside:
        if trained_on and not isinstance(chosen, Mapping):
            return data
        raise RecipeError(f"{folder} holds no tokenizer; give one: --tokenizer bytes, a folder, or a name on the Hub.")
    return {**others, "tokenizer": _choice_in(folder)}


def _choice_in(folder: Path) -> str:
    """The tokenizer beside a model as `data.tokenizer` names it."""
    ids = _ids_without_mask(load_processor(folder))
    known = (choice for choice in BYTE_CHOICES if _ids_without_mask(load_tokenizer(choice)) == ids)
    return next(known, str(folder))


def _ids_without_mask(tokenizer: Any) -> dict[str, int]:
    return {token: number for token, number in tokenizer.get_vocab().items() if token != MASK}


def _check_kind(folder: Path, task: Task, source: str) -> None:
    """Raise ValueError unless the model's architecture is one that the source is for."""
    config = read_config(folder)
    auto_class = auto_class_of(folder, config)
    if auto_class is not task.auto_class:
        fitting = [name for name in SOURCES if task_of_source(name).auto_class is auto_class]
        raise RecipeError(
            f"{folder} holds a {config.architectures[0]}, and the source {source!r} is for {task.auto_class.__name__}; "
            f"sources for this one: {', '.join(fitting)}."
        )


def has_same_ids(folder: str | Path, data: LoadedData) -> bool:
    """Do the data's ids mean the tokens of the tokenizer beside a model? True where either has none."""
    beside = load_processor(folder)
    if not hasattr(beside, "get_vocab") or not hasattr(data.processor, "get_vocab"):
        return True
    return _ids_without_mask(beside) == _ids_without_mask(data.processor)


def _check_ids(config: Any, tokenizer: Any, name: str) -> None:
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(
            f"--tokenizer {name} has {len(tokenizer)} ids, and the model vocab_size={config.vocab_size}; give its own."
        )


def _length_of(data: dict[str, Any]) -> int:
    """Tokens in a segment, as a recipe's data section or its source has them."""
    return data.get("length", inspect.signature(SOURCES[data["source"]]).parameters["length"].default)


def check_options(options: dict[str, Any], allowed: Iterable[str], done: str) -> None:
    """Raise ValueError for options that the task has no use for."""
    for name in options:
        if name not in allowed:
            flags = ", ".join(_flag(option) for option in allowed) or "none"
            raise ValueError(f"This model cannot be {done} with {_flag(name)}; options here: {flags}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def load_processor(folder: str | Path) -> Any:
    """The image processor or tokenizer saved beside a model; None if there is neither."""
    if (Path(folder) / "preprocessor_config.json").exists():
        require("PIL")  # without it Transformers forgets our processors and asks whether to run the code beside them
        return AutoImageProcessor.from_pretrained(folder)
    if any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(folder)
    return None


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

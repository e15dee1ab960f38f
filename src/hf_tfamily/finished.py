"""The folder that a finished run leaves: load it with all that belongs to it, and measure it again."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .data import load_data
from .data.sequences import require
from .recipes import Recipe, load_recipe
from .tasks import Task, task_of
from .value_types import check_arguments

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Finished:
    """A finished model, with its recipe, its task, and the image processor or tokenizer beside it (or None)."""

    recipe: Recipe
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
    """The task of the finished model in `folder`, which is not loaded."""
    return task_of(load_recipe(Path(folder) / RECIPE_FILE))


def evaluate(
    folder: str | Path, overrides: Iterable[str] = (), batch_size: int = 32, progress: bool = True, **options: Any
) -> dict[str, float]:
    """Figures of the finished model in `folder` on the held-out part of the data it was trained for.

    Args:
        overrides: as in `load_finished`.
        options: what the model's task takes beyond (its `evaluation_options`).
    """
    task = task_in(folder)
    check_options(options, task.evaluation_options, "evaluated")
    check_arguments(task.evaluate, options)
    finished = load_finished(folder, overrides)
    data = load_data(finished.recipe.data)
    return finished.task.evaluate(finished.model, data, batch_size=batch_size, progress=progress, **options)


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
    if (Path(folder) / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    return None


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

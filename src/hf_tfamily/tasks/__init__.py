"""Kinds of task. The class of data that a recipe's source returns decides which one a recipe is for.

A task knows which model fits its data, how it is trained, what is measured on held-out data, and what there is to show.
A new one is a module here with a subclass of `Task`, a place in `TASKS`, and a source of its class of data.
"""

import inspect

from ..data import SOURCES
from ..recipes import Recipe
from .algorithms import AlgorithmTask
from .base import Task
from .image_classification import ImageClassificationTask
from .masked_text import MaskedTextTask
from .recurrent_text import RecurrentTextTask
from .super_resolution import SuperResolutionTask
from .token_sequences import TokenSequenceTask
from .translation import TranslationTask

TASKS: tuple[Task, ...] = (
    TokenSequenceTask(),
    RecurrentTextTask(),
    TranslationTask(),
    SuperResolutionTask(),
    ImageClassificationTask(),
    MaskedTextTask(),
    AlgorithmTask(),
)


def task_of(recipe: Recipe) -> Task:
    """The task that the recipe's data is for; nothing is loaded."""
    data_class = inspect.signature(SOURCES[recipe.data["source"]]).return_annotation
    return next(task for task in TASKS if task.data_class is data_class)


__all__ = ["TASKS", "Task", "task_of"]

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
    return task_of_source(recipe.data["source"])


def task_of_source(source: str) -> Task:
    """The task that a source's data is for."""
    data_class = inspect.signature(SOURCES[source]).return_annotation
    return next(task for task in TASKS if task.data_class is data_class)


def task_of_model(auto_class: type, pictures: bool) -> Task:
    """The task of a model of which no more is known than what loads it, and whether its ids are pictures."""
    tasks = (RecurrentTextTask, TranslationTask, MaskedTextTask, ImageClassificationTask)
    if pictures:
        tasks = (TokenSequenceTask, SuperResolutionTask, ImageClassificationTask)
    return next(task for task in TASKS if task.auto_class is auto_class and type(task) in tasks)


__all__ = ["TASKS", "MaskedTextTask", "Task", "task_of", "task_of_model", "task_of_source"]

"""A folder that loads anywhere: weights, configuration, processor, and the model's own code beside them.

The code travels only with `export`, not with every `save_pretrained`, so a Trainer's checkpoints hold none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .auto import SYSTEMS, System

MODELING = f"{__package__}.modeling."


def export(model: PreTrainedModel, folder: str | Path, processor: Any = None) -> None:
    """Save `model` (a class of this package) and its processor or tokenizer into `folder`, with their code.

    The folder loads after `import hf_tfamily`, and where this package is not installed with `trust_remote_code=True`.
    """
    system = _system_of(model)
    model.config.auto_map = {
        auto_class.__name__: f"modeling_{system.name}.{system.prefix}{suffix}"
        for auto_class, suffix in system.heads.items()
    }
    with _code_travels(model, model.config, processor):
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)


def _system_of(model: PreTrainedModel) -> System:
    for system in SYSTEMS:
        if type(model).__module__ == f"{MODELING}modeling_{system.name}":
            return system
    raise ValueError(
        f"{type(model).__name__} is no model of this package; models loaded as remote code save their own."
    )


@contextmanager
def _code_travels(*objects: Any) -> Iterator[None]:
    """While inside, `save_pretrained` of these objects copies their code, if it is this package's."""
    classes = [type(obj) for obj in objects if type(obj).__module__.startswith(MODELING)]
    for cls in classes:
        cls.register_for_auto_class(*_auto_class_name(cls))
    try:
        yield
    finally:
        for cls in classes:
            cls._auto_class = None


def _auto_class_name(cls: type) -> list[str]:
    """The Auto class that loads a model class; configurations and processors know theirs."""
    names = [
        auto_class.__name__
        for system in SYSTEMS
        for auto_class, suffix in system.heads.items()
        if cls.__name__ == system.prefix + suffix
    ]
    return names[:1]

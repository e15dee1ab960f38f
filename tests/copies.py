"""A second copy of modeling/ in the process, as a checkpoint's own code brings it."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import hf_tfamily.modeling

NAME = "copy_of_modeling"


@contextmanager
def copy_of_modeling() -> Iterator[Callable[[str], ModuleType]]:
    """A function that imports a module of the copy by its name."""
    folder = Path(hf_tfamily.modeling.__file__).parent
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    try:
        yield lambda name: import_module(f"{NAME}.{name}")
    finally:
        for name in [name for name in sys.modules if name.startswith(NAME)]:
            del sys.modules[name]

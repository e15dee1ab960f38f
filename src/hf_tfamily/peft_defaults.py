"""Default target modules for PEFT, so that `LoraConfig()` without target_modules fits every system.

PEFT looks them up by model type in tables of its own. They are filled in once it is imported, before or after this
package, and never because of it.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLES = "peft.utils.constants"
LIKE_LORA = ("q_proj", "v_proj")
IA3 = ("k_proj", "v_proj", "down_proj", "fc2")  # Swin calls its second layer fc2
IA3_FEEDFORWARD = ("down_proj", "fc2")


def register(model_types: list[str]) -> None:
    """Fill PEFT's tables now if it is imported, else when it will be."""
    if TABLES in sys.modules:
        fill(sys.modules[TABLES], model_types)
    else:
        sys.meta_path.insert(0, _Watcher(model_types))


def fill(tables: ModuleType, model_types: list[str]) -> None:
    """Add the model types to the tables of LoRA, its relatives, and IA3."""
    lora = tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    relatives = [table for table in vars(tables).values() if isinstance(table, dict) and _is_like(table, lora)]
    for model_type in model_types:
        for table in relatives:
            table.setdefault(model_type, list(LIKE_LORA))
        tables.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.setdefault(model_type, list(IA3))
        tables.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.setdefault(model_type, list(IA3_FEEDFORWARD))


def _is_like(table: dict, lora: dict) -> bool:
    """Most tuners' tables are copies of LoRA's; those of others name other modules."""
    return table.get("llama") == lora["llama"] and table.get("gpt2") == lora["gpt2"]


class _Watcher(MetaPathFinder):
    """Waits for PEFT's tables to be imported, fills them, and is gone."""

    def __init__(self, model_types: list[str]):
        self.model_types = model_types

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_fill(module: ModuleType) -> None:
                execute(module)
                fill(module, self.model_types)

            spec.loader.exec_module = execute_and_fill
        return spec

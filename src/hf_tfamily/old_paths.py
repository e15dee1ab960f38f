"""Where things stood before version 0.2: `from hf_tfamily.modeling.memory import PatternCache` still works, and warns.

Goes with version 0.3; CHANGELOG.md says what moved. Names that left altogether, or got another name, are not here.
"""

import sys
import warnings
from importlib import import_module
from types import ModuleType

# Modules of hf_tfamily, and the old modules of hf_tfamily.modeling that their names were in.
HOLDS = {
    "block_sparse.cpu": "attention_torch attention_tile_kernels",
    "block_sparse.decode": "attention_decode",
    "block_sparse.interface": "attention_block_sparse",
    "block_sparse.parts": "attention_parts",
    "block_sparse.plan": "attention_plan attention_tiles",
    "block_sparse.products": "attention_products",
    "block_sparse.relative": "attention_relative",
    "block_sparse.relative_plan": "attention_relative_plan",
    "block_sparse.stock_masks": "attention_block_sparse",
    "block_sparse.triton.attention": "attention_triton",
    "block_sparse.triton.call": "attention_triton_call",
    "block_sparse.triton.layout": "attention_triton_layout",
    "block_sparse.triton.relative": "attention_triton_relative",
    "block_sparse.triton.tiles": "attention_triton_configs",
    "block_sparse.triton.views": "attention_triton_views",
    "block_sparse.windows": "attention_windows",
    "modeling.attention": "attention_masks",
    "modeling.attention_patterns": "attention_patterns_base attention_patterns_images attention_relative_plan",
    "modeling.cache_patterns": "memory memory_steps memory_stores",
    "modeling.modeling_compressive_transformer": "memory_compressive",
    "modeling.modeling_image_transformer": "image_embeddings image_enlargement image_heads image_layers memory_images",
    "modeling.modeling_swin_transformer": "positions_window swin_layers window_layout",
    "modeling.modeling_vanilla_transformer": "layers vanilla_stacks",
    "modeling.modeling_xl_sparse": "memory_sparse_segments",
    "modeling.positions": "position_schemes attention_relative_plan",
}
OLD = {old for row in HOLDS.values() for old in row.split()}


class MovedModule(ModuleType):
    """A module of an earlier layout; each name of it warns once and is then what it always was."""

    def __getattr__(self, name: str):
        old = self.__name__.rpartition(".")[2]
        asked = [] if name.startswith("__") else [new for new, row in HOLDS.items() if old in row.split()]
        modules = (import_module(f"{__package__}.{new}") for new in asked)
        module = next((module for module in modules if hasattr(module, name)), None)
        if module is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; see CHANGELOG.md")
        warnings.warn(f"{self.__name__}.{name} is now {module.__name__}.{name}", DeprecationWarning, stacklevel=2)
        setattr(self, name, getattr(module, name))
        return getattr(self, name)


def register() -> None:
    """Make the old modules importable; a file of the same name that is there wins."""
    modeling = sys.modules[f"{__package__}.modeling"]
    for old in OLD:
        name = f"{modeling.__name__}.{old}"
        setattr(modeling, old, sys.modules.setdefault(name, MovedModule(name)))

"""Who may import whom: modeling/ is a flat folder that travels to the Hub whole, beside the weights.

The tables below are the rule; a new file says there what it may import.
"""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELING = ROOT / "modeling"
FILES = sorted(path.stem for path in MODELING.glob("*.py") if path.stem != "__init__")

PATTERNS = {"attention_patterns", "attention_patterns_base", "attention_patterns_images"}
MASKS = {"attention_masks"} | PATTERNS
PLAN = {"attention_parts", "attention_plan"} | PATTERNS
EXECUTORS = {"attention_torch", "attention_triton", "attention_triton_relative"}
KERNELS = {f"attention_triton_{name}" for name in ("kernels", "key_gradients", "query_gradients")}
TRITON = {"attention_parts"} | {f"attention_triton_{name}" for name in ("call", "configs", "layout", "tables")}
SHARED = {name for name in FILES if not name.startswith(("modeling_", "configuration_"))}

# The first line that fits a file holds. Modules without a line of their own import nothing of ours.
MAY_IMPORT = {
    "attention_decode": MASKS,
    "attention_masks": PATTERNS,
    "attention_patterns": PATTERNS,
    "attention_patterns_images": {"attention_patterns_base"},
    "attention_plan": {"attention_parts", "attention_tiles"} | PATTERNS,
    "attention_tiles": {"attention_parts"} | PATTERNS,
    "attention_relative_plan": PLAN,
    "attention_products": {"attention_parts", "freed_memory"},
    "attention_relative": PLAN | {"attention_products", "attention_relative_plan", "attention_torch"},
    "attention_tile_kernels": {"attention_parts", "attention_products"},
    "attention_torch": PLAN | {"attention_products", "attention_tile_kernels"},
    "attention_triton": {"attention_triton_call", "attention_triton_launch", "attention_triton_views"},
    "attention_triton_*_gradients": {"attention_triton_kernels"},
    "attention_triton_call": {"attention_triton_views"} | PATTERNS | KERNELS | TRITON,
    "attention_triton_launch": TRITON,
    "attention_triton_relative": {"attention_relative", "attention_relative_plan", "attention_triton", "positions"}
    | PATTERNS
    | TRITON,
    "attention_triton_layout": {"attention_parts"} | PATTERNS,
    "attention_triton_tables": {"attention_parts", "attention_triton_layout"} | PATTERNS,
    "attention_triton_views": {"attention_parts"} | PATTERNS,
    "attention_block_sparse": MASKS | PLAN | EXECUTORS | {"attention_decode", "attention_relative", "positions"},
    "attention_windows": {"call_modes", "freed_memory"},
    "attention": MASKS | PLAN | {"attention_block_sparse"},
    "feed_forward": {"call_modes", "freed_memory", "linear_onednn"},
    "linear_onednn": {"call_modes"},
    "image_embeddings": {"memory_images", "mixture_of_logistics", "positions"} | PATTERNS,
    "image_enlargement": {"mixture_of_logistics"} | PATTERNS,
    "image_heads": {"mixture_of_logistics"},
    "image_layers": {"attention"},
    "swin_layers": {"checks", "configuration_swin_transformer", "feed_forward", "linear_onednn"},
    "window_layout": {"call_modes"} | PATTERNS,
    "memory": MASKS | {"memory_steps", "memory_stores"},
    "memory_blocks": PATTERNS,
    "memory_steps": MASKS,
    "memory_stores": MASKS | {"memory_blocks", "memory_steps"},
    "memory_compressive": {"memory_segments"},
    "memory_sparse_segments": {"memory_segments"} | PATTERNS,
    "memory_*": MASKS | {"memory"},
    "configuration_*": PATTERNS,
    "modeling_*": SHARED,
}
# Systems that their own paper presents as an extension of another.
EXTENDS = {
    "configuration_compressive_transformer": "configuration_transformer_xl",
    "configuration_vanilla_encoder": "configuration_vanilla_transformer",
    "configuration_xl_sparse": "configuration_transformer_xl",
    "modeling_compressive_transformer": "modeling_transformer_xl",
    "modeling_vanilla_encoder": "modeling_vanilla_transformer",
    "modeling_xl_sparse": "modeling_transformer_xl",
}
THIRD_PARTY = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}


def tree_of(name):
    return ast.parse((MODELING / f"{name}.py").read_text())


def own_imports(name):
    """Modules of modeling/ that a file imports, anywhere in it."""
    nodes = (node for node in ast.walk(tree_of(name)) if isinstance(node, ast.ImportFrom) and node.level)
    return {node.module for node in nodes}


def foreign_imports(name):
    """(package, whether it is inside a try) for every absolute import of a file."""
    tree = tree_of(name)
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        yield from ((name.split(".")[0], id(node) in guarded) for name in names)


def allowed(name):
    own = next((modules for rule, modules in MAY_IMPORT.items() if fnmatch(name, rule)), set())
    if name.startswith("modeling_"):
        own = own | {name.replace("modeling_", "configuration_", 1)}
    return own | {EXTENDS.get(name)}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_it_may(name):
    surplus = own_imports(name) - allowed(name)
    assert not surplus, f"modeling/{name}.py imports {sorted(surplus)}; MAY_IMPORT above does not let it."


@pytest.mark.parametrize("name", FILES)
def test_own_imports_name_a_file_beside(name):
    """Saving copies what `from .name import x` reaches and nothing else."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}: only single dots travel with a checkpoint"
            assert node.module in FILES, f"line {node.lineno}: {node.module} is no file of modeling/"


def test_there_are_no_cycles():
    done, waiting = set(), {name: own_imports(name) for name in FILES}
    while ready := [name for name, needed in waiting.items() if needed <= done]:
        done.update(ready)
        for name in ready:
            del waiting[name]
    assert not waiting, f"each of {sorted(waiting)} needs one of the others"


@pytest.mark.parametrize("name", FILES)
def test_third_parties_are_few_and_others_optional(name):
    for package, guarded in foreign_imports(name):
        assert package != "hf_tfamily", "an absolute import of ours breaks where the package is not installed"
        known = package in THIRD_PARTY or package in sys.stdlib_module_names
        assert known or guarded, f"modeling/{name}.py imports {package} outside try"


@pytest.mark.parametrize("name", FILES)
def test_no_text_reads_like_a_relative_import(name):
    """Transformers finds the files to copy by a regular expression, in docstrings too."""
    lines = (MODELING / f"{name}.py").read_text().splitlines()
    code = {line for node in ast.walk(tree_of(name)) if isinstance(node, ast.ImportFrom) for line in [node.lineno]}
    found = [i for i, line in enumerate(lines, 1) if re.match(r"\s*(from\s+\.|import\s+\.)", line) and i not in code]
    assert not found, f"modeling/{name}.py, lines {found}"


@pytest.mark.parametrize("name", FILES)
def test_annotations_are_not_postponed(name):
    """Transformers reads the annotations of forward methods."""
    futures = [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.ImportFrom)]
    assert all(node.module != "__future__" for node in futures)


def test_modeling_is_flat():
    assert not [path for path in MODELING.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_every_rule_is_for_a_file_that_may_exist():
    """A misspelt rule would hold nothing."""
    for rule in MAY_IMPORT:
        assert any(fnmatch(name, rule) for name in [*FILES, "attention_triton", "memory"]), rule


def test_configs_import_nothing():
    for path in (ROOT / "configs").rglob("*.py"):
        assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["triton", "datasets", "matplotlib", "sklearn", "skimage", "PIL.Image", "accelerate", "typer", "rich"]
    code = "import sys, transformers.modeling_utils; before = set(sys.modules); import hf_tfamily; "
    code += f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

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

from hf_tfamily.modeling.attention_patterns import PATTERN_TYPES

ROOT = Path(__file__).parents[1]
MODELING = ROOT / "modeling"
FILES = sorted(path.stem for path in MODELING.glob("*.py") if path.stem != "__init__")

# modeling/: the first line that fits a file holds. Files without a line of their own import nothing of ours.
PATTERNS = {"attention_patterns"}
SHARED = {name for name in FILES if not name.startswith(("modeling_", "configuration_"))}
MAY_IMPORT = {
    "attention": PATTERNS,
    "cache_patterns": PATTERNS | {"attention"},
    "configuration_*": PATTERNS | {"checks"},
    "modeling_*": SHARED,
}
# Systems that their own paper presents as an extension of another.
EXTENDS = {
    "configuration_adaptive_span": "configuration_rope_decoder",
    "configuration_compressive_transformer": "configuration_transformer_xl",
    "configuration_long_encoder": "configuration_vanilla_encoder",
    "configuration_memorizing_transformer": "configuration_transformer_xl",
    "configuration_universal_transformer": "configuration_vanilla_transformer",
    "configuration_vanilla_encoder": "configuration_vanilla_transformer",
    "configuration_xl_sparse": "configuration_transformer_xl",
    "modeling_adaptive_span": "modeling_rope_decoder",
    "modeling_compressive_transformer": "modeling_transformer_xl",
    "modeling_long_encoder": "modeling_vanilla_encoder",
    "modeling_memorizing_transformer": "modeling_transformer_xl",
    "modeling_universal_transformer": "modeling_vanilla_transformer",
    "modeling_vanilla_encoder": "modeling_vanilla_transformer",
    "modeling_xl_sparse": "modeling_transformer_xl",
}
MOST_FLOORS = 7
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


def floors(needs):
    """Files by how many imports are below them; the rest are in a circle."""
    done, waiting, found = set(), dict(needs), []
    while ready := [name for name, needed in waiting.items() if needed & set(needs) <= done]:
        found.append(ready)
        done.update(ready)
        for name in ready:
            del waiting[name]
    return found, sorted(waiting)


def test_modeling_has_few_floors_and_no_circle():
    found, circle = floors({name: own_imports(name) for name in FILES})
    assert not circle, f"each of {circle} needs one of the others"
    assert len(found) <= MOST_FLOORS, found


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


def test_every_rule_is_for_a_file_that_exists():
    """A misspelt rule would hold nothing."""
    for rule in [*MAY_IMPORT, *EXTENDS, *EXTENDS.values()]:
        assert any(fnmatch(name, rule) for name in FILES), rule


# ---------------------------------------------------------------------------------------------------------------------
# The other two wings: src/hf_tfamily/* -> src/hf_tfamily/block_sparse/ -> modeling/

PACKAGE = ROOT / "src" / "hf_tfamily"
# What the engine reads of modeling/: patterns, what is seen, how scores know distances.
OF_MODELING = {
    "hf_tfamily.modeling.attention",
    "hf_tfamily.modeling.attention_patterns",
    "hf_tfamily.modeling.positions",
}
ENGINE = "hf_tfamily.block_sparse"


def module_name(path):
    parts = ("hf_tfamily", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name):
    """Modules that one of ours imports, anywhere in it."""
    path = MODULES[name]
    home = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = home[: len(home) - node.level + 1] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if whole in MODULES or module == "hf_tfamily.modeling" else module


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(ENGINE)])
def test_the_engine_imports_itself_and_three_files_of_modeling(name):
    ours = {module for module in imports_of(name) if module.startswith("hf_tfamily")}
    surplus = {module for module in ours if not module.startswith(ENGINE)} - OF_MODELING
    assert not surplus, f"{name} imports {sorted(surplus)}"


def test_only_the_engines_triton_wing_imports_triton():
    for name in MODULES:
        found = [module for module in imports_of(name) if module.split(".")[0] == "triton"]
        assert not found or name.startswith(f"{ENGINE}.triton."), name


def test_the_package_has_no_circle():
    needs = {name: set(imports_of(name)) for name in MODULES}
    _, circle = floors(needs)
    assert not circle, f"each of {circle} needs one of the others"


def test_few_places_ask_for_a_patterns_class():
    """They ask for facts; what is left are converters, pictures and one config."""
    classes = {cls.__name__ for cls in PATTERN_TYPES.values()}
    found = []
    for path in [*MODELING.glob("*.py"), *PACKAGE.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "isinstance":
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            elif isinstance(node, ast.MatchClass):
                asked = {getattr(node.cls, "id", None)}
            else:
                continue
            found += [f"{path.relative_to(ROOT)}:{node.lineno if hasattr(node, 'lineno') else ''}"] * bool(
                asked & classes
            )
    assert len(found) <= 12, found
    assert not [place for place in found if "block_sparse" in place]


@pytest.mark.parametrize("name", FILES)
def test_models_know_the_engine_by_name_only(name):
    """No operator and no attention function is registered in modeling/."""
    text = (MODELING / f"{name}.py").read_text()
    for word in ("custom_op", "register_kernel", "AttentionInterface", "AttentionMaskInterface", "globals()"):
        assert word not in text, f"modeling/{name}.py has {word}"


def test_configs_import_nothing():
    for path in (ROOT / "configs").rglob("*.py"):
        assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["triton", "datasets", "matplotlib", "sklearn", "skimage", "PIL.Image", "accelerate", "typer", "rich"]
    code = "import sys, transformers.modeling_utils; before = set(sys.modules); import hf_tfamily; "
    code += f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

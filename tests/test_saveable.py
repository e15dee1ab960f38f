"""modeling/ can be saved beside weights: Transformers' own tools see in it what test_import_rules.py reads there."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from hf_tfamily import block_sparse
from hf_tfamily.auto import SYSTEMS
from hf_tfamily.hub import export
from tests.hub.examples import example
from tests.test_import_rules import FILES, MODELING, THIRD_PARTY, own_imports

each_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)


@each_system
def test_transformers_copies_all_that_a_model_reaches(system):
    wanted, reached = {f"modeling_{system.name}"}, set()
    while new := wanted - reached:
        reached |= new
        wanted = {module for name in new for module in own_imports(name)}
    copied = {Path(file).stem for file in get_relative_import_files(MODELING / f"modeling_{system.name}.py")}
    assert copied | {f"modeling_{system.name}"} == reached


@pytest.mark.parametrize("name", FILES)
def test_transformers_asks_for_no_optional_package(name):
    """A repository's file that needs a package is refused where it is missing, unless it is imported inside a try."""
    packages = {package.partition(".")[0] for package in get_imports(MODELING / f"{name}.py")}
    assert packages <= THIRD_PARTY | sys.stdlib_module_names


@each_system
def test_attention_implementations_can_be_set(system):
    """Transformers decides it by reading the file that a class is from, also where it is a checkpoint's own."""
    modeling = import_module(f"hf_tfamily.modeling.modeling_{system.name}")
    for suffix in system.heads.values():
        assert getattr(modeling, system.prefix + suffix)._can_set_attn_implementation()


# Code files beside the weights, at most, where it is not MOST_OF_OTHERS; what nobody reads, nobody can trust.
MOST_OF_OTHERS = 9
MOST_FILES = {
    "adaptive_span": 11,
    "compressive_transformer": 12,
    "image_transformer": 10,
    "long_encoder": 13,
    "memorizing_transformer": 12,
    "swin_transformer": 7,
    "transformer_xl": 10,
    "universal_transformer": 10,
    "vanilla_encoder": 11,
    "vanilla_transformer": 8,
    "xl_sparse": 12,
}
OF_ENGINES = ("custom_op", "register_kernel", "AttentionInterface", "triton", "plan_attention")


@each_system
def test_a_checkpoint_carries_few_files_and_no_engine(system, tmp_path):
    """Its code is what it reaches and no more; lines are printed (pytest -s)."""
    model, processor = example(system.name)
    export(model, tmp_path, processor)
    files = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    lines = sum(text.count("\n") for text in files.values())
    print(f"{system.name}: {len(files)} files, {lines} lines beside the weights: {', '.join(sorted(files))}")
    assert len(files) <= MOST_FILES.get(system.name, MOST_OF_OTHERS), sorted(files)
    assert {Path(name).stem for name in files} <= set(FILES)
    engine = [path.read_text() for path in Path(block_sparse.__file__).parent.rglob("*.py")]
    assert not set(engine) & set(files.values())
    for name, text in files.items():
        assert not [word for word in OF_ENGINES if word in text], name

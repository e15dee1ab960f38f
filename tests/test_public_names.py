"""What people may import: the top level, and for one more release the module paths of version 0.1."""

import subprocess
import sys
import warnings
from importlib import import_module

import pytest

import hf_tfamily
from hf_tfamily import old_paths
from hf_tfamily.auto import public_classes
from hf_tfamily.modeling.attention_patterns import PATTERN_TYPES

DOCUMENTED = {  # at 135ffd8, in docs, scripts and benchmarks
    "memory": "PatternCache",
    "memory_compressive": "CompressiveMemory",
    "memory_images": "ImageCache",
    "memory_sparse_segments": "SparseSegmentMemory",
    "memory_stores": "Ring",
    "attention_block_sparse": "block_sparse_attention_forward",
    "attention_decode": "attend_one",
    "attention_masks": "VisibleKeys",
    "attention_patterns_base": "Pattern",
    "attention_patterns_images": "Window2D",
    "attention_plan": "plan_attention",
    "attention_relative": "relative_attention",
    "attention_relative_plan": "distances_met",
    "attention_torch": "block_sparse_attention",
    "attention_triton_layout": "layout",
    "attention_windows": "window_attention",
    "image_layers": "ImageTransformerAttention",
    "position_schemes": "Rotary",
    "swin_layers": "SwinTransformerMLP",
    "vanilla_stacks": "VanillaTransformerEncoder",
}
SHIMS = {old: sys.modules[f"hf_tfamily.modeling.{old}"] for old in old_paths.OLD}


def test_every_public_class_is_at_the_top():
    assert set(public_classes()) <= set(hf_tfamily.__all__)
    patterns = {type.__name__ for type in PATTERN_TYPES.values() if type.__module__.startswith("hf_tfamily.")}
    assert {*patterns, "Pattern"} <= set(hf_tfamily.__all__)


def test_the_list_of_public_names_is_complete_and_true():
    assert len(set(hf_tfamily.__all__)) == len(hf_tfamily.__all__)
    assert set(hf_tfamily.__all__) <= set(dir(hf_tfamily))
    for name in hf_tfamily.__all__:
        assert getattr(hf_tfamily, name) is not None


def test_others_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'Sparse'"):
        hf_tfamily.Sparse  # noqa: B018


def test_trainers_are_imported_when_they_are_used():
    code = "import sys, hf_tfamily; before = 'transformers.trainer' in sys.modules; hf_tfamily.RecurrentTrainer; "
    code += "print(before, 'transformers.trainer' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True"]


# ---------------------------------------------------------------------------------------------------------------------
# Old paths


def moved(old):
    """A fresh shim of an old module, which has not been asked for anything."""
    return old_paths.MovedModule(f"hf_tfamily.modeling.{old}")


@pytest.mark.parametrize("old", sorted(old_paths.OLD))
def test_old_modules_can_be_imported(old):
    assert import_module(f"hf_tfamily.modeling.{old}") is SHIMS[old]
    assert getattr(import_module("hf_tfamily.modeling"), old) is SHIMS[old]


@pytest.mark.parametrize(("old", "name"), DOCUMENTED.items())
def test_a_name_of_an_old_path_warns_once_and_is_the_same_object(old, name):
    if old.startswith("attention_triton"):
        pytest.importorskip("triton")
    shim = moved(old)
    with pytest.warns(DeprecationWarning, match=f"hf_tfamily.modeling.{old}.{name} is now hf_tfamily") as found:
        first = getattr(shim, name)
    assert len(found) == 1
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(shim, name) is first
    homes = [new for new, row in old_paths.HOLDS.items() if old in row.split()]
    assert any(first is getattr(import_module(f"hf_tfamily.{new}"), name, None) for new in homes)


def test_old_imports_work():
    with pytest.warns(DeprecationWarning, match="is now hf_tfamily.modeling.attention.VisibleKeys"):
        from hf_tfamily.modeling.attention_masks import VisibleKeys
    assert VisibleKeys is import_module("hf_tfamily.modeling.attention").VisibleKeys


def test_names_that_left_are_refused_naming_the_changelog():
    with pytest.raises(AttributeError, match="has no attribute 'decode_keys'; see CHANGELOG"):
        moved("attention_plan").decode_keys  # noqa: B018


def test_looking_at_a_module_does_not_warn():
    """As inspect and pickle do with all of sys.modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(moved("memory"), "__file__")
        assert not hasattr(moved("memory"), "__wrapped__")

"""Checkpoints of the layout of commit 135ffd8, whose code brought an engine of its own, keep working.

Their engine never serves where the package is imported: before or after it, whatever the copy holds.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_tfamily.hub import export
from tests.bare_packages import link_packages
from tests.hub.examples import example, main_head, write_expected

pytestmark = pytest.mark.slow

ZIP = Path(__file__).parent / "data" / "layout_135ffd8.zip"
with zipfile.ZipFile(ZIP) as archive:  # the systems that there were
    NAMES = sorted({name.partition("/")[0] for name in archive.namelist()} - {"code"})
HEADS = {name: main_head(name).__name__ for name in NAMES}
WINDOWS = "swin_transformer"  # the old copy of which calls its own operator, not what is registered

SCRIPT = """
import json, sys, torch, transformers
from importlib import import_module
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HEADS = json.loads(sys.argv[1])
calls = []

def batch(name):
    tensors = load_file(f"{name}/expected.safetensors")
    return tensors, tensors.pop("answer")

def load(name, **options):
    return getattr(transformers, HEADS[name]).from_pretrained(name, trust_remote_code=True, **options)

def load_old(name, **options):
    '''The checkpoint's own class, also where the package is imported.'''
    auto_map = json.load(open(f"{name}/config.json"))["auto_map"]
    config_class = get_class_from_dynamic_module(auto_map["AutoConfig"], name)
    model_class = get_class_from_dynamic_module(auto_map[HEADS[name]], name)
    return model_class.from_pretrained(name, config=config_class.from_pretrained(name), **options)

def difference(name, model):
    inputs, expected = batch(name)
    inputs.pop("labels", None)
    with torch.no_grad():
        return (model.eval()(**inputs)[0] - expected).abs().max().item()

def use(name, model):
    '''What a model does: answer, generate, learn.'''
    calls.clear()
    result = {"module": type(model).__module__, "default": model.config._attn_implementation}
    result["difference"] = difference(name, model)
    result["calls"] = len(calls)
    inputs, _ = batch(name)
    if model.can_generate():
        ids = model.generate(inputs["input_ids"][:, :5], max_new_tokens=4, do_sample=False)
        result["generated"] = ids.tolist()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(0)  # of dropout
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    result["loss"] = loss.item()
    result["changed"] = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    return result

def import_package():
    '''With every call of its operators counted.'''
    interface = import_module("hf_tfamily.block_sparse.interface")
    for operator in ("block_sparse_attention", "relative_attention", "window_attention"):
        def counted(*args, run=getattr(interface, operator), **kwargs):
            calls.append(run)
            return run(*args, **kwargs)
        setattr(interface, operator, counted)

def engine():
    function = ALL_ATTENTION_FUNCTIONS.get("block_sparse")
    return [function.__module__, function.version]
"""
WITHOUT = """
import importlib.util
assert importlib.util.find_spec("hf_tfamily") is None
results = {name: {"old": use(name, load(name))} for name in HEADS}
print(json.dumps(results))
"""
PACKAGE_FIRST = """
import_package()
results = {name: {"ours": use(name, load(name)), "old": use(name, load_old(name))} for name in HEADS}
print(json.dumps({**results, "engine": engine()}))
"""
OLD_FIRST = """
models = {name: load(name) for name in HEADS}
before = {name: difference(name, model) for name, model in models.items()}
first = engine()
import_package()
results = {name: {"old": use(name, models[name]), "ours": use(name, load(name))} for name in HEADS}
print(json.dumps({**results, "before": before, "first": first, "engine": engine()}))
"""
# The package's own model, and one of a copy, beside a copy whose executor was changed: differences from eager.
BROKEN = """
def answers(model):
    ids, gradients = torch.arange(40)[None] % 90 + 1, []
    for implementation in ("block_sparse", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        gradients.append([logits] + [parameter.grad for parameter in model.parameters()])
    return max((a - b).abs().max().item() for a, b in zip(*gradients))

name = "sparse_transformer"
old = load(name).eval()
result = {"alone": answers(old)}
import_package()
config = transformers.AutoConfig.for_model(name, **json.loads(sys.argv[2]))
torch.manual_seed(0)
ours = transformers.AutoModelForCausalLM.from_config(config).eval()
for parameter in ours.parameters():
    parameter.data.add_(0.02 * torch.randn_like(parameter))
result |= {"ours": answers(ours), "module": type(ours).__module__, "old": answers(old), "engine": engine()}
print(json.dumps(result))
"""
# A checkpoint of today, beside the engine that one of the earlier layout registered.
NEW_BESIDE_OLD = """
HEADS["new"] = "AutoModelForCausalLM"
old, model = load("sparse_transformer"), load("new")
result = {"registered": engine()[1], "module": type(model).__module__, "default": model.config._attn_implementation}
try:
    load("new", attn_implementation="block_sparse")
except ImportError as error:
    result["refused"] = str(error)
result |= {"new": difference("new", model), "old": difference("sparse_transformer", old)}
print(json.dumps(result))
"""
# The package's own model, after a checkpoint of today was loaded whose code is not what was exported.
BROKEN_NEW = """
HEADS["new"] = "AutoModelForCausalLM"
changed = load("new", attn_implementation="eager")
result = {"module": type(changed).__module__, "changed": difference("new", changed)}
import_package()
result |= {"ours": difference("new", load("new", attn_implementation="block_sparse")), "calls": len(calls)}
changed = load_old("new", attn_implementation="block_sparse")
result |= {"on the engine": difference("new", changed), "engine": engine()}
print(json.dumps(result))
"""


def unpack(folder: Path) -> Path:
    """The checkpoints, each with the code beside its weights as `export` left it."""
    with zipfile.ZipFile(ZIP) as archive:
        archive.extractall(folder)
    for name in NAMES:
        for path in (folder / "code").iterdir():
            (folder / name / path.name).write_bytes(path.read_bytes())
    return folder


def ask(folder: Path, code: str, *arguments, options: tuple[str, ...] = (), **environment: str) -> dict:
    """What code prints as JSON in its last line, in a process that knows no other checkpoint's code."""
    environment = {**os.environ, "HF_HOME": str(folder / f"home-{len(list(folder.iterdir()))}"), **environment}
    command = [sys.executable, *options, "-c", SCRIPT + code, json.dumps(HEADS), *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return unpack(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """All that is installed, but for this package."""
    return link_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def without_package(folder, packages):
    return ask(folder, WITHOUT, options=("-S",), PYTHONPATH=str(packages))


@pytest.fixture(scope="module")
def package_first(folder):
    return ask(folder, PACKAGE_FIRST)


@pytest.fixture(scope="module")
def old_first(folder):
    return ask(folder, OLD_FIRST)


@pytest.fixture(params=["without_package", "package_first", "old_first"])
def answers(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_old_checkpoints_answer_generate_and_learn(answers, without_package, name):
    for whose, result in answers[name].items():
        assert result["module"].startswith("hf_tfamily.modeling." if whose == "ours" else "transformers_modules.")
        assert result["difference"] <= 1e-5, whose
        assert result.get("generated") == without_package[name]["old"].get("generated"), whose
        assert result["loss"] == pytest.approx(without_package[name]["old"]["loss"], abs=1e-5), whose
        assert result["changed"] > 0, whose


@pytest.mark.parametrize("name", [name for name in NAMES if HEADS[name].endswith(("CausalLM", "Seq2SeqLM"))])
def test_every_old_checkpoint_that_generates_is_asked_to(without_package, name):
    assert without_package[name]["old"]["generated"]


@pytest.mark.parametrize("first", ["package_first", "old_first"])
def test_the_installed_engine_is_the_one_that_is_registered(request, first):
    answers = request.getfixturevalue(first)
    assert answers["engine"] == ["hf_tfamily.block_sparse.interface", 2]


def test_an_old_engine_serves_until_the_package_comes(old_first):
    module, version = old_first["first"]
    assert (module.split(".")[0], version) == ("transformers_modules", 1)
    assert max(old_first["before"].values()) <= 1e-5


@pytest.mark.parametrize("first", ["package_first", "old_first"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != WINDOWS])
def test_old_models_are_computed_by_the_installed_engine(request, first, name):
    result = request.getfixturevalue(first)[name]["old"]
    assert (result["calls"] > 0) == (result["default"] == "block_sparse")


def test_most_old_models_run_under_block_sparse(package_first):
    """So that what is asked above is asked."""
    assert sum(package_first[name]["old"]["default"] == "block_sparse" for name in NAMES) >= 6


def test_an_executor_that_a_checkpoint_changed_changes_nothing_of_the_package(folder):
    """It registered operators for the whole process, so that the package's results went from 4e-6 to 9.8 off."""
    broken = {
        "attention_torch.py": ("value.shape[3]].contiguous(), lse\n", "value.shape[3]].contiguous() * 3, lse\n"),
        "attention_block_sparse.py": ("\nVERSION = 1\n", "\nVERSION = 99\n"),  # nor by what it says of itself
    }
    files = {folder / "sparse_transformer" / name: changes for name, changes in broken.items()}
    whole = {file: file.read_text() for file in files}
    for file, (old, new) in files.items():
        assert whole[file].count(old) == 1
        file.write_text(whole[file].replace(old, new))
    try:
        config = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        result = ask(folder, BROKEN, json.dumps(config))
    finally:
        for file, text in whole.items():
            file.write_text(text)
    assert result["alone"] > 1e-3, "the change must be one that shows"
    assert result["module"] == "hf_tfamily.modeling.modeling_sparse_transformer"
    assert result["engine"] == ["hf_tfamily.block_sparse.interface", 2]
    assert result["ours"] <= 1e-5
    assert result["old"] <= 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of today


@pytest.fixture
def exported(folder):
    """A Sparse Transformer with today's code beside it, and what it answers."""
    model, _ = example("sparse_transformer")
    export(model, folder / "new")
    write_expected("sparse_transformer", model, folder)
    (folder / "sparse_transformer.safetensors").rename(folder / "new" / "expected.safetensors")
    yield folder / "new"
    shutil.rmtree(folder / "new")


def test_a_new_copy_asks_for_an_upgrade_of_an_old_engine(folder, exported, packages):
    result = ask(folder, NEW_BESIDE_OLD, options=("-S",), PYTHONPATH=str(packages))
    assert result["registered"] == 1
    assert result["default"] == "sdpa"
    assert "upgrade it: what is there speaks seam 1" in result["refused"]
    assert max(result["new"], result["old"]) <= 1e-5


def test_a_new_copy_that_was_changed_changes_nothing_of_the_package(folder, exported):
    """There is no executor in it any more; whatever else is changed holds for its own models only."""
    file = exported / "attention.py"
    line = "    output = (dropped @ value).transpose(1, 2).contiguous()\n"
    assert file.read_text().count(line) == 1
    file.write_text(file.read_text().replace(line, line.replace("dropped @ value", "dropped @ value * 3")))
    result = ask(folder, BROKEN_NEW)
    assert result["changed"] > 1e-3, "the change must be one that shows"
    assert result["module"].startswith("transformers_modules.")
    assert result["engine"] == ["hf_tfamily.block_sparse.interface", 2]
    assert result["ours"] <= 1e-5
    assert result["on the engine"] <= 1e-5
    assert result["calls"] > 0

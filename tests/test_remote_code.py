"""A repository's own code: every system runs where neither this package nor triton is installed."""

import os
import subprocess
import sys

import pytest

from hf_tfamily.hub import export
from tests.bare_packages import link_packages
from tests.hub.conftest import Client, open_hub
from tests.hub.examples import NAMES, example, main_head, repository, write_expected
from tests.hub.fixture_hub import Blob, Repository
from tests.hub.scripts import BOTH, REMOTE

pytestmark = pytest.mark.slow

ROUNDING = 5e-6  # of float32 outputs of about 1, computed by two backends
WANTED = {name: (repository(name), main_head(name).__name__) for name in NAMES}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A process's client of a Hub that holds every system, with its code."""
    folder = tmp_path_factory.mktemp("remote")
    with open_hub() as hub:
        for name in NAMES:
            model, processor = example(name)
            export(model, folder / name, processor)
            write_expected(name, model, folder)
            files = {path.name: Blob(path.read_bytes()) for path in (folder / name).iterdir()}
            stored = hub.repositories[repository(name)] = Repository(repository(name))
            stored.branches["main"] = stored.add_commit(stored.branches["main"], "files", files).oid
        yield Client(hub, folder)


@pytest.fixture(scope="module")
def bare_packages(tmp_path_factory):
    return link_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def without_package(filled, bare_packages):
    """What every system did in one such process; -S keeps the other packages out."""
    return filled.ask(REMOTE, WANTED, options=("-S",), token=None, PYTHONPATH=str(bare_packages))


@pytest.mark.parametrize("name", NAMES)
def test_every_system_runs_without_the_package(without_package, name):
    result = without_package[name]
    assert "error" not in result, result
    assert result["class"].startswith("transformers_modules.")
    assert result["loaded"] <= ROUNDING
    assert result["loss"] > 0
    assert result["labels move"] == main_head(name).__name__.endswith("CausalLM")
    assert result["changed"] > 0
    assert result["saved again"] <= ROUNDING
    assert {f"modeling_{name}.py", f"configuration_{name}.py", "config.json"} <= set(result["files"])


@pytest.mark.parametrize(
    "name", [name for name in NAMES if main_head(name).__name__.endswith(("CausalLM", "Seq2SeqLM"))]
)
def test_every_generating_system_generates_without_the_package(without_package, name):
    assert without_package[name]["generated"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_block_sparse_asks_for_the_package(without_package, name):
    assert without_package[name]["default"] == "sdpa"
    assert "`import hf_tfamily` before loading the model; see https://" in without_package[name]["refused"]


def test_the_default_without_the_package_says_once_what_it_costs(without_package):
    said = [(copy, line) for copy, line in without_package["said"] if "N x N" in line]
    assert len(set(said)) == len(said) > 0
    assert {copy.rpartition(".")[2] for copy, _ in said} == {"attention"}
    for system in ("image", "sparse", "swin"):
        assert any(f"{system}_hyphen_transformer" in copy for copy, _ in said)
    assert all("under sdpa" in line and "`import hf_tfamily` before loading the model" in line for _, line in said)


@pytest.fixture(scope="module")
def both(filled):
    """The repositories' code first, and then this package, in one process."""
    return filled.ask(BOTH, WANTED, token=None)


@pytest.mark.parametrize("name", NAMES)
def test_the_packages_classes_win_where_it_is_imported(both, name):
    result = both[name]
    assert result["remote"].startswith("transformers_modules.")
    assert result["ours"] == f"hf_tfamily.modeling.modeling_{name}"
    assert max(result["before"], result["after"]) <= ROUNDING


def test_links_hold_no_package_of_ours(bare_packages):
    """The environment is what it says: neither is found, and Transformers is."""
    code = (
        "import importlib.util as u; print([u.find_spec(name) is None for name in ('hf_tfamily', 'triton', 'torch')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(bare_packages)}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=bare_packages,
    )
    assert result.stdout.strip() == "[True, True, False]"

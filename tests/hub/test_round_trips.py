"""From one process to another over the Hub, each with a fresh cache: every system, by name and by revision."""

import json
import re
import signal
import threading

import pytest

from hf_tfamily.hub import export

from .conftest import ROOT, Client, open_hub
from .examples import NAMES, example, main_head, processor_class, repository
from .fixture_hub import Blob, Repository
from .scripts import PULL, PUSH, REFUSED

pytestmark = pytest.mark.slow

WANTED = {name: (repository(name), main_head(name).__name__, processor_class(name)) for name in NAMES}
PACKAGE = {"PYTHONPATH": str(ROOT)}  # for tests.hub.examples


@pytest.fixture(scope="module", params=["regular", "lfs"])
def pulled(request, tmp_path_factory):
    """What a process found that pulled all that another had pushed."""
    with open_hub() as hub:
        if request.param == "lfs":
            hub.lfs, hub.part_size = (".safetensors",), 100_000
        client = Client(hub, tmp_path_factory.mktemp("pushed"))
        client.run(PUSH, **PACKAGE)
        yield hub, client.ask(PULL, WANTED, token=None)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_equal_in_another_process(pulled, name):
    _, results = pulled
    assert results[name]["tagged"] <= 1e-6
    assert results[name]["newest"] > 1e-4
    assert results[name]["class"] == f"hf_tfamily.modeling.modeling_{name}"


def test_sparse_transformer_cifar(pulled):
    """AutoModel.from_pretrained("org/sparse-transformer-cifar"), as the README promises."""
    hub, results = pulled
    files = hub.repositories["org/sparse-transformer-cifar"].files
    assert {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"} <= files.keys()
    assert results["sparse_transformer"]["processor"] == "ImageTokenProcessor"


TRAIN = """
import torch, hf_tfamily
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from tests.tiny_models import tiny_model

rows = [{"input_ids": row, "labels": row} for row in torch.arange(1, 49).reshape(4, 12)]
arguments = TrainingArguments(
    "out", push_to_hub=True, hub_model_id="org/trained", hub_strategy="every_save", max_steps=2, save_steps=1,
    per_device_train_batch_size=2, use_cpu=True, report_to="none", logging_steps=1,
)
trainer = Trainer(tiny_model("rope_decoder", AutoModelForCausalLM), arguments, train_dataset=rows)
trainer.train()
trainer.push_to_hub()
reloaded = AutoModelForCausalLM.from_pretrained("org/trained", force_download=True)
for name, tensor in trainer.model.state_dict().items():
    assert torch.equal(tensor, reloaded.state_dict()[name]), name
"""


def test_the_stock_trainer_pushes(hub, client):
    client.run(TRAIN, **PACKAGE)
    repository = hub.repositories["org/trained"]
    assert {"config.json", "model.safetensors", "README.md"} <= repository.files.keys()
    assert len(repository.commits) >= 3


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def put(hub, repo, folder, **changed):
    """Lay a folder's files, some changed, into a repository."""
    files = {path.name: Blob(path.read_bytes()) for path in folder.iterdir()}
    files |= {name.replace("__", "."): Blob(content) for name, content in changed.items()}
    hub.repositories[repo] = Repository(repo)
    put_files(hub.repositories[repo], files)


def put_files(repository, files):
    repository.branches["main"] = repository.add_commit(repository.branches["main"], "files", files).oid


def test_what_cannot_be_pulled_says_why(hub, client, tmp_path):
    model, processor = example("sparse_transformer")
    folder = tmp_path / "model"
    export(model, folder, processor)
    config = json.loads((folder / "config.json").read_text())

    def changed(**fields):
        return {"config__json": json.dumps({**config, **fields}).encode()}

    for repo in ("org/private", "org/gated", "org/public"):
        put(hub, repo, folder)
    hub.repositories["org/private"].private = True
    hub.repositories["org/gated"].gated = True
    put(hub, "org/newer", folder, **changed(transformers_version="99.0.0", field_of_tomorrow=[1]))
    put(hub, "org/pattern", folder, **changed(attention_patterns={"type": "locl", "window": 4}))
    put(hub, "org/other", folder, **changed(model_type="never_heard_of", auto_map={}))
    trap = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00trap\x85R."
    put(hub, "org/pickle", folder, pytorch_model__bin=trap)
    del hub.repositories["org/pickle"].files["model.safetensors"]
    put(hub, "org/both", folder, pytorch_model__bin=trap)

    names = ("public", "private", "gated", "missing", "newer", "pattern", "other", "pickle", "both")
    cases = {name: {"pretrained_model_name_or_path": f"org/{name}"} for name in names}
    cases["revision"] = {"pretrained_model_name_or_path": "org/public", "revision": "v9"}
    found = client.ask(REFUSED, cases, token="stranger")
    assert {name for name, said in found.items() if said == "loaded"} == {"public", "newer", "both"}
    expected = {
        "private": "not a valid model identifier",
        "missing": "not a valid model identifier",
        "gated": "gated repo",
        "revision": "v9 is not a valid git identifier",
        "pattern": "did you mean 'local'",
        "other": "model type `never_heard_of`",
        "pickle": "weights_only|Weights only|safetensors",
    }
    for case, message in expected.items():
        assert re.search(message, found[case]), (case, found[case])
    assert ("GET", "/org/both/resolve/main/pytorch_model.bin") not in hub.requests
    assert not (tmp_path / "trap").exists()


def test_a_process_killed_while_it_pushes(hub, client, tmp_path):
    hub.lfs = (".safetensors",)
    model, processor = example("sparse_transformer")
    folder = tmp_path / "model"
    export(model, folder, processor)
    arguments = ("-m", "hf_tfamily", "push", str(folder), "org/killed")
    arrived, gone = threading.Event(), threading.Event()

    def wait():
        arrived.set()
        gone.wait(60)

    hub.once("PUT", "/lfs/", wait)
    process = client.start(*arguments)
    assert arrived.wait(120), process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    gone.set()
    assert hub.repositories["org/killed"].files == {}

    again = client.start(*arguments)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert f"{hub.url}/org/killed/commit/" in output
    question = {"killed": {"pretrained_model_name_or_path": "org/killed"}}
    assert client.ask(REFUSED, question) == {"killed": "loaded"}


def test_pulling_offline_uses_what_is_there(hub, client, tmp_path):
    model, processor = example("rope_decoder")
    export(model, tmp_path / "model", processor)
    put(hub, "org/rope-decoder", tmp_path / "model")
    load = "import hf_tfamily; from transformers import AutoModelForCausalLM as Auto\n"
    load += "Auto.from_pretrained('org/rope-decoder')"
    client.run(load)
    asked = len(hub.requests)
    client.run(load, HF_HOME=str(tmp_path / "home-1"), HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked

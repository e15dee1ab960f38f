"""`push`: what goes up, what stays here, and what happens when the Hub does not take it."""

import json
import pickle
from http import HTTPStatus

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_tfamily import Local, set_attention_patterns
from hf_tfamily.hub import PushError, changed_files, export, push
from hf_tfamily.modeling.image_processing_tokens import ImageTokenProcessor
from hf_tfamily_cli import app
from tests.tiny_models import tiny_model

from .fixture_hub import Answer, Blob, Dropped

REPO = "org/sparse-transformer-cifar"


pytestmark = pytest.mark.usefixtures("at_the_fixture")


@pytest.fixture
def folder(tmp_path):
    """A Sparse Transformer of pictures with its code."""
    export(tiny_model("sparse_transformer", AutoModelForCausalLM), tmp_path / "model", ImageTokenProcessor())
    return tmp_path / "model"


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def json_file(hub, name, repo=REPO):
    return json.loads(hub.repositories[repo].files[name].data)


def test_a_folder_becomes_one_commit(hub, folder):
    before = snapshot(folder)
    pushed = push(folder, REPO)
    repository = hub.repositories[REPO]
    assert pushed.url == f"{hub.url}/{REPO}/commit/{repository.branches['main']}"
    assert set(pushed.files) == set(repository.files) == {path.name for path in before} | {"README.md"}
    assert len(repository.commits) == 2
    assert snapshot(folder) == before
    assert repository.files["model.safetensors"].data == (folder / "model.safetensors").read_bytes()
    assert not repository.private


def test_the_card_says_where_it_is(hub, folder):
    push(folder, REPO)
    card = ModelCard(hub.repositories[REPO].files["README.md"].data.decode())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert {"sparse_transformer", "arxiv:1904.10509"} <= set(card.data.tags)
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}", trust_remote_code=True)' in card.text


def test_code_is_added_where_it_is_missing_and_left_out_on_demand(hub, folder, tmp_path):
    push(folder, "org/with")
    plain = tmp_path / "plain"
    tiny_model("sparse_transformer", AutoModelForCausalLM).save_pretrained(plain)
    ImageTokenProcessor().save_pretrained(plain)
    push(plain, "org/added")
    assert hub.repositories["org/added"].files.keys() == hub.repositories["org/with"].files.keys()
    for name in ("config.json", "preprocessor_config.json"):
        assert json_file(hub, name, "org/added")["auto_map"] == json_file(hub, name, "org/with")["auto_map"]

    push(folder, "org/without", with_code=False)
    files = hub.repositories["org/without"].files
    assert not [name for name in files if name.endswith(".py")]
    assert "auto_map" not in json_file(hub, "config.json", "org/without")
    assert "auto_map" not in json_file(hub, "preprocessor_config.json", "org/without")
    assert "trust_remote_code" not in files["README.md"].data.decode()


def test_models_of_other_packages_are_pushed_as_they_are(hub, tmp_path):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    push(tmp_path / "llama", "org/llama")
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert hub.repositories["org/llama"].files.keys() == names


def test_a_stock_model_under_a_pattern_is_loaded_under_it(hub, tmp_path):
    """Its own `save_pretrained` leaves the backend out; `export` and `push` write it beside the patterns."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    with pytest.raises(ValueError, match="no model of this package and follows no attention patterns"):
        export(model, tmp_path / "plain")
    set_attention_patterns(model, Local(2))
    ids = torch.randint(8, (1, 9))
    export(model, tmp_path / "exported")
    model.save_pretrained(tmp_path / "saved")
    push(tmp_path / "saved", REPO)
    for place in (tmp_path / "exported", REPO):
        loaded = AutoModelForCausalLM.from_pretrained(place)
        assert loaded.config._attn_implementation == "block_sparse"
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert "trust_remote_code" not in hub.repositories[REPO].files["README.md"].data.decode()


def test_pickles_and_checkpoints_stay_here(hub, folder):
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").touch()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "file").touch()
    torch.save({}, folder / "training_args.bin")
    (folder / "trap.pkl").write_bytes(pickle.dumps(print))
    pushed = push(folder, REPO)
    assert pushed.left_out == ["training_args.bin", "trap.pkl"]
    assert not [name for name in hub.repositories[REPO].files if "/" in name or name.endswith((".bin", ".pkl"))]


def test_pushing_again_sends_only_what_changed(hub, folder):
    hub.lfs = (".safetensors",)
    push(folder, REPO)
    push(folder, REPO)
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2
    (folder / "metrics.json").write_text("{}")
    push(folder, REPO)
    assert len(repository.commits) == 3
    assert sum(method == "PUT" for method, _ in hub.requests) == 1


@pytest.mark.parametrize("lfs", [(), (".safetensors", ".json")])
def test_changed_files_are_told_without_sending(hub, folder, lfs):
    hub.lfs = lfs
    everything = changed_files(folder, REPO)
    assert everything == sorted(push(folder, REPO).files)
    hub.requests.clear()
    assert changed_files(folder, REPO) == []
    assert changed_files(folder, REPO, revision="attempt") == everything
    assert changed_files(folder, REPO, with_code=False) == ["README.md", "config.json", "preprocessor_config.json"]
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "metrics.json").write_text("{}")
    hub.repositories[REPO].files["of_others.txt"] = Blob(b"theirs")
    assert changed_files(folder, REPO) == ["metrics.json", "model.safetensors"]
    assert {method for method, _ in hub.requests} == {"GET"}
    with pytest.raises(PushError, match="does not know the token"):
        changed_files(folder, REPO, token="unknown")


def test_private_and_revision(hub, folder):
    push(folder, REPO, private=True, revision="attempt")
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.files == {}
    assert "config.json" in repository.commit_at("attempt").files
    push(folder, REPO, private=True, revision="attempt")
    repository.private = False
    with pytest.raises(PushError, match="there already and public"):
        push(folder, REPO, private=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparse-transformer-cifar", "such as your-name/sparse-transformer-cifar"),
        ("a/b/c", "namespace/name"),
        ("/name", "namespace/name"),
        ("org/two words", "alphanumeric"),
    ],
)
def test_names(hub, folder, name, message):
    with pytest.raises(ValueError, match=message):
        push(folder, name)
    assert not hub.repositories


def test_folders_that_hold_no_safe_model(hub, folder, tmp_path):
    with pytest.raises(PushError, match=r"no config\.json"):
        push(tmp_path / "nothing", REPO)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(PushError, match="safetensors only, never pickled"):
        push(folder, REPO)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(PushError, match=r"no model-1\.safetensors"):
        push(folder, REPO)
    (folder / "config.json").write_text('{"model_type": "sparse_transformer"}')
    with pytest.raises(PushError, match="does not say its architectures"):
        push(folder, REPO)
    assert not hub.requests


def test_tokens(hub, folder, monkeypatch):
    refusals = {"read": "may not write there", "stranger": "may not write there", "unknown": "does not know the token"}
    for token, message in refusals.items():
        with pytest.raises(PushError, match=message):
            push(folder, REPO, token=token)
    HfApi(endpoint=hub.url, token="write").create_repo(REPO)
    with pytest.raises(PushError, match="may not write there"):
        push(folder, REPO, token="read")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match="no token; log in"):
        push(folder, REPO)
    assert hub.repositories[REPO].files == {}


def test_offline_and_unreachable(folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match="cannot be reached"):
        push(folder, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        push(folder, REPO)


def test_another_architecture_is_not_overwritten(hub, folder):
    push(folder, REPO)
    other = hub.repositories[REPO].files
    other["config.json"] = Blob(b'{"model_type": "bert"}')
    with pytest.raises(PushError, match="model_type='bert', this one is 'sparse_transformer'"):
        push(folder, REPO)


def test_somebody_elses_commit_meanwhile(hub, folder):
    push(folder, REPO)
    (folder / "metrics.json").write_text("{}")

    def commit_first():
        repository = hub.repositories[REPO]
        theirs = {**repository.files, "notes.txt": Blob(b"theirs")}
        repository.branches["main"] = repository.add_commit(repository.branches["main"], "theirs", theirs).oid

    hub.once("POST", "/preupload/", commit_first)
    with pytest.raises(PushError, match=r"somebody else committed there meanwhile.*push again"):
        push(folder, REPO)
    assert "metrics.json" not in hub.repositories[REPO].files
    push(folder, REPO)
    assert {"metrics.json", "notes.txt"} <= hub.repositories[REPO].files.keys()


def test_interrupted_uploads_leave_nothing_half_done(hub, folder):
    hub.lfs = (".safetensors", ".json")
    before = snapshot(folder)
    hub.once("PUT", "/lfs/", lambda: Answer(HTTPStatus.BAD_REQUEST))
    with pytest.raises(PushError, match="Nothing was pushed"):
        push(folder, REPO)
    hub.once("POST", "/commit/", lambda: Answer(HTTPStatus.SERVICE_UNAVAILABLE))
    with pytest.raises(PushError, match="503"):
        push(folder, REPO)
    hub.once("POST", "/commit/", drop)
    with pytest.raises(PushError, match="cannot be reached"):
        push(folder, REPO)
    assert hub.repositories[REPO].files == {}
    sent = sum(method == "PUT" for method, _ in hub.requests)
    push(folder, REPO)
    assert sum(method == "PUT" for method, _ in hub.requests) == sent
    assert "model.safetensors" in hub.repositories[REPO].files
    assert snapshot(folder) == before


def drop():
    raise Dropped


def test_an_overloaded_hub_is_asked_again(hub, folder):
    hub.lfs = (".safetensors",)
    hub.once("PUT", "/lfs/", lambda: Answer(HTTPStatus.SERVICE_UNAVAILABLE, headers={"Retry-After": "0"}))
    push(folder, REPO)
    assert "model.safetensors" in hub.repositories[REPO].files


def test_command(hub, folder):
    torch.save({}, folder / "training_args.bin")
    result = CliRunner().invoke(app, ["push", str(folder), REPO, "--private", "--without-code", "--revision", "v1"])
    assert result.exit_code == 0, result.output
    assert f"{hub.url}/{REPO}/commit/" in result.output
    assert "Left out, being pickles: training_args.bin" in result.output
    assert hub.repositories[REPO].private
    result = CliRunner().invoke(app, ["push", str(folder), "name"])
    assert result.exit_code == 2
    assert "namespace/name" in result.output

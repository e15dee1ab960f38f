"""`scripts/make_zoo.py`: every small recipe is trained once, pushed once, and one that fails stops no other."""

import re

import make_zoo
import pytest
from transformers import AutoModelForCausalLM

from hf_tfamily.recipes import list_recipes, load_recipe
from hf_tfamily.training import RunFolder, train

from .fixture_hub import Blob, Repository

pytestmark = pytest.mark.usefixtures("at_the_fixture")

# Sources that want files of one's own, or the Hub's.
LARGE = {"hub_images", "hub_labelled_images", "hub_word_stream"}
LARGE |= {"audio_files", "text_file", "text_file_stream", "translation_files"}
TINY = ("model.num_hidden_layers=1", "training.max_steps=2", "data.limit=600", "data.eval_limit=300")
DIGITS, TEXT = "sparse-transformer-digits", "transformer-xl-bible"


@pytest.fixture
def zoo(tmp_path, capfd, monkeypatch):
    """Runs the script on tiny models; returns its exit code and what it printed."""
    monkeypatch.setattr(make_zoo.console, "width", 200)

    def run(*words, settings=TINY):
        changes = [word for setting in settings for word in ("--set", setting)]
        code = make_zoo.main(["org", "--runs", str(tmp_path / "runs"), *changes, *words])
        output, errors = capfd.readouterr()
        return code, output + errors

    return run


def commits(hub):
    return {name: len(repository.commits) - 1 for name, repository in hub.repositories.items()}


def test_every_small_recipe_has_a_repository_of_its_name():
    small = [name for name in list_recipes() if load_recipe(name).data["source"] not in LARGE]
    assert sorted(recipe for _, recipe in make_zoo.ZOO) == small
    assert all(name == re.sub("[/_]", "-", recipe) for name, recipe in make_zoo.ZOO)


def test_a_dry_run_does_nothing(hub, zoo, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, said = zoo("--dry-run", settings=())
    assert code == 0, said
    assert said.count("would train and push") == 2 * len(make_zoo.ZOO)
    assert not (tmp_path / "runs").exists()
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "There is no token"), ("unknown", "does not take the token"), ("read", "reading only")],
)
def test_a_token_that_will_not_do_is_said_first(hub, zoo, tmp_path, monkeypatch, token, message):
    monkeypatch.setattr(make_zoo, "train", None)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    code, said = zoo()
    assert code == 2
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_is_left_to_do_is_done(hub, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(make_zoo, "ZOO", (("broken", "sparse_transformer/nothing"), *make_zoo.ZOO))
    hub.lfs = (".safetensors",)
    other = hub.repositories[f"org/{TEXT}"] = Repository(f"org/{TEXT}")
    other.files["config.json"] = Blob(b'{"model_type": "bert"}')
    names = ("--only", "broken", DIGITS, TEXT)

    # One recipe cannot be read, another's repository is taken: the third is there.
    code, said = zoo(*names, "--private")
    assert code == 1
    for message in ("No recipe and no file is called 'sparse_transformer/nothing'", "there already and public"):
        assert said.count(message) == 2, said
    assert commits(hub) == {f"org/{DIGITS}": 1, f"org/{TEXT}": 0}
    there = hub.repositories[f"org/{DIGITS}"]
    assert there.private
    assert {"README.md", "samples.png", "metrics.json", "modeling_sparse_transformer.py"} <= there.files.keys()
    figure = re.search(rf"org/{DIGITS} +(Held-out bits per dimension: [\d.]+) +pushed", said)[1]
    assert figure in there.files["README.md"].data.decode()
    assert AutoModelForCausalLM.from_pretrained(f"org/{DIGITS}").config.num_hidden_layers == 1

    # Nothing is trained again, and only what is missing goes up.
    monkeypatch.setattr(make_zoo, "train", None)
    del hub.repositories[f"org/{TEXT}"]
    code, said = zoo(*names[:1], *names[2:], "--private")
    assert code == 0, said
    assert commits(hub) == {f"org/{DIGITS}": 1, f"org/{TEXT}": 1}
    assert "samples.txt" in hub.repositories[f"org/{TEXT}"].files

    # And then nothing at all.
    hub.requests.clear()
    code, said = zoo(*names[:1], *names[2:], "--private")
    assert code == 0
    assert said.count("unchanged") == 4
    assert {method for method, _ in hub.requests} == {"GET"}

    # A file that changed is seen; folders of other settings are not taken for these.
    (tmp_path / "runs/sparse_transformer-digits/metrics.json").write_text(
        '{"bits_per_dim": 1, "uniform_bits_per_dim": 4}'
    )
    code, said = zoo("--only", DIGITS, "--dry-run")
    assert code == 0
    assert "would push 1 file" in said
    code, said = zoo("--only", DIGITS, settings=("training.max_steps=3",))
    assert code == 1
    assert "was trained with other settings" in said
    code, said = zoo("--only", DIGITS, settings=())
    assert code == 0
    assert commits(hub)[f"org/{DIGITS}"] == 2


@pytest.mark.slow
def test_an_interrupted_run_goes_on(hub, zoo, tmp_path, monkeypatch):
    def interrupted(recipe, output, resume):
        run = RunFolder(output)
        run.open(recipe, resume)
        raise KeyboardInterrupt

    monkeypatch.setattr(make_zoo, "train", interrupted)
    code, said = zoo("--only", DIGITS)
    assert code == 130
    assert "give the same command again" in said
    code, said = zoo("--only", DIGITS, "--dry-run")
    assert "would go on training and push" in said
    assert not hub.repositories
    monkeypatch.setattr(make_zoo, "train", train)
    code, said = zoo("--only", DIGITS)
    assert code == 0, said
    assert commits(hub) == {f"org/{DIGITS}": 1}

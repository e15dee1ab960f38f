"""Checkpoints that are damaged: the file is named, and a run goes on from the newest that is whole, or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_tfamily import manifest, training
from hf_tfamily.checkpoints import damage, newest_whole
from hf_tfamily.manifest import MANIFEST, write_manifest
from hf_tfamily.recipes import load_recipe
from hf_tfamily.training import RunError, train


def interrupt(monkeypatch, step, recipe, output):
    """A run that is interrupted at the end of `step`."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Stopwatch, "on_step_end", on_step_end, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, output)


@pytest.fixture(scope="module")
def recipe(micro_file):
    return load_recipe(micro_file, ["training.max_steps=6"])


@pytest.fixture(scope="module")
def interrupted_once(recipe, tmp_path_factory):
    """Folder of a run with checkpoint-2 and checkpoint-4."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch, 5, recipe, folder / "run")
    return folder / "run.partial"


@pytest.fixture
def run(interrupted_once, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(interrupted_once, tmp_path / "run.partial")


def cut(name):
    def do_damage(checkpoint):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return do_damage


def written(name, content):
    return lambda checkpoint: (checkpoint / name).write_text(content)


def gone(*names):
    def do_damage(checkpoint):
        for name in names:
            (checkpoint / name).unlink()

    return do_damage


def flipped(name):
    def do_damage(checkpoint):
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return do_damage


def other_step(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "global_step": 3}))


# What is done to checkpoint-4, what is said of it, and whether a checkpoint without a manifest shows it.
DAMAGES = {
    "optimizer cut": (cut("optimizer.pt"), "optimizer.pt", True),
    "optimizer empty": (written("optimizer.pt", ""), "optimizer.pt", True),
    "optimizer missing": (gone("optimizer.pt"), "optimizer.pt is missing", True),
    "a bit of the optimizer": (flipped("optimizer.pt"), "optimizer.pt is not what was written", False),
    "a bit of the weights": (flipped("model.safetensors"), "model.safetensors is not what was written", False),
    "weights cut": (cut("model.safetensors"), "model.safetensors", True),
    "weights missing": (gone("model.safetensors"), "model.safetensors is missing", True),
    "scheduler cut": (cut("scheduler.pt"), "scheduler.pt", True),
    "scheduler missing": (gone("scheduler.pt"), "scheduler.pt is missing", True),
    "random numbers cut": (cut("rng_state.pth"), "rng_state.pth", True),
    "random numbers missing": (gone("rng_state.pth"), "rng_state.pth is missing", True),
    "an object as state": (written("trainer_state.json", "{}"), "trainer_state.json", True),
    "a list as state": (written("trainer_state.json", "[]"), "trainer_state.json", True),
    "state cut": (cut("trainer_state.json"), "trainer_state.json", True),
    "state missing": (gone("trainer_state.json"), "trainer_state.json is missing", False),
    "another step": (other_step, "trainer_state.json", True),
    "config cut": (cut("config.json"), "config.json", True),
    "manifest cut": (cut(MANIFEST), "manifest.json cannot be read", False),
    "manifest of something else": (written(MANIFEST, '{"files": []}'), "manifest.json cannot be read", False),
    "no manifest after one": (gone(MANIFEST), "it was not finished (no manifest.json)", False),
    "half written": (gone(MANIFEST, "trainer_state.json"), "it was not finished (no manifest.json)", False),
}


def test_manifest_names_every_file(run):
    manifest = json.loads((run / "checkpoint-4" / MANIFEST).read_text())
    assert manifest["files"].keys() == {path.name for path in (run / "checkpoint-4").iterdir()} - {MANIFEST}


def test_whole_ones_are_gone_on_with(run):
    said = []
    assert newest_whole(run, said.append) == str(run / "checkpoint-4")
    assert said == [f"Resuming from {run / 'checkpoint-4'}."]


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_ones_are_passed_over(name, run):
    do_damage, words, _ = DAMAGES[name]
    do_damage(run / "checkpoint-4")
    said = []
    assert newest_whole(run, said.append) == str(run / "checkpoint-2")
    assert said[0].startswith(f"{run / 'checkpoint-4'} is passed over: {words}")
    assert said[1:] == [f"Resuming from {run / 'checkpoint-2'}."]
    assert not (run / "checkpoint-4").exists()
    assert (run / "damaged-checkpoint-4").exists() == (name != "half written")


@pytest.mark.parametrize("name", [name for name, (_, _, seen) in DAMAGES.items() if seen])
def test_damage_shows_without_manifests(name, run):
    """Checkpoints of older runs have none."""
    do_damage, words, _ = DAMAGES[name]
    do_damage(run / "checkpoint-4")
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / MANIFEST).unlink()
    said = []
    assert newest_whole(run, said.append) == str(run / "checkpoint-2")
    assert words.split()[0] in said[0]
    assert said[1].startswith(f"Warning: {run / 'checkpoint-2'} has no manifest.json")


def test_shards_are_verified(run):
    """In folders of their own, as FSDP2 writes them."""
    shard = run / "checkpoint-4" / "pytorch_model_fsdp_0" / "__1_0.distcp"
    shard.parent.mkdir()
    shard.write_bytes(b"weights of a process")
    write_manifest(run / "checkpoint-4")
    shard.write_bytes(b"Weights of a process")
    assert damage(run / "checkpoint-4") == "pytorch_model_fsdp_0/__1_0.distcp is not what was written (SHA-256)"
    shard.unlink()
    assert damage(run / "checkpoint-4") == "pytorch_model_fsdp_0/__1_0.distcp is missing"


def test_checkpoints_of_weights_alone_are_not_gone_on_with(run):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-4" / name).unlink()
    write_manifest(run / "checkpoint-4")
    assert damage(run / "checkpoint-4") == "optimizer.pt is missing"


def test_memory_is_not_taken_for_weights(run):
    (run / "checkpoint-4" / "model.safetensors").rename(run / "checkpoint-4" / "memory-0-of-1.safetensors")
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / MANIFEST).unlink()
    said = []
    assert newest_whole(run, said.append) == str(run / "checkpoint-2")
    assert "model.safetensors is missing" in said[0]


def test_other_folders_are_passed_over(run):
    for name in ("checkpoint-abc", "checkpoint-6.bak"):
        (run / name).mkdir()
    said = []
    assert newest_whole(run, said.append) == str(run / "checkpoint-4")
    assert any("checkpoint-abc is passed over: its name says no step" in line for line in said)


def test_with_none_whole_it_refuses(run, recipe):
    flipped("optimizer.pt")(run / "checkpoint-2")
    cut("model.safetensors")(run / "checkpoint-4")
    before = sorted(run.rglob("*"))
    with pytest.raises(RunError) as refused:
        train(recipe, run.with_name("run"), resume=True)
    assert "checkpoint-4: model.safetensors has" in str(refused.value)
    assert "checkpoint-2: optimizer.pt is not what was written (SHA-256)" in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert sorted(run.rglob("*")) == before


def test_first_checkpoint_half_written_begins_anew_and_says_so(run):
    shutil.rmtree(run / "checkpoint-2")
    gone(MANIFEST, "trainer_state.json")(run / "checkpoint-4")
    said = []
    assert newest_whole(run, said.append) is None
    assert said == [f"{run} has no finished checkpoint yet; beginning at step 0."]


def test_checkpoints_without_their_recipe(run, recipe):
    (run / "recipe.yaml").unlink()
    with pytest.raises(RunError, match=r"recipe.yaml is missing.*--overwrite"):
        train(recipe, run.with_name("run"), resume=True)
    assert (run / "checkpoint-4").exists()


def test_resumed_from_the_one_before_equals_an_uninterrupted_run(run, recipe, tmp_path, capsys):
    flipped("optimizer.pt")(run / "checkpoint-4")
    resumed = train(recipe, run.with_name("run"), resume=True)
    straight = train(recipe, tmp_path / "straight")
    assert f"Resuming from {run / 'checkpoint-2'}." in capsys.readouterr().out
    resumed, straight = (load_file(folder / "model.safetensors") for folder in (resumed, straight))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_the_only_checkpoint_goes_when_the_next_has_its_manifest(recipe, micro_file, tmp_path, monkeypatch):
    """A kill just before the manifest leaves the older one."""
    limited, write = load_recipe(micro_file, ["training.max_steps=6", "training.save_total_limit=1"]), write_manifest

    def die(checkpoint):
        assert [path.name for path in sorted(checkpoint.parent.glob("checkpoint-*"))] == [
            "checkpoint-2",
            "checkpoint-4",
        ]
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write_manifest", lambda path: (die if path.name == "checkpoint-4" else write)(path))
    with pytest.raises(KeyboardInterrupt):
        train(limited, tmp_path / "run")
    monkeypatch.undo()
    assert damage(tmp_path / "run.partial" / "checkpoint-2") is None
    interrupt(monkeypatch, 5, limited, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other.partial").glob("checkpoint-*")] == ["checkpoint-4"]
    train(limited, tmp_path / "run", resume=True)
    straight = train(recipe, tmp_path / "straight")
    resumed, straight = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", straight))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)

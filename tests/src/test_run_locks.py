"""Runs that meet others, are sent away, or find no room: nothing whole is lost, and it is said how to go on."""

import errno
import inspect
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from hf_tfamily import training
from hf_tfamily.checkpoints import damage
from hf_tfamily.recipes import load_recipe
from hf_tfamily.run_lock import locked
from hf_tfamily.training import RunError, RunFolder, Terminated, train

RECURRENT = """
title: The Bible by a model of a few thousand parameters
model: {model_type: transformer_xl, vocab_size: 257, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
  mem_len: 12, hidden_dropout: 0.1}
data: {source: bible_stream, length: 16, eval_books: [Jude]}
training: {max_steps: 4, per_device_train_batch_size: 4, per_device_eval_batch_size: 8, save_steps: 2, logging_steps: 1}
"""


@pytest.fixture(scope="module")
def recurrent_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipes") / "recurrent.yaml"
    file.write_text(RECURRENT)
    return file


def at_step_end(monkeypatch, step, do):
    """Let a run do something at the end of a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            do()

    monkeypatch.setattr(training.Stopwatch, "on_step_end", on_step_end, raising=False)


def assert_same_weights(*folders):
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)


HOLDER = """
import sys, time
from pathlib import Path
from hf_tfamily.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def another_process_holds(lock):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_second_run_into_one_folder_is_refused(micro, tmp_path, flags):
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "checkpoint-2").touch()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locked(tmp_path / "run.lock"):
        for name in ("run", "link"):
            with pytest.raises(RunError, match=f"run.lock is held by process {os.getpid()} on .*--output"):
                train(micro, tmp_path / name, **flags)
    assert (tmp_path / "run.partial" / "checkpoint-2").exists()
    assert not (tmp_path / "run.lock").exists()


def test_a_run_holds_the_lock_and_leaves_none(micro, tmp_path, monkeypatch):
    holders = []
    at_step_end(monkeypatch, 3, lambda: holders.append((tmp_path / "run.lock").read_text()))
    train(micro, tmp_path / "run")
    assert holders[0].splitlines()[0] == str(os.getpid())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_lock_of_a_process_that_was_killed_is_free(tmp_path):
    lock = tmp_path / "run.lock"
    with another_process_holds(lock) as process:
        with pytest.raises(RunError, match=f"held by process {process.pid} on .*another --output"), locked(lock):
            pass
        process.kill()
        process.wait()
        with locked(lock):
            assert lock.read_text().splitlines()[0] == str(os.getpid())
    assert not lock.exists()


def test_lock_that_cannot_be_written(micro, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"A run locks its folder; make .* writable, or choose another --output"):
        train(micro, tmp_path / "file" / "run")


def test_a_link_stays_a_link(micro, tmp_path):
    target = tmp_path / "large disk" / "model"
    target.parent.mkdir()
    (tmp_path / "run").symlink_to(target)
    for overwrite in (False, True):
        train(micro, tmp_path / "run", overwrite=overwrite)
        assert (tmp_path / "run").readlink() == target
        assert (target / "model.safetensors").exists()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large disk", "run"]


def test_a_run_that_was_begun_beside_its_link_is_not_begun_anew(micro, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large" / "model")
    (tmp_path / "run.partial").mkdir()
    with pytest.raises(RunError, match=r"is a link to .*; move .*run.partial to .*model.partial"):
        train(micro, tmp_path / "run", resume=True)


@pytest.mark.parametrize("kind", ["stock", "recurrent"])
def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_was(kind, micro_file, recurrent_file, tmp_path, monkeypatch):
    recipe = load_recipe(micro_file if kind == "stock" else recurrent_file)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step_end(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Terminated) as stopped:
            train(recipe, tmp_path / "run")
    assert (stopped.value.code, stopped.value.step) == (143, 3)
    assert signal.getsignal(signal.SIGTERM) == before
    checkpoint = tmp_path / "run.partial" / "checkpoint-3"
    assert damage(checkpoint) is None
    assert (checkpoint / "memory-0-of-1.safetensors").exists() == (kind == "recurrent")
    assert not (tmp_path / "run").exists()
    train(recipe, tmp_path / "run", resume=True)
    train(recipe, tmp_path / "straight")
    assert_same_weights(tmp_path / "run", tmp_path / "straight")


def test_sigterm_before_training_ends_at_once(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_data", lambda data: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        train(micro, tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_handler_of_a_program_around_stays(micro, tmp_path, monkeypatch):
    got = []
    before = signal.signal(signal.SIGTERM, lambda *arguments: got.append(arguments))
    try:
        at_step_end(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(micro, tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(got) == 1


def test_checkpoints_in_between_are_not_for_recipes(micro_file, tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint is not for `train`"):
        train(load_recipe(micro_file, ["training.enable_jit_checkpoint=true"]), tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "words", "cure"),
    [
        ("ENOSPC", r"No space left on device \(a checkpoint takes [\d,]+ bytes, [\d,]+ are free\)", "free space, then"),
        ("EDQUOT", "Disk quota exceeded", "free space or have the quota raised, then"),
        ("EROFS", "Read-only file system", "have the file system mounted for writing, then"),
    ],
)
def test_disk_that_takes_no_more(number, words, cure, micro, finished_once, tmp_path, monkeypatch):
    save = torch.save

    def fail(content, file, *arguments, **options):
        if "checkpoint-4" in str(file) and Path(file).name == "optimizer.pt":
            Path(file).write_bytes(b"half")
            raise OSError(getattr(errno, number), words)
        save(content, file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(RunError, match=f"checkpoint-4/optimizer.pt: {words}.*checkpoint-2 is whole; {cure}"):
            train(micro, tmp_path / "run")
    train(micro, tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "run", finished_once)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts")
def test_real_disk_that_is_full(micro, tmp_path, monkeypatch):
    """By the errors of torch and safetensors, whatever these are."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("no permission to mount")
    try:
        filling = small / "other"
        at_step_end(monkeypatch, 3, lambda: fill(filling))
        with pytest.raises(RunError, match=r"No space left on device.*checkpoint-2 is whole; free space"):
            train(micro, small / "run")
        assert damage(small / "run.partial" / "checkpoint-2") is None
    finally:
        subprocess.run(["umount", str(small)], check=True)


def fill(file):
    """All but 40 kB, which is less than a checkpoint."""
    free = os.statvfs(file.parent).f_bavail * os.statvfs(file.parent).f_frsize
    file.write_bytes(bytes(free - 40_000))


def test_finished_model_is_not_lost_where_the_new_one_cannot_take_its_place(micro, finished, monkeypatch):
    before = (finished / "model.safetensors").read_bytes()
    rename = Path.rename

    def fail(self, target):
        if self.name == "finished" and self.parent.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RunError, match="No space left on device"):
        train(micro, finished, overwrite=True)
    assert (finished / "model.safetensors").read_bytes() == before


def test_errors_about_files_elsewhere_stay_as_they_are(micro, tmp_path, monkeypatch):
    def fail(data):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/secret")

    monkeypatch.setattr(training, "load_data", fail)
    with pytest.raises(PermissionError, match="/data/secret"):
        train(micro, tmp_path / "run")


def last_checkpoint(output):
    return max((int(path.name.split("-")[-1]) for path in RunFolder(output).partial.glob("checkpoint-*")), default=0)


@contextmanager
def started(*arguments, launcher=(sys.executable, "-m")):
    """A run that would take for ever, with all its processes; none outlives the block."""
    command = [*launcher, "hf_tfamily", "train", *map(str, arguments), "--set", "training.max_steps=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        yield process
    finally:
        left = [] if process.poll() is not None else [process.pid, *map(int, children(process.pid))]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_for_checkpoint(process, output, step):
    while process.poll() is None and last_checkpoint(output) < step:
        time.sleep(0.05)


@pytest.mark.slow
def test_commands_and_signals(recurrent_file, tmp_path):
    """One command trains; a second is refused; SIGTERM ends the first, which is gone on with."""
    output = tmp_path / "run"
    with started(recurrent_file, "--output", output) as process:
        wait_for_checkpoint(process, output, 2)
        for flag in ("--overwrite", "--resume"):
            with started(recurrent_file, "--output", output, flag) as second:
                said = second.communicate(timeout=120)[1]
            assert (second.returncode, "Traceback" in said) == (2, False), said
            assert f"held by process {process.pid} on" in said
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert (process.returncode, "Traceback" in said) == (143, False), said
    assert f"Terminated. To go on: hf-tfamily train {recurrent_file} --output {output} --resume --set" in said
    reached = last_checkpoint(output)
    assert damage(RunFolder(output).partial / f"checkpoint-{reached}") is None
    with started(recurrent_file, "--output", output, "--resume") as process:
        wait_for_checkpoint(process, output, reached + 2)
        process.kill()
        assert f"Resuming from {RunFolder(output).partial / f'checkpoint-{reached}'}." in process.communicate()[0]


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes need two accelerators, or none")
def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(micro_file, tmp_path):
    output = tmp_path / "run"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    with started(micro_file, "--output", output, launcher=launcher) as process:
        wait_for_checkpoint(process, output, 2)
        ranks = [int(rank) for rank in children(process.pid)]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "Traceback" not in said.split("torch/distributed")[0]
    assert "Terminated. To go on:" in said
    checkpoint = RunFolder(output).partial / f"checkpoint-{last_checkpoint(output)}"
    assert damage(checkpoint) is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_trainer_calls_back_once_a_checkpoint_is_written():
    """What the manifest and SIGTERM rest on: on_save follows _save_checkpoint, in every process."""
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert source.index("self._save_checkpoint(") < source.index("callback_handler.on_save(")

"""Runs: what they leave behind, how they survive being stopped, and what they refuse to touch."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from hf_tfamily import training
from hf_tfamily.data import load_data
from hf_tfamily.evaluation import bits_per_dim
from hf_tfamily.finished import evaluate
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.training import RunError, RunFolder, train


def train_until(monkeypatch, step, recipe, output):
    """A run that is interrupted at the end of `step`."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Stopwatch, "on_step_end", on_step_end, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, output)


def test_finished_folder_is_complete(finished_once):
    names = {path.name for path in finished_once.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "preprocessor_config.json"} <= names
    assert {"README.md", "metrics.json", "recipe.yaml", "samples.png", "loss.png"} <= names
    assert not finished_once.with_name("micro.partial").exists()


def test_metrics_and_card_tell_the_same_figures(finished_once):
    metrics = json.loads((finished_once / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["uniform_bits_per_dim"] == pytest.approx(math.log2(17))
    assert metrics["parameters"] == AutoModelForCausalLM.from_pretrained(finished_once).num_parameters()
    assert metrics["bits_per_dim"] == pytest.approx(evaluate(finished_once, progress=False)["bits_per_dim"], abs=1e-5)
    card = (finished_once / "README.md").read_text()
    assert f"{metrics['bits_per_dim']:.4f}" in card
    assert "trust_remote_code=True" in card
    assert "BSD-3-Clause" in card


def test_samples_are_values(finished_once):
    config = json.loads((finished_once / "generation_config.json").read_text())
    assert config["do_sample"] is True
    assert config["max_length"] == 65
    assert config["suppress_tokens"] == list(range(17, 27))


def test_bits_per_dim_is_the_mean_over_all_values(finished_once):
    """Against a loop over single examples; 7 examples in batches of 3 leave a smaller last batch."""
    model = AutoModelForCausalLM.from_pretrained(finished_once)
    examples = load_data({"source": "digits"}).eval.select(range(7))
    bits = []
    for example in examples:
        ids = torch.as_tensor(example["input_ids"]).long()
        with torch.no_grad():
            log_probabilities = log_softmax(model(input_ids=ids[None, :-1]).logits[0].double(), dim=-1)
        bits += [-log_probabilities[place, value].item() / math.log(2) for place, value in enumerate(ids[1:])]
    assert bits_per_dim(model, examples, batch_size=3) == pytest.approx(sum(bits) / len(bits), rel=1e-6)


def test_resumed_run_ends_with_the_same_weights(micro, finished_once, tmp_path, monkeypatch):
    train_until(monkeypatch, 3, micro, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(micro, tmp_path / "run", resume=True)
    resumed, straight = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", finished_once))
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)
    assert not (tmp_path / "run.partial").exists()


def test_interrupted_run_is_neither_overrun_nor_mixed_up(micro, micro_file, tmp_path, monkeypatch):
    train_until(monkeypatch, 1, micro, tmp_path / "run")
    with pytest.raises(RunError, match=r"--resume.*--overwrite"):
        train(micro, tmp_path / "run")
    other = load_recipe(micro_file, ["training.learning_rate=0.5"])
    with pytest.raises(RunError, match=r"training.learning_rate is 0.01 there and 0.5 here.*--overwrite"):
        train(other, tmp_path / "run", resume=True)
    train(other, tmp_path / "run", overwrite=True)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").training["learning_rate"] == 0.5


def test_finished_model_is_replaced_only_on_demand(micro, finished):
    before = (finished / "model.safetensors").stat().st_mtime_ns
    for flags in ({}, {"resume": True}):
        with pytest.raises(RunError, match=r"finished model.*--resume.*--overwrite"):
            train(micro, finished, **flags)
    assert (finished / "model.safetensors").stat().st_mtime_ns == before
    train(micro, finished, overwrite=True)
    assert (finished / "model.safetensors").stat().st_mtime_ns != before


def test_folder_of_other_things_is_never_replaced(micro, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="holds no model"):
        train(micro, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=20", "vocab_size=20 is too small: the data has 27 ids"),
        ("model.position_shape=[8, 7]", "max_position_embeddings=56 is too small: an example has 64 values"),
        ("model.num_attention_heads=3", "hidden_size=16 is not a multiple of num_attention_heads=3"),
        ("training.max_steps=many", "max_steps must be a number"),
        ("training.output_dir=here", "output_dir cannot be set"),
        ("training.lr_scheduler_type=wavy", "wavy'? is not a valid"),
    ],
)
def test_unfit_recipes_leave_nothing_behind(micro_file, tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        train(load_recipe(micro_file, [override]), tmp_path / "run")
    assert not any(tmp_path.iterdir())


def run_command(*arguments, launcher=(sys.executable, "-m")):
    return [*launcher, "hf_tfamily", "train", *map(str, arguments)]


def furthest_checkpoint(output):
    checkpoints = output.with_name(output.name + ".partial").glob("checkpoint-*")
    return max((int(checkpoint.name.split("-")[-1]) for checkpoint in checkpoints), default=0)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(micro_file, tmp_path):
    command = run_command(micro_file, "--output", tmp_path / "run", "--set", "training.max_steps=100000")
    take_ctrl_c = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **take_ctrl_c)
    while process.poll() is None and furthest_checkpoint(tmp_path / "run") < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"{tmp_path / 'run'} --resume --set training.max_steps=100000" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc_per_node=2", "--master_port=29611", "-m"),
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=29612", "-m"),
    ],
    ids=["torchrun", "accelerate"],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes need two accelerators, or none")
def test_two_processes(micro_file, tmp_path, launcher):
    command = run_command(micro_file, "--output", tmp_path / "run", launcher=(sys.executable, "-m", *launcher))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.count("Held-out bits per dimension") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["processes"] == 2


def test_what_loggers_wrote_is_kept(micro, tmp_path):
    """TensorBoard's files, and whatever else somebody's callback puts into the working folder."""
    run = RunFolder(tmp_path / "run")
    run.open(micro, resume=False)
    for name in ("runs/now/events.out.tfevents.1", "emissions.csv", "checkpoint-2/model.safetensors"):
        (run.partial / name).parent.mkdir(parents=True, exist_ok=True)
        (run.partial / name).write_text(name)
    run.publish(lambda folder: (folder / "config.json").write_text("{}"))
    left = {path.relative_to(run.output).as_posix() for path in run.output.rglob("*") if path.is_file()}
    assert left == {"config.json", "runs/now/events.out.tfevents.1", "emissions.csv"}
    assert not run.partial.exists()

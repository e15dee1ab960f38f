"""Runs that diverge: they stop at the first number that is none, say where, and write nothing of it."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from typer.testing import CliRunner

import hf_tfamily_cli
from hf_tfamily.divergence import DivergenceError, stop_at_divergence
from hf_tfamily.recipes import load_recipe
from hf_tfamily.recurrent_training import RecurrentTrainer
from hf_tfamily.tasks.recurrent_text import text_metrics
from hf_tfamily.training import train
from tests.tiny_models import tiny_config

QUICK = ["training.max_steps=5", "training.save_steps=1", "training.eval_strategy=no"]


class Rows(torch.utils.data.Dataset):
    """Rows of text for a tiny model; RecurrentTrainer reads them as two streams."""

    num_streams = 2

    def __len__(self):
        return 12

    def __getitem__(self, place):
        ids = torch.arange(9) % 7 + place
        return {"input_ids": ids[:-1], "labels": ids[:-1]}


class BreakWeight(TrainerCallback):
    """At the start of a step a weight becomes NaN."""

    def __init__(self, step, weight):
        self.step, self.weight = step, weight

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.get_parameter(self.weight).data.fill_(math.nan)


def trainer_of(tmp_path, trainer_class=Trainer, callbacks=(), **settings):
    model = AutoModelForCausalLM.from_config(tiny_config("transformer_xl", hidden_dropout=0.1))
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2, disable_tqdm=True, **settings
    )
    collator = {"data_collator": torch.utils.data.default_collate} if trainer_class is RecurrentTrainer else {}
    return trainer_class(model=model, args=arguments, train_dataset=Rows(), callbacks=list(callbacks), **collator)


@pytest.mark.parametrize("rate", ["1e6", "1e30"])
def test_a_run_with_an_absurd_rate_stops_and_keeps_its_last_good_checkpoint(micro_file, tmp_path, rate):
    recipe = load_recipe(micro_file, [*QUICK, f"training.learning_rate={rate}"])
    with pytest.raises(DivergenceError, match=r"stopped in step \d.*checkpoint-\d\.$") as raised:
        train(recipe, tmp_path / "run")
    kept = str(raised.value).rpartition("checkpoint-")[2].rstrip(".")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run.partial" / f"checkpoint-{kept}")
    assert all(torch.isfinite(weight).all() for weight in saved.parameters())
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.partial" / "finished").exists()


def test_the_command_says_so_in_one_line(micro_file, tmp_path):
    command = ["train", str(micro_file), "--output", str(tmp_path / "run"), "--set", "training.learning_rate=1e30"]
    said = CliRunner().invoke(hf_tfamily_cli.app, command)
    assert said.exit_code == 2
    assert "Training stopped in step" in said.output
    assert "Traceback" not in said.output


@pytest.mark.parametrize("trainer_class", [Trainer, RecurrentTrainer])
@pytest.mark.parametrize("filtered", [False, True])
def test_the_module_is_named_and_no_broken_weights_are_saved(tmp_path, trainer_class, filtered):
    broken = BreakWeight(3, "model.layers.1.mlp.up_proj.weight")
    trainer = trainer_of(tmp_path, trainer_class, [broken], save_steps=1, max_steps=5, logging_nan_inf_filter=filtered)
    stop_at_divergence(trainer)
    with pytest.raises(DivergenceError, match=r"step 3: the loss is nan in batch 1 of 1.*layers\.1\.mlp\.up_proj"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_the_batch_of_an_accumulated_step_is_named(tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3, max_steps=2)
    seen, compute = [], trainer.compute_loss

    def compute_loss(*args, **kwargs):
        seen.append(1)
        return compute(*args, **kwargs) * (math.inf if len(seen) == 5 else 1)

    trainer.compute_loss = compute_loss
    stop_at_divergence(trainer)
    with pytest.raises(DivergenceError, match="step 2: the loss is inf in batch 2 of 3 of this step"):
        trainer.train()


def test_a_gradient_that_is_not_finite_is_found_where_it_begins(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=2)
    module = trainer.model.model.layers[0].mlp
    module.register_forward_hook(lambda module, inputs, output: output + 0 * (output - output.detach()).abs().sqrt())
    stop_at_divergence(trainer)
    with pytest.raises(DivergenceError, match=r"step 1: the norm of gradients is nan.*gradient of the output of model"):
        trainer.train()


def test_weights_are_looked_at_before_they_are_saved(tmp_path):
    class BreakAfterStep(BreakWeight):
        def on_optimizer_step(self, *args, **kwargs):
            super().on_step_begin(*args, **kwargs)

        def on_step_begin(self, *args, **kwargs):
            pass

    broken = BreakAfterStep(2, "model.layers.0.mlp.down_proj.weight")
    trainer = trainer_of(tmp_path, callbacks=[broken], save_steps=1, max_steps=2)
    stop_at_divergence(trainer)
    with pytest.raises(DivergenceError, match=r"step 2: the weights that it made .*down_proj, whose weight"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("trainer_class", [Trainer, RecurrentTrainer])
def test_looking_changes_nothing(tmp_path, trainer_class):
    """Dropout, memory and weights are those of a run that nobody watches."""
    torch.manual_seed(0)
    trained = []
    start = trainer_of(tmp_path, trainer_class).model.state_dict()
    for watch in (False, True):
        trainer = trainer_of(tmp_path / str(watch), trainer_class, save_steps=1, max_steps=4)
        trainer.model.load_state_dict(copy.deepcopy(start))
        if watch:
            stop_at_divergence(trainer)
        torch.manual_seed(1)
        trainer.train()
        trained.append(trainer.model.state_dict())
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]), name


def test_loss_scaling_may_skip_steps(tmp_path):
    """fp16 scales its loss up until gradients overflow, and goes on with a smaller scale."""
    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.accelerator.scaler = object()
    trainer.accelerator.clip_grad_norm_ = lambda *args, **kwargs: torch.tensor(math.inf)
    stop_at_divergence(trainer)
    watch = trainer.callback_handler.callbacks[-1]
    watch.losses, watch.batches = [torch.tensor(1.0)], [next(iter(trainer.get_train_dataloader()))]
    trainer.accelerator.clip_grad_norm_()
    watch.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    trainer.accelerator.scaler = None
    with pytest.raises(DivergenceError, match="the norm of gradients is inf"):
        watch.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)


def test_a_large_loss_that_is_finite_is_said_at_the_end(micro_file, tmp_path, capsys):
    """It ends no run: losses come down again."""
    for rate, said in (("3", True), ("1e-2", False)):
        settings = ["training.max_steps=40", "training.eval_strategy=no", f"training.learning_rate={rate}"]
        train(load_recipe(micro_file, settings), tmp_path / rate)
        assert ("nothing was learnt. A lower learning_rate" in capsys.readouterr().out) == said


def test_absurd_losses_have_figures():
    """A perplexity beyond what a float holds is the largest that one does, about."""
    data = SimpleNamespace(eval_bytes=4, eval_words=1, vocab_size=257)
    assert math.isfinite(text_metrics(np.full(4, 1e5), data)["perplexity"])

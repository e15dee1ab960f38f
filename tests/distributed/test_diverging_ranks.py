"""A run of two processes, one of which meets NaN or fails at its end: both stop, and with one message."""

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_tfamily.divergence import DivergenceError, stop_at_divergence
from hf_tfamily.processes import prepare_for_processes
from hf_tfamily.recipes import load_recipe
from hf_tfamily.run_errors import RunError
from hf_tfamily.tasks.token_sequences import TokenSequenceTask
from hf_tfamily.training import train
from tests.distributed.fsdp_ranks import fsdp2_on_a_cpu, write_recipes
from tests.distributed.pairs import run_ranks
from tests.tiny_models import tiny_config

KINDS = {"loss": "the loss is nan in batch 2 of 2 of this step of process 1", "weights": "the weights that it made"}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, place):
        ids = torch.arange(8) % 7 + place
        return {"input_ids": ids, "labels": ids}


class BreakAfterStep(TrainerCallback):
    """After the second step a weight is NaN in every process."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(iter(model.parameters())).data.fill_(float("nan"))


def train_broken(folder, kind, rank, sharded):
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    model = AutoModelForCausalLM.from_config(tiny_config("rope_decoder"))
    arguments = TrainingArguments(
        str(folder / kind), use_cpu=True, report_to="none", per_device_train_batch_size=2, max_steps=4, save_steps=1,
        gradient_accumulation_steps=2, disable_tqdm=True, logging_nan_inf_filter=False,
    )  # fmt: skip
    if sharded:
        PartialState().distributed_type = DistributedType.MULTI_GPU  # as in fsdp2_on_a_cpu
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    prepare_for_processes(trainer)
    assert trainer.accelerator.distributed_type == (DistributedType.FSDP if sharded else DistributedType.MULTI_CPU)
    compute, seen = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        seen.append(1)
        return compute(*args, **kwargs) * (float("nan") if len(seen) == 4 and rank == 1 else 1)

    if kind == "loss":
        trainer.compute_loss = compute_loss
    else:
        trainer.add_callback(BreakAfterStep())
    stop_at_divergence(trainer)
    with pytest.raises(DivergenceError) as raised:
        trainer.train()
    (folder / f"{kind}-{rank}.json").write_text(json.dumps(str(raised.value)))


def end_broken(folder, rank, error):
    """A run whose last evaluation, in the main process, fails."""

    def evaluate(self, *args, **kwargs):
        if error is not None:
            raise error
        return {"bits_per_dim": float("nan")}

    expected = DivergenceError if error is None else (type(error), RunError)[rank]
    recipe = load_recipe(folder / "stock.yaml", ["training.eval_strategy=no"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenSequenceTask, "evaluate", evaluate)
        with pytest.raises(expected) as raised:
            train(recipe, folder / f"end-{error is None}")
    (folder / f"end-{error is None}-{rank}.json").write_text(json.dumps(str(raised.value)))


def work(folder):
    rank = torch.distributed.get_rank()
    for error in (None, ZeroDivisionError("by nothing")):
        end_broken(folder, rank, error)
        torch.distributed.barrier()
    for engine in ("ddp", "fsdp2"):
        with fsdp2_on_a_cpu("FULL_STATE_DICT") if engine == "fsdp2" else nullcontext():
            for kind in KINDS:
                train_broken(folder / engine, kind, rank, sharded=engine == "fsdp2")
                torch.distributed.barrier()


@pytest.mark.slow
def test_all_processes_stop(tmp_path):
    write_recipes(tmp_path)
    run_ranks(work, tmp_path)
    for diverged, message in ((True, "bits_per_dim is nan on held-out data"), (False, "by nothing")):
        for rank in range(2):
            assert message in json.loads((tmp_path / f"end-{diverged}-{rank}.json").read_text())
        assert not (tmp_path / f"end-{diverged}").exists()
    for engine, kind in ((engine, kind) for engine in ("ddp", "fsdp2") for kind in KINDS):
        folder, message = tmp_path / engine, KINDS[kind]
        said = [json.loads((folder / f"{kind}-{rank}.json").read_text()) for rank in range(2)]
        assert said[0] == said[1]
        assert "step 2" in said[0]
        assert message in said[0]
        assert [path.name for path in (folder / kind).iterdir()] == ["checkpoint-1"]

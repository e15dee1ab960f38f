"""What the processes of test_fsdp.py do: train every head by `fully_shard`, and recipes by `train` under FSDP2."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_tfamily import training
from hf_tfamily.checkpoints import consolidate, has_shards
from hf_tfamily.processes import SentInBfloat16, held_bytes
from hf_tfamily.recipes import load_recipe
from tests.loss_cases import Case, cases

STEPS = 4
SPANS = "adaptive_span-CausalLM"  # whose loss reads parameters of the blocks
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
SIZES = "hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2"
TRAINING = """
training: {max_steps: 4, per_device_train_batch_size: 4, per_device_eval_batch_size: 8, learning_rate: 1e-2,
  logging_steps: 1, eval_strategy: steps, eval_steps: 2, save_steps: 2, save_total_limit: 9, adam_epsilon: 1e-3}
"""
SPARSE = f"model_type: sparse_transformer, max_position_embeddings: 16, vocab_size: 257, {SIZES}"
XL = f"model_type: transformer_xl, mem_len: 12, vocab_size: 257, {SIZES}"
RECIPES = {
    "stock": SPARSE + ", attention_patterns: [{type: local, window: 8}, {type: strided, stride: 8}]",
    "recurrent": XL,
    "adaptive": XL + ", cutoffs: [32, 128], div_val: 2",
}
SOURCES = {"stock": "text_file", "recurrent": "text_file_stream", "adaptive": "text_file_stream"}


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An epsilon that rounding of small gradients does not get over."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def halves(case: Case) -> list[dict[str, torch.Tensor]]:
    """What each of two ranks reads in every step."""
    return [case.collate(case.rows[rank::2]) for rank in range(2)]


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def train_by_hand(case: Case) -> dict:
    """A few steps of a model whose blocks are sharded; this rank's losses, and all weights."""
    model, batch = case.build().train(), halves(case)[distributed.get_rank()]
    blocks = blocks_of(model)
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    assert {type(block).__bases__[-1].__name__ for block in blocks} == set(model._no_split_modules)
    assert len(blocks) > 1 or case.name == "universal_transformer"  # whose decoder is one, applied again and again
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == len(blocks) + 1
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer, losses = optimizer_of(model), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    held = held_bytes(optimizer)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"losses": losses, "weights": weights, "held": held}


def sharded_cases() -> dict[str, Case]:
    """All that may be sharded block by block."""
    return {name: case for name, case in cases().items() if name != SPANS}


def by_hand(folder: Path) -> None:
    """Every head."""
    found = {name: train_by_hand(case) for name, case in sharded_cases().items()}
    with pytest.raises(ValueError, match="Spans pay their cost outside the blocks"):
        train_by_hand(cases()[SPANS])
    torch.save(found, folder / f"by-hand-{distributed.get_rank()}.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def write_recipes(folder: Path) -> None:
    """A text, and recipes of a model for it."""
    text = " ".join(f"{number} is {number % 7} and {number % 11}." for number in range(400))
    (folder / "text.txt").write_text(text)
    for name, model in RECIPES.items():
        data = f"{{source: {SOURCES[name]}, path: {folder / 'text.txt'}, length: 16}}"
        (folder / f"{name}.yaml").write_text(f"title: {name}\nmodel: {{{model}}}\ndata: {data}\n{TRAINING}")


@contextmanager
def fsdp2_on_a_cpu(state_dict_type: str):
    """What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` sets, and processes taken for those of GPUs.

    Accelerate turns several processes into FSDP only where each has an accelerator, and DDP on a CPU otherwise. So the
    type of PartialState, a public attribute, is set between TrainingArguments, which make it, and the Trainer.
    """
    settings = {**FSDP2, "FSDP_STATE_DICT_TYPE": state_dict_type}
    load_data, whole_model = training.load_data, training.whole_model

    def force(data):
        PartialState().distributed_type = DistributedType.MULTI_GPU
        return load_data(data)

    def check(trainer):
        assert trainer.accelerator.is_fsdp2
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
        assert all(isinstance(block, FSDPModule) for block in trainer.model.model.layers)
        return whole_model(trainer)

    os.environ |= settings
    training.load_data, training.whole_model = force, check
    try:
        yield
    finally:
        training.load_data, training.whole_model = load_data, whole_model
        for name in settings:
            del os.environ[name]


@contextmanager
def interrupted_at(step: int):
    """Ctrl+C at the end of a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    training.Stopwatch.on_step_end = on_step_end
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        del training.Stopwatch.on_step_end


def recipes(folder: Path) -> None:
    """Runs that are interrupted and resumed, with either kind of checkpoint, until they are finished."""
    for name in RECIPES:
        recipe = load_recipe(folder / f"{name}.yaml")
        for kind in KINDS:
            output = folder / f"{name}-{kind}"
            checkpoint = output.with_name(output.name + ".partial") / "checkpoint-2"
            with fsdp2_on_a_cpu(kind):
                with interrupted_at(3):
                    training.train(recipe, output)
                assert not output.exists()
                assert has_shards(checkpoint) == (kind == "SHARDED_STATE_DICT")
                _keep(checkpoint, folder / f"{name}-{kind}-kept.partial")
                training.train(recipe, output, resume=True)
            assert (output / "model.safetensors").exists(), "everybody leaves when the folder is there"


def _keep(checkpoint: Path, kept: Path) -> None:
    """The main process copies an interrupted run, and puts a sharded checkpoint of it together."""
    if distributed.get_rank() == 0:
        shutil.copytree(checkpoint.parent, kept)
        if has_shards(checkpoint):
            consolidate(checkpoint, kept.with_name(kept.name.replace("kept.partial", "consolidated")))
    distributed.barrier()


def refusals_and_reductions(folder: Path) -> None:
    """What two ranks are refused, and gradients that DDP sends in bfloat16."""
    said = {}
    for name, arguments in {
        "another kind": ("FULL_STATE_DICT", "stock-SHARDED_STATE_DICT-kept", []),
        "a hook": ("FULL_STATE_DICT", "unused", ["training.ddp_comm_hook=bf16"]),
    }.items():
        kind, output, overrides = arguments
        with fsdp2_on_a_cpu(kind):
            said[name] = _refusal(folder, "stock", folder / output, overrides)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    said["not forced"] = _refusal(folder, "stock", folder / "unused", [])
    del os.environ["ACCELERATE_USE_FSDP"]
    (folder / f"said-{distributed.get_rank()}.json").write_text(json.dumps(said))
    recipe = load_recipe(folder / "stock.yaml", ["training.ddp_comm_hook=bf16", "training.eval_strategy=no"])
    with reductions() as found:
        training.train(recipe, folder / "stock-hook")
    (folder / f"reduced-{distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.save(
        [average_gradients(in_bfloat16) for in_bfloat16 in (False, True)],
        folder / f"averages-{distributed.get_rank()}.pt",
    )


def _refusal(folder: Path, name: str, output: Path, overrides: list[str]) -> str:
    try:
        training.train(load_recipe(folder / f"{name}.yaml", overrides), output, resume=True)
    except ValueError as error:
        return str(error)
    return "nothing"


@contextmanager
def reductions():
    """Counts the bytes that communication hooks send, by dtype."""
    found, all_reduce = {}, distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        found[str(tensor.dtype)] = found.get(str(tensor.dtype), 0) + tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counting
    try:
        yield found
    finally:
        distributed.all_reduce = all_reduce


def average_gradients(in_bfloat16: bool) -> tuple[dict, dict]:
    """One backward pass of two ranks under DDP: the gradients, and the bytes that were sent for them."""
    case = cases()["sparse_transformer-CausalLM"]
    model = DistributedDataParallel(case.build().train())
    if in_bfloat16:
        SentInBfloat16().register_comm_hook(model)
    else:
        model.register_comm_hook(None, allreduce_hook)
    with reductions() as found:
        model(**halves(case)[distributed.get_rank()]).loss.backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}, found


def two_ranks(folder: Path) -> None:
    by_hand(folder)
    recipes(folder)
    refusals_and_reductions(folder)


def three_ranks(folder: Path) -> None:
    """Go on with what two ranks began."""
    with fsdp2_on_a_cpu("SHARDED_STATE_DICT"):
        training.train(load_recipe(folder / "stock.yaml"), folder / "stock-SHARDED_STATE_DICT-kept", resume=True)
        said = _refusal(folder, "recurrent", folder / "recurrent-SHARDED_STATE_DICT-kept", [])
    (folder / f"three-{distributed.get_rank()}.txt").write_text(said)

"""Which engines a run refuses, and what of a recipe: nothing is trained in another way than was asked for."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from hf_tfamily.processes import check_engine
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.training import train


def trainer(engine, processes=2, fsdp2=True, deepspeed=None, **sizes):
    """As much of a Trainer as is asked."""
    return SimpleNamespace(
        args=SimpleNamespace(world_size=processes, fsdp=None, deepspeed=deepspeed),
        accelerator=SimpleNamespace(
            distributed_type=engine,
            is_fsdp2=fsdp2,
            device=torch.device("cpu"),
            parallelism_config=SimpleNamespace(**sizes) if sizes else None,
        ),
    )


def test_what_is_there_is_taken():
    for engine in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        check_engine(trainer(engine))
    check_engine(trainer(DistributedType.DEEPSPEED, deepspeed="zero3.json"))
    check_engine(trainer(DistributedType.FSDP, tp_size=1, cp_size=1))


def test_an_engine_that_does_not_come(monkeypatch):
    with pytest.raises(ValueError, match=r"DEEPSPEED was asked for, but .* does not shard in 2 processes on cpu"):
        check_engine(trainer(DistributedType.MULTI_CPU, deepspeed="zero3.json"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_engine(trainer(DistributedType.FSDP))
    with pytest.raises(ValueError, match=r"FSDP was asked for, but .* does not shard in 1 process on cpu"):
        check_engine(trainer(DistributedType.NO, processes=1))


def test_what_is_not_supported():
    with pytest.raises(ValueError, match="fsdp_version=1 is not supported; use fsdp_version: 2"):
        check_engine(trainer(DistributedType.FSDP, fsdp2=False))
    for name in ("tp_size", "cp_size", "sp_size"):
        with pytest.raises(ValueError, match=f"{name}=2 is not supported"):
            check_engine(trainer(DistributedType.FSDP, **{name: 2}))


def test_settings_of_recipes(tmp_path):
    recipe = "sparse_transformer/digits"
    assert load_recipe(recipe, ["training.ddp_comm_hook=bf16"]).training["ddp_comm_hook"] == "bf16"
    with pytest.raises(RecipeError, match=r"training.ddp_comm_hook must be 'bf16' or null, got 'fp8'"):
        load_recipe(recipe, ["training.ddp_comm_hook=fp8"])
    if not torch.accelerator.is_available():
        with pytest.raises(RecipeError, match="fp16=true would compute in float32 on a CPU"):
            train(load_recipe(recipe, ["training.fp16=true"]), tmp_path / "run")
    assert not any(tmp_path.iterdir())

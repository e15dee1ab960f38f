"""Runs of several processes: which engines train a recipe, what a process holds, and the whole model at the end.

Under DDP every process holds all of a model. Under FSDP2 (and DeepSpeed's ZeRO-3) it holds a part of every weight, so
that nothing may be done with the model by one process alone until `whole_model` has put it together.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
FOR_EVER = timedelta(days=365)


def prepare_for_processes(trainer: Trainer, ddp_comm_hook: str | None = None) -> "HeldBytes":
    """Let `trainer` train in as many processes as there are; returns the callback that counts what each of them holds.

    Args:
        ddp_comm_hook: "bf16" for gradients that cross from process to process in bfloat16; in their own dtype if None.

    Raises:
        ValueError: for an engine that was asked for and is not there, or that is not supported.
    """
    check_engine(trainer)
    if ddp_comm_hook is not None:
        _compress_gradients(trainer, ddp_comm_hook)
    if trainer.accelerator.distributed_type == DistributedType.FSDP:
        cut_by_blocks(trainer)
    held = HeldBytes()
    trainer.add_callback(held)
    return held


def check_engine(trainer: Trainer) -> None:
    """Raise ValueError if the engine that was asked for is not the one that would run, or is not supported here."""
    accelerator, arguments = trainer.accelerator, trainer.args
    for engine, asked in (
        (DistributedType.FSDP, arguments.fsdp or _is_set("ACCELERATE_USE_FSDP")),
        (DistributedType.DEEPSPEED, arguments.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED")),
    ):
        if asked and accelerator.distributed_type != engine:
            raise ValueError(
                f"{engine.value} was asked for, but Accelerate does not shard in {in_words(arguments.world_size)} on "
                f"{accelerator.device.type}: each would hold the whole model. It takes several processes with a GPU "
                f"each; without, leave {engine.value} out (DDP, torchrun --nproc_per_node 2)."
            )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version=1 is not supported; use fsdp_version: 2 (configs/accelerate/fsdp2.yaml).")
    sizes = accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(sizes, name, 1) > 1:
            raise ValueError(
                f"{name}={getattr(sizes, name)} is not supported by `hf-tfamily train`, which cuts no layer and no "
                "sequence; leave it at 1, or see docs/many_processes.md for scripts of your own."
            )


def _is_set(variable: str) -> bool:
    """Does `accelerate launch` say so in the environment?"""
    return os.environ.get(variable, "").lower() == "true"


def _compress_gradients(trainer: Trainer, hook: str) -> None:
    """Gradients cross from process to process in a smaller dtype (DDP's communication hook)."""
    accelerator = trainer.accelerator
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"ddp_comm_hook={hook!r} is for DDP; {accelerator.distributed_type.value} averages gradients in the dtype "
            "of its mixed precision (training.bf16=true)."
        )
    accelerator.ddp_handler = SentInBfloat16(**vars(accelerator.ddp_handler))


class SentInBfloat16(DistributedDataParallelKwargs):
    """Lets Accelerate register torch's hook for bfloat16, on CPUs too.

    DistributedDataParallel knows that hook by its name and takes it for NVIDIA's and Intel's GPUs alone; gloo sums
    bfloat16 as well.
    """

    def register_comm_hook(self, model):
        def send_in_bfloat16(group, bucket):
            return bf16_compress_hook(group, bucket)

        model.register_comm_hook(None, send_in_bfloat16)


def cut_by_blocks(trainer: Trainer) -> None:
    """Let Accelerate's FSDP2 cut the model of `trainer` into its blocks (`_no_split_modules`) and one unit of the rest.

    By itself Accelerate also makes units of embeddings and head. torch refuses that where three share a table (the
    vanilla Transformer) and where they share several (an adaptive softmax).
    """
    prepare = trainer.accelerator.prepare

    def prepare_blocks(*args, **kwargs):
        with _without_embeddings(trainer.model):
            return prepare(*args, **kwargs)

    trainer.accelerator.prepare = prepare_blocks


@contextmanager
def _without_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """The model answers that it has no embeddings and no head of logits."""
    names = ("get_input_embeddings", "get_output_embeddings")
    for name in names:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


def is_sharded(trainer: Trainer) -> bool:
    """Does a process hold only a part of each weight?"""
    return trainer.accelerator.distributed_type in SHARDED


def whole_model(trainer: Trainer) -> PreTrainedModel | None:
    """The trained model with all its weights in the main process, None in the others. Every process calls this.

    A sharded model is left as it is: what is returned is a new one, on the device of the main process.
    """
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if not is_sharded(trainer):
        return model if accelerator.is_main_process else None
    weights = accelerator.get_state_dict(trainer.model_wrapped)
    if not accelerator.is_main_process:
        return None
    whole = plain_class(model)(model.config).to(model.dtype)
    whole.load_state_dict(weights)
    if whole.can_generate():
        whole.generation_config = model.generation_config
    return whole.to(accelerator.device)


def plain_class(model: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a model before `fully_shard` put a subclass in its place."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


@contextmanager
def everyone_waits() -> Iterator[None]:
    """Processes leave the block together, however long one of them works in it.

    They wait in a group of their own: a barrier of the run's own group fails after its timeout, half an hour.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    waiting = distributed.new_group(backend="gloo", timeout=FOR_EVER)
    try:
        yield
    finally:
        distributed.barrier(group=waiting)


class HeldBytes(TrainerCallback):
    """Says how many processes train, and how many bytes each of them holds of a sharded model.

    Attributes:
        bytes: parameters, gradients and optimizer state in this process, after the first step; None if not sharded.
    """

    def __init__(self, write: Callable[[str], None] = tqdm.write):
        self.bytes: int | None = None
        self.write = write

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write(f"Training in {in_words(args.world_size)}.")

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.bytes is not None or not any(isinstance(p, DTensor) for p in _parameters(optimizer)):
            return
        self.bytes = held_bytes(optimizer)
        if state.is_world_process_zero:
            self.write(f"A process holds {self.bytes:,} bytes of parameters, gradients and optimizer state.")


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's parameters, their gradients and its state that are in this process."""
    tensors = []
    for parameter in _parameters(optimizer):
        tensors += [parameter, parameter.grad, *optimizer.state.get(parameter, {}).values()]
    return sum(_local(tensor).nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_words(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"

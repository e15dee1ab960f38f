"""The checkpoints of a run: which of them are whole, who can go on with them, and a model out of a sharded one.

A checkpoint is a folder that the Trainer writes. Under FSDP with state_dict_type SHARDED_STATE_DICT it has no weights
in one file, but a folder of each process' shards (torch.distributed.checkpoint).
"""

import json
from pathlib import Path

from torch.distributed import checkpoint as distributed_checkpoint
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, Trainer

from .finished import load_processor, task_in
from .hub import export

# Names that Accelerate gives: weights and optimizer in shards, and weights of FSDP in one file.
SHARDED_MODEL, SHARDED_OPTIMIZER, FULL_MODEL = "pytorch_model_fsdp_0", "optimizer_0", "pytorch_model_fsdp.bin"
# In the working folder of a run, beside its checkpoints: what the model is, for those that hold shards alone.
DESCRIPTION = "model"
ENGINES = {
    "SHARDED_STATE_DICT": "under FSDP with state_dict_type SHARDED_STATE_DICT",
    "FULL_STATE_DICT": "under FSDP with state_dict_type FULL_STATE_DICT",
    "plain": "without FSDP",
}


def is_whole(checkpoint: Path) -> bool:
    """Does it have weights, and a trainer_state.json that is not cut off?"""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("*model*.safetensors")) or has_shards(checkpoint)


def has_shards(checkpoint: Path) -> bool:
    """Does it have the shards of a model and of its optimizer? What each contains is written last."""
    return all((checkpoint / name / ".metadata").exists() for name in (SHARDED_MODEL, SHARDED_OPTIMIZER))


def check_engine_of(checkpoint: Path, trainer: Trainer) -> None:
    """Raise ValueError if a checkpoint is of another engine than that of `trainer`, which could not read it."""
    written = "plain"
    if has_shards(checkpoint):
        written = "SHARDED_STATE_DICT"
    elif (checkpoint / FULL_MODEL).exists():
        written = "FULL_STATE_DICT"
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    reads = "plain" if plugin is None else plugin.state_dict_type.name
    if written != reads:
        raise ValueError(
            f"{checkpoint} was written {ENGINES[written]}, and this run trains {ENGINES[reads]}; resume it as it was "
            "begun."
        )


def describe(model: PreTrainedModel, processor, run: Path) -> None:
    """Write into a run's working folder what `consolidate` has to know of the model beyond its weights."""
    model.config.save_pretrained(run / DESCRIPTION)
    if model.can_generate():
        model.generation_config.save_pretrained(run / DESCRIPTION)
    if processor is not None:
        processor.save_pretrained(run / DESCRIPTION)


def consolidate(checkpoint: str | Path, output: str | Path) -> None:
    """A folder that loads like any saved model out of a sharded checkpoint of `hf-tfamily train`, in one process.

    The shards' list of contents is a pickle, which torch.distributed.checkpoint reads as such: consolidate checkpoints
    of your own only. The weights themselves are read as weights alone.

    Args:
        checkpoint: `OUTPUT.partial/checkpoint-N` of a run, where it is.
        output: a new folder, for safetensors, configuration and code.

    Raises:
        ValueError: if `checkpoint` has no shards or has been moved from its run, or `output` is not empty.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    description = checkpoint.parent / DESCRIPTION
    if not has_shards(checkpoint):
        raise ValueError(f"{checkpoint} has no shards ({SHARDED_MODEL}, {SHARDED_OPTIMIZER}) to put together.")
    if not (description / "config.json").exists():
        raise ValueError(f"{description} is missing, which says what the model is; leave {checkpoint} in its run.")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose a new folder.")
    model = task_in(checkpoint.parent).auto_class.from_config(AutoConfig.from_pretrained(description))
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(description)
    reader = distributed_checkpoint.FileSystemReader(checkpoint / SHARDED_MODEL)
    distributed_checkpoint.load({"model": model.state_dict()}, storage_reader=reader, no_dist=True)
    export(model, output, load_processor(description))

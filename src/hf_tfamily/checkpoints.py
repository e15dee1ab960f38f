"""The checkpoints of a run: which of them are whole, who can go on with them, and a model out of a sharded one.

A checkpoint is a folder that the Trainer writes. Under FSDP with state_dict_type SHARDED_STATE_DICT it has no weights
in one file, but a folder of each process' shards (torch.distributed.checkpoint).
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, Trainer

from .divergence import DivergenceError
from .finished import load_processor, task_in
from .hub import export
from .manifest import MANIFEST, difference
from .processes import everyone_waits
from .run_errors import RunError

# Names that Accelerate gives: weights and optimizer in shards, and weights of FSDP in one file.
SHARDED_MODEL, SHARDED_OPTIMIZER, FULL_MODEL = "pytorch_model_fsdp_0", "optimizer_0", "pytorch_model_fsdp.bin"
# In the working folder of a run, beside its checkpoints: what the model is, for those that hold shards alone.
DESCRIPTION = "model"
ENGINES = {
    "SHARDED_STATE_DICT": "under FSDP with state_dict_type SHARDED_STATE_DICT",
    "FULL_STATE_DICT": "under FSDP with state_dict_type FULL_STATE_DICT",
    "plain": "without FSDP",
}


def newest_whole(run: Path, say: Callable[[str], None]) -> str | None:
    """The checkpoint that training in the folder `run` goes on from; None if none was ever finished.

    Newer ones that are not whole are set aside as `damaged-checkpoint-N`; what a process was still writing when it died
    goes. Each is said with its reason.

    Raises:
        RunError: if there are checkpoints and all are damaged.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints_in(run, say)):
        if (reason := damage(checkpoint)) is None:
            for other, why in damaged.items():
                say(f"{other} is passed over: {why}.")
                _set_aside(other)
            if not (checkpoint / MANIFEST).exists():
                say(f"Warning: {checkpoint} has no {MANIFEST}, so that nobody knows whether its files are as written.")
            say(f"Resuming from {checkpoint}.")
            return str(checkpoint)
        damaged[checkpoint] = reason
    if all(was_being_written(checkpoint) for checkpoint in damaged):
        say(f"{run} has no finished checkpoint yet; beginning at step 0.")
        return None
    reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in damaged.items())
    raise RunError(
        f"{run} has no whole checkpoint to resume from ({reasons}); put the files back, or begin anew by --overwrite."
    )


def checkpoints_in(run: Path, say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """The folders checkpoint-N of a run, oldest first."""
    found = {}
    for folder in run.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            found[folder] = step_of(folder)
        else:
            say(f"{folder} is passed over: its name says no step.")
    return sorted(found, key=found.get)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def damage(checkpoint: Path) -> str | None:
    """Why a run cannot go on from a checkpoint as if it had never stopped; None if it can."""
    if (checkpoint / MANIFEST).exists():
        return difference(checkpoint) or _what_is_missing(checkpoint)
    older = [other for other in checkpoints_in(checkpoint.parent) if step_of(other) < step_of(checkpoint)]
    if was_being_written(checkpoint) or any((other / MANIFEST).exists() for other in older):
        return f"it was not finished (no {MANIFEST})"
    return _what_is_missing(checkpoint) or _what_is_cut(checkpoint)


def was_being_written(checkpoint: Path) -> bool:
    """Did the process die over it? Of its own files the Trainer writes trainer_state.json last."""
    state = checkpoint / "trainer_state.json"
    return not (checkpoint / MANIFEST).exists() and (not state.exists() or state.stat().st_size == 0)


def _what_is_missing(checkpoint: Path) -> str | None:
    """The first file without which a run would go on differently, or the first that says something else."""
    state = _read_json(checkpoint / "trainer_state.json")
    if state is None or not isinstance(state.get("global_step"), int):
        return "trainer_state.json says no global_step"
    if state["global_step"] != step_of(checkpoint):
        return f"trainer_state.json is of step {state['global_step']}"
    if (checkpoint / "config.json").exists() and _read_json(checkpoint / "config.json") is None:
        return "config.json cannot be read"
    if (checkpoint / "latest").exists():  # DeepSpeed, which has the rest in a folder of its own
        return None
    index = _read_json(checkpoint / "model.safetensors.index.json") or {}
    for name in sorted(set(index.get("weight_map", {}).values())):
        if not (checkpoint / name).exists():
            return f"{name} is missing"
    for name, patterns in {
        "model.safetensors": ("*model*.safetensors", "*/adapter_model.safetensors", f"{SHARDED_MODEL}/.metadata"),
        "optimizer.pt": ("optimizer.pt", "optimizer.bin", f"{SHARDED_OPTIMIZER}/.metadata"),
        "scheduler.pt": ("scheduler.pt",),
        "rng_state.pth": ("rng_state*.pth",),
    }.items():
        if not any(found for pattern in patterns for found in checkpoint.glob(pattern)):
            return f"{name} is missing"
    return None


def _what_is_cut(checkpoint: Path) -> str | None:
    """The first file that visibly lacks its end; bytes that have changed nobody sees without a manifest."""
    for pattern in ("*.pt", "*.pth", "*.bin"):
        for path in sorted(checkpoint.glob(pattern)):
            if not zipfile.is_zipfile(path):
                return f"{path.name} is cut"
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return f"{path.name} is cut"
    return None


def _read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _set_aside(checkpoint: Path) -> None:
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if was_being_written(checkpoint):
        shutil.rmtree(checkpoint)
    else:
        checkpoint.rename(aside)


def from_main(work: Callable[[], Any]) -> Any:
    """What `work` returns in the main process, in all, however long it takes. Every process calls this.

    An error that it raises, all raise: a RunError or DivergenceError as it is, another the others as a RunError.
    """
    answer, error = [None, None], None
    with everyone_waits():
        if PartialState().is_main_process:
            try:
                answer[0] = work()
            except BaseException as raised:  # whoever is not told waits for ever
                kept = isinstance(raised, (RunError, DivergenceError))
                answer[1] = raised if kept else RunError(f"The main process ended: {type(raised).__name__}: {raised}")
                error = raised
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1] if error is None else error
    return answer[0]


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
    if (checkpoint / MANIFEST).exists() and (reason := difference(checkpoint)) is not None:
        raise ValueError(f"{checkpoint} is damaged: {reason}.")
    model = task_in(checkpoint.parent).auto_class.from_config(AutoConfig.from_pretrained(description))
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(description)
    reader = distributed_checkpoint.FileSystemReader(checkpoint / SHARDED_MODEL)
    distributed_checkpoint.load({"model": model.state_dict()}, storage_reader=reader, no_dist=True)
    export(model, output, load_processor(description))

"""What a checkpoint consisted of when it was finished: the size and the SHA-256 of each of its files.

The manifest is written after everything else, under another name, and renamed: a checkpoint with one was finished.
"""

import hashlib
import json
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from .whole_files import write_text

MANIFEST = "manifest.json"


def write_manifest(checkpoint: Path) -> None:
    """Record all files that are in the folder `checkpoint`."""
    files = {path.relative_to(checkpoint).as_posix(): _entry(path) for path in _files(checkpoint)}
    write_text(checkpoint / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def difference(checkpoint: Path) -> str | None:
    """The first file that is not as its manifest says, and how; None if all are."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = [(checkpoint / name, entry["bytes"], entry["sha256"]) for name, entry in sorted(files.items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for path, size, digest in entries:
        name = path.relative_to(checkpoint)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if _digest(path) != digest:
            return f"{name} is not what was written (SHA-256)"
    return None


def size_of(checkpoint: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in _files(checkpoint))


def _files(checkpoint: Path) -> list[Path]:
    ours = {checkpoint / MANIFEST, *checkpoint.glob(f"{MANIFEST}.*.tmp")}  # one that a killed process left, too
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path not in ours)


def _entry(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ManifestWriter(TrainerCallback):
    """Gives every checkpoint its manifest, and only then lets older ones go.

    The Trainer itself would remove them before, so `save_total_limit` is taken away from it.
    """

    def __init__(self, arguments: TrainingArguments):
        self.limit, arguments.save_total_limit = arguments.save_total_limit, None

    def on_save(self, args, state, control, **kwargs):
        everyone = PartialState()
        everyone.wait_for_everyone()  # each process has files of its own
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate_checkpoints(args.output_dir, self.limit, state.best_model_checkpoint)
        everyone.wait_for_everyone()  # nobody leaves before

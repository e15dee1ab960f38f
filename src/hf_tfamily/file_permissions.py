"""Weights that a group or a web server may read like the files beside them.

Newer versions of safetensors write a temporary file of the owner's alone (0600) and rename it.
"""

from pathlib import Path

from transformers import TrainerCallback


def give_usual_permissions(folder: Path) -> None:
    """Give the safetensors in a saved folder the permissions of its config.json, which are what the umask says."""
    config = folder / "config.json"
    if config.exists():
        for path in folder.glob("*.safetensors"):
            path.chmod(config.stat().st_mode & 0o777)


class UsualPermissions(TrainerCallback):
    """The same for every checkpoint of a Trainer."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            give_usual_permissions(Path(args.output_dir) / f"checkpoint-{state.global_step}")

"""Where an experiment trains: a folder that keeps what is finished, so that it goes on where it was cut off."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import training
from ..recipes import Recipe, load_recipe

# What makes a short try of any recipe: does it run? A stream's limits are tokens, those of other data examples.
SHORT_STEPS = ("training.max_steps=2", "training.warmup_steps=1", "training.eval_strategy=no")
SHORT_STREAM = ("data.limit=8192", "data.eval_limit=2048")
SHORT_EXAMPLES = ("data.limit=32", "data.eval_limit=8")


@dataclass(frozen=True)
class Workspace:
    """A folder for finished models, shared by all claims; `quick` cuts every training down to a try."""

    folder: Path
    quick: bool = False

    def train(self, recipe: str, changes: Iterable[str] = (), seed: int = 0) -> Path:
        """The finished folder of a recipe, changed and with a seed; trained unless it is there.

        Args:
            recipe: its name, or a YAML file.
            changes: as `hf-tfamily train --set`.
        """
        changed = self._loaded(recipe, [*changes, f"training.seed={seed}"])
        told = json.dumps([changed.model, changed.data, changed.training], sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        folder = self.folder / "models" / f"{changed.name.replace('/', '-')}-{digest}"
        if not (folder / "config.json").exists():
            training.train(changed, folder, resume=True)
        return folder

    def metrics(self, recipe: str, changes: Iterable[str] = (), seed: int = 0) -> dict[str, float]:
        """The figures of `train`'s model on held-out data, as metrics.json has them."""
        return json.loads((self.train(recipe, changes, seed) / "metrics.json").read_text(encoding="utf-8"))

    def _loaded(self, recipe: str, changes: list[str]) -> Recipe:
        loaded = load_recipe(recipe, changes)
        if not self.quick:
            return loaded
        short = SHORT_STREAM if loaded.data["source"].endswith("_stream") else SHORT_EXAMPLES
        return load_recipe(recipe, [*changes, *SHORT_STEPS, *short])

"""Reads and writes the folders that `convert` works on."""

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from ..auto import SYSTEMS
from ..file_permissions import give_usual_permissions
from ..hub import export

PICKLED = "pytorch_model.bin"
ARRAYS = "model.npz"  # of numpy, which is read without its pickles
WEIGHT_FILES = ("model.safetensors", PICKLED, ARRAYS)
# What a tokenizer, an image processor and `generate` read; pickled vocabularies are none of it.
COMPANIONS = (
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
)


# What values that nobody expects make of code that reads them.
OF_WRONG_VALUES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Errors that come of what is in a checkpoint are ValueErrors that say which it is."""
    try:
        yield
    except (*OF_WRONG_VALUES, StrictDataclassError) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        readable = isinstance(error, (ValueError, StrictDataclassError))
        said = error if readable else f"its config or weights are not as expected: {error!r}"
        raise ValueError(f"{folder}: {said}") from error


def find_checkpoint(source: str | Path) -> Path:
    """The folder of a checkpoint: `source` itself, or what the Hub has under that name."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.bin", *COMPANIONS]))
    except (ValueError, OSError) as error:
        raise FileNotFoundError(f"{source} is no folder, and no Hub repository that can be reached: {error}") from error


def read_config(folder: Path) -> dict:
    """The content of config.json, which must say its model_type."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so nothing says what it is.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} does not say its model_type.")
    if "quantization_config" in config:
        raise ValueError(f"{path} says that the weights are quantised; convert the checkpoint they were made from.")
    return config


def read_weights(folder: Path, pickled: bool = False) -> dict[str, torch.Tensor]:
    """All weights by name, from one file or several; pickled ones only if told so, and never as code."""
    for name in WEIGHT_FILES:
        whole, index = folder / name, folder / f"{name}.index.json"
        if not whole.is_file() and not index.is_file():
            continue
        if name == PICKLED and not pickled:
            raise ValueError(
                f"The weights in {folder} are pickled, and a pickle is a program. Convert a copy in safetensors, or "
                "say --pickled-weights (pickled_weights=True) to have them read as weights only."
            )
        if whole.is_file():
            return _read_weight_file(whole)
        return {key: tensor for shard in _shards_in(index) for key, tensor in _read_weight_file(shard).items()}
    raise FileNotFoundError(f"{folder} has no weights: neither {' nor '.join(WEIGHT_FILES)}, whole or with an index.")


def _shards_in(index: Path) -> list[Path]:
    """The files that an index names, beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} does not say which files hold the weights: {error!r}") from error
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing, which {index.name} names.")
    return shards


def _read_weight_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, where somebody else's bytes are read
        raise ValueError(f"{path} does not hold weights: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} does not hold weights by name.")
    return weights


class Fit(NamedTuple):
    """How weights fit a model: how many do, and the names of those that do not."""

    matched: int
    left_over: list[str]
    missing: list[str]
    misshapen: list[str]

    def require(self, architecture: str) -> None:
        """Raise ValueError unless they fit just so."""
        problems = {"Left over": self.left_over, "Missing": self.missing, "Of another shape": self.misshapen}
        if any(problems.values()):
            said = " ".join(f"{problem}: {', '.join(names) or 'none'}." for problem, names in problems.items())
            raise ValueError(f"Weights do not fit {architecture}. {said}")


def fit(config: dict, weights: dict[str, torch.Tensor]) -> Fit:
    """How `weights` fit the model that `config` describes; what is tied to another weight may be missing."""
    model = _empty_model(config)
    wanted = model.state_dict()
    both = wanted.keys() & weights.keys()
    misshapen = sorted(name for name in both if wanted[name].shape != weights[name].shape)
    missing = sorted(wanted.keys() - weights.keys() - set(model.all_tied_weights_keys))
    return Fit(len(both) - len(misshapen), sorted(weights.keys() - wanted.keys()), missing, misshapen)


def check_destination(destination: Path) -> None:
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists; name a new folder.")


def write_checkpoint(
    destination: Path, config: dict, weights: dict[str, torch.Tensor], companions_of: Path, tokens: int | None = None
) -> None:
    """Write the model into a folder beside `destination` that takes its name once it is whole.

    Args:
        companions_of: where the tokenizer or image processor is copied from.
        tokens: how many the copied tokenizer shall take, where that is not what it was.
    """
    model = build_model(config, weights)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
        whole = Path(temporary) / "whole"
        save = export if _is_ours(config) else type(model).save_pretrained
        save(model, whole)
        give_usual_permissions(whole)
        for path in companions_of.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANIONS):
                shutil.copyfile(path, whole / path.name)
        if tokens is not None:
            _set_longest(whole / "tokenizer_config.json", tokens)
        os.replace(whole, destination)


def _set_longest(tokenizer_config: Path, tokens: int) -> None:
    if tokenizer_config.is_file():
        content = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        tokenizer_config.write_text(json.dumps({**content, "model_max_length": tokens}, indent=2), encoding="utf-8")


def build_model(config: dict, weights: dict[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """The model that `config` describes with just these weights, which fit."""
    model = _empty_model(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def _empty_model(config: dict) -> transformers.PreTrainedModel:
    model_class = model_class_of(config)
    try:
        described = model_class.config_class.from_dict(config)
    except StrictDataclassError as error:
        raise ValueError(f"The config of {config['architectures'][0]} is refused: {error}") from error
    with torch.device("meta"):
        return model_class(described)


def _is_ours(config: dict) -> bool:
    return config["model_type"] in {system.name for system in SYSTEMS}


def model_class_of(config: dict) -> type[transformers.PreTrainedModel]:
    """The class that `architectures` names."""
    model_type, architecture = config["model_type"], config["architectures"][0]
    home = import_module(f"..modeling.modeling_{model_type}", __package__) if _is_ours(config) else transformers
    if not hasattr(home, architecture):
        raise ValueError(f"There is no class {architecture} for model_type={model_type!r}.")
    return getattr(home, architecture)

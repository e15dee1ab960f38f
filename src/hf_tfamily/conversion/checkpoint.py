"""Reads and writes the folders that `convert` works on."""

import fnmatch
import json
import os
import pickle
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..auto import SYSTEMS
from ..hub import export

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# What a tokenizer and `generate` read; pickled vocabularies are none of it.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
)


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


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights by name, from one file or several; pickled ones are read as weights only, never as code."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _read_weight_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: tensor for shard in shards for key, tensor in _read_weight_file(folder / shard).items()}
    raise FileNotFoundError(f"{folder} has no weights: neither {' nor '.join(WEIGHT_FILES)}, whole or with an index.")


def _read_weight_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} does not hold weights: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} does not hold weights by name.")
    return weights


def write_checkpoint(destination: Path, config: dict, weights: dict[str, torch.Tensor], companions_of: Path) -> None:
    """Write the model into a folder beside `destination` that takes its name once it is whole."""
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists; name a new folder.")
    model = build_model(config, weights)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
        whole = Path(temporary) / "whole"
        save = export if _is_ours(config) else type(model).save_pretrained
        save(model, whole)
        for path in companions_of.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANIONS):
                shutil.copyfile(path, whole / path.name)
        os.replace(whole, destination)


def build_model(config: dict, weights: dict[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """The model that `config` describes with just these weights, none left over and none missing."""
    model_class = _model_class(config)
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(config))
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = sorted(set(missing) - set(model.all_tied_weights_keys))
    if missing or unexpected:
        left_over, missing = (", ".join(names) or "none" for names in (unexpected, missing))
        raise ValueError(f"Weights do not fit {model_class.__name__}. Left over: {left_over}. Missing: {missing}.")
    return model


def _is_ours(config: dict) -> bool:
    return config["model_type"] in {system.name for system in SYSTEMS}


def _model_class(config: dict) -> type[transformers.PreTrainedModel]:
    """The class that `architectures` names."""
    model_type, architecture = config["model_type"], config["architectures"][0]
    home = import_module(f"..modeling.modeling_{model_type}", __package__) if _is_ours(config) else transformers
    if not hasattr(home, architecture):
        raise ValueError(f"There is no class {architecture} for model_type={model_type!r}.")
    return getattr(home, architecture)

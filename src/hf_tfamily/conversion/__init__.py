"""Checkpoints of other classes turned into this family's, and back.

A converter is a module here that says

    SOURCE_TYPE     the `model_type` in the config.json of the other side
    OUR_TYPE        the `model_type` of ours
    to_ours(config: dict, weights: dict) -> (config, weights)
    to_stock(config: dict, weights: dict) -> (config, weights)      left out where there is no way back
    ALSO_TO         further types that ours can become at once, and their `to_stock`; left out where there are none

where a config is the content of a config.json and weights are the tensors by name. The config returned names its
`model_type` and its class in `architectures`. What cannot be said on the other side is a ValueError naming it. A
`to_ours` of LENGTHENED takes the length that the model gets as well.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from . import (
    bert,
    big_bird,
    bloom,
    distribution_augmentation,
    imagegpt,
    llama,
    longformer,
    marian,
    mistral,
    mpt,
    qwen2,
    roberta,
    swin,
    transformer_xl,
)
from .checkpoint import (
    Fit,
    check_destination,
    find_checkpoint,
    fit,
    naming,
    read_config,
    read_weights,
    write_checkpoint,
)
from .equality import largest_difference
from .lengthening import USUAL, Length

# For each of our types the first is what it becomes when no target is named.
CONVERTERS: tuple[ModuleType, ...] = (
    llama,
    mistral,
    qwen2,
    transformer_xl,
    marian,
    bloom,
    mpt,
    swin,
    longformer,
    big_bird,
    bert,
    roberta,
    imagegpt,
    distribution_augmentation,
)

LENGTHENED = tuple(converter.SOURCE_TYPE for converter in (bert, roberta))
Step = Callable[[dict, dict], tuple[dict, dict]]


class Conversion(NamedTuple):
    """What `convert` did, or would do: the type and class of the result, how the weights fit, and how equal it is."""

    model_type: str
    architecture: str
    fit: Fit
    difference: float | None = None


def convert(
    source: str | Path,
    destination: str | Path,
    target: str | None = None,
    pickled_weights: bool = False,
    check: bool = False,
    length: Length | None = None,
) -> Conversion:
    """Convert the checkpoint `source` and write it to the folder `destination`, with its tokenizer or image processor.

    Args:
        source: a folder or a Hub repository; its config.json says what it is.
        destination: a folder that does not exist yet, or is empty.
        target: `model_type` to convert to, where there is a choice.
        pickled_weights: where the source has no safetensors, read its pickle; as weights only, never as code.
        check: also run both models on the same random inputs; the result says the largest difference of logits.
        length: how long BERT or RoBERTa becomes.

    Raises:
        FileNotFoundError: if the source has no config or no weights.
        FileExistsError: if the destination holds something.
        ValueError: if the source is of a type nobody converts, if the target cannot hold it, if its weights are
            pickled, if weights are left over or missing, naming them, or if a checked result differs.
    """
    destination = Path(destination)
    check_destination(destination)
    folder = find_checkpoint(source)
    with naming(folder):
        config, weights, result = _convert(folder, target, pickled_weights, length)
        result.fit.require(result.architecture)
        if check:
            result = result._replace(difference=largest_difference(folder, config, weights, pickled_weights))
        lengthened = read_config(folder)["model_type"] in LENGTHENED
        tokens = (length or USUAL).max_positions if lengthened else None
        write_checkpoint(destination, config, weights, companions_of=folder, tokens=tokens)
    return result


def dry_run(
    source: str | Path, target: str | None = None, pickled_weights: bool = False, length: Length | None = None
) -> Conversion:
    """What `convert` would make of `source`, weights left over or missing included; nothing is written."""
    folder = find_checkpoint(source)
    with naming(folder):
        return _convert(folder, target, pickled_weights, length)[-1]


def _convert(
    folder: Path, target: str | None, pickled_weights: bool, length: Length | None
) -> tuple[dict, dict, Conversion]:
    config = read_config(folder)
    step = _step(config, target, length)
    new_config, new_weights = step(config, read_weights(folder, pickled_weights))
    _carry_patterns(config, new_config)
    found = Conversion(new_config["model_type"], new_config["architectures"][0], fit(new_config, new_weights))
    return new_config, new_weights, found


def _carry_patterns(config: dict, new_config: dict) -> None:
    """What `set_attention_patterns` entered in a stock model's config goes along, or ValueError where it cannot."""
    patterns = config.get("attention_patterns")
    if patterns is None or config["model_type"] in {converter.OUR_TYPE for converter in CONVERTERS}:
        return
    if new_config["model_type"] != llama.OUR_TYPE or new_config.get("attention_patterns") is not None:
        raise ValueError(
            f"The source was saved under attention_patterns={patterns}, which {new_config['model_type']} would not "
            "follow; take them off before it is saved (set_attention_patterns(model, None)), and set them again."
        )
    new_config["attention_patterns"] = patterns


def _step(config: dict, target: str | None, length: Length | None):
    """The function that leads from the type of `config` to `target`."""
    found = config["model_type"]
    steps = {}
    for converter in CONVERTERS:
        if found == converter.SOURCE_TYPE:
            to_ours = _of_length(converter, length)
            steps[converter.OUR_TYPE] = to_ours
            steps |= {name: _both(to_ours, step) for name, step in getattr(converter, "ALSO_TO", {}).items()}
        elif found == converter.OUR_TYPE and hasattr(converter, "to_stock"):
            steps[converter.SOURCE_TYPE] = converter.to_stock
    if not steps:
        known = sorted({c.SOURCE_TYPE for c in CONVERTERS} | {c.OUR_TYPE for c in CONVERTERS if hasattr(c, "to_stock")})
        raise ValueError(f"The source has model_type={found!r}; what can be converted is {', '.join(known)}.")
    if length is not None and found not in LENGTHENED:
        raise ValueError(f"{found} has the length that it has; what becomes longer is {', '.join(LENGTHENED)}.")
    target = next(iter(steps)) if target is None else target
    if target not in steps:
        raise ValueError(f"{found} cannot become target={target!r}; it can become {', '.join(steps)}.")
    return steps[target]


def _of_length(converter: ModuleType, length: Length | None) -> Step:
    return converter.to_ours if length is None else partial(converter.to_ours, length=length)


def _both(first: Step, second: Step) -> Step:
    return lambda config, weights: second(*first(config, weights))


__all__ = ["CONVERTERS", "Conversion", "Length", "convert", "dry_run"]

"""Do two checkpoints give the same logits? Both models run, in float64 where their code lets them."""

import tempfile
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from .checkpoint import model_class_of, read_config, write_checkpoint

TOLERANCE = 1e-4  # of the largest logit; rotary angles and norms stay float32 in stock models


def largest_difference(folder: Path, config: dict, weights: dict[str, torch.Tensor], pickled: bool) -> float:
    """The largest difference of logits between the model in `folder` and its conversion, as a share of the largest.

    Raises:
        ValueError: if Transformers has no class for the source, or the difference is more than rounding.
    """
    source_config = read_config(folder)
    try:
        source_class = model_class_of({"architectures": [config["architectures"][0]], **source_config})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Nothing to check against: Transformers {transformers.__version__} cannot run it: {error}"
        ) from error
    patterned = {"attn_implementation": "block_sparse"} if source_config.get("attention_patterns") else {}
    source = source_class.from_pretrained(folder, use_safetensors=not pickled, **patterned)
    with tempfile.TemporaryDirectory() as temporary:  # what is compared is what a reader would load
        written = Path(temporary) / "converted"
        write_checkpoint(written, config, weights, companions_of=folder)
        converted = model_class_of(config).from_pretrained(written)
    torch.manual_seed(0)
    inputs = _inputs(source)
    expected, found = (_logits(model, inputs) for model in (source, converted))
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"The converted model differs: logits by {difference:.1e} of the largest. Nothing was written."
        )
    return difference


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor | bool]:
    """A random batch of two of what the model takes."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = [config.image_size] * 2 if isinstance(config.image_size, int) else config.image_size
        return {"pixel_values": torch.randn(2, config.num_channels, *size, dtype=torch.float64)}
    ids = torch.randint(1, config.vocab_size, (2, 12))
    if config.pad_token_id is not None:  # which RoBERTa leaves out where it counts positions
        ids = ids.masked_fill(ids == config.pad_token_id, (config.pad_token_id + 1) % config.vocab_size)
    decoder = {"decoder_input_ids": ids.flip(1)} if config.is_encoder_decoder else {}
    return {"input_ids": ids, "use_cache": False, **decoder}  # stock MarianForCausalLM has caches of a wrong length


def _logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor | bool]) -> torch.Tensor:
    """Logits, or what a model without them returns first: states, a picture, or all maps of a backbone."""
    try:
        with torch.no_grad():
            found = model.eval().double()(**inputs)[0]
    except RuntimeError as error:  # stock Swin, for one, fails on pictures of less than a window in some stage
        raise ValueError(f"Nothing to check: {type(model).__name__} fails on random inputs: {error}") from error
    return torch.cat([each.flatten() for each in found]) if isinstance(found, tuple) else found

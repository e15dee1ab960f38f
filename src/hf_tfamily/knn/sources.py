"""What the command line reads: a causal language model with its tokenizer, and texts or a recipe's data as ids."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data import TextStreams, TokenSequences, load_data
from ..data.text_lines import read_text
from ..finished import best_device
from ..recipes import load_recipe
from ..tasks import task_of


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the best device, and the tokenizer of a folder or Hub repository."""
    model = AutoModelForCausalLM.from_pretrained(name).to(best_device())
    return model.eval(), AutoTokenizer.from_pretrained(name)


def read_tokens(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Path] | None = None,
    recipe: str | None = None,
    overrides: Iterable[str] = (),
    held_out: bool = False,
) -> list[np.ndarray]:
    """Documents of ids [n]: each file by the tokenizer, or a recipe's text as the recipe makes ids of it.

    Args:
        held_out: the held-out part of a recipe's data; else the training part.

    Raises:
        ValueError: unless either texts or a recipe of text is given, if a file is empty, or if the tokenizer is not
            that of the recipe's data.
    """
    if bool(texts) == (recipe is not None):
        raise ValueError("Say what to read: --text FILE, or --data RECIPE.")
    if texts:
        return [_ids_of(tokenizer, path) for path in texts]
    loaded = load_recipe(recipe, overrides)
    if task_of(loaded).data_class not in (TextStreams, TokenSequences):
        raise ValueError(f"{recipe} is no recipe of text or of token sequences.")
    data = load_data(loaded.data)
    if data.processor is not None and getattr(data.processor, "get_vocab", dict)() != tokenizer.get_vocab():
        raise ValueError(f"The ids of {recipe} are not those of this model's tokenizer; give its text by --text.")
    part = data.eval if held_out else data.train
    if isinstance(data, TextStreams):
        return [np.concatenate([[data.start_id], np.asarray(part, np.int64)])]
    return [np.asarray(row) for row in part["input_ids"][:]]


def _ids_of(tokenizer: PreTrainedTokenizerBase, path: Path) -> np.ndarray:
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty.")
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int64)

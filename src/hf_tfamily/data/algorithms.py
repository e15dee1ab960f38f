"""Symbols and what an algorithm makes of them: copy, reverse, add. Trained on short strings, tested on longer ones too.

The tasks of Dehghani et al. 2018 (arXiv:1807.03819), section 3.3, after Kaiser and Sutskever 2016 (arXiv:1511.08228).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .sequences import LoadedData, require
from .translation import END, PAD, UNKNOWN, Pair

if TYPE_CHECKING:
    from datasets import Dataset

DIGITS = "0123456789"


@dataclass(frozen=True, kw_only=True)
class AlgorithmPairs(LoadedData):
    """Strings and what an algorithm makes of them.

    Attributes:
        train, eval, longer: data sets with the columns `source` and `target` (strings), `input_ids` and `labels` (their
            ids, each with an end token); `longer` is held out as `eval` is, and of longer strings than any in `train`.
        processor: the tokenizer, a token for each character.
        longest: most ids in any string.
    """

    train: "Dataset"
    eval: "Dataset"
    longer: "Dataset"
    longest: int


def algorithms(
    algorithm: str = "reverse",
    max_length: int = 16,
    longer_length: int = 32,
    train_examples: int = 20000,
    eval_examples: int = 500,
    seed: int = 0,
) -> AlgorithmPairs:
    """Random strings of digits and what an algorithm makes of them.

    Args:
        algorithm: "copy", "reverse", or "add", where the source is two numbers of as many digits around a plus sign.
        max_length: most digits in a string that is trained on, in one of the numbers that are added; lengths from 1 on
            are as likely.
        longer_length: digits of every string of `longer`, more than max_length.
        train_examples, eval_examples: how many strings; held out are as many of each kind, none of which is trained on.
        seed: chooses the strings.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}.")
    if not 1 <= max_length < longer_length:
        raise ValueError(f"longer_length must be above max_length={max_length} >= 1, got {longer_length}.")
    if train_examples < 1 or eval_examples < 1:
        raise ValueError(f"train_examples and eval_examples must be at least 1, got {train_examples, eval_examples}.")
    make, drawn = ALGORITHMS[algorithm], random.Random(seed)
    held_out = [make(drawn, drawn.randint(1, max_length)) for _ in range(eval_examples)]
    known = {source for source, _ in held_out if len(source) > 3}  # of shorter ones there are too few to hold out
    train = [make(drawn, drawn.randint(1, max_length)) for _ in range(train_examples)]
    train = [pair for pair in train if pair[0] not in known]
    longer = [make(drawn, longer_length) for _ in range(eval_examples)]
    tokenizer = character_tokenizer(DIGITS + "+")
    parts = [_tokenized(pairs, tokenizer) for pairs in (train, held_out, longer)]
    return AlgorithmPairs(
        train=parts[0],
        eval=parts[1],
        longer=parts[2],
        longest=max(len(ids) for part in parts for name in ("input_ids", "labels") for ids in part[name]),
        processor=tokenizer,
        description=f"{len(train):,} random strings to {algorithm}, of up to {max_length} digits; held out: "
        f"{eval_examples:,} of these lengths and as many of {longer_length} digits",
        licence="public domain",
    )


def _copy(drawn: random.Random, length: int) -> Pair:
    digits = "".join(drawn.choices(DIGITS, k=length))
    return digits, digits


def _reverse(drawn: random.Random, length: int) -> Pair:
    digits = "".join(drawn.choices(DIGITS, k=length))
    return digits, digits[::-1]


def _add(drawn: random.Random, length: int) -> Pair:
    """Numbers with their last digit first, so that a carry goes on to what is written next."""
    numbers = [drawn.choices(DIGITS, k=length) for _ in range(2)]
    total = sum(int("".join(reversed(digits))) for digits in numbers)
    return "+".join("".join(digits) for digits in numbers), str(total)[::-1]


ALGORITHMS: dict[str, Callable[[random.Random, int], Pair]] = {"copy": _copy, "reverse": _reverse, "add": _add}


def character_tokenizer(characters: str):
    """A PreTrainedTokenizerFast of a token for each of the characters; it ends every text with an end token.

    AutoTokenizer loads it without this package.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate([PAD, END, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, ids[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _tokenized(pairs: list[Pair], tokenizer) -> "Dataset":
    sources, targets = (list(side) for side in zip(*pairs))
    columns = {
        "source": sources,
        "target": targets,
        "input_ids": tokenizer(sources)["input_ids"],
        "labels": tokenizer(targets)["input_ids"],
    }
    return require("datasets").Dataset.from_dict(columns)

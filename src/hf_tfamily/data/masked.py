"""Texts some tokens of which are hidden, for models that read both ways."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .sequences import LoadedData
from .text import BIBLE_EVAL_BOOKS, BIBLE_LICENCE, bible_parts, cut_text, of, text_data
from .text_lines import read_text_bytes
from .text_tokenizers import BYTES, TokenizerChoice
from .text_tokenizers import MASK as MASK


@dataclass(frozen=True, kw_only=True)
class MaskedTexts(LoadedData):
    """Texts of one length; what is hidden is chosen anew each time they are read.

    Attributes:
        train, eval: data sets with a column `input_ids`: a start token and the text's ids.
        processor: a tokenizer with a mask token.
        length: number of ids in an example.
    """

    length: int

    @property
    def vocab_size(self) -> int:
        """Number of ids a model of this data needs."""
        return len(self.processor)


def bible_masked(
    length: int = 127, eval_books: Iterable[str] = BIBLE_EVAL_BOOKS, tokenizer: TokenizerChoice = BYTES
) -> MaskedTexts:
    """The King James Bible in windows behind a start token, and a mask token: with bytes, after the 257 ids of those.

    Args:
        length: bytes, or tokens, in an example.
        eval_books: titles of the books that are held out, such as "Ruth" or "1 Kings".
        tokenizer: what ids are of; see hf_tfamily.data.text_tokenizers. One without a mask token gets one.
    """
    eval_books = tuple(eval_books)
    train, held_out = bible_parts(eval_books)
    description = f"the King James Bible in windows of {of(length, tokenizer)}; held out: {', '.join(eval_books)}"
    return _masked(train, held_out, length, description, BIBLE_LICENCE, tokenizer)


def masked_text_file(
    path: str,
    length: int = 127,
    sizes: tuple[int, int, int] | None = None,
    eval_part: str = "validation",
    tokenizer: TokenizerChoice = BYTES,
) -> MaskedTexts:
    """A text file, cut as `text_file` cuts it, in windows behind a start token, and a mask token.

    Args:
        path: the file.
        length: bytes, or tokens, in an example.
        sizes, eval_part: as for `text_file`.
        tokenizer: what ids are of; see hf_tfamily.data.text_tokenizers. One without a mask token gets one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no text file {path!r}; give one with data.path=...")
    train, held_out, cut = cut_text(read_text_bytes(path), sizes, eval_part)
    description = f"the file {path} in windows of {of(length, tokenizer)}, {cut}"
    return _masked(train, held_out, length, description, "unknown", tokenizer)


def _masked(
    train: bytes, held_out: bytes, length: int, description: str, licence: str, tokenizer: TokenizerChoice
) -> MaskedTexts:
    windows = text_data(train, held_out, length, description, licence, tokenizer, mask=True)
    return MaskedTexts(
        train=windows.train.select_columns(["input_ids"]),
        eval=windows.eval.select_columns(["input_ids"]),
        length=1 + length,
        processor=windows.processor,
        description=description,
        licence=licence,
    )

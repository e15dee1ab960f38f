"""Texts some tokens of which are hidden, for models that read both ways."""

from collections.abc import Iterable
from dataclasses import dataclass

from .sequences import LoadedData
from .text import BIBLE_EVAL_BOOKS, BIBLE_LICENCE, bible_parts, of, text_data
from .text_files import named, text_parts
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
    path: str | list[str],
    length: int = 127,
    sizes: tuple[int, int, int] | None = None,
    eval_part: str = "validation",
    tokenizer: TokenizerChoice = BYTES,
    eval_share: float | None = None,
    seed: int = 0,
) -> MaskedTexts:
    """Text files, cut as `text_file` cuts them, in windows behind a start token, and a mask token.

    Args:
        path, sizes, eval_part, eval_share, seed: as for `text_file`.
        length: bytes, or tokens, in an example.
        tokenizer: what ids are of; see hf_tfamily.data.text_tokenizers. One without a mask token gets one.
    """
    train, held_out, cut = text_parts(path, sizes, eval_part, eval_share, seed)
    description = f"{named(path)} in windows of {of(length, tokenizer)}, {cut}"
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

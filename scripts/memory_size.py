"""What a larger store gives a Memorizing Transformer, on the bytes of the King James Bible.

    python scripts/memory_size.py --json benchmarks/memory_size.json --page benchmarks/memory_size.md \\
        --plot benchmarks/memory_size.png

Trains the recipe `memorizing_transformer/bible` with its store and without one, and reads held-out text with stores of
several sizes, the weights unchanged: bits per byte of all bytes, of names that the same text had long before, of names
that it had not, and of the rest.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from benchmarking import surroundings, write
from transformers import AutoModelForCausalLM

from hf_tfamily import plots
from hf_tfamily.data import load_data
from hf_tfamily.recipes import load_recipe
from hf_tfamily.stream_evaluation import stream_losses
from hf_tfamily.training import train

RECIPE = "memorizing_transformer/bible"
SIZES = (0, 512, 2048, 8192)
SEEDS = (0, 1)
STEPS, ROWS = 300, 16
SHORT = "[Jude]"  # what training itself evaluates on, to be done soon
STREAMS, STREAM_BYTES = 4, 16384  # of held-out text
NAME = re.compile(rb"(?<=[a-z,;:] )[A-Z][a-z]{2,}")  # a capitalised word within a sentence
KINDS = ("all", "names from long ago", "new names", "other bytes")
CLAIM = """\
Wu et al. 2022, section 4: perplexity falls as the memory grows, also beyond the size that a model was trained with, and
it is rare words such as names that gain.
"""


@dataclass(frozen=True)
class Run:
    """Bits per byte of each of KINDS, of a model that was trained with one store and reads with another."""

    seed: int
    trained: int
    size: int
    bits: dict[str, float]


def kinds_of(text: bytes, stream_bytes: int, near: int) -> np.ndarray:
    """[bytes], which of KINDS each byte is: 1 to 3.

    Args:
        stream_bytes: streams begin at its multiples, and know nothing of each other.
        near: how far back a query sees without a store. A name that occurred within it is among the other bytes.
    """
    kinds, last = np.full(len(text), 3), {}
    for match in NAME.finditer(text):
        start, stream = match.start(), match.start() // stream_bytes
        before = last.get((stream, match[0]))
        last[stream, match[0]] = start
        if before is None:
            kinds[start : match.end()] = 2
        elif start - before > near:
            kinds[start : match.end()] = 1
    return kinds


def read(folder: Path, size: int, ids: np.ndarray, length: int, start_id: int) -> np.ndarray:
    """Bits of every byte of a text, by the model in a folder with a store of `size`."""
    model = AutoModelForCausalLM.from_pretrained(folder, memory_size=size)
    return stream_losses(model, ids, length, start_id, STREAMS) / np.log(2)


def runs_of(seed: int, sizes: tuple[int, ...], steps: int, stream_bytes: int) -> tuple[list[Run], dict[str, int]]:
    """One seed: a model with a store at every size, and one without; and how many bytes are of which kind."""
    recipe = load_recipe(RECIPE)
    data = load_data(recipe.data)
    ids, length = data.eval[: STREAMS * stream_bytes], recipe.data["length"]
    kinds = kinds_of(ids.astype(np.uint8).tobytes(), stream_bytes, recipe.model["mem_len"] + length)
    runs = []
    for trained in (recipe.model["memory_size"], 0):
        changes = [f"model.memory_size={trained}", f"training.seed={seed}", f"training.max_steps={steps}"]
        changes += [f"training.warmup_steps={steps // 10}", f"training.save_steps={steps}", f"data.eval_books={SHORT}"]
        changes += [f"training.per_device_train_batch_size={ROWS}"]
        with tempfile.TemporaryDirectory() as folder:
            finished = train(load_recipe(RECIPE, changes), Path(folder) / "run")
            for size in sizes if trained else (0,):
                bits = read(finished, size, ids, length, data.start_id)
                means = {"all": bits.mean(), **{kind: bits[kinds == n].mean() for n, kind in enumerate(KINDS) if n}}
                runs.append(Run(seed, trained, size, {kind: float(mean) for kind, mean in means.items()}))
                print(runs[-1], flush=True)
    return runs, {kind: int((kinds == n).sum()) for n, kind in enumerate(KINDS) if n}


def mean_bits(runs: list[Run], trained: bool, size: int, kind: str) -> float:
    return statistics.mean(run.bits[kind] for run in runs if bool(run.trained) == trained and run.size == size)


def verdict(runs: list[Run]) -> str:
    """What was found of CLAIM: does each larger store help, in the mean over seeds, and names more than the rest?"""
    sizes = sorted({run.size for run in runs})
    means = {kind: [mean_bits(runs, True, size, kind) for size in sizes] for kind in KINDS}
    falls = all(larger < smaller for smaller, larger in zip(means["all"], means["all"][1:]))
    gains = {kind: bits[0] - min(bits[1:]) for kind, bits in means.items()}
    best = sizes[1:][int(np.argmin(means["all"][1:]))]
    beside = {kind: min(bits[1:]) - mean_bits(runs, False, 0, kind) for kind, bits in means.items()}
    told = {kind: f"{abs(bits):.3f} {'lower' if bits < 0 else 'higher'}" for kind, bits in beside.items()}
    names = gains["names from long ago"] > max(gains["new names"], gains["other bytes"])
    return (
        f"{'Found' if falls else 'Found in part' if gains['all'] > 0 else 'Not found'} at this size: of the same "
        f"weights, bits per byte fall by {gains['all']:.3f} at best, with a store of {best:,}, "
        f"{'and each larger store is better' if falls else 'but not each larger store is better'}; names from long ago "
        f"gain {gains['names from long ago']:.3f}, new names {gains['new names']:.3f}, other bytes "
        f"{gains['other bytes']:.3f}: {'names gain most' if names else 'it is not names that gain most'}. Beside a "
        f"model trained without a store, the best is {told['all']} for all bytes, and for names from "
        f"long ago {told['names from long ago']}."
    )


@plots.styled
def draw(runs: list[Run], path: Path) -> None:
    """Bits per byte by size, of all bytes and of names from long ago: the mean over seeds, and each seed."""
    sizes = sorted({run.size for run in runs})
    figure = plots.new_figure(8, 3.2)
    for axes, kind in zip(figure.subplots(1, 2), KINDS):
        for seed in sorted({run.seed for run in runs}):
            bits = [run.bits[kind] for run in runs if run.seed == seed and run.trained]
            axes.plot(range(len(sizes)), bits, "o", markersize=3, color=plots.BLUE, alpha=0.5)
        means = [mean_bits(runs, True, size, kind) for size in sizes]
        axes.plot(range(len(sizes)), means, color=plots.BLUE, label="trained with a store")
        without = mean_bits(runs, False, 0, kind)
        axes.axhline(without, color=plots.ORANGE, linestyle="--", linewidth=1.2, label="trained without one")
        axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axes.set(xlabel="tokens in the store", title=kind)
    figure.axes[0].set_ylabel("bits per byte")
    figure.axes[0].legend(fontsize=8)
    plots.save(figure, path)


def page(runs: list[Run], record: dict, plot: Path | None) -> str:
    sizes = sorted({run.size for run in runs})
    lines = ["# What a larger memory gives", "", f"{record['machine']}, {record['versions']}, {record['date']}", ""]
    lines += ["```", *record["commands"], "```", "", CLAIM, verdict(runs), ""]
    lines += [] if plot is None else [f"![bits per byte by the size of the store]({plot.name})", ""]
    counts = ", ".join(f"{count:,} are {kind}" for kind, count in record["bytes"].items())
    lines += [
        f"The recipe `{RECIPE}` with {record['steps']} steps of {ROWS} rows, {len(record['seeds'])} seeds; "
        f"{STREAMS} streams of {record['stream_bytes']:,} held-out bytes, of which {counts}. A name is a capitalised "
        "word within a sentence; from long ago, if the same stream had it before what a query sees without a store. "
        "Means over seeds, and how far seeds lie apart: less than that says little.",
        "",
        "| trained with | reads with | " + " | ".join(KINDS) + " |",
        "|--:|--:|" + "--:|" * len(KINDS),
    ]
    for trained, size in [(True, size) for size in sizes] + [(False, 0)]:
        chosen = [run for run in runs if bool(run.trained) == trained and run.size == size]
        cells = [f"{chosen[0].trained:,}", f"{size:,}"]
        for kind in KINDS:
            bits = [run.bits[kind] for run in chosen]
            cells.append(f"{statistics.mean(bits):.4f} ({max(bits) - min(bits):.4f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, what in (("--json", "all runs"), ("--page", "the table"), ("--plot", "the picture")):
        parser.add_argument(option, type=Path, metavar="FILE", help=f"write {what} there")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each model")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="what an earlier --json wrote, instead of new runs")
    args = parser.parse_args()
    if args.runs:
        record = json.loads(args.runs.read_text())
    else:
        record = measure(SEEDS[:1] if args.quick else SEEDS, 10 if args.quick else args.steps, args.quick)
    runs = [Run(**run) for run in record["runs"]]
    if args.json:
        write(args.json, json.dumps(record, indent=1) + "\n")
    if args.plot:
        draw(runs, args.plot)
    if args.page:
        write(args.page, page(runs, record, args.plot))


def measure(seeds: tuple[int, ...], steps: int, quick: bool) -> dict:
    """All runs, and where they were made."""
    runs, begun = [], time.monotonic()
    sizes, stream_bytes = (SIZES[:2], 2048) if quick else (SIZES, STREAM_BYTES)
    for seed in seeds:
        found, counts = runs_of(seed, sizes, steps, stream_bytes)
        runs += found
    told = {"steps": steps, "seeds": seeds, "stream_bytes": stream_bytes, "bytes": counts}
    told |= {"minutes": round((time.monotonic() - begun) / 60, 1)}
    return {**surroundings(), **told, "runs": [asdict(run) for run in runs]}


if __name__ == "__main__":
    main()

"""Nine ways of knowing order under the same small decoder, seed and budget, on two tasks.

    python scripts/compare_positions.py --json positions.json --page positions.md --plot positions.png

Recall: after random tokens, say which one stood three places before; only relative order helps. Text: the bytes of the
King James Bible, one after the other. Both are tested at the length they were trained at and at longer ones.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import transformers
from benchmarking import write

from hf_tfamily import plots
from hf_tfamily.data import load_data
from hf_tfamily.modeling.configuration_vanilla_transformer import POSITION_ENCODINGS, VanillaTransformerConfig
from hf_tfamily.modeling.modeling_vanilla_transformer import VanillaTransformerForCausalLM

MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "norm_first": True,
    "dropout": 0.0,
    "max_relative_position": 16,
}
LEARNING_RATE, WARMUP = 2e-3, 50
RECALL_TOKENS, RECALL_DISTANCE = 16, 3
START = 256
PALETTE = ("#1f5fa8", "#d9730d", "#2b8a3e", "#c2255c", "#7048e8", "#0b7285", "#868e96", "#a07800", "#5c3d2e")
COLOURS = dict(zip(POSITION_ENCODINGS, cycle(PALETTE)))

Batch = tuple[torch.Tensor, torch.Tensor]  # ids [B, T], and what each place shall predict [B, T], -100 for nothing


@dataclass(frozen=True)
class Setting:
    """One task: where its batches come from, and how much is learned from how many of them."""

    name: str
    vocab_size: int
    lengths: tuple[int, ...]
    batch_size: int
    steps: int
    seeds: tuple[int, ...]
    figure: str
    batches: Callable[[int, int, int], Iterator[Batch]]  # (length, batch size, seed) -> training batches
    held_out: Callable[[int], list[Batch]]  # length -> batches to test on


@dataclass(frozen=True)
class Run:
    """What one encoding came to on one task with one seed: its figure at each length, and its way there."""

    task: str
    encoding: str
    seed: int
    parameters: int
    figures: dict[int, float]
    curve: list[tuple[int, float]]  # step, training loss in bits


def recall_batches(length: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Random tokens; each place predicts the token RECALL_DISTANCE places before its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(RECALL_TOKENS, (batch_size, length), generator=generator)
        targets = torch.nn.functional.pad(ids[:, :-RECALL_DISTANCE], (RECALL_DISTANCE, 0), value=-100)
        yield ids, targets


def text_batches(content: np.ndarray) -> Callable[[int, int, int], Iterator[Batch]]:
    """Random windows of a text of bytes, each behind a start token."""

    def batches(length: int, batch_size: int, seed: int) -> Iterator[Batch]:
        generator = np.random.default_rng(seed)
        while True:
            starts = generator.integers(0, len(content) - length, batch_size)
            yield windows(content, starts, length)

    return batches


def windows(content: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    targets = torch.from_numpy(np.stack([content[start : start + length] for start in starts]).astype(np.int64))
    return torch.nn.functional.pad(targets[:, :-1], (1, 0), value=START), targets


def held_out_text(content: np.ndarray, count: int) -> Callable[[int], list[Batch]]:
    """The same bytes at every length, so that figures compare."""

    def batches(length: int) -> list[Batch]:
        starts = np.arange(0, count - count % length, length)
        return [windows(content, part, length) for part in np.array_split(starts, max(1, count // 8192))]

    return batches


def settings(quick: bool) -> list[Setting]:
    text = load_data({"source": "bible_stream"})
    cut = 50 if quick else 1
    return [
        Setting(
            name="recall",
            vocab_size=RECALL_TOKENS,
            lengths=(32, 64, 128),
            batch_size=32,
            steps=600 // cut,
            seeds=(0,) if quick else (0, 1, 2),
            figure="accuracy",
            batches=recall_batches,
            held_out=lambda length: [next(recall_batches(length, 64, seed=12345))],
        ),
        Setting(
            name="text",
            vocab_size=START + 1,
            lengths=(128, 256, 512),
            batch_size=16,
            steps=800 // cut,
            seeds=(0,),
            figure="bits per byte",
            batches=text_batches(text.train),
            held_out=held_out_text(text.eval, 65536 // cut),
        ),
    ]


def run(setting: Setting, encoding: str, seed: int) -> Run:
    """Train one model and test it at every length."""
    torch.manual_seed(seed)
    config = VanillaTransformerConfig(
        **MODEL,
        vocab_size=setting.vocab_size,
        position_encoding=encoding,
        max_position_embeddings=max(setting.lengths),
    )
    model = VanillaTransformerForCausalLM(config)
    curve = train(model, setting, seed)
    measure = accuracy if setting.figure == "accuracy" else bits
    figures = {length: measure(model.eval(), setting.held_out(length)) for length in setting.lengths}
    return Run(setting.name, encoding, seed, model.num_parameters(), figures, curve)


def train(model: VanillaTransformerForCausalLM, setting: Setting, seed: int) -> list[tuple[int, float]]:
    """Adam with a linear warm-up; returns the mean training loss of every 25 steps, in bits."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    batches, losses, curve = setting.batches(setting.lengths[0], setting.batch_size, seed), [], []
    for step in range(1, setting.steps + 1):
        ids, targets = next(batches)
        loss = model(ids, shift_labels=targets, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()) / np.log(2))
        if step % 25 == 0 or step == setting.steps:
            curve.append((step, statistics.mean(losses)))
            losses = []
    return curve


@torch.inference_mode()
def accuracy(model: VanillaTransformerForCausalLM, batches: list[Batch]) -> float:
    """Share of the targets that are the likeliest token."""
    right, count = 0, 0
    for ids, targets in batches:
        counted = targets != -100
        right += int((model(ids, use_cache=False).logits.argmax(dim=-1) == targets)[counted].sum())
        count += int(counted.sum())
    return right / count


@torch.inference_mode()
def bits(model: VanillaTransformerForCausalLM, batches: list[Batch]) -> float:
    """Mean of -log2 p over all targets."""
    losses = [
        float(model(ids, shift_labels=targets, use_cache=False).loss) * targets.numel() for ids, targets in batches
    ]
    return sum(losses) / sum(targets.numel() for _, targets in batches) / np.log(2)


def summary(runs: list[Run], task: str, encoding: str) -> dict[int, tuple[float, float, float]]:
    """At each length the mean over seeds, the lowest and the highest."""
    chosen = [run.figures for run in runs if (run.task, run.encoding) == (task, encoding)]
    values = {length: [figures[length] for figures in chosen] for length in chosen[0]}
    return {length: (statistics.mean(v), min(v), max(v)) for length, v in values.items()}


def page(runs: list[Run], tasks: list[Setting], record: dict, plot: Path | None) -> str:
    """The runs as Markdown: a table for each task."""
    lines = ["# Ways of knowing order, compared", "", f"{record['machine']}, {record['versions']}, {record['date']}"]
    lines += ["", "```", record["command"], "```", "", __doc__.strip().splitlines()[0]]
    lines += [
        f"The decoder has {MODEL['num_hidden_layers']} layers of width {MODEL['hidden_size']} with "
        f"{MODEL['num_attention_heads']} heads.",
        "Learned positions have a place for the longest test, but those beyond the trained length never learn.",
    ]
    if plot is not None:
        lines += ["", f"![figures at each length, and losses while training]({plot.name})"]
    lines += ["", "## What the papers claim", "", *findings(runs, tasks)]
    for setting in tasks:
        seeds = f"{len(setting.seeds)} seeds" if len(setting.seeds) > 1 else "one seed"
        lines += ["", f"## {setting.name.capitalize()}: {setting.figure}", ""]
        lines += [
            f"Trained at length {setting.lengths[0]}, {setting.steps} steps of {setting.batch_size} rows, {seeds}"
            + ("; the range over seeds in brackets." if len(setting.seeds) > 1 else ".")
        ]
        lines += ["", "| encoding | parameters | " + " | ".join(f"length {n}" for n in setting.lengths) + " |"]
        lines += ["|---|--:|" + "--:|" * len(setting.lengths)]
        for encoding in POSITION_ENCODINGS:
            parameters = next(r.parameters for r in runs if (r.task, r.encoding) == (setting.name, encoding))
            cells = [
                f"{mean:.3f}" + (f" ({low:.3f} to {high:.3f})" if len(setting.seeds) > 1 else "")
                for mean, low, high in summary(runs, setting.name, encoding).values()
            ]
            lines.append(f"| {encoding} | {parameters:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def findings(runs: list[Run], tasks: list[Setting]) -> list[str]:
    """What the papers claim, and what these runs say to it."""
    text = tasks[-1]
    trained, longest = text.lengths[0], text.lengths[-1]
    bits_of = {
        encoding: {length: mean for length, (mean, *_) in summary(runs, text.name, encoding).items()}
        for encoding in POSITION_ENCODINGS
    }
    curves = {run.encoding: run.curve for run in runs if run.task == text.name}
    last = curves["sinusoidal"][-1][1]
    caught_up = next((step for step, loss in curves["rotary"] if loss <= last), None)

    def compared(better: str, worse: str) -> str:
        one, other = bits_of[better][trained], bits_of[worse][trained]
        return f"They {'do' if one < other else 'do not'} here: {one:.3f} and {other:.3f} bits per byte."

    def longer(encoding: str) -> str:
        return f"{encoding} {bits_of[encoding][longest] - bits_of[encoding][trained]:+.3f}"

    others = ", ".join(longer(encoding) for encoding in POSITION_ENCODINGS)
    when = "not within these steps" if caught_up is None else f"at step {caught_up} of {text.steps}"
    return [
        f"- Shaw et al. 2018: relative positions do better than sinusoidal ones. {compared('relative', 'sinusoidal')}",
        "- Su et al. 2021: rotary positions converge faster. Here they reach the last training loss of sinusoidal ones "
        f"{when}.",
        f"- Dai et al. 2019: absolute positions do not carry over to longer texts, relative ones do. From {trained} to "
        f"{longest} tokens the bits per byte change by: {others}.",
        f"- Press et al. 2021: with ALiBi a model trained on short texts reads longer ones no worse. From {trained} to "
        f"{longest} tokens its bits per byte change by {bits_of['alibi'][longest] - bits_of['alibi'][trained]:+.3f}; "
        f"T5's buckets by {bits_of['t5'][longest] - bits_of['t5'][trained]:+.3f}.",
    ]


@plots.styled
def draw(runs: list[Run], tasks: list[Setting], path: Path) -> None:
    """The figures at each length, and the losses of the text while training."""
    figure = plots.new_figure(12, 4)
    panels = figure.subplots(1, len(tasks) + 1)
    for axes, setting in zip(panels, tasks):
        for encoding in POSITION_ENCODINGS:
            found = summary(runs, setting.name, encoding)
            means = [mean for mean, *_ in found.values()]
            axes.plot(list(found), means, marker="o", markersize=4, color=COLOURS[encoding], label=encoding)
        axes.set_xscale("log", base=2)
        axes.set_xticks(setting.lengths, [str(length) for length in setting.lengths])
        axes.set_title(f"{setting.name}: {setting.figure}")
        axes.set_xlabel(f"tokens in a test (trained with {setting.lengths[0]})")
    last = tasks[-1]
    for chosen in (run for run in runs if run.task == last.name):
        steps, losses = zip(*chosen.curve)
        panels[-1].plot(steps, losses, linewidth=1.2, color=COLOURS[chosen.encoding])
    panels[-1].set_title(f"{last.name}: training loss")
    panels[-1].set_xlabel("step")
    panels[-1].set_ylabel("bits per byte, mean of 25 steps")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(POSITION_ENCODINGS))
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, what in (("--json", "all runs"), ("--page", "the tables"), ("--plot", "the picture")):
        parser.add_argument(option, type=Path, metavar="FILE", help=f"write {what} there")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="what an earlier --json wrote, instead of new runs")
    parser.add_argument("--add", nargs="+", choices=POSITION_ENCODINGS, default=[], help="run these beside --runs")
    args = parser.parse_args()
    tasks = settings(args.quick)
    record = json.loads(args.runs.read_text()) if args.runs else compare(tasks, POSITION_ENCODINGS)
    if args.add:
        record = added(record, compare(tasks, args.add))
    runs = [Run(**{**kept, "figures": {int(n): f for n, f in kept["figures"].items()}}) for kept in record["runs"]]
    if args.json:
        write(args.json, json.dumps(record, indent=1) + "\n")
    if args.plot:
        draw(runs, tasks, args.plot)
    if args.page:
        write(args.page, page(runs, tasks, record, args.plot))


def added(record: dict, new: dict) -> dict:
    """A record with the runs of another in the place of its own of the same encodings."""
    encodings = sorted({run["encoding"] for run in new["runs"]})
    kept = [run for run in record["runs"] if run["encoding"] not in encodings]
    dates = f"{record['date']} and {new['date']} ({', '.join(encodings)}: {new['machine']}, {new['versions']})"
    told = {"command": f"{record['command']}\n{new['command']}", "date": dates}
    return {**record, **told, "seconds": record["seconds"] + new["seconds"], "runs": kept + new["runs"]}


def compare(tasks: list[Setting], encodings: Iterable[str]) -> dict:
    """Encodings on every task; the runs, and where they were made."""
    runs, start = [], time.monotonic()
    for setting in tasks:
        for encoding in encodings:
            runs += [run(setting, encoding, seed) for seed in setting.seeds]
            means = "  ".join(f"{n}: {mean:.3f}" for n, (mean, *_) in summary(runs, setting.name, encoding).items())
            print(f"{time.monotonic() - start:6.0f} s  {setting.name:8}{encoding:20}{means}", flush=True)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "command": shlex.join(["python", *sys.argv]),
        "seconds": round(time.monotonic() - start),
        "model": MODEL,
        "runs": [asdict(run) for run in runs],
    }


if __name__ == "__main__":
    main()

"""Long rows and many layers: peak memory and time of one optimizer step, each measured in a process of its own.

    python scripts/benchmark_scale.py --json benchmarks/scale.json --page benchmarks/scale.md

The model is the music recipe's, 4 layers of width 256 in 8 heads, whose stride is the square root of the length. Ways
of training it are first held to the plain one, loss and gradients, in a row that no chunk divides. Processes run under
the allocator that `hf-tfamily train` sets; what needs more than `--most` GiB is stopped and said so. `--only` runs some
sections and keeps the others of FILE; `--quick` takes short rows and few layers.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from benchmark_attention import relative_error, status
from benchmarking import shown, surroundings, write
from torch.nn.utils import clip_grad_norm_

from hf_tfamily import Full, Local, SparseTransformerConfig, SparseTransformerForCausalLM, Strided, plots
from hf_tfamily.kept_activations import in_bfloat16, on_disk
from hf_tfamily.recipes import load_recipe
from hf_tfamily_cli import ALLOCATOR

RECIPE = "sparse_transformer/music"
CHUNK = 4096
# What a way of training is: whether it takes chunks, whether layers are computed again, and what is kept where.
PLAIN = {"chunks": False, "checkpointing": False, "kept": nullcontext}
CHECKPOINTING = PLAIN | {"checkpointing": True}
WAYS = {
    "plain": PLAIN,
    "checkpointing": CHECKPOINTING,
    "and chunks": CHECKPOINTING | {"chunks": True},
    "and kept in bfloat16": CHECKPOINTING | {"chunks": True, "kept": in_bfloat16},
    "and kept on disk": CHECKPOINTING | {"chunks": True, "kept": on_disk},
    "dense SDPA": CHECKPOINTING | {"chunks": True},
}
LEANEST = "and kept on disk"
TOKENS, LAYERS = (4096, 16_384, 65_536, 262_144, 1_048_576), (4, 16, 64, 128)
ROW, WIDTH = 16_384, 256  # tokens of the section on layers; width of both
# The longest row of a way that is tried; what the others need beyond follows from their line.
LONGEST = {
    **{"plain": 65_536, "dense SDPA": 65_536},
    **{"checkpointing": 262_144, "and chunks": 262_144, "and kept in bfloat16": 262_144},
}
DEEP = "checkpointing"  # the way of the section on layers
GOALS = {"GiB of the longest row": 16, "cost exponent": 1.6, "GiB of the deepest": 4, "activations a layer": 1.3}
LINES = {
    "plain": (plots.GREY, "o", ":"),
    "checkpointing": (plots.GREY, "s", "-"),
    "and chunks": (plots.BLUE, "o", "-"),
    "and kept in bfloat16": (plots.BLUE, "^", "--"),
    "and kept on disk": (plots.BLUE, "s", ":"),
    "dense SDPA": (plots.ORANGE, "o", "-"),
}

INTRODUCTION = f"""One optimizer step of the music recipe's model at width {WIDTH}, float32, one row: peak resident
memory of the whole process, libraries included, and seconds. Each in a process of its own, under the allocator that
`hf-tfamily train` sets. "and" adds to what stands before it: chunks of {CHUNK:,} positions for feed-forward layers and
loss; and what layers begin with, kept in bfloat16 or on disk ([how to](../docs/length_and_depth.md))."""


# ---------------------------------------------------------------------------------------------------------------------
# One case, in its own process


def build(
    way: str, tokens: int, layers: int, width: int, chunk: int = CHUNK, dropout: float | None = None
) -> SparseTransformerForCausalLM:
    """The music recipe's model for rows of so many tokens, made smaller."""
    stride = 2 ** round(math.log2(tokens) / 2)
    recipe = load_recipe(RECIPE).model
    dense = way == "dense SDPA"
    patterns = {"local": Local(stride), "strided": Strided(stride)}
    config = SparseTransformerConfig(
        vocab_size=recipe["vocab_size"],
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        position_shape=[-(-tokens // stride), stride],
        attention_patterns=Full().to_dict() if dense else [
            patterns[of_layer["type"]].to_dict() for of_layer in recipe["attention_patterns"]
        ],
        resid_dropout=recipe["resid_dropout"] if dropout is None else dropout,
        chunk_size_feed_forward=chunk if WAYS[way]["chunks"] else 0,
        chunk_size_lm_head=chunk if WAYS[way]["chunks"] else 0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SparseTransformerForCausalLM._from_config(config, attn_implementation="sdpa" if dense else "block_sparse")
    model.train()
    if WAYS[way]["checkpointing"]:
        model.gradient_checkpointing_enable()
    return model


def step(way: str, model: SparseTransformerForCausalLM, optimizer: torch.optim.Optimizer, tokens: int) -> None:
    """One optimizer step on a row of random bytes."""
    ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    with WAYS[way]["kept"]():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(way: str, tokens: int, layers: int, width: int) -> dict:
    """GiB of the whole process at its peak, seconds of the step, and parameters."""
    model = build(way, tokens, layers, width)
    training = load_recipe(RECIPE).training
    optimizer = torch.optim.AdamW(model.parameters(), training["learning_rate"], weight_decay=training["weight_decay"])
    step(way, model, optimizer, min(tokens, 256))  # libraries, threads, the optimizer's state
    start = time.perf_counter()
    step(way, model, optimizer, tokens)
    seconds = time.perf_counter() - start
    return {"GiB": status("VmHWM") / 2**20, "seconds": seconds, "parameters": model.num_parameters()}


def in_own_process(case: dict, most: float) -> dict:
    """What `measure` finds in a process that may not have more than `most` GiB; without figures if it needs more."""
    command = [sys.executable, __file__, "--case", json.dumps(case), "--most", str(most)]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True)
    if done.returncode == 0:
        return case | json.loads(done.stdout.splitlines()[-1])
    if "memory" not in done.stderr.lower():
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return case | {"GiB": None, "seconds": None}


# ---------------------------------------------------------------------------------------------------------------------
# All cases


def differences(tokens: int = 300) -> dict[str, float]:
    """How far loss and gradients of each way are from the plain one's, in a short row and without dropout."""
    found = {}
    for way in WAYS:
        if way == "dense SDPA":
            continue
        model = build(way, tokens, layers=2, width=64, chunk=128, dropout=0.0)
        model.lm_head.weight.data.normal_(std=0.1)  # zero at first, and then so are most gradients
        ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))
        with WAYS[way]["kept"](least_bytes=0) if WAYS[way]["kept"] is not nullcontext else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        found[way] = loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return {way: max(relative_error(*pair) for pair in zip(found[way], found["plain"])) for way in found}


def cases(section: str, tokens: tuple[int, ...], layers: tuple[int, ...], row: int, width: int) -> list[dict]:
    if section == "tokens":
        return [
            {"way": way, "tokens": length, "layers": 4, "width": width}
            for way in WAYS
            for length in tokens
            if length <= LONGEST.get(way, max(tokens))
        ]
    return [{"way": DEEP, "tokens": row, "layers": count, "width": width} for count in layers]


def exponent(rows: list[dict], of: str, value: str) -> float | None:
    """Of the power law through the first and the last of rows: value ~ of ** exponent."""
    known = [row for row in rows if row[value] is not None]
    if len(known) < 2:
        return None
    return math.log(known[-1][value] / known[0][value]) / math.log(known[-1][of] / known[0][of])


def activations_a_layer(rows: list[dict]) -> float | None:
    """What an added layer needs beyond its weights, gradients and two moments, in activations [N, d] of float32."""
    known = [row for row in rows if row["GiB"] is not None]
    if len(known) < 2:
        return None
    first, last = known[-2:]
    state = 16 * (last["parameters"] - first["parameters"])
    added = (last["GiB"] - first["GiB"]) * 2**30 - state
    return added / (last["layers"] - first["layers"]) / (4 * last["tokens"] * last["width"])


# ---------------------------------------------------------------------------------------------------------------------
# Page and pictures


def by_way(record: dict, section: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in record["rows"].get(section, []):
        found.setdefault(row["way"], []).append(row)
    return found


def page(record: dict) -> str:
    lines = ["# Long rows and many layers", "", f"{record['machine']}, {record['versions']}, {record['date']}", ""]
    lines += ["```", *record["commands"], "```", ""]
    lines += [INTRODUCTION]
    if "tokens" in record["rows"]:
        lines += ["", "## Tokens", "", "4 layers; the stride is the square root of the number of tokens.", ""]
        lines += table(by_way(record, "tokens"), "tokens", record["most"])
        lines += ["", "![peak memory and time against tokens](scale_tokens.png)", ""]
        lines += [f"- {line}" for line in said_of_tokens(by_way(record, "tokens"))]
    if "layers" in record["rows"]:
        lines += ["", "## Layers", "", f"Rows of {record['row']:,} tokens.", ""]
        lines += table(by_way(record, "layers"), "layers", record["most"])
        lines += ["", "![peak memory and time against layers](scale_layers.png)", ""]
        lines += [f"- {line}" for line in said_of_layers(by_way(record, "layers"))]
    ways = ", ".join(f"{error:.0e} {way}" for way, error in record["differences"].items() if way != "plain")
    lines += ["", f"Loss and gradients against the plain way, in a row that no chunk divides: {ways}."]
    return "\n".join(lines) + "\n"


def table(rows: dict[str, list[dict]], of: str, most: float) -> list[str]:
    columns = sorted({row[of] for found in rows.values() for row in found})
    lines = ["| | " + " | ".join(f"{column:,} {of}" for column in columns) + " |", "|---|" + "--:|" * len(columns)]
    for way, found in rows.items():
        at = {row[of]: row for row in found}
        cells = [cell(at[column], most) if column in at else "" for column in columns]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return lines


def cell(row: dict, most: float) -> str:
    return f"over {most:g} GiB" if row["GiB"] is None else f"{row['GiB']:.2f} GiB, {shown(row['seconds'])} s"


def verdict(value: float, goal: float) -> str:
    return f"(must be at most {goal:g}: {'met' if value <= goal else 'missed'})"


def said_of_tokens(rows: dict[str, list[dict]]) -> list[str]:
    said = []
    for way, found in rows.items():
        time_exponent, memory = exponent(found, "tokens", "seconds"), exponent(found[-2:], "tokens", "GiB")
        if time_exponent is not None:
            goal = verdict(time_exponent, GOALS["cost exponent"]) if way == LEANEST else ""
            said.append(f"{way}: seconds grow with tokens to the power {time_exponent:.2f} {goal}".rstrip())
            said[-1] += f", memory at last {memory:.2f}" if memory is not None else ""
    longest = rows[LEANEST][-1] if LEANEST in rows else {"GiB": None}
    if longest["GiB"] is not None and longest["tokens"] == max(TOKENS):
        goal = verdict(longest["GiB"], GOALS["GiB of the longest row"])
        said.append(f"{longest['tokens']:,} tokens, {LEANEST}: {longest['GiB']:.2f} GiB {goal}, "
                    f"{longest['parameters'] / 1e6:.1f}M parameters")  # fmt: skip
    return said


def said_of_layers(rows: dict[str, list[dict]]) -> list[str]:
    said = []
    for way, found in rows.items():
        if (added := activations_a_layer(found)) is not None:
            goal = verdict(added, GOALS["activations a layer"]) if way == DEEP else ""
            said.append(f"{way}: an added layer needs {added:.2f} activations [N, d] beyond its weights, gradients and "
                        f"optimizer state {goal}".rstrip())  # fmt: skip
    deepest = rows[DEEP][-1] if DEEP in rows else {"GiB": None}
    if deepest["GiB"] is not None:
        goal = verdict(deepest["GiB"], GOALS["GiB of the deepest"])
        said.append(f"{deepest['layers']} layers with {DEEP}: {deepest['GiB']:.2f} GiB {goal}")
    return said


@plots.styled
def draw(rows: dict[str, list[dict]], of: str, path: Path) -> None:
    """Peak memory on the left, seconds on the right, both axes logarithmic."""
    figure = plots.new_figure(11, 4.2)
    for axes, value, title in zip(figure.subplots(1, 2), ("GiB", "seconds"), ("Peak memory, GiB", "Seconds per step")):
        for way, found in rows.items():
            known = [row for row in found if row[value] is not None]
            colour, marker, style = LINES[way]
            label = way
            if (power := exponent(found, of, value)) is not None and value == "seconds":
                label = f"{way}, power {power:.2f}"
            axes.plot([row[of] for row in known], [row[value] for row in known], color=colour, marker=marker,
                      linestyle=style, linewidth=1.4, markersize=4, label=label)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = sorted({row[of] for found in rows.values() for row in found})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(color=plots.GREY, alpha=0.25, linewidth=0.6)
        axes.set_title(title)
        axes.set_xlabel(of)
        axes.legend(fontsize=8)
    plots.save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, measured: Callable[[dict, float], dict] = in_own_process) -> dict:
    """All figures of the sections that were asked for, beside those that an earlier run left in the JSON file."""
    tokens, layers, row, width = TOKENS, LAYERS, ROW, WIDTH
    if args.quick:
        tokens, layers, row, width = (64, 256), (1, 2), 64, 32
    tokens = tuple(length for length in tokens if length <= args.longest)
    before = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"rows": {}, "commands": []}
    record = surroundings() | {"most": args.most, "row": row, "width": width, "differences": differences()}
    record["commands"] = list(dict.fromkeys(before["commands"] + record["commands"]))
    record["rows"] = {section: before["rows"][section] for section in ("tokens", "layers") if section in before["rows"]}
    for section in args.only:
        record["rows"][section] = []
        for case in cases(section, tokens, layers, row, width):
            record["rows"][section].append(measured(case, args.most))
            print(
                f"{case['way']}, {case[section]:,} {section}: {cell(record['rows'][section][-1], args.most)}",
                flush=True,
            )
            if args.json:
                write(args.json, json.dumps(record, indent=1) + "\n")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short rows, few layers: does it run?")
    parser.add_argument("--only", nargs="+", choices=["tokens", "layers"], default=["tokens", "layers"])
    parser.add_argument("--longest", type=int, default=max(TOKENS), metavar="TOKENS", help="leave out longer rows")
    parser.add_argument("--most", type=float, default=16, metavar="GIB", help="that a process may have (default 16)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page there, and its pictures beside it")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        most = int(args.most * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        print(json.dumps(measure(**json.loads(args.case))))
        return 0
    record = run(args)
    wrong = [way for way, error in record["differences"].items() if error > (0.05 if "bfloat16" in way else 1e-5)]
    if args.page:
        write(args.page, page(record))
        for section in record["rows"]:
            draw(by_way(record, section), section, args.page.parent / f"scale_{section}.png")
    for section, said in (("tokens", said_of_tokens), ("layers", said_of_layers)):
        if section in record["rows"]:
            print("\n".join(said(by_way(record, section))))
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

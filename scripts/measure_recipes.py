"""Train the small recipes with several seeds, and write what they reach into docs/results.md.

    python scripts/measure_recipes.py --json docs/results.json --page docs/results.md

A run that was cut off goes on: what is measured is kept in the JSON file at once, and what was being trained in
`--output`. `--only RECIPE ...` measures some.
"""

import argparse
import json
import statistics
from pathlib import Path

from benchmarking import surroundings, write

from hf_tfamily.recipes import load_recipe
from hf_tfamily.reproduction.claim import number
from hf_tfamily.tasks import Task, task_of
from hf_tfamily.training import train

MARK = "<!-- What follows is made by scripts/measure_recipes.py -->"
RECIPES = (
    *("sparse_transformer/digits", "image_transformer/digits", "rope_decoder/bible", "vanilla_transformer/bible"),
    *("transformer_xl/bible", "compressive_transformer/bible", "xl_sparse/bible", "memorizing_transformer/bible"),
    *("adaptive_span/bible", "sparse_transformer/bible_no_memory", "vanilla_encoder/bible", "long_encoder/bible"),
    *("vanilla_transformer/bible_versions", "vanilla_transformer/reverse", "universal_transformer/reverse"),
    *("image_transformer/photo_crops", "image_transformer/super_resolution"),
)
SEEDS = (0, 1, 2)
LEAST_RUNS = 2  # that a range is told of


def measure(recipe: str, seed: int, output: Path) -> dict:
    """The metrics of one run."""
    changed = load_recipe(recipe, [f"training.seed={seed}"])
    folder = output / f"{recipe.replace('/', '-')}-{seed}"
    if not folder.exists():
        train(changed, folder, resume=True)
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def beside(task: Task, metrics: dict) -> str:
    """What trivial predictors cost."""
    named = {"a uniform guess": f"uniform_{task.metric}", **task.trivial_predictors}
    return ", ".join(f"{words} {number(metrics[name])}" for words, name in named.items() if name in metrics)


def row(recipe: str, runs: list[dict]) -> str:
    """One line of the table."""
    task = task_of(load_recipe(recipe))
    values = [run["metrics"][task.metric] for run in runs]
    shown = number(statistics.mean(values))
    if len(values) >= LEAST_RUNS:
        shown += f" ({number(min(values))} to {number(max(values))})"
    minutes = statistics.mean(run["metrics"]["seconds"] for run in runs) / 60
    name = task.metric_title.removeprefix("Held-out ")
    return f"| `{recipe}` | {name} | {shown} | {len(runs)} | {minutes:.1f} | {beside(task, runs[0]['metrics'])} |"


def table(record: dict) -> str:
    """All that is measured, as Markdown."""
    measured = [recipe for recipe in RECIPES if any(run["recipe"] == recipe for run in record["runs"])]
    lines = [f"{record['machine']}, {record['versions']}, {record['date']}", "", "```", *record["commands"], "```", ""]
    lines += [
        "| recipe | held-out | mean (lowest to highest) | seeds | minutes | beside it |",
        "|---|---|--:|--:|--:|---|",
    ]
    lines += [row(recipe, [run for run in record["runs"] if run["recipe"] == recipe]) for recipe in measured]
    missing = [recipe for recipe in RECIPES if recipe not in measured]
    lines += ["", f"Not measured yet: {', '.join(f'`{recipe}`' for recipe in missing)}."] if missing else []
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=RECIPES, choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=Path("runs/results"), help="folder of the finished models")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="what is measured is kept there")
    parser.add_argument("--page", type=Path, metavar="FILE", help=f"a page whose part below {MARK!r} is made anew")
    args = parser.parse_args()
    record = surroundings()
    record["runs"] = json.loads(args.json.read_text())["runs"] if args.json.exists() else []
    known = {(run["recipe"], run["seed"]) for run in record["runs"]}
    for recipe in args.only:
        for seed in args.seeds:
            if (recipe, seed) not in known:
                record["runs"].append({"recipe": recipe, "seed": seed, "metrics": measure(recipe, seed, args.output)})
                write(args.json, json.dumps(record, indent=1) + "\n")
    if args.page:
        written = args.page.read_text(encoding="utf-8").partition(MARK)[0]
        write(args.page, f"{written}{MARK}\n\n{table(record)}\n")


if __name__ == "__main__":
    main()

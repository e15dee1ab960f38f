"""Train the small recipes and push each to a repository of its own: ORG/sparse-transformer-digits and so on.

    hf auth login
    python scripts/make_zoo.py your-name --dry-run
    python scripts/make_zoo.py your-name

A recipe whose finished folder is in `--runs` is not trained again, one that was interrupted goes on, and a repository
that holds the folder's files already is left alone; so the same command, given again, does what is left to do. What
fails is said in the table at the end, does not stop the others, and makes the exit code 1.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging

from hf_tfamily.finished import RECIPE_FILE, task_in
from hf_tfamily.hub import PushError, changed_files, push
from hf_tfamily.missing_packages import how_to_install
from hf_tfamily.recipes import Recipe, load_recipe
from hf_tfamily.run_errors import RunError
from hf_tfamily.secret_values import without_secrets
from hf_tfamily.training import RunFolder, Terminated, default_output, train

# Repositories and their recipes: all that train in minutes, on data that installs or is made.
ZOO = (
    ("sparse-transformer-digits", "sparse_transformer/digits"),
    ("sparse-transformer-fashion-mnist", "sparse_transformer/fashion_mnist"),
    ("sparse-transformer-photo-crops", "sparse_transformer/photo_crops"),
    ("sparse-transformer-bible", "sparse_transformer/bible"),
    ("sparse-transformer-bible-no-memory", "sparse_transformer/bible_no_memory"),
    ("transformer-xl-bible", "transformer_xl/bible"),
    ("compressive-transformer-bible", "compressive_transformer/bible"),
    ("memorizing-transformer-bible", "memorizing_transformer/bible"),
    ("xl-sparse-bible", "xl_sparse/bible"),
    ("rope-decoder-bible", "rope_decoder/bible"),
    ("rope-decoder-bible-bpe", "rope_decoder/bible_bpe"),
    ("adaptive-span-bible", "adaptive_span/bible"),
    ("image-transformer-digits", "image_transformer/digits"),
    ("image-transformer-fashion-mnist", "image_transformer/fashion_mnist"),
    ("image-transformer-photo-crops", "image_transformer/photo_crops"),
    ("image-transformer-super-resolution", "image_transformer/super_resolution"),
    ("swin-transformer-fashion-mnist", "swin_transformer/fashion_mnist"),
    ("swin-transformer-fashion-mnist-no-shift", "swin_transformer/fashion_mnist_no_shift"),
    ("swin-transformer-emoji", "swin_transformer/emoji"),
    ("vanilla-transformer-bible", "vanilla_transformer/bible"),
    ("vanilla-transformer-bible-versions", "vanilla_transformer/bible_versions"),
    ("vanilla-transformer-help-en-de", "vanilla_transformer/help-en-de"),
    ("vanilla-transformer-reverse", "vanilla_transformer/reverse"),
    ("vanilla-encoder-bible", "vanilla_encoder/bible"),
    ("long-encoder-bible", "long_encoder/bible"),
    ("universal-transformer-reverse", "universal_transformer/reverse"),
)
# What a request, the data or the disk are at fault for, which one line explains.
EXPLAINED = (ValueError, ImportError, OSError)
FAILED = "failed"
UNREACHABLE = (HfHubHTTPError, HTTPError, OfflineModeIsEnabled)

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


@dataclass
class Row:
    """A line of the final table."""

    repository: str
    figure: str
    what: str
    details: str = ""


def visit(repository: str, recipe: Recipe, folder: Path, args: argparse.Namespace) -> Row:
    """Train the recipe if it must be and push its folder if it must be; with `--dry-run` say so only."""
    finished = (folder / "config.json").exists()
    if finished:
        _check_same(recipe, folder, args.set)
    elif args.dry_run:
        begun = RunFolder(folder).partial.exists()
        return Row(repository, "", f"would {'go on training' if begun else 'train'} and push")
    else:
        console.print(f"  training {escape(recipe.name)} in {escape(str(folder))}", soft_wrap=True)
        train(recipe, folder, resume=True)
    figure = _figure(folder)
    changed = changed_files(folder, repository)
    if not changed and not (args.private and _is_public(repository)):
        return Row(repository, figure, "unchanged")
    if args.dry_run:
        return Row(repository, figure, f"would push {_files(len(changed))}")
    console.print(f"  pushing {_files(len(changed))} of {escape(str(folder))}", soft_wrap=True)
    return Row(repository, figure, "pushed", push(folder, repository, private=args.private).url)


def _check_same(recipe: Recipe, folder: Path, overrides: Sequence[str]) -> None:
    """A finished folder counts as it is, unless `--set` asks for something else than it was made by."""
    if overrides and replace(load_recipe(folder / RECIPE_FILE), name=recipe.name) != recipe:
        raise RunError(f"{folder} was trained with other settings; choose another folder by --runs.")


def _figure(folder: Path) -> str:
    """The finished model's own, without what it is compared with."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return task_in(folder).summary(metrics).partition(" (")[0]


def _is_public(repository: str) -> bool:
    return not HfApi().model_info(repository).private


def _files(number: int) -> str:
    return f"{number} file{'s' * (number != 1)}"


def check_token() -> None:
    """Before hours of training: PushError unless there is a token that the Hub knows and that is for writing."""
    if get_token() is None:
        raise PushError("There is no token; log in with `hf auth login`, or set HF_TOKEN.")
    try:
        access = HfApi().whoami()["auth"].get("accessToken", {})
    except UNREACHABLE as error:
        raise PushError(f"The Hub does not take the token or cannot be reached: {_line(error)}") from error
    if access.get("role") == "read":
        raise PushError("The token is for reading only; make one for writing.")


def _line(error: Exception) -> str:
    """What an error says, in one line without secrets."""
    said = how_to_install(error) if isinstance(error, ImportError) else None
    return without_secrets(" ".join(str(said or error).split()) or type(error).__name__)


def make_zoo(args: argparse.Namespace) -> list[Row]:
    """A row for each repository asked for."""
    chosen = [(name, recipe) for name, recipe in ZOO if not args.only or name in args.only]
    rows = []
    for number, (name, recipe_name) in enumerate(chosen, 1):
        repository = f"{args.org}/{name}"
        console.print(f"[bold]{number} of {len(chosen)}: {escape(repository)}[/]")
        try:
            recipe = load_recipe(recipe_name, args.set)
            row = visit(repository, recipe, args.runs / default_output(recipe).name, args)
        except Exception as error:
            if not isinstance(error, EXPLAINED):
                traceback.print_exc()
            row = Row(repository, "", FAILED, _line(error))
        console.print(f"  {escape(f'{row.what} {row.details}'.strip())}", style=_style(row), soft_wrap=True)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> Table:
    drawn = Table("repository", "figure", "what was done", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        what = f"{FAILED}: {row.details}" if row.what == FAILED else row.what
        drawn.add_row(*map(escape, (row.repository, row.figure, what)), style=_style(row))
    return drawn


def _style(row: Row) -> str | None:
    return "red" if row.what == FAILED else None


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("org", metavar="ORG", help="account or organisation on the Hub")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[name for name, _ in ZOO], help="of these alone")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="finished folders are and go here")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change every recipe")
    parser.add_argument("--private", action="store_true", help="make private repositories")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; train and push nothing")
    args = parser.parse_args(words)
    logging.disable_progress_bar()  # for loading and saving; the one for training stays
    try:
        if not args.dry_run:
            check_token()
        rows = make_zoo(args)
    except PushError as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        errors.print("\nStopped. To go on, give the same command again.")
        return 130 if isinstance(stop, KeyboardInterrupt) else stop.code
    console.print()
    console.print(table(rows))
    return int(any(row.what == FAILED for row in rows))


if __name__ == "__main__":
    sys.exit(main())

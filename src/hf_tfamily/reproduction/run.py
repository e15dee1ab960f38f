"""Run a claim's experiment: what is measured is kept at once, so that a run that was cut off goes on."""

import hashlib
import importlib
import json
import pkgutil
import time
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from .. import claims
from ..data.sequences import require
from ..modeling.attention_patterns import nearest
from ..whole_files import write_text
from .claim import Claim, Finding, Result, Results, number
from .page import table, write_page
from .workspace import Workspace


class ClaimError(ValueError):
    """There is no such claim."""


def list_claims() -> list[str]:
    """Names of all claims."""
    return sorted(module.name for module in pkgutil.iter_modules(claims.__path__))


def load_claim(name: str) -> Claim:
    """The claim of that name. Raises ClaimError, naming the nearest, where there is none."""
    if name not in list_claims():
        raise ClaimError(f"No claim is called {name!r}{nearest(name, list_claims())}")
    return importlib.import_module(f"{claims.__name__}.{name}").CLAIM


def reproduce(
    name: str, folder: str | Path = "runs/claims", quick: bool = False, page: str | Path | None = None
) -> Finding:
    """Look for a claim: measure every variant with every seed, show the table, and say what was found.

    Args:
        name: of the claim, as `list_claims` has it.
        folder: keeps trained models and results. A second call measures only what is missing.
        quick: tiny data and two steps with the first seed: does it run? What it finds means nothing.
        page: a folder that gets a page, its picture, and the results as JSON.

    Raises:
        ClaimError: if there is no such claim, or `page` is asked of a quick run.
        MissingPackageError: if the experiment needs a package that is not installed.
    """
    claim = load_claim(name)
    if quick and page is not None:
        raise ClaimError("A quick run finds nothing that a page could say; leave out --quick or --page.")
    for module in claim.needs:
        require(module)
    folder = Path(folder) / "quick" if quick else Path(folder)
    results = _measured(name, claim, folder, quick)
    finding = claim.judge(results)
    print(f"\n{claim.system}: {claim.statement} ({claim.paper})\n\n{table(claim, results)}\n")
    print(f"Found if: {claim.criterion}\n{finding}" if not quick else "A quick run: the figures above mean nothing.")
    if page is not None:
        write_page(name, claim, results, Path(page))
    return finding


def _measured(name: str, claim: Claim, folder: Path, quick: bool) -> Results:
    kept, version = folder / f"{name}.json", _version()
    results = _read(kept, version)
    known = {(result.variant, result.seed) for result in results}
    seeds = claim.seeds[:1] if quick else claim.seeds
    tasks = [(variant, seed) for seed in seeds for variant in claim.variants]
    for place, (variant, seed) in enumerate(tasks, 1):
        if (variant, seed) in known:
            continue
        tqdm.write(f"[{place}/{len(tasks)}] {name}: {variant}, seed {seed}")
        start = time.monotonic()
        figures = claim.measure(variant, seed, Workspace(folder, quick))
        results.append(Result(variant, seed, figures, round(time.monotonic() - start, 1)))
        record = {"version": version, "results": [asdict(result) for result in results]}
        write_text(kept, json.dumps(record, indent=1) + "\n")
        tqdm.write("    " + ", ".join(f"{claim.figures[key]} {number(value)}" for key, value in figures.items()))
    return results


def _version() -> str:
    """Of all claims, which share settings: after a change of any, results are measured anew; models are kept."""
    sources = sorted(Path(claims.__path__[0]).glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _read(kept: Path, version: str) -> Results:
    if not kept.exists():
        return Results()
    record = json.loads(kept.read_text(encoding="utf-8"))
    return Results(Result(**result) for result in record["results"]) if record["version"] == version else Results()

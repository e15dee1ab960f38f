"""A claim's table, picture and page, and the page that lists all claims."""

import json
import platform
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import plots
from ..whole_files import write_text
from .claim import Claim, Result, Results, Verdict


def table(claim: Claim, results: Results) -> str:
    """The figures of every variant as Markdown: the mean over seeds, and in brackets the lowest and the highest."""
    lines = ["| | " + " | ".join(claim.figures.values()) + " |", "|---|" + "--:|" * len(claim.figures)]
    for variant in claim.variants:
        lines.append(f"| {variant} | " + " | ".join(results.shown(variant, figure) for figure in claim.figures) + " |")
    return "\n".join(lines)


def write_page(name: str, claim: Claim, results: Results, folder: Path) -> None:
    """NAME.md, NAME.png and NAME.json in `folder`."""
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} threads",
        "command": shlex.join(["hf-tfamily", "reproduce", name, "--page", str(folder)]),
        "results": [asdict(result) for result in results],
    }
    draw(claim, results, folder / f"{name}.png")
    write_text(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_text(folder / f"{name}.md", page(name, claim, record))


def page(name: str, claim: Claim, record: dict[str, Any]) -> str:
    """The page of one claim as Markdown, of what `write_page` recorded."""
    results = Results(Result(**result) for result in record["results"])
    seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in results}))
    minutes = sum(result.seconds for result in results) / 60
    return "\n".join(
        [
            f"# {claim.system}: {claim.statement}",
            "",
            f"{claim.paper}. The paper's own figures: {claim.papers_figure}",
            "",
            f"**{claim.judge(results)}**",
            "",
            f"Experiment: {claim.experiment}",
            "",
            f"Found if: {claim.criterion}",
            "",
            table(claim, results),
            "",
            f"![{claim.statement}]({name}.png)",
            "",
            "```",
            record["command"],
            "```",
            "",
            f"{record['date']}, {record['versions']}; seeds {seeds}; {minutes:.0f} minutes. Figures are means over "
            "seeds, with the lowest and the highest.",
            "",
        ]
    )


@plots.styled
def draw(claim: Claim, results: Results, path: Path) -> None:
    """What a claim draws, or a point for each result."""
    figure = plots.new_figure(6.4, 3.4 if claim.draw else 1.1 + 0.42 * len(claim.variants))
    axes = figure.subplots()
    (claim.draw or _points_of(claim))(results, axes)
    plots.save(figure, path)


def _points_of(claim: Claim):
    first, words = next(iter(claim.figures.items()))

    def points(results: Results, axes: Any) -> None:
        for place, variant in enumerate(reversed(claim.variants)):
            values = results.values(variant, first)
            axes.plot(values, [place] * len(values), "o", color=plots.BLUE, alpha=0.7)
        axes.set_yticks(range(len(claim.variants)), reversed(claim.variants))
        axes.set(xlabel=words, ylim=(-0.5, len(claim.variants) - 0.5))
        axes.grid(axis="y", color="#e8ecf0")

    return points


def index(claims: Iterable[tuple[str, Claim, dict[str, Any] | None]], folder: str) -> str:
    """The page of all claims as Markdown; records are None of claims that have no page yet."""
    lines = ["| system | claim | the paper's figures | ours | verdict |", "|---|---|---|---|---|"]
    for name, claim, record in sorted(claims, key=lambda entry: (entry[1].system, entry[0])):
        if record is None:
            ours, verdict = "", "not run yet"
        else:
            finding = claim.judge(Results(Result(**result) for result in record["results"]))
            ours, verdict = finding.words, _verdict(finding.verdict)
        link = claim.statement if record is None else f"[{claim.statement}]({folder}/{name}.md)"
        lines.append(f"| {claim.system} | {link} | {claim.papers_figure} | {ours} | {verdict} |")
    return "\n".join(lines)


def _verdict(verdict: Verdict) -> str:
    return f"**{verdict}**" if verdict is Verdict.FOUND else str(verdict)

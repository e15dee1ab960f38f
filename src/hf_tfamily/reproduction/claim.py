"""What a claim is, what an experiment came to, and what that says of the claim."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .workspace import Workspace

Figures = dict[str, float]


class Verdict(StrEnum):
    """What an experiment may say of a claim."""

    FOUND = "found"
    NOT_FOUND = "not found at this size"
    OTHER = "other than claimed"


@dataclass(frozen=True)
class Finding:
    """A verdict, and the figures that it rests on in words."""

    verdict: Verdict
    words: str

    def __str__(self) -> str:
        return f"{self.verdict.capitalize()}: {self.words}"


@dataclass(frozen=True)
class Result:
    """What one variant came to with one seed."""

    variant: str
    seed: int
    figures: Figures
    seconds: float


class Results(list[Result]):
    """All results of an experiment."""

    def values(self, variant: str, figure: str) -> list[float]:
        """A variant's figure, seed by seed."""
        return [result.figures[figure] for result in self if result.variant == variant]

    def mean(self, variant: str, figure: str) -> float:
        return statistics.mean(self.values(variant, figure))

    def shown(self, variant: str, figure: str) -> str:
        """The mean over seeds and, where they differ, the lowest and the highest."""
        values = self.values(variant, figure)
        low, high = number(min(values)), number(max(values))
        return number(statistics.mean(values)) + (f" ({low} to {high})" if low != high else "")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of a paper, and how it is looked for.

    Attributes:
        system: whose claim it is, as the documentation names it.
        paper: authors, year, arXiv number and section.
        statement: what is claimed, in a sentence.
        papers_figure: the paper's own figures, at its own size.
        experiment: what is run here, in sentences.
        criterion: what counts as found, written before the experiment was run.
        variants, seeds: what is measured; every variant with every seed.
        figures: the figures of each measurement and, in words, what they are; the first is drawn.
        measure: (variant, seed, workspace) -> the figures.
        judge: results -> a finding, by the criterion.
        draw: (results, matplotlib axes); None for a point for each result.
        needs: names of modules that the experiment needs beyond the package's own, each in an extra.
    """

    system: str
    paper: str
    statement: str
    papers_figure: str
    experiment: str
    criterion: str
    variants: tuple[str, ...]
    figures: dict[str, str]
    measure: Callable[[str, int, Workspace], Figures]
    judge: Callable[[Results], Finding]
    seeds: tuple[int, ...] = (0, 1)
    draw: Callable[[Results, Any], None] | None = None
    needs: tuple[str, ...] = ()


def compare(results: Results, figure: str, better: str, worse: str, lower_is_better: bool = True) -> Finding:
    """Is one variant better than another with every seed of both? Found; the other way round, other than claimed."""
    sign = 1 if lower_is_better else -1
    good, bad = ([sign * value for value in results.values(variant, figure)] for variant in (better, worse))
    verdict = Verdict.FOUND if max(good) < min(bad) else Verdict.OTHER if min(good) > max(bad) else Verdict.NOT_FOUND
    words = "; ".join(f"{variant}: {results.shown(variant, figure)}" for variant in (better, worse))
    return Finding(verdict, words)


def all_of(*findings: Finding) -> Finding:
    """Found if all are; other than claimed if one is."""
    verdicts = {finding.verdict for finding in findings}
    worst = next(v for v in (Verdict.OTHER, Verdict.NOT_FOUND, Verdict.FOUND) if v in verdicts)
    return Finding(worst, ". ".join(finding.words for finding in findings))


def of_recipe(
    recipe: str, variants: Mapping[str, Iterable[str]], metrics: Mapping[str, str], common: Iterable[str] = ()
) -> Callable[[str, int, Workspace], Figures]:
    """A `measure` that trains a recipe and reads its metrics.

    Args:
        variants: what each variant changes, as `hf-tfamily train --set`.
        metrics: for each figure its name in metrics.json.
        common: changes of all variants.
    """

    def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
        found = workspace.metrics(recipe, [*common, *variants[variant]], seed)
        return {figure: found[metric] for figure, metric in metrics.items()}

    return measure


def number(value: float) -> str:
    """Four digits, for people."""
    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"

"""How a claim is looked for: its results are kept, judged by its criterion, and written on a page."""

import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

from hf_tfamily import claims, reproduction
from hf_tfamily.reproduction import Claim, ClaimError, Finding, Result, Results, Verdict, all_of, compare
from hf_tfamily.reproduction import run as running
from hf_tfamily.reproduction.page import index, page

PAGES = Path(__file__).parents[2] / "docs" / "claims"
VALUES = {("a", 0): 1.0, ("a", 1): 1.2, ("b", 0): 2.0, ("b", 1): 2.1}


def results(**values) -> Results:
    return Results(
        Result(variant, seed, {"bits": value}, 1.0) for variant, of in values.items() for seed, value in enumerate(of)
    )


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([1.0, 1.2], [1.3, 1.4], Verdict.FOUND),
        ([1.0, 1.3], [1.2, 1.4], Verdict.NOT_FOUND),
        ([1.0, 1.2], [1.2, 1.4], Verdict.NOT_FOUND),
        ([1.3, 1.4], [1.0, 1.2], Verdict.OTHER),
    ],
)
def test_a_difference_counts_where_seeds_do_not_overlap(better, worse, verdict):
    found = results(a=better, b=worse)
    assert compare(found, "bits", "a", "b").verdict is verdict
    opposite = {Verdict.FOUND: Verdict.OTHER, Verdict.OTHER: Verdict.FOUND}.get(verdict, verdict)
    assert compare(found, "bits", "a", "b", lower_is_better=False).verdict is opposite


def test_all_of_is_as_good_as_the_worst():
    yes, no, other = (Finding(verdict, verdict) for verdict in (Verdict.FOUND, Verdict.NOT_FOUND, Verdict.OTHER))
    assert all_of(yes, yes).verdict is Verdict.FOUND
    assert all_of(yes, no).verdict is Verdict.NOT_FOUND
    assert all_of(yes, other, no).verdict is Verdict.OTHER


@pytest.fixture
def claim(monkeypatch, tmp_path):
    """A claim `made_up`; what it was asked to measure is in `asked`."""
    asked = []

    def measure(variant, seed, workspace):
        asked.append((variant, seed))
        if len(asked) == 3 and not workspace.quick:
            raise KeyboardInterrupt
        return {"bits": VALUES[variant, seed]}

    made_up = types.ModuleType("hf_tfamily.claims.made_up")
    made_up.asked = asked
    made_up.CLAIM = Claim(
        system="Somebody's model",
        paper="Somebody 2020",
        statement="a is better than b",
        papers_figure="1 against 2",
        experiment="both",
        criterion="a is below b",
        variants=("a", "b"),
        figures={"bits": "bits per byte"},
        measure=measure,
        judge=lambda found: compare(found, "bits", "a", "b"),
    )
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "made_up.py").write_text("first")
    monkeypatch.setattr(claims, "__path__", [str(tmp_path / "claims")])
    monkeypatch.setitem(sys.modules, made_up.__name__, made_up)
    return made_up


def test_a_run_goes_on_where_it_was_cut_off(claim, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        reproduction.reproduce("made_up", tmp_path / "runs")
    assert claim.asked == [("a", 0), ("b", 0), ("a", 1)]
    finding = reproduction.reproduce("made_up", tmp_path / "runs", page=tmp_path / "pages")
    assert claim.asked[3:] == [("a", 1), ("b", 1)]
    assert finding.verdict is Verdict.FOUND
    assert finding.words == "a: 1.1 (1 to 1.2); b: 2.05 (2 to 2.1)"
    assert "| a | 1.1 (1 to 1.2) |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "pages").iterdir()} == {"made_up.md", "made_up.png", "made_up.json"}
    record = json.loads((tmp_path / "pages" / "made_up.json").read_text())
    assert (tmp_path / "pages" / "made_up.md").read_text() == page("made_up", claim.CLAIM, record)
    assert "hf-tfamily reproduce made_up --page" in record["command"]
    reproduction.reproduce("made_up", tmp_path / "runs")
    assert len(claim.asked) == 5


def test_another_experiment_is_measured_anew(claim, tmp_path):
    reproduction.reproduce("made_up", tmp_path / "runs", quick=True)
    reproduction.reproduce("made_up", tmp_path / "runs", quick=True)
    assert claim.asked == [("a", 0), ("b", 0)]  # a quick run takes one seed
    (tmp_path / "claims" / "made_up.py").write_text("second")
    reproduction.reproduce("made_up", tmp_path / "runs", quick=True)
    assert len(claim.asked) == 4


def test_what_is_refused(claim, tmp_path):
    with pytest.raises(ClaimError, match=r"No claim is called 'madeup'.*made_up"):
        reproduction.reproduce("madeup")
    with pytest.raises(ClaimError, match="leave out --quick or --page"):
        reproduction.reproduce("made_up", tmp_path, quick=True, page=tmp_path)
    missing = dataclasses.replace(claim.CLAIM, needs=("not_a_module",))
    claim.CLAIM = missing
    with pytest.raises(ImportError, match="not_a_module"):
        reproduction.reproduce("made_up", tmp_path)


def test_the_index_says_what_pages_say(claim):
    record = {"results": [dataclasses.asdict(result) for result in results(a=[1.0, 1.2], b=[2.0, 2.1])]}
    lines = index([("made_up", claim.CLAIM, record), ("new", claim.CLAIM, None)], "claims").splitlines()
    assert lines[2].endswith("| a: 1.1 (1 to 1.2); b: 2.05 (2 to 2.1) | **found** |")
    assert lines[3].endswith("|  | not run yet |")


@pytest.mark.parametrize("name", running.list_claims())
def test_every_claim_is_told_whole(name):
    told = reproduction.load_claim(name)
    assert all(getattr(told, field.name) for field in dataclasses.fields(told) if field.type is str)
    assert "{" not in told.experiment + told.criterion
    assert told.variants
    assert told.figures
    ends = [words.endswith(".") for words in (told.statement, told.criterion, told.experiment)]
    assert ends == [False, True, True]


@pytest.mark.parametrize("file", sorted(PAGES.glob("*.json")), ids=lambda file: file.stem)
def test_pages_say_what_their_results_say(file):
    """No verdict and no table is written by hand."""
    record = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == page(file.stem, reproduction.load_claim(file.stem), record)
    assert file.with_suffix(".png").exists()


@pytest.mark.slow
def test_every_claim_runs_quickly(tmp_path, capsys):
    """But those on weights of packages that are not installed here; they are named, and no more than these."""
    needs = {name: reproduction.load_claim(name).needs for name in running.list_claims()}
    left_out = {name for name, modules in needs.items() if not all(map(importlib.util.find_spec, modules))}
    assert left_out <= {"streaming_sinks"}
    for name in needs.keys() - left_out:
        reproduction.reproduce(name, tmp_path, quick=True)
    assert capsys.readouterr().out.count("A quick run") == len(needs) - len(left_out)

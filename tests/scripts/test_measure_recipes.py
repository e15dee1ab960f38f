"""Results over several seeds: what is measured is kept, and the page tells ranges."""

import json
import sys

import pytest

from hf_tfamily.recipes import list_recipes


@pytest.fixture
def script(monkeypatch, tmp_path):
    import measure_recipes

    def measure(recipe, seed, output):
        asked.append((recipe, seed))
        return {"bits_per_dim": 1.5 + seed / 10, "uniform_bits_per_dim": 4.0, "seconds": 60.0}

    asked = []
    monkeypatch.setattr(measure_recipes, "measure", measure)
    monkeypatch.setattr(measure_recipes, "asked", asked, raising=False)
    (tmp_path / "page.md").write_text(f"# Mine\n\n{measure_recipes.MARK}\nold\n")
    return measure_recipes


def run(script, monkeypatch, tmp_path, *options):
    files = ["--json", str(tmp_path / "found.json"), "--page", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", ["measure_recipes.py", *files, *options])
    script.main()
    return (tmp_path / "page.md").read_text()


def test_every_recipe_is_one_of_the_package(script):
    assert set(script.RECIPES) <= set(list_recipes())


def test_the_table_tells_means_and_ranges(script, monkeypatch, tmp_path):
    page = run(script, monkeypatch, tmp_path, "--only", "sparse_transformer/digits", "--seeds", "0", "1", "2")
    assert page.startswith("# Mine\n")
    assert "old" not in page
    row = "| `sparse_transformer/digits` | bits per dimension | 1.6 (1.5 to 1.7) | 3 | 1.0 | a uniform guess 4 |"
    assert row in page
    assert "`rope_decoder/bible`" in page.partition("Not measured yet: ")[2]
    assert len(json.loads((tmp_path / "found.json").read_text())["runs"]) == 3


def test_what_is_measured_is_not_measured_again(script, monkeypatch, tmp_path):
    one = ("--only", "sparse_transformer/digits", "--seeds")
    assert "| 1.5 | 1 |" in run(script, monkeypatch, tmp_path, *one, "0")
    run(script, monkeypatch, tmp_path, *one, "0", "1")
    assert script.asked == [("sparse_transformer/digits", 0), ("sparse_transformer/digits", 1)]

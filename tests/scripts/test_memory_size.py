"""The comparison of store sizes runs from end to end, and tells names from long ago from others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import memory_size

    return memory_size


def test_names_are_new_or_from_long_ago_or_near(script):
    text = b"Then Adam went. Then Adam came, and Eve; but Adam sat; " + b"x" * 9 + b"y Adam and Eve"
    kinds = script.kinds_of(text, stream_bytes=1000, near=30)
    new, eve = text.index(b"Adam"), text.index(b"Eve")
    assert kinds[new : new + 4].tolist() == [2] * 4
    assert kinds[eve : eve + 3].tolist() == [2] * 3
    assert set(kinds[text.index(b"Then", 3) : eve]) == {3}  # a beginning, and a name from a moment ago
    assert kinds[-3:].tolist() == [1] * 3
    assert (kinds == 1).sum() == 3 + 0 * new
    apart = script.kinds_of(text, stream_bytes=len(text) - 20, near=30)
    assert apart[-3:].tolist() == [2] * 3  # a stream of its own


@pytest.mark.slow
def test_quick_run_writes_table_and_picture(tmp_path):
    files = {option: tmp_path / f"memory.{option}" for option in ("json", "md", "png")}
    options = ["--quick", "--json", files["json"], "--page", files["md"], "--plot", files["png"]]
    subprocess.run([sys.executable, SCRIPTS / "memory_size.py", *options], check=True)
    runs = json.loads(files["json"].read_text())["runs"]
    assert [(run["trained"] > 0, run["size"]) for run in runs] == [(True, 0), (True, 512), (False, 0)]
    assert "| names from long ago |" in files["md"].read_text()
    assert files["png"].stat().st_size > 10_000

"""The table of what ranks send is counted from end to end, for short rows."""

import sys

import count_exchange


def test_the_table(monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["count_exchange.py", "--tokens", "1024", "--ranks", "4", "--page", str(page)])
    count_exchange.main()
    text = page.read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(count_exchange.patterns(1024))
    by_pattern = {row[0].strip("| `"): row for row in rows}
    assert by_pattern["Full()"][-1] == "**1** |"
    halo = 31 * 8 * 2 * 64 * 2 / 2**20
    assert by_pattern["Local(window=32)"][2] == f"{halo:.3g} MiB"
    assert by_pattern["Strided(stride=32)"][1] == "columns"

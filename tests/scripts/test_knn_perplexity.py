"""The figures of kNN-LM: parts share no passage, and it runs from end to end with a tiny model in place of SmolLM2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tfamily.data.text import byte_tokenizer

pytest.importorskip("faiss")
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import knn_perplexity

    return knn_perplexity


def write_help(folder):
    (folder / "en-US").mkdir(parents=True)
    for page in range(40):
        body = "".join(f'<p id="par_id{line}">Page {page} says {line} &amp; <b>more</b>.</p>' for line in range(4))
        (folder / "en-US" / f"{page:02}.html").write_text(f'<h1 id="hd_id1">Choose a page</h1>{body}')


def test_pages_are_lines(script, tmp_path):
    write_help(tmp_path)
    pages = script.help_pages(tmp_path / "en-US")
    assert len(pages) == 40
    assert pages[3].splitlines()[:2] == ["Choose a page", "Page 3 says 0 & more."]
    with pytest.raises(SystemExit, match="apt-get install libreoffice-help-en-us"):
        script.help_pages(tmp_path / "de")


def test_parts_share_no_passage(script, tmp_path):
    write_help(tmp_path)
    sizes = script.Sizes(store=1000, tuned=300, reported=300)
    parts = script.deal_out(script.help_pages(tmp_path / "en-US"), byte_tokenizer(), sizes)
    dealt = [*parts.store, *parts.tuned, *parts.reported]
    assert len(set(dealt)) == len(dealt)
    title = len("Choose a page") / sum(map(len, parts.reported[0].splitlines()))
    assert parts.repeated == pytest.approx(title, rel=0.05)


@pytest.mark.slow
def test_the_script_writes_its_table(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_help(tmp_path / "help")
    files = {option: tmp_path / f"knn.{option}" for option in ("json", "page")}
    options = ["--quick", "--model", tmp_path / "model", "--help-folder", tmp_path / "help"]
    outputs = [part for option, file in files.items() for part in (f"--{option}", file)]
    subprocess.run([sys.executable, SCRIPTS / "knn_perplexity.py", *options, *outputs], check=True)
    rows = json.loads(files["json"].read_text())["rows"]
    assert [row["store"] for row in rows] == [
        "LibreOffice help", "King James Bible", "King James Bible", "King James Bible, bytes",
    ]  # fmt: skip
    assert rows[0]["knn_perplexity"] < rows[0]["perplexity"], "an untrained model learns everything from its store"
    assert all(row["knn_bits_per_token"] <= row["bits_per_token"] + 0.2 for row in rows)
    assert files["page"].read_text().count("\n| ") == 1 + 4

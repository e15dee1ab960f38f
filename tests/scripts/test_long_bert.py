"""The comparison of a BERT with itself made long runs from end to end, with a tiny one in place of MiniLM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_tfamily.data import byte_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "long_bert.py"


@pytest.mark.slow
def test_a_page_of_a_tiny_model(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=256,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<start>", "sep_token": "<start>"})
    tokenizer.save_pretrained(tmp_path / "bert")
    files = ["--json", str(tmp_path / "rows.json"), "--page", str(tmp_path / "page.md")]
    subprocess.run([sys.executable, SCRIPT, "--quick", "--model", str(tmp_path / "bert"), *files], check=True)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["chapters"] for row in rows] == [4] * 4
    assert all(0 <= row[place] <= 1 for row in rows for place in ("within", "behind"))
    page = (tmp_path / "page.md").read_text()
    assert "| made long, positions copied |" in page

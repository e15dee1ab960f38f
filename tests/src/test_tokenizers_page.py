"""The commands of docs/tokenizers_and_prompts.md run in their order, on small models in the place of those named."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_tfamily import (
    VanillaEncoderConfig,
    VanillaEncoderForMaskedLM,
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
)
from hf_tfamily.data import byte_tokenizer, streams
from hf_tfamily.data.text import bible_parts
from hf_tfamily.data.translation import pair_tokenizer
from hf_tfamily_cli import app

PAGE = (Path(__file__).parents[2] / "docs" / "tokenizers_and_prompts.md").read_text(encoding="utf-8")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALLER = ["model.num_hidden_layers=1", "model.hidden_size=32", "training.max_steps=2", "data.eval_limit=300"]


def make_models():
    """What the page takes for granted."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, **SIZES)).save_pretrained("my-llama")
    masked, folder = byte_tokenizer(), "runs/vanilla_encoder-bible"
    masked.add_special_tokens({"mask_token": "<mask>"})
    VanillaEncoderForMaskedLM(VanillaEncoderConfig(vocab_size=258, **SIZES)).save_pretrained(folder)
    masked.save_pretrained(folder)
    folder = "runs/vanilla_transformer-help-en-de"
    VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(vocab_size=300, **SIZES)).save_pretrained(
        folder
    )
    pair_tokenizer(["Click OK."] * 9, 300).save_pretrained(folder)


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streams, "bible_parts", lambda books: [part[:40_000] for part in bible_parts(books)])
    make_models()
    for name, words in (("book", "the cat and a dog"), ("other", "an ox"), ("chapter", "the cat")):
        Path(f"{name}.txt").write_text(f"{words} sat on the mat.\n" * (2000 if name != "chapter" else 9))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    commands = [line for kind, block in blocks if not kind for line in block.splitlines()]
    assert len(commands) == 11
    for command in commands:
        typed, _, asked = command.rpartition(" | ")
        arguments = shlex.split(asked)[1:]
        if arguments[0] == "train":
            arguments += [word for change in SMALLER for word in ("--set", change)]
        result = CliRunner().invoke(app, arguments, input=" ".join(shlex.split(typed)[1:]) + "\n")
        assert result.exit_code == 0, (command, result.output)
        assert result.stdout.strip() or arguments[0] == "sample", command

"""The byte tokenizer: ids are UTF-8 bytes, any text comes back, and AutoTokenizer needs nothing of ours."""

import os
import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from hf_tfamily.data import byte_tokenizer

TEXTS = [
    "",
    " ",
    "plain",
    "  two  spaces \n\t\r\n",
    "Größe, 漢字, 🦔",
    "\0\x7f\u0080ÿĀ",
    "it 's n't .",
]


def any_text(seed):
    """30 characters from all of Unicode but the surrogates, which no text holds."""
    rng = random.Random(seed)
    ranges = [range(0x80), range(0x80, 0xD800), range(0xE000, 0x110000)]
    return "".join(chr(rng.choice(rng.choice(ranges))) for _ in range(30))


@pytest.fixture(scope="module", params=["made", "loaded"])
def tokenizer(request, tmp_path_factory):
    if request.param == "made":
        return byte_tokenizer()
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", [*TEXTS, *map(any_text, range(5))])
def test_ids_are_utf8_bytes_and_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_byte_has_its_id(tokenizer):
    assert len(tokenizer) == 257
    for byte in range(128):
        assert tokenizer.decode([byte]) == chr(byte)
    assert tokenizer.decode([0xC3, 0xA9]) == "é"
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_start_token(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 256
    for text in ("<start>", "a<start>b"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert 256 in tokenizer(text)["input_ids"]
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == list(text.encode())
    assert tokenizer.decode([256, 104, 105], skip_special_tokens=True) == "hi"


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["ab", "c"], padding=True)
    assert batch["input_ids"] == [[97, 98], [256, 99]]
    assert batch["attention_mask"] == [[1, 1], [0, 1]]


@pytest.mark.slow
def test_loads_without_the_package(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['hf_tfamily'] = None; from transformers import AutoTokenizer;"
        "print(AutoTokenizer.from_pretrained(sys.argv[1])('é<start>')['input_ids'])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == str([*"é".encode(), 256])

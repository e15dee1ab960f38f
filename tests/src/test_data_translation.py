"""Sentence pairs: the LibreOffice help by page and paragraph, files of lines, and the tokenizer of both languages."""

import pytest
from transformers import AutoTokenizer

from hf_tfamily.data import TranslationPairs, load_data
from hf_tfamily.data.translation import HELP_FOLDER, pair_tokenizer
from tests.src.help_pages import write_help

SMALL = {"source": "libreoffice_help", "vocab_size": 300, "eval_share": 0.25}


@pytest.fixture(scope="module")
def help_folder(tmp_path_factory):
    return write_help(tmp_path_factory.mktemp("help"))


@pytest.fixture(scope="module")
def data(help_folder):
    return load_data({**SMALL, "path": str(help_folder)})


def pairs(part):
    return list(zip(part["source"], part["target"]))


def test_paragraphs_are_aligned_and_markup_is_gone(data):
    assert isinstance(data, TranslationPairs)
    everything = pairs(data.train) + pairs(data.eval)
    assert ("Opens the file & more.", "Öffnet die Datei & mehr.") in everything
    assert not [pair for pair in everything if "<" in pair[0] + pair[1] or "LibreOffice" in pair]
    assert len(everything) == len(set(everything)) == 24 + 12 + 1  # sentences, titles, and what all pages have


def test_pages_are_held_out_whole(data, help_folder):
    train, held_out = pairs(data.train), pairs(data.eval)
    assert not {source for source, _ in train} & {source for source, _ in held_out}
    assert len([pair for pair in held_out if pair[0].startswith("Chapter")]) == 3
    assert "9 of 12" not in data.description
    assert "held out: 3 of 12 pages" in data.description
    again, other = (load_data({**SMALL, "path": str(help_folder), "seed": seed}) for seed in (0, 1))
    assert pairs(again.eval) == held_out != pairs(other.eval)


def test_the_other_way_round(help_folder):
    data = load_data({**SMALL, "path": str(help_folder), "source_language": "de", "target_language": "en-US"})
    assert ("Öffnet die Datei & mehr.", "Opens the file & more.") in pairs(data.train) + pairs(data.eval)


def test_ids_end_with_the_end_token_and_long_texts_are_left_out(data, help_folder):
    tokenizer = data.processor
    for row in data.train:
        assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id == 1
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == row["source"]
        assert tokenizer.decode(row["labels"], skip_special_tokens=True) == row["target"]
    assert data.longest == max(len(row[name]) for row in data.train for name in ("input_ids", "labels"))
    short = load_data({**SMALL, "path": str(help_folder), "max_length": 16})
    assert 0 < len(short.train) < len(data.train)
    assert short.longest <= 16


@pytest.mark.parametrize("text", ["naïve Größe", "日本語 and 🙂", "  two  spaces\n", "<pad> spelt out"])
def test_any_text_comes_back_from_the_tokenizer(data, text, tmp_path):
    data.processor.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (data.processor, loaded):
        ids = tokenizer(text)["input_ids"]
        kept = text.replace("<pad>", "") if "<pad>" in text else text
        assert tokenizer.decode(ids, skip_special_tokens=True) == kept
    assert loaded(text)["input_ids"] == data.processor(text)["input_ids"]
    assert set(loaded("x")) == {"input_ids", "attention_mask"}


def test_files_of_lines(tmp_path):
    contents = {"a": "one\n\ntwo\n", "b": "eins\n\nzwei\n", "c": "three\n", "d": "drei\n"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    names = ("source_file", "target_file", "eval_source_file", "eval_target_file")
    files = dict(zip(names, (str(tmp_path / name) for name in "abcd")))
    data = load_data({"source": "translation_files", "vocab_size": 270, **files})
    assert pairs(data.train) == [("one", "eins"), ("two", "zwei")]
    assert pairs(data.eval) == [("three", "drei")]
    with pytest.raises(ValueError, match=r"has 3 lines and .* 1; they do not pair up"):
        load_data({"source": "translation_files", **files, "target_file": files["eval_target_file"]})
    with pytest.raises(FileNotFoundError, match=r"There is no file '/nowhere'; say in data\.source_file"):
        load_data({"source": "translation_files", **files, "source_file": "/nowhere"})


def test_missing_help_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_data({"source": "libreoffice_help", "path": str(tmp_path)})
    message = str(caught.value)
    assert "apt-get install libreoffice-help-en-us libreoffice-help-de" in message
    assert "apt-get download" in message
    assert f"--set data.path=help{HELP_FOLDER}" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_share": 0}, "eval_share must leave pages on both sides of 12, got 0"),
        ({"vocab_size": 100}, "vocab_size must be at least 259, got 100"),
        ({"max_length": 2}, "max_length=2 leaves no pair"),
        ({"max_len": 2}, "has no argument 'max_len'; did you mean 'max_length'"),
    ],
)
def test_bad_arguments(changes, message, help_folder):
    with pytest.raises(ValueError, match=message):
        load_data({**SMALL, "path": str(help_folder), **changes})


def test_the_vocabulary_is_as_large_as_asked():
    texts = [f"the number {i} and the number {i * i}" for i in range(200)]
    assert len(pair_tokenizer(texts, 290)) == 290

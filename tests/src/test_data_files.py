"""Text and sound files: what ends a line, byte order marks, other encodings, and files that are cut off."""

import codecs
import gzip
import io
import struct

import datasets
import numpy as np
import pytest

from hf_tfamily.data import load_data
from hf_tfamily.data.audio import read_wav
from hf_tfamily.data.images import _read_idx
from hf_tfamily.data.text_lines import read_text, split_lines
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.tasks.translation import TranslationTask

# What str.splitlines cuts at and no text file does.
INSIDE = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
ENDS = ["\n", "\r\n", "\r"]


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("end", ENDS)
def test_only_line_ends_end_lines(end):
    lines = [f"one{character}two" for character in INSIDE]
    assert split_lines(end.join(lines)) == lines
    assert split_lines(end.join([*lines, ""])) == lines
    assert split_lines(f"{end}{end}a{end}") == ["", "", "a"]
    assert split_lines("") == []


def parallel_files(folder, source, target):
    files = {"source_file": source, "target_file": target, "eval_source_file": b"x\n", "eval_target_file": b"y\n"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {"source": "translation_files", "vocab_size": 270, **{name: str(folder / name) for name in files}}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_parallel_lines_stay_in_step(tmp_path, end, mark):
    source = [f"one{character}two" for character in INSIDE]
    target = [f"line {number}" for number in range(len(INSIDE))]
    arguments = parallel_files(tmp_path, mark + end.join(source).encode(), mark + end.join([*target, ""]).encode())
    data = load_data(arguments)
    assert (list(data.train["source"]), list(data.train["target"])) == (source, target)


def test_parallel_files_of_unequal_length_are_refused_by_name(tmp_path):
    arguments = parallel_files(tmp_path, b"a\nb\n", b"c\n")
    with pytest.raises(ValueError, match=r"source_file has 2 lines and .*target_file 1; they do not pair up"):
        load_data(arguments)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("which", ["source_file", "eval_target_file"])
def test_other_encodings_of_parallel_files_are_named(tmp_path, encoding, which):
    arguments = parallel_files(tmp_path, b"a\n", b"b\n")
    (tmp_path / which).write_bytes("Größe\n".encode(encoding))
    reason = (
        "is no UTF-8 text: byte 0xf6 at 2 .*iconv" if encoding == "latin-1" else f"is {encoding.upper()} text.*iconv"
    )
    with pytest.raises(ValueError, match=f"{which} {reason}"):
        load_data(arguments)


@pytest.mark.parametrize("source", ["text_file", "text_file_stream"])
def test_byte_order_marks_are_no_text(tmp_path, source):
    (tmp_path / "plain").write_bytes("Größe\u2028\x0c\r\n".encode() * 40)
    (tmp_path / "marked").write_bytes(codecs.BOM_UTF8 + (tmp_path / "plain").read_bytes())
    plain, marked = (
        load_data({"source": source, "path": str(tmp_path / name), "length": 8}) for name in ("plain", "marked")
    )
    ids = [part.train if source == "text_file_stream" else part.train["input_ids"][:] for part in (plain, marked)]
    np.testing.assert_array_equal(*ids)
    (tmp_path / "wide").write_bytes("Größe".encode("utf-16") * 40)
    with pytest.raises(ValueError, match="wide is UTF-16 text; make it UTF-8: iconv -f UTF-16"):
        load_data({"source": source, "path": str(tmp_path / "wide"), "length": 8})


@pytest.mark.parametrize("end", ENDS)
def test_texts_of_a_folder_are_lines(tmp_path, cache, end):
    lines = [f"one{character}two" for character in INSIDE]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_bytes(codecs.BOM_UTF8 + end.join(lines).encode())
    data = load_data(
        {"source": "hub_text", "dataset": str(tmp_path), "eval_split": "validation", "length": 1, "separator": "\n"}
    )
    assert bytes(data.train["input_ids"][:][:, 1].astype(np.uint8)).decode() == "\n".join(lines)
    words = load_data({"source": "hub_word_stream", "dataset": str(tmp_path), "length": 2})
    assert list(words.train).count(words.start_id) == len(lines)
    assert words.eval_bytes == sum(len(line.encode()) + 1 for line in lines)


@pytest.mark.parametrize("source", ["hub_text", "hub_word_stream"])
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_in_a_folder_are_named(tmp_path, cache, source, encoding):
    (tmp_path / "train.txt").write_text("whole\n" * 9)
    (tmp_path / "validation.txt").write_bytes("Größe\n".encode(encoding))
    with pytest.raises(ValueError, match=r"validation\.txt is (no UTF-8|UTF-16) text"):
        load_data({"source": source, "dataset": str(tmp_path), "eval_split": "validation", "length": 2})


def test_help_pages_and_recipes_in_other_encodings_are_named(tmp_path):
    for language in ("en-US", "de"):
        (tmp_path / language).mkdir()
        for page in "ab":
            (tmp_path / language / f"{page}.html").write_bytes('<p id="par_id1">Größe</p>'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.html is no UTF-8 text"):
        load_data({"source": "libreoffice_help", "path": str(tmp_path)})
    (tmp_path / "mine.yaml").write_bytes("title: Größe".encode("utf-16"))
    with pytest.raises(RecipeError, match=r"mine\.yaml is UTF-16 text"):
        load_recipe(tmp_path / "mine.yaml")
    assert read_text(__file__).startswith('"""')


def test_lines_to_translate_are_lines(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffone\u2028two\nthree\n"))
    monkeypatch.setattr("hf_tfamily.tasks.translation.translate", lambda model, processor, lines: iter(lines))
    assert TranslationTask().sample(None, "a tokenizer", None) == ["one\u2028two", "three"]


# ---------------------------------------------------------------------------------------------------------------------
# Sound


def wav(samples, kind=1, extensible=False, bits=16, channels=1, size=None, before=b""):
    """A wav file of bytes `samples`; `size` is what it says of their number."""
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, 8000, 8000 * frame, frame, bits)
    if extensible:
        sub_format = struct.pack("<H", kind) + bytes.fromhex("000000001000800000aa00389b71")
        form += struct.pack("<HHI", 22, bits, 4) + sub_format
    content = b"WAVE" + struct.pack("<4sI", b"fmt ", len(form)) + form + before
    content += struct.pack("<4sI", b"data", len(samples) if size is None else size) + samples
    return struct.pack("<4sI", b"RIFF", len(content)) + content


LEVELS = np.array([-32768, -16384, 0, 16384], "<i2")


@pytest.mark.parametrize(
    "content",
    [
        wav(LEVELS.tobytes()),
        wav(LEVELS.tobytes(), extensible=True),
        wav(np.repeat(LEVELS, 2).tobytes(), extensible=True, channels=2),
        wav((LEVELS.astype("<i4") * 65536).tobytes(), extensible=True, bits=32),
        wav(LEVELS.tobytes(), before=struct.pack("<4sI", b"LIST", 3) + b"abc\0"),
        wav(LEVELS.tobytes(), size=0xFFFFFFFF),
        wav(LEVELS.tobytes()) + struct.pack("<4sI", b"LIST", 4) + b"abcd",
    ],
    ids=["plain", "extensible", "two channels", "32 bits", "a list before", "of a pipe", "a list behind"],
)
def test_wav_files_of_every_form(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    samples, rate = read_wav(tmp_path / "a.wav")
    assert (samples.tolist(), rate) == ([-1.0, -0.5, 0.0, 0.5], 8000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wav(LEVELS.tobytes())[:-3], r"cut off: its part 'data' should have 8 bytes and has 5"),
        (wav(LEVELS.tobytes())[:30], r"cut off: its part 'fmt ' should have 16 bytes and has 10"),
        (wav(LEVELS.tobytes())[:36], "its format or its samples are missing"),
        (wav(LEVELS.tobytes()[:-1]), "cut off: it ends inside a sample"),
        (wav(LEVELS.tobytes(), size=4), "contradicts itself: its parts do not end where it should, at byte 52"),
        (wav(LEVELS.tobytes(), kind=3, extensible=True), "but of floating-point numbers; make it one: ffmpeg"),
        (wav(LEVELS.tobytes(), kind=3), "but of floating-point numbers; make it one: ffmpeg"),
        (wav(LEVELS.tobytes(), kind=7, bits=8), "but of mu-law; make it one: ffmpeg"),
        (b"fLaC, say", "it does not begin like one"),
        (b"", "no wav file"),
    ],
)
@pytest.mark.parametrize("name", ["a.wav", "z.WAV"])
def test_broken_wav_files_are_named_training_or_held_out(tmp_path, content, message, name):
    for whole in ("b.wav", "c.WAV"):
        (tmp_path / whole).write_bytes(wav(LEVELS.tobytes()))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        load_data({"source": "audio_files", "path": str(tmp_path), "length": 2})


def test_capital_endings_are_found(tmp_path):
    for name in ("a.wav", "b.WAV", "c.Wav"):
        (tmp_path / name).write_bytes(wav(LEVELS.tobytes()))
    data = load_data({"source": "audio_files", "path": str(tmp_path), "length": 2})
    assert (data.train.num_rows, data.eval.num_rows) == (4, 2)
    assert "held out: c.Wav" in data.description


@pytest.mark.parametrize(
    "content", [gzip.compress(b"abc" * 99)[:-9], gzip.compress(b"abc")[:5], b"no gzip"], ids=range(3)
)
def test_cut_off_gzip_files_are_named(tmp_path, content):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gz is no whole gzip file"):
        _read_idx(tmp_path / "a.gz")


def test_damaged_rows_of_a_folder_are_named(tmp_path, cache):
    """Whatever `datasets` raises: a StopIteration for an empty file, an OSError without a name for Parquet."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").touch()
    (tmp_path / "cut").mkdir()
    datasets.Dataset.from_list([{"text": "one"}] * 9).to_parquet(str(tmp_path / "cut" / "train.parquet"))
    content = bytearray((tmp_path / "cut" / "train.parquet").read_bytes())
    content[-60:-20] = bytes(40)
    (tmp_path / "cut" / "train.parquet").write_bytes(content)
    for name in ("empty", "cut"):
        with pytest.raises(ValueError, match=f"{name}, split train, cannot be read"):
            load_data({"source": "hub_text", "dataset": str(tmp_path / name), "length": 1})

"""Own data: every command of docs/your_own_data.md writes a recipe that trains; what does not fit is said by name."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import hf_tfamily_cli
from hf_tfamily.data import SOURCES, load_data, write_wav
from hf_tfamily.data.descriptions import arguments, list_sources, sentence
from hf_tfamily.new_recipes import STARTERS, new_recipe
from hf_tfamily.recipes import load_recipe
from hf_tfamily.training import train

soundfile = pytest.importorskip("soundfile")
PAGE = Path(__file__).parents[2] / "docs" / "your_own_data.md"
COMMANDS = re.findall(r"^hf-tfamily (new-recipe .*)$", PAGE.read_text(), re.MULTILINE)
COLOURS = {"roses": (250, 20, 20), "violets": (40, 20, 250)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The files that the page speaks of, small."""
    home, draw = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    words = draw.choice(["alpha ", "beta ", "gamma.\n"], 2000)
    (home / "notes.txt").write_text("".join(words))
    (home / "letters").mkdir()
    for n in range(6):
        (home / "letters" / f"{n}.md").write_text(f"letter {n}. " + "".join(words[n * 300 : (n + 1) * 300]))
    rows = ["".join(draw.choice(list("ACGT"), 40)) for _ in range(60)]
    (home / "dna.csv").write_text("id,sequence\n" + "".join(f"{n},{row}\n" for n, row in enumerate(rows)))
    values = np.sin(np.arange(1000) / 9)
    (home / "series.csv").write_text(
        "day;value\n" + "".join(f"{n % 7};{value:.3f}\n" for n, value in enumerate(values))
    )
    for language, word in (("en", "number"), ("de", "Zahl")):
        (home / f"lines.{language}").write_text("".join(f"{word} {n}\n" for n in range(100)))
    for name, colour in COLOURS.items():
        (home / "flowers" / name).mkdir(parents=True)
        for n in range(6):
            pixels = (np.array(colour) * draw.random((20, 24, 1))).astype(np.uint8)
            Image.fromarray(pixels).save(home / "flowers" / name / f"{n}.png")
    (home / "music").mkdir()
    for n, ending in enumerate(("flac", "ogg", "wav", "mp3")):
        soundfile.write(home / "music" / f"{n}.{ending}", 0.3 * np.sin(np.arange(9000) / (5 + n)), 8000)
    return home


def run(*words):
    return CliRunner().invoke(hf_tfamily_cli.app, list(words))


def test_the_page_has_a_command_for_every_kind():
    assert {shlex.split(command)[1] for command in COMMANDS} == set(STARTERS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_new_recipe_trains(command, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    words = [word for word in shlex.split(command) if not word.endswith(".yaml") and word != "--output"]
    file = tmp_path / "own.yaml"
    said = run(*words, "--output", str(file))
    assert said.exit_code == 0, said.output
    short = ["training.max_steps=2", "training.warmup_steps=1", "data.limit=12", "data.eval_limit=4"]
    if load_recipe(file).data["source"].endswith("_stream"):
        short[2:] = ["data.limit=2048", "data.eval_limit=300"]
    folder = train(load_recipe(file, short), tmp_path / "run")
    assert (folder / "metrics.json").exists()
    if words[1] == "audio_files":
        assert soundfile.info(folder / "samples-1.wav").samplerate == 8000
        assert '<audio controls src="samples-1.wav"></audio>' in (folder / "README.md").read_text()


def test_sizes_follow_the_data(home, monkeypatch):
    monkeypatch.chdir(home)
    pictures, text = new_recipe("hub_labelled_images", ["flowers"]), new_recipe("text_file_stream", ["notes.txt"])
    assert (pictures.model["num_labels"], pictures.model["image_size"], pictures.data["size"]) == (2, 16, 16)
    assert text.model["hidden_size"] == 64
    assert text.parameters > 0
    assert new_recipe("csv_column", ["series.csv"], settings=["column=value"]).data["levels"] == 25


def test_a_recipe_is_never_overwritten(home, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    said = run("new-recipe", "text_file_stream", str(home / "notes.txt"), "--output", str(tmp_path / "mine.yaml"))
    assert said.exit_code == 2
    assert "mine.yaml is there already" in said.stderr
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text_file_streams", "notes.txt"], "No source is called 'text_file_streams'.*text_file_stream"),
        (["digits", "notes.txt"], "digits needs no file of yours"),
        (["text_file_stream", "none.txt"], "There is no file and no folder 'none.txt'"),
        (["text_file_stream", "notes.txt", "lines.en"], "takes 1 paths"),
        (
            ["text_file_stream", "notes.txt", "--system", "swin_transformer"],
            "is for rope_decoder, .*'swin_transformer'",
        ),
        (["text_file_stream", "lines.en"], "lines.en has 990 bytes"),
        (["csv_column", "dna.csv"], "dna.csv has the columns id, sequence; say which"),
        (["csv_column", "dna.csv", "--data", "column=sequenz"], "dna.csv has no column 'sequenz'; it has id, sequence"),
        (["csv_column", "dna.csv", "--data", "column"], "written key=value"),
        (["csv_column", "dna.csv", "--data", "column=sequence", "--data", "levels=4"], "which is no number"),
        (["hub_images", "music"], "music holds no pictures"),
        (["audio_files", "flowers"], "Found 0 files"),
        (["translation_files", "lines.en", "notes.txt"], "do not pair up"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(words, message, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    said = run("new-recipe", *words, "--output", str(tmp_path / "own.yaml"))
    assert said.exit_code == 2
    assert len(said.stderr.strip().splitlines()) == 1
    assert re.search(message, said.stderr)
    assert not (tmp_path / "own.yaml").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,text\n1,\xff\xfe\n2,b\n", "a.csv"),
        ("b.csv", b"", "b.csv has 0 rows"),
        ("c.csv", b"id,text\n1,a\n2\n3,c\n", "c.csv, row 3: 1 cells"),
        ("d.csv", b'id,text\n1,"a\n2,b\n', "d.csv"),
    ],
)
def test_damaged_tables_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_data({"source": "csv_column", "path": str(tmp_path / name), "column": "text", "length": 2})


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png is no picture"):
        new_recipe("hub_images", [tmp_path])


def test_a_damaged_sound_is_named(tmp_path):
    (tmp_path / "a.flac").write_bytes(b"fLaC and nothing")
    write_wav(tmp_path / "b.wav", np.zeros(2000, np.uint8), 8000)
    with pytest.raises(ValueError, match=r"a\.flac is no sound file"):
        load_data({"source": "audio_files", "path": str(tmp_path), "length": 100})


def test_columns_as_texts_and_as_levels(home):
    text = load_data({"source": "csv_column", "path": str(home / "dna.csv"), "column": "sequence", "length": 41})
    assert text.processor.decode(text.train[0]["input_ids"][1:]).count("\n") == 1
    assert set(text.processor.decode(text.train[3]["input_ids"][1:])) == set("ACGT\n")
    data = {"source": "csv_column", "path": str(home / "series.csv"), "column": "value", "length": 50, "levels": 10}
    numbers = load_data(data)
    values = np.concatenate(numbers.train["input_ids"][:])
    counts = np.bincount(values[values < 10], minlength=10)
    assert (numbers.num_values, len(numbers.eval)) == (10, 2)
    assert counts.min() > 0.7 * counts.mean(), "each level holds as many numbers as any other"


def test_files_of_a_folder_are_held_out_whole(home):
    data = {"source": "text_file_stream", "path": str(home / "letters"), "length": 16}
    shared = load_data({**data, "eval_share": 0.34})
    held_out = bytes(shared.eval.astype(np.uint8)).decode()
    train = bytes(shared.train.astype(np.uint8)).decode()
    assert held_out.count("letter ") == 2
    assert train.count("letter ") == 4
    cut, texts = load_data(data), sorted((home / "letters").iterdir())
    assert bytes(cut.train.astype(np.uint8)).decode().startswith(texts[0].read_text())
    listed = load_data({**data, "path": [str(text) for text in texts]})
    assert np.array_equal(listed.train, cut.train)
    with pytest.raises(FileNotFoundError, match="There is no text file in the folder"):
        load_data({**data, "path": str(home / "music")})
    with pytest.raises(ValueError, match="Give sizes or eval_share, not both"):
        load_data({**data, "eval_share": 0.2, "sizes": [100, 50, 50]})


def test_pairs_are_divided_by_their_sources(tmp_path):
    """A sentence that was translated twice stands on one side only."""
    (tmp_path / "a").write_text("".join(f"line {n % 20}\n" for n in range(40)))
    (tmp_path / "b").write_text("".join(f"Zeile {n}\n" for n in range(40)))
    files = {"source_file": str(tmp_path / "a"), "target_file": str(tmp_path / "b")}
    data = load_data({"source": "translation_files", **files, "eval_share": 0.2, "vocab_size": 300})
    assert (len(data.train), len(data.eval)) == (32, 8)
    assert not set(data.train["source"]) & set(data.eval["source"])
    with pytest.raises(ValueError, match="or eval_share"):
        load_data({"source": "translation_files", **files})


def test_every_source_is_told_whole():
    assert [name for name, _ in list_sources()] == list(SOURCES)
    for source in SOURCES:
        assert len(sentence(source)) > 20
        assert {"limit", "eval_limit"} <= {argument.name for argument in arguments(source)}
    listed = run("sources")
    assert all(source in listed.output for source in SOURCES)
    one = run("sources", "csv_column")
    assert "hf-tfamily new-recipe csv_column CSV" in one.output
    assert "Recipes that read it" in run("sources", "bible_stream").output
    assert "csv_column" in run("sources", "csv_colum").stderr

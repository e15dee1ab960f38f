"""Sources of bytes: windows, splits, and the texts themselves."""

import datasets
import numpy as np
import pytest

from hf_tfamily.data import load_data


def text(part):
    """All bytes of a data set, without its start tokens."""
    return bytes(part["input_ids"][:][:, 1:].astype(np.uint8).ravel())


@pytest.fixture
def file(tmp_path):
    """A file of 1,000 bytes, every byte value among them."""
    path = tmp_path / "text"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8).tobytes())
    return path


def test_bible_holds_out_whole_books():
    data = load_data({"source": "bible", "length": 256, "eval_books": ["Ruth", "Jude"]})
    assert (data.vocab_size, data.dims, data.class_names) == (257, 256, None)
    held_out, train = text(data.eval).decode(), text(data.train).decode(errors="replace")
    assert held_out.startswith("Now it came to pass in the days when the judges ruled")
    assert "Jude, the servant of Jesus Christ" in held_out
    assert "In the beginning God created" in train
    assert "judges ruled" not in train
    assert set(data.train["input_ids"][:][:, 0]) == {256}
    assert 4_100_000 < len(train) + len(held_out) < 4_200_000


def test_bible_names_its_books():
    with pytest.raises(ValueError, match=r"got \['Hezekiah'\]; there are Genesis, .*Revelation"):
        load_data({"source": "bible", "eval_books": ["Hezekiah"]})


def test_text_file_is_cut_90_5_5(file):
    content = file.read_bytes()
    data = load_data({"source": "text_file", "path": str(file), "length": 20})
    assert text(data.train) == content[:900]
    assert text(data.eval) == content[900:940]  # 50 bytes: two windows, 10 bytes left out
    test = load_data({"source": "text_file", "path": str(file), "length": 20, "eval_part": "test"})
    assert text(test.eval) == content[950:990]


def test_text_file_in_given_sizes(file):
    content = file.read_bytes()
    data = load_data({"source": "text_file", "path": str(file), "length": 10, "sizes": [500, 300, 200]})
    assert text(data.train) == content[:500]
    assert text(data.eval) == content[500:800]
    assert "500 + 300 + 200 bytes; held out: validation" in data.description
    assert data.processor.bos_token_id == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [900, 100, 1]}, "at most 1000 together"),
        ({"sizes": [900, 100]}, "three byte counts"),
        ({"sizes": [900, -1, 100]}, "three byte counts"),
        ({"eval_part": "train"}, 'must be "validation" or "test"'),
        ({"length": 51}, "length must be from 1 to the 50 bytes of the held-out text, got 51"),
        ({"length": 0}, "length must be from 1"),
    ],
)
def test_text_file_refuses_what_does_not_fit(file, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data({"source": "text_file", "path": str(file), "length": 10, **arguments})


def test_missing_text_file_is_named():
    with pytest.raises(FileNotFoundError, match="no text file 'enwik9'"):
        load_data({"source": "text_file", "path": "enwik9"})


@pytest.fixture
def text_folder(tmp_path, tmp_path_factory, monkeypatch):
    """A data set of json lines: two training texts, one test text."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.Dataset.from_dict({"text": ["erste Größe", "zweite"]}).to_json(tmp_path / "train.json")
    datasets.Dataset.from_dict({"text": ["the test"]}).to_json(tmp_path / "test.json")
    return {"source": "hub_text", "dataset": str(tmp_path), "length": 4}


def test_hub_text_of_a_local_folder(text_folder):
    data = load_data(text_folder)
    assert text(data.train) == "erste Größe\nzweite".encode()[:20]
    assert text(data.eval) == b"the test"


def test_hub_text_cut_by_size(text_folder):
    data = load_data({**text_folder, "separator": "", "sizes": [8, 4, 4], "eval_part": "test"})
    assert text(data.train) == b"erste Gr"
    assert text(data.eval) == "Größezweite".encode()[6:10]


def test_hub_text_names_its_columns(text_folder):
    with pytest.raises(ValueError, match="no column 'content'; it has text"):
        load_data({**text_folder, "text_column": "content"})

"""Streams: every token is predicted once, rows go on with their own stream, and sources hold what they say."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_tfamily.data import SegmentCollator, StreamDataset, load_data


def rows_of(dataset, rank=0, world_size=1):
    """The batches of one of several processes that take turns, joined: input_ids and labels [rows, tokens]."""
    rows = dataset.num_streams // world_size
    batches = [range(i, i + rows) for i in range(0, len(dataset), rows)][rank::world_size]
    items = [SegmentCollator()([dataset[i] for i in batch]) for batch in batches]
    return [torch.cat([item[name] for item in items], dim=1) for name in ("input_ids", "shift_labels")]


@pytest.mark.parametrize(("tokens", "streams", "length"), [(60, 4, 5), (61, 4, 5), (59, 6, 7), (9, 9, 1), (10, 3, 20)])
def test_every_token_is_predicted_once_from_the_one_before(tokens, streams, length):
    text = np.arange(tokens)
    inputs, labels = rows_of(StreamDataset(text, streams, length, start_id=999))
    predicted = labels != -100
    assert labels[predicted].tolist() == text.tolist()  # row by row: each stream is a piece of the text
    before = torch.where(labels % -(-tokens // streams) == 0, 999, labels - 1)
    assert torch.equal(inputs[predicted], before[predicted])


def test_processes_keep_their_streams():
    dataset = StreamDataset(np.arange(97), 6, 4, start_id=0)
    together = rows_of(dataset)
    apart = [rows_of(dataset, rank, world_size=2) for rank in range(2)]
    for name in range(2):
        assert torch.equal(torch.cat([rank[name] for rank in apart]), together[name])


def test_segments_that_are_not_there():
    dataset = StreamDataset(np.arange(10), 2, 2, start_id=0)
    assert len([item["labels"] for item in dataset]) == len(dataset) == 6
    for streams, length, message in ((0, 2, "num_streams must be from 1 to the 10 tokens"), (1, 0, "length must be")):
        with pytest.raises(ValueError, match=message):
            StreamDataset(np.arange(10), streams, length, start_id=0)


def test_bible_stream_is_the_bible():
    data = load_data({"source": "bible_stream", "eval_books": ["Ruth", "Jude"]})
    assert data.processor.decode(data.eval[:30]) == "Now it came to pass in the day"
    assert (data.vocab_size, data.start_id, data.eval_bytes) == (257, 256, len(data.eval))
    assert b"In the beginning God created" in data.train.tobytes()
    assert b"judges ruled" not in data.train.tobytes()
    assert data.eval_words == len(data.eval.tobytes().split())


def test_own_bytes_are_numbered(tmp_path):
    file = tmp_path / "text"
    file.write_bytes("héllo wörld\nagain and ever".encode() * 40)
    data = load_data({"source": "text_file_stream", "path": str(file), "own_bytes": True})
    distinct = sorted(set(file.read_bytes()))
    assert data.vocab_size == len(distinct)
    assert distinct[data.start_id] == ord("\n")
    assert bytes(distinct[i] for i in data.train) == file.read_bytes()[: len(data.train)]
    data.processor.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.decode(data.train[:11]) == "héllo wörld"[: len("héllo wörld") - 2]
    assert tokenizer("wörld\n")["input_ids"] == [distinct.index(byte) for byte in "wörld\n".encode()]


def test_words_and_line_ends(tmp_path):
    (tmp_path / "train.txt").write_text("the cat <unk>\n\nthe dog\n")
    (tmp_path / "validation.txt").write_text("the mouse sat\n")
    data = load_data({"source": "hub_word_stream", "dataset": str(tmp_path), "length": 4})
    words = data.processor.convert_ids_to_tokens(data.train)
    assert words == ["the", "cat", "<unk>", "<eos>", "<eos>", "the", "dog", "<eos>"]
    assert data.processor.convert_ids_to_tokens(data.eval) == ["the", "<unk>", "<unk>", "<eos>"]
    assert (data.vocab_size, data.eval_words, data.eval_bytes) == (5, 3, 14)
    assert data.train[3] == data.start_id == 0  # the most frequent


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"source": "bible_stream", "length": 0}, ValueError, "length must be at least 1"),
        ({"source": "text_file_stream", "path": "nowhere"}, FileNotFoundError, "no text file 'nowhere'"),
    ],
)
def test_says_what_is_wrong(data, error, message):
    with pytest.raises(error, match=message):
        load_data(data)

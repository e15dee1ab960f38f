"""`limit` and `eval_limit`, which every source takes."""

import datasets
import numpy as np
import pytest

from hf_tfamily.data import load_data
from hf_tfamily.recipes import RecipeError, load_recipe


def test_examples_are_taken_evenly():
    whole = load_data({"source": "digits"})
    few = load_data({"source": "digits", "limit": 100, "eval_limit": 30})
    assert (len(few.train), len(few.eval)) == (100, 30)
    assert len(set(few.train["label"])) == 10
    for part, place in ((few.train, 0), (few.train, -1), (few.eval, -1)):
        of = whole.train if part is few.train else whole.eval
        np.testing.assert_array_equal(part[place]["input_ids"], of[place]["input_ids"])
    assert few.description.endswith("; limit=100, eval_limit=30")


def test_more_than_there_are_is_all():
    few = load_data({"source": "digits", "limit": 10**6})
    assert (len(few.train), len(few.eval)) == (1500, 297)


def test_what_is_held_out_beside_is_cut_too():
    few = load_data({"source": "algorithms", "train_examples": 50, "eval_examples": 20, "limit": 10, "eval_limit": 5})
    assert [len(part) for part in (few.train, few.eval, few.longer)] == [10, 5, 5]


def test_streams_of_bytes_are_cut_off():
    whole, few = (
        load_data({"source": "bible_stream"}),
        load_data({"source": "bible_stream", "limit": 9, "eval_limit": 50}),
    )
    np.testing.assert_array_equal(few.train, whole.train[:9])
    np.testing.assert_array_equal(few.eval, whole.eval[:50])
    assert (few.eval_bytes, few.eval_words) == (50, len(bytes(whole.eval[:50]).split()))


def test_streams_of_words_are_counted_anew(tmp_path):
    texts = ["the cat sat", "", "on the mat", "and sat"]
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"text": texts}).to_json(str(tmp_path / f"{split}.jsonl"))
    data = {"source": "hub_word_stream", "dataset": str(tmp_path), "length": 2}
    whole = load_data(data)
    assert (whole.eval_bytes, whole.eval_words) == (len("the cat sat\n\non the mat\nand sat\n"), 8)
    few = load_data({**data, "eval_limit": 8})  # to the end of the third line but its end
    assert (few.eval_bytes, few.eval_words) == (len("the cat sat\n\non the mat"), 6)


@pytest.mark.parametrize("value", [0, -1, "all", 2.5, True])
def test_other_limits_are_refused(value):
    with pytest.raises(RecipeError, match=r"digits.*eval_limit.*(at least 1|without a fraction)"):
        load_recipe("sparse_transformer/digits", [f"data.eval_limit={value}"])

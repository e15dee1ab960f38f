"""What all sources share: the data set they return, its collator, and how arrays become `datasets.Dataset`s.

Shapes: n examples, N values in an example, B examples in a batch.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..missing_packages import how_to_install

if TYPE_CHECKING:
    from datasets import Dataset


class MissingPackageError(ImportError):
    """An optional package is not installed; the message says which extra brings it."""


@dataclass(frozen=True, kw_only=True)
class LoadedData:
    """What every source returns; its class says which task it is for (hf_tfamily.tasks).

    Attributes:
        train, eval: data sets.
        description: what it is, and how it was split.
        licence: under which terms it comes.
        processor: what is saved beside a model of this data: an image processor, a tokenizer, or None.
    """

    train: "Dataset"
    eval: "Dataset"
    description: str
    licence: str
    processor: Any = None


@dataclass(frozen=True, kw_only=True)
class TokenSequences(LoadedData):
    """A data set as token sequences of one length, to be predicted value by value.

    Attributes:
        train, eval: data sets with a column `input_ids` of 1 + dims ids, and `label` where there are classes.
        num_values: number of values an element can take; a uniform guess costs log2(num_values) bits per dimension.
        dims: number N of values in an example, the start token not counted.
        class_names: names of the classes, whose start ids are num_values + class; None if there is one start id.
        processor: turns ids into data and back: an ImageTokenProcessor, a tokenizer, or None.
        sample_rate: samples a second where values are mu-law levels of sound; else None.
        start_id: the start token, where it is not `num_values`, as of a tokenizer.
        num_ids: number of ids of the tokenizer, where there are more than values and start tokens.
    """

    num_values: int
    dims: int
    class_names: tuple[str, ...] | None = None
    sample_rate: int | None = None
    start_id: int | None = None
    num_ids: int | None = None

    @property
    def start_ids(self) -> range:
        """Ids of the start tokens: one for each class, else one."""
        first = self.num_values if self.start_id is None else self.start_id
        return range(first, first + len(self.class_names or [None]))

    @property
    def vocab_size(self) -> int:
        """Number of ids a model of this data needs."""
        return max(self.start_ids.stop, self.num_ids or 0)

    @property
    def eval_bytes(self) -> int | None:
        """UTF-8 bytes of the held-out text, where ids are tokens of more than one; None otherwise."""
        return int(np.sum(self.eval["bytes"][:])) if "bytes" in self.eval.column_names else None


class NextTokenCollator:
    """Examples [start, x0 ... x(N-1)] -> input_ids [B, N] without the last id, shift_labels [B, N] without the first.

    Models go by shift_labels; `labels`, as models move them by themselves, are there because the Trainer counts targets
    only beside them. Where it smooths labels it takes them out, and counted_targets [B] lets models refuse that.

    For the stock Trainer: `Trainer(..., data_collator=NextTokenCollator())` with
    `TrainingArguments(..., label_names=["shift_labels"])`.
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack([np.asarray(example["input_ids"]) for example in examples])).long()
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        counted = torch.full((len(ids),), targets.shape[1])
        return {"input_ids": inputs, "labels": inputs, "shift_labels": targets, "counted_targets": counted}


def token_dataset(
    input_ids: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] = ()
) -> "Dataset":
    """A `datasets.Dataset` of ids [n, 1 + N], and of labels [n] where there are classes; rows are numpy arrays.

    Ids are kept as int16 where they are that small, as values of at most 8 bits and their start tokens are.
    """
    datasets, pyarrow = require("datasets"), require("pyarrow")
    length = input_ids.shape[1]
    kind = smallest_kind(input_ids)
    flat = pyarrow.array(np.ascontiguousarray(input_ids, kind).reshape(-1))
    # Arrow takes the whole buffer at once; Dataset.from_dict would go through Python row by row.
    columns = {"input_ids": pyarrow.FixedSizeListArray.from_arrays(flat, length)}
    features = {"input_ids": datasets.List(datasets.Value(np.dtype(kind).name), length=length)}
    if class_names:
        columns["label"] = pyarrow.array(np.asarray(labels, np.int64))
        features["label"] = datasets.ClassLabel(names=list(class_names))
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(pyarrow.table(columns), info=info).with_format("numpy")


def with_start(values: np.ndarray, start_id: int) -> np.ndarray:
    """Values [n, N] behind a start token: ids [n, 1 + N]."""
    ids = np.pad(values.astype(np.int32), ((0, 0), (1, 0)), constant_values=start_id)
    return ids.astype(smallest_kind(ids))


def smallest_kind(ids: np.ndarray) -> type:
    """int16 where that holds all ids, else int32."""
    return np.int16 if ids.size == 0 or ids.max() < 2**15 else np.int32


def require(module: str) -> ModuleType:
    """The optional module, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingPackageError(how_to_install(error) or str(error)) from error

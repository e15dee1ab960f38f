"""The two parts of a data set that `datasets.load_dataset` reads: two splits, or one of them divided at random."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .sequences import require
from .text_lines import read_text

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_ENDINGS = (".txt", ".text", ".md", ".json", ".jsonl", ".csv", ".tsv")


class HubParts(NamedTuple):
    """Two parts of a data set, the name of each, and in words how they were split."""

    train: "Dataset"
    eval: "Dataset"
    names: tuple[str, str]
    how: str


def load_part(dataset: str, name: str | None, split: str, revision: str | None) -> "Dataset":
    """One split. Raises ValueError where it cannot be read, naming the file if one is no UTF-8 text."""
    datasets = require("datasets")
    try:
        return datasets.load_dataset(dataset, name, split=split, revision=revision)
    except ImportError:
        raise
    except Exception as error:  # of any kind, where somebody else's files are read
        for file in _text_files(dataset):
            read_text(file)
        missing = isinstance(error, datasets.exceptions.DatasetsError) or not Path(dataset).exists()
        if isinstance(error, OSError) and missing:  # files that are not there, or the Hub
            raise
        raise ValueError(f"{dataset}, split {split}, cannot be read: {error.__cause__ or error}") from error


def load_text_parts(
    dataset: str, name: str | None, revision: str | None, column: str, train_split: str, eval_split: str
) -> tuple[list[str], list[str]]:
    """The texts to train on, and those that are held out; see `texts_of`."""
    train, held_out = (load_part(dataset, name, split, revision) for split in (train_split, eval_split))
    _warn_of_common_rows(train, dataset, train_split, eval_split)
    return texts_of(train, column, dataset), texts_of(held_out, column, dataset)


def texts_of(part: "Dataset", column: str, dataset: str) -> list[str]:
    """The texts of one split, in order, without byte order marks. Raises ValueError if there is no such column."""
    if column not in part.column_names:
        raise ValueError(f"{dataset} has no column {column!r}; it has {', '.join(part.column_names)}.")
    texts = list(part[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{dataset} holds {text!r} in row {row} of {column!r}, which is no text.")
    return [text.removeprefix("\ufeff") for text in texts]


def load_parts(
    dataset: str,
    name: str | None,
    revision: str | None,
    train_split: str,
    eval_split: str | None,
    default_eval_split: str,
    eval_share: float | None,
    seed: int,
    label_column: str | None,
) -> HubParts:
    """What to train on and what is held out.

    Args:
        dataset, name, revision: as in load_dataset.
        train_split, eval_split: splits in load_dataset's notation; `default_eval_split` if eval_split is None.
        eval_share: instead of eval_split, the share of train_split to hold out, drawn with `seed`, and of each class
            the same share where there are classes.
        label_column: the classes that count; None if the source takes none.

    Raises:
        ValueError: if eval_split and eval_share are both given, or a part that was cut out lacks classes of the other.
    """
    if eval_share is None:
        eval_split = default_eval_split if eval_split is None else eval_split
        train, held_out = (load_part(dataset, name, split, revision) for split in (train_split, eval_split))
        _check_classes(train, held_out, dataset, train_split, eval_split, label_column)
        _warn_of_common_rows(train, dataset, train_split, eval_split)
        where = (f"{dataset}, split {train_split}", f"{dataset}, split {eval_split}")
        return HubParts(train, held_out, where, f"train: {train_split}; held out: {eval_split}")
    if eval_split is not None:
        raise ValueError(f"Give eval_split or eval_share, not both; got {eval_split!r} and {eval_share}.")
    whole = load_part(dataset, name, train_split, revision)
    column = _class_column(whole, label_column)
    labels = np.zeros(len(whole), int) if column is None else _labels(whole, column)
    names = ["the data"] if column is None else whole.features[column].names
    train, held_out = (whole.select(rows) for rows in divided(labels, eval_share, seed, names))
    of_each = "" if column is None else " of each class"
    how = f"held out: {eval_share:.3g}{of_each} of {train_split}, drawn with seed {seed}"
    return HubParts(train, held_out, (f"{dataset}, split {train_split}",) * 2, how)


def divided(labels: np.ndarray, eval_share: float, seed: int, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on, and `eval_share` of the rows of each label, at least one, drawn with `seed`; in order.

    Raises:
        ValueError: if a share is no share, or a label has not two rows, one for either side.
    """
    if not 0 < eval_share < 1:
        raise ValueError(f"eval_share must lie between 0 and 1, such as 0.1, got {eval_share}.")
    draw, held_out = np.random.default_rng(seed), []
    for label in np.unique(labels):
        rows = draw.permutation(np.flatnonzero(labels == label))
        if len(rows) < 2:
            raise ValueError(
                f"eval_share={eval_share} needs at least two rows of each class, one for either side; of "
                f"{names[label] if 0 <= label < len(names) else label} there is one."
            )
        held_out.append(rows[: min(max(1, round(eval_share * len(rows))), len(rows) - 1)])
    if not held_out:
        raise ValueError("There are no rows to divide.")
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _check_classes(train, held_out, dataset: str, train_split: str, eval_split: str, label_column: str | None) -> None:
    """A slice that lacks classes of the other part is refused; where the source takes no classes, a sorted slice is."""
    column = _class_column(train, label_column)
    if column is None or column not in held_out.column_names:
        return
    sides, names = [_labels(part, column) for part in (train, held_out)], train.features[column].names
    lacking = [_lack(here, there, names) for here, there in (sides[::-1], sides)]
    if not any(lacking):
        return
    sliced = "[" in train_split + eval_split
    in_order = all((np.diff(labels) >= 0).all() for labels in sides)
    said = "; ".join(
        f"the {what} part ({split}) has none of {classes}, which the other has"
        for what, split, classes in (("held-out", eval_split, lacking[0]), ("training", train_split, lacking[1]))
        if classes
    )
    if sliced and (label_column is not None or in_order):
        raise ValueError(
            f"{dataset}: {said}. Rows are in the order of their classes where a folder holds one for each. Give "
            "eval_share: 0.1 (and a seed, if you like) in place of eval_split: that share of each class is held out."
        )
    if label_column is not None:
        warnings.warn(f"{dataset}: {said}.", stacklevel=2)


def _warn_of_common_rows(part: "Dataset", dataset: str, train_split: str, eval_split: str) -> None:
    """Slices may overlap, so that what is held out is trained on."""
    sizes = {split: info.num_examples for split, info in (part.info.splits or {}).items()}
    if not sizes or "[" not in train_split + eval_split:
        return
    instruction = require("datasets").ReadInstruction
    train, held_out = (instruction.from_spec(split).to_absolute(sizes) for split in (train_split, eval_split))
    pairs = [(one, other) for one in train for other in held_out if one.splitname == other.splitname]
    common = sum(max(0, min(one.to, other.to) - max(one.from_, other.from_)) for one, other in pairs)
    if common:
        warnings.warn(f"{dataset}: {common} rows of {eval_split} are trained on as well ({train_split}).", stacklevel=2)


def _lack(here: np.ndarray, there: np.ndarray, names: list[str]) -> str:
    """The classes of `there` that are not in `here`."""
    missing = [names[label] for label in np.setdiff1d(there, here) if 0 <= label < len(names)]
    return ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")


def _class_column(part: "Dataset", asked: str | None) -> str | None:
    """The column that is asked for, if it holds classes; else the only one that does, such as an image folder's."""
    columns = [column for column, feature in part.features.items() if getattr(feature, "names", None)]
    if asked is not None:
        return asked if asked in columns else None
    return columns[0] if len(columns) == 1 else None


def _labels(part: "Dataset", column: str) -> np.ndarray:
    """Numbers of classes, -1 where there is none."""
    return part.select_columns([column]).with_format("arrow")[:][column].fill_null(-1).to_numpy()


def _text_files(dataset: str) -> list[Path]:
    """The text files of a local data set."""
    place = Path(dataset)
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [file for file in files if file.is_file() and file.suffix.lower() in TEXT_ENDINGS]

"""One column of a CSV file as token sequences: texts (DNA, say) as bytes, numbers (a time series, say) as levels."""

import csv
import io
import math
from pathlib import Path

import numpy as np

from .sequences import TokenSequences, token_dataset, with_start
from .text import byte_tokenizer
from .text_lines import read_text

MOST_LEVELS = 256
ROW_END = "\n"


def csv_column(
    path: str, column: str, length: int = 256, levels: int | None = None, eval_share: float = 0.1
) -> TokenSequences:
    """A column of a CSV file whose first row names its columns; the last rows are held out.

    Args:
        path: the file, in UTF-8; commas, semicolons or tabs part its cells.
        column: name of the column.
        length: values in an example; what does not fill a window at the end of a part is left out.
        levels: None for texts, which are read as bytes, a line end behind each. For numbers, of how many levels they
            become, 2 to 256: each holds as many numbers of the training part as any other, so that rare ones share one.
        eval_share: share of the rows that is held out.
    """
    cells = read_column(path, column)
    if not 0 < eval_share < 1:
        raise ValueError(f"eval_share must lie between 0 and 1, such as 0.1, got {eval_share}.")
    held_out = max(1, round(eval_share * len(cells)))
    parts = (cells[:-held_out], cells[-held_out:])
    if levels is None:
        encoded, num_values, processor = [_bytes(part) for part in parts], 256, byte_tokenizer()
    else:
        encoded, num_values, processor = _levels(parts, levels, f"{path}: column {column!r}"), levels, None
    windows = [_windows(part, length, what, path) for part, what in zip(encoded, ("training", "held-out"))]
    return TokenSequences(
        train=token_dataset(with_start(windows[0], num_values)),
        eval=token_dataset(with_start(windows[1], num_values)),
        num_values=num_values,
        dims=length,
        processor=processor,
        description=f"the column {column} of {path} in windows of {length} {'bytes' if levels is None else 'values'}; "
        f"held out: the last {held_out} of {len(cells)} rows",
        licence="unknown",
    )


def read_column(path: str, column: str) -> list[str]:
    """The cells of a column. Raises ValueError, naming the file, on what is no table with it."""
    header, rows = read_table(path)
    if column not in header:
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(header)}.")
    place = header.index(column)
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {number}: {len(row)} cells, where the first row has {len(header)}.")
    return [row[place] for row in rows]


def read_table(path: str) -> tuple[list[str], list[list[str]]]:
    """The first row and the others. Raises ValueError, naming the file, if there are none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no CSV file {path!r}; give one with data.path=...")
    text = read_text(path).removeprefix("\ufeff")
    try:
        dialect = csv.Sniffer().sniff(text[:4096], delimiters=",;\t")
    except csv.Error:
        dialect = csv.excel  # of a single column, which has no delimiter
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), dialect, strict=True) if row]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file that can be read: {error}.") from error
    if len(rows) < 3:
        raise ValueError(f"{path} has {len(rows)} rows; the first names columns, and at least two must follow.")
    return rows[0], rows[1:]


def _bytes(cells: list[str]) -> np.ndarray:
    return np.frombuffer("".join(cell + ROW_END for cell in cells).encode(), np.uint8)


def _levels(parts: tuple[list[str], list[str]], levels: int, where: str) -> list[np.ndarray]:
    """Both parts as the numbers of quantiles of the first."""
    if not 2 <= levels <= MOST_LEVELS:
        raise ValueError(f"levels must be from 2 to {MOST_LEVELS}, or null for texts, got {levels}.")
    train, held_out = (np.array([_number(cell, where) for cell in part]) for part in parts)
    bounds = np.quantile(train, np.linspace(0, 1, levels + 1)[1:-1])
    return [np.searchsorted(bounds, part, side="right") for part in (train, held_out)]


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} holds {cell!r}, which is no number; leave out data.levels to read it as text.")
    return value


def _windows(values: np.ndarray, length: int, what: str, path: str) -> np.ndarray:
    """[n, length], one window behind the other."""
    if length < 1 or len(values) < length:
        raise ValueError(
            f"length must be from 1 to the {len(values)} values of the {what} rows of {path}, got {length}."
        )
    count = len(values) // length
    return values[: count * length].reshape(count, length)

"""Pictures from files: opened in one way everywhere, and checked before anything is trained on them."""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..modeling.image_processing_tokens import in_mode
from .sequences import require

if TYPE_CHECKING:
    from datasets import Dataset

CHECKED = 20_000  # of pictures inside larger files, such as the Hub's, which have checksums; others are all checked
BAR_FROM = 2_000
USUAL_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
FAULTS = (OSError, SyntaxError, ValueError, EOFError)  # what Pillow raises on broken files


def open_picture(file: str | Path, mode: str = "RGB") -> Any:
    """A PIL picture of a file as every part of this package sees it: upright, 8 bits a channel, "RGB" or "L".

    See `modeling.image_processing_tokens.in_mode`. Raises ValueError, naming the file, where it is broken.
    """
    try:
        with require("PIL.Image").open(file) as picture:
            picture.load()
            return in_mode(picture, mode)
    except FAULTS as error:
        raise ValueError(f"{file} cannot be read as a picture: {_reason(error)}") from error


def check_pictures(part: "Dataset", column: str, what: str) -> None:
    """Raise ValueError, naming the file, if one of the pictures of a data set cannot be decoded to its end.

    Args:
        what: the part in words, for pictures that are in no file of their own.
    """
    if not len(part):
        return
    rows = part.select_columns([column]).cast_column(column, require("datasets").Image(decode=False))
    first = rows.with_format(None)[0][column]
    if len(part) > CHECKED and first and first["bytes"] is not None:
        return
    found = (row[column] for row in rows.with_format(None))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
        problems = tqdm(
            _in_batches(workers, found), "Checking pictures", len(part), disable=len(part) < BAR_FROM, leave=False
        )
        for number, (path, problem) in enumerate(problems):
            if problem:
                where = path or f"{what}: row {number}"
                raise ValueError(f"{where} cannot be read as a picture: {problem}")


def _in_batches(workers: ThreadPoolExecutor, pictures: Iterator[dict], size: int = 256) -> Iterator[tuple]:
    """(path, problem) of each picture, of which a few at a time are held."""
    batch = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield from workers.map(_path_and_problem, batch)
            batch = []
    yield from workers.map(_path_and_problem, batch)


def _path_and_problem(picture: dict | None) -> tuple[str | None, str | None]:
    """Where a picture comes from, and why it cannot be decoded; None if it can."""
    if picture is None:
        return None, "there is none."
    content = picture["bytes"]
    try:
        with require("PIL.Image").open(picture["path"] if content is None else io.BytesIO(content)) as opened:
            opened.draft(None, (1, 1))  # JPEGs at an eighth of their size, which is enough to read to their end
            opened.load()
            if opened.mode not in USUAL_MODES:
                in_mode(opened, "RGB")
    except FAULTS as error:
        return picture["path"], _reason(error)
    return picture["path"], None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file."
    if "cannot identify image file" in str(error):
        return "it is in no format that Pillow knows."
    return f"{str(error).rstrip('.')}."

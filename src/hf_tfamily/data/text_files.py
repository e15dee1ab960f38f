"""A user's text: one file, several, or a folder of them, as one training and one held-out part."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .hub_parts import divided
from .text_lines import read_text_bytes

PARTS = ("train", "validation", "test")
ENDINGS = (".txt", ".text", ".md")
BETWEEN_FILES = b"\n"


def text_files(path: str | Sequence[str]) -> list[Path]:
    """The files that `path` names: itself, all of a list, or those of a folder that end in .txt, .text or .md.

    Raises FileNotFoundError, naming what is missing or the folder that holds none.
    """
    found: list[Path] = []
    for place in map(Path, [path] if isinstance(path, str) else path):
        if place.is_dir():
            inside = sorted(file for file in place.rglob("*") if file.is_file() and file.suffix.lower() in ENDINGS)
            if not inside:
                raise FileNotFoundError(f"There is no text file in the folder {place} ({', '.join(ENDINGS)}).")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise FileNotFoundError(f"There is no text file {str(place)!r}; give one with data.path=...")
    if not found:
        raise ValueError("data.path names no file.")
    return found


def text_parts(
    path: str | Sequence[str],
    sizes: tuple[int, int, int] | None,
    eval_part: str,
    eval_share: float | None,
    seed: int,
) -> tuple[bytes, bytes, str]:
    """The training and the held-out part of a text, and how it was cut in words; arguments as in `text_file`."""
    contents = {file: read_text_bytes(file) for file in text_files(path)}
    if eval_share is None:
        return cut_text(BETWEEN_FILES.join(contents.values()), sizes, eval_part)
    if sizes is not None:
        raise ValueError(f"Give sizes or eval_share, not both; got {list(sizes)} and {eval_share}.")
    if len(contents) == 1:
        (content,) = contents.values()
        return _last_share(content, eval_share)
    files = list(contents)
    train, held_out = divided(np.zeros(len(files), int), eval_share, seed, ["the files"])
    joined = [BETWEEN_FILES.join(contents[files[i]] for i in part) for part in (train, held_out)]
    names = ", ".join(files[i].name for i in held_out[:5]) + (" ..." if len(held_out) > 5 else "")
    return *joined, f"{len(files)} files; held out: {len(held_out)} of them, drawn with seed {seed}: {names}"


def distinct_bytes(path: str | Sequence[str]) -> set[int]:
    """The bytes that occur in a text, in whatever part of it."""
    return set().union(*(read_text_bytes(file) for file in text_files(path)))


def cut_text(content: bytes, sizes: tuple[int, int, int] | None, eval_part: str) -> tuple[bytes, bytes, str]:
    """The training and the held-out part of a text, and how it was cut in words; arguments as in `text_file`."""
    if eval_part not in PARTS[1:]:
        raise ValueError(f'eval_part must be "validation" or "test", got {eval_part!r}.')
    if sizes is None:
        sizes = (len(content) * 9 // 10, len(content) // 20, len(content) // 20)
    if len(sizes) != 3 or min(sizes) < 0 or sum(sizes) > len(content):
        raise ValueError(f"sizes must be three byte counts of at most {len(content)} together, got {list(sizes)}.")
    bounds = np.cumsum([0, *sizes])
    parts = {part: content[start:end] for part, start, end in zip(PARTS, bounds, bounds[1:])}
    cut = " + ".join(f"{size:,}" for size in sizes)
    return parts["train"], parts[eval_part], f"cut into {cut} bytes; held out: {eval_part}"


def _last_share(content: bytes, eval_share: float) -> tuple[bytes, bytes, str]:
    if not 0 < eval_share < 1:
        raise ValueError(f"eval_share must lie between 0 and 1, such as 0.1, got {eval_share}.")
    kept = len(content) - round(eval_share * len(content))
    return content[:kept], content[kept:], f"held out: the last {eval_share:.3g} of it"


def named(path: str | Sequence[str]) -> str:
    """What `path` names, for descriptions."""
    if isinstance(path, str):
        return f"the folder {path}" if Path(path).is_dir() else f"the file {path}"
    return f"the files {', '.join(map(str, path))}"

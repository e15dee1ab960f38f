"""Short tries: a part of the training data and of what is held out, `limit` and `eval_limit` of every source."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np

from .sequences import LoadedData
from .streams import END_OF_LINE, TextStreams

if TYPE_CHECKING:
    from datasets import Dataset

LIMITS = ("limit", "eval_limit")


def limited(data: LoadedData, limit: int | None, eval_limit: int | None) -> LoadedData:
    """At most `limit` training and `eval_limit` held-out examples; of a stream of text, so many tokens.

    Examples are taken evenly spaced, so that a data set sorted by class keeps its classes; a text is cut off.
    """
    if limit is None and eval_limit is None:
        return data
    cut = _cut_streams if isinstance(data, TextStreams) else _cut_examples
    shares = [f"{name}={value:,}" for name, value in zip(LIMITS, (limit, eval_limit)) if value is not None]
    return replace(cut(data, limit, eval_limit), description=f"{data.description}; {', '.join(shares)}")


def _cut_examples(data: LoadedData, limit: int | None, eval_limit: int | None) -> LoadedData:
    parts = {field.name: getattr(data, field.name) for field in fields(data)}
    limits = {name: limit if name == "train" else eval_limit for name, part in parts.items() if hasattr(part, "select")}
    return replace(data, **{name: _evenly(parts[name], most) for name, most in limits.items()})


def _evenly(part: "Dataset", most: int | None) -> "Dataset":
    if most is None or most >= len(part):
        return part
    return part.select(np.linspace(0, len(part) - 1, most).round().astype(int))


def _cut_streams(data: TextStreams, limit: int | None, eval_limit: int | None) -> TextStreams:
    data = replace(data, train=data.train[:limit])
    if eval_limit is None or eval_limit >= len(data.eval):
        return data
    held_out = data.eval[:eval_limit]
    if data.eval_ends is not None:
        text = data.eval_text[: data.eval_ends[eval_limit - 1]]
        ends = data.eval_ends[:eval_limit]
        sizes = {"eval_bytes": len(text), "eval_words": len(text.split())}
        return replace(data, eval=held_out, eval_text=text, eval_ends=ends, **sizes)
    lines = data.processor.decode(held_out).split(END_OF_LINE)  # a word not in the vocabulary counts as <unk>
    words = sum(len(line.split()) for line in lines)
    of_lines = sum(len(line.strip().encode()) + 1 for line in lines) - 1
    return replace(
        data,
        eval=held_out,
        eval_bytes=len(held_out) if held_out.dtype == np.uint8 else of_lines,
        eval_words=words,
    )

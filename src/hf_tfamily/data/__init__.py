"""Real data as token sequences: images, bytes of text, audio.

An example is [start, x0 ... x(N-1)]: N values in 0 ... num_values - 1 behind a start token, whose id is num_values, or
num_values + class where a class is given. A model reads the first N ids and predicts the last N (`NextTokenCollator`).

    data = load_data({"source": "digits"})
    data.train[0]["input_ids"]      # 1 + 64 ids
"""

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from ..modeling.attention_patterns import nearest
from ..value_types import annotations_of, check_value
from .algorithms import AlgorithmPairs, algorithms
from .audio import audio_files, mu_law_decode, mu_law_encode, write_wav
from .augmentation import Augmentation
from .bible_versions import bible_versions
from .csv_columns import csv_column
from .enlargement import EnlargementPairs, photo_enlargements
from .images import digits, fashion_mnist, hub_images, photo_crops
from .labelled_images import LabelledImages, digit_classes, emoji, fashion_mnist_classes, hub_labelled_images
from .limits import LIMITS, limited
from .masked import MaskedTexts, bible_masked, masked_text_file
from .pictures import open_picture
from .sequences import LoadedData, MissingPackageError, NextTokenCollator, TokenSequences
from .streams import SegmentCollator, StreamDataset, TextStreams, bible_stream, hub_word_stream, text_file_stream
from .text import bible, hub_text, text_file
from .text_tokenizers import LEAST_SPECIAL, byte_tokenizer, check_tokenizer
from .translation import TranslationPairs, libreoffice_help, translation_files

SOURCES: dict[str, Callable[..., LoadedData]] = {
    source.__name__: source
    for source in (
        *(digits, photo_crops, fashion_mnist, hub_images, photo_enlargements),
        *(digit_classes, emoji, fashion_mnist_classes, hub_labelled_images),
        *(bible, text_file, hub_text, audio_files, csv_column),
        *(bible_stream, text_file_stream, hub_word_stream),
        *(libreoffice_help, translation_files, bible_versions),
        *(bible_masked, masked_text_file, algorithms),
    )
}


def load_data(data: Mapping[str, Any]) -> LoadedData:
    """The data set that `{"source": name, **arguments}` describes; arguments are those of the function in SOURCES.

    Every source takes `limit` and `eval_limit`, too: the most examples, or tokens of a stream, to train on and to hold
    out.

    Raises ValueError on an unknown source or argument (with the nearest names) and on files that are not as they should
    be (by name), MissingPackageError where an optional package is not installed, FileNotFoundError where files are
    missing.
    """
    check_data(data)
    arguments = dict(data)
    source, limits = SOURCES[arguments.pop("source")], [arguments.pop(name, None) for name in LIMITS]
    try:
        return limited(source(**arguments), *limits)
    except ValueError as error:
        places = {name: value for name, value in arguments.items() if isinstance(value, str) and os.path.exists(value)}
        if not places or any(place in str(error) for place in places.values()):
            raise
        read = ", ".join(f"data.{name}={place}" for name, place in places.items())
        raise ValueError(f"{str(error).rstrip('.')} ({read}).") from error


def check_data(data: Mapping[str, Any]) -> None:
    """Raise ValueError unless `data` names a source and fits its parameters and their types; nothing is loaded."""
    arguments = dict(data)
    source = str(arguments.pop("source", None))
    if source not in SOURCES:
        raise ValueError(f"Unknown data source {source!r}{nearest(source, SOURCES)}")
    parameters = inspect.signature(SOURCES[source]).parameters
    hints = annotations_of(SOURCES[source])
    for limit in LIMITS:
        most = arguments.pop(limit, None)
        check_value(most, int | None, f"Data source {source!r}: {limit}")
        if most is not None and most < 1:
            raise ValueError(f"Data source {source!r}: {limit} must be at least 1, got {most}.")
    for key in arguments:
        if key not in parameters:
            raise ValueError(
                f"Data source {source!r} has no argument {key!r}{nearest(str(key), [*parameters, *LIMITS])}"
            )
        check_value(arguments[key], hints[key], f"Data source {source!r}: {key}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise ValueError(f"Data source {source!r} needs the argument {key!r}.")
    if arguments.get("tokenizer") is not None:
        special = LEAST_SPECIAL + (source == bible_masked.__name__)
        check_tokenizer(arguments["tokenizer"], f"Data source {source!r}: tokenizer", special)
        if "vocab_size" in arguments:
            raise ValueError(f"Data source {source!r}: vocab_size is that of the tokenizer; leave one of both out.")
    if "augmentation" in parameters:
        Augmentation.of(arguments.get("augmentation"))


__all__ = [
    "SOURCES",
    "AlgorithmPairs",
    "EnlargementPairs",
    "LabelledImages",
    "LoadedData",
    "MaskedTexts",
    "MissingPackageError",
    "NextTokenCollator",
    "SegmentCollator",
    "StreamDataset",
    "TextStreams",
    "TokenSequences",
    "TranslationPairs",
    "byte_tokenizer",
    "check_data",
    "load_data",
    "mu_law_decode",
    "mu_law_encode",
    "open_picture",
    "write_wav",
]

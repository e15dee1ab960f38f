"""Recipes for one's own data: `hf-tfamily new-recipe SOURCE PATH` writes one that trains at once.

Each begins with a recipe of the package for the same kind of data, whose optimizer settings are known to train, and
takes sizes from the data: vocabulary, classes, length, side of pictures, and a smaller model where there is little.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .data import SOURCES, LoadedData, load_data
from .data.csv_columns import read_column, read_table
from .data.sequences import require
from .data.text_files import text_files
from .model_size import count_parameters
from .modeling.attention_patterns import nearest
from .recipe_yaml import read_yaml, write_yaml
from .recipes import Recipe, load_recipe
from .tasks import task_of
from .whole_files import write_text

LITTLE = 300_000  # training values below which a small model is enough
EPOCHS, MOST_STEPS, FEWEST_STEPS = 20, 2000, 20
FEWEST_BYTES = 6400  # of a text
SIDES = (32, 16, 8, 4)  # of a sequence laid out in rows, the longest first
PICTURE_SIDES = (64, 32, 16)


@dataclass(frozen=True)
class Starter:
    """How a recipe for one source begins.

    Attributes:
        paths: names of the files and folders that it takes, in order.
        bases: system -> recipe of the package to begin with; the first system is the default.
        data: paths -> arguments of the source.
        model: (arguments, data, base's model) -> fields of the model that follow from the data.
    """

    paths: tuple[str, ...]
    bases: dict[str, str]
    data: Callable[..., dict[str, Any]]
    model: Callable[[dict[str, Any], LoadedData, dict[str, Any]], dict[str, Any]]


def new_recipe(
    source: str, paths: Iterable[str | Path], system: str | None = None, settings: Iterable[str] = ()
) -> Recipe:
    """A recipe for one's own data.

    Args:
        source: one of STARTERS.
        paths: files or folders, as many as the source takes.
        system: the model's system; the source's default if None.
        settings: arguments of the source as `key=value`, in place of what follows from the data.

    Raises:
        ValueError: on a source or system that does not fit, and on data that cannot be read, by name.
        FileNotFoundError: where a path leads nowhere.
    """
    paths, starter = [str(path) for path in paths], _starter(source)
    if len(paths) != len(starter.paths):
        raise ValueError(f"{source} takes {len(starter.paths)} paths ({', '.join(starter.paths)}), got {len(paths)}.")
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"There is no file and no folder {path!r}.")
    system = system or next(iter(starter.bases))
    if system not in starter.bases:
        raise ValueError(f"{source} is for {', '.join(starter.bases)}, not for {system!r}.")
    base = load_recipe(starter.bases[system])
    chosen = dict(_setting(text) for text in settings)
    arguments = {"source": source, **starter.data(*paths, **chosen)}
    data = load_data(arguments)
    model = {**base.model, **_small(base.model, data), **starter.model(arguments, data, base.model)}
    made = replace(
        base,
        name=f"{system}/{Path(paths[0]).stem}",
        title=f"{', '.join(Path(path).name for path in paths)}, by the model of {base.name}",
        reference="",
        notes=(f"Made for these data after {base.name}; sizes and steps follow from how much there is.",),
        model={key: value for key, value in model.items() if value is not None},
        data=arguments,
        training=_training(base.training, data),
    )
    config = AutoConfig.for_model(**made.model)
    return replace(made, parameters=count_parameters(task_of(made).auto_class, config))


def write_recipe(recipe: Recipe, file: str | Path) -> None:
    """As YAML, checked by reading it again. Raises FileExistsError where there is something already."""
    file = Path(file)
    if file.exists():
        raise FileExistsError(f"{file} is there already; choose another --output.")
    sections = {"title": recipe.title, "notes": list(recipe.notes), "parameters": recipe.parameters}
    content = {**sections, "model": recipe.model, "data": recipe.data, "training": recipe.training}
    write_text(file, write_yaml(content))
    load_recipe(file)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"An argument is written key=value, such as column=price; got {text!r}.")
    return key, read_yaml(value)


def _starter(source: str) -> Starter:
    if source in STARTERS:
        return STARTERS[source]
    if source in SOURCES:
        raise ValueError(
            f"{source} needs no file of yours: hf-tfamily sources {source} shows recipes that read it. Sources of own "
            f"data: {', '.join(STARTERS)}."
        )
    raise ValueError(f"No source is called {source!r}{nearest(source, STARTERS)}")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def _values(data: LoadedData) -> int:
    """How many values, tokens or pictures there are to learn from."""
    return len(data.train) * (getattr(data, "dims", None) or 1)


def _small(model: dict[str, Any], data: LoadedData) -> dict[str, Any]:
    """A narrower model of fewer layers where there is little to learn from."""
    if "hidden_size" not in model or _values(data) >= LITTLE:
        return {}
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return small | {key: value for key, value in (("intermediate_size", 128), ("qk_head_dim", 8)) if key in model}


def _training(training: dict[str, Any], data: LoadedData) -> dict[str, Any]:
    """The base's settings, for about EPOCHS rounds of the data, never more than MOST_STEPS steps."""
    rows, length = len(data.train), getattr(data, "length", None)
    if not hasattr(data.train, "column_names"):  # a stream
        rows = max(1, len(data.train) // length)
    batch = min(training["per_device_train_batch_size"], max(1, rows // 4))
    steps = min(MOST_STEPS, max(FEWEST_STEPS, EPOCHS * rows // batch))
    kept = {key: value for key, value in training.items() if key not in ("num_train_epochs", "eval_steps")}
    return kept | {
        "max_steps": steps,
        "warmup_steps": max(1, steps // 10),
        "per_device_train_batch_size": batch,
        "logging_steps": max(1, steps // 50),
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": max(1, steps // 4),
        "save_total_limit": 2,
    }


def _side(held_out: int, path: str) -> int:
    """Of the largest square that the held-out values fill."""
    fitting = [side for side in SIDES if side * side <= held_out]
    if not fitting:
        raise ValueError(f"{path}: {held_out} values are held out; {SIDES[-1] ** 2} are needed at least.")
    return fitting[0]


def _fixed_square(arguments: dict, data: LoadedData, model: dict) -> dict[str, Any]:
    """A Sparse Transformer of text: rows of a side, with summaries."""
    side = math.isqrt(arguments["length"])
    pattern = {"type": "fixed", "block": side, "summary": max(1, side // 4), "sub_blocks": 4 if side >= 16 else 1}
    return {"vocab_size": data.vocab_size, "position_shape": [side, side], "attention_patterns": pattern}


def _strided_square(arguments: dict, data: LoadedData, model: dict) -> dict[str, Any]:
    """A Sparse Transformer of sound or numbers: a row back, and a column."""
    side = math.isqrt(arguments["length"])
    patterns = [{"type": "local", "window": side}, {"type": "strided", "stride": side}]
    return {"vocab_size": data.vocab_size, "position_shape": [side, side], "attention_patterns": patterns}


def _bytes_of(path: str) -> int:
    return sum(file.stat().st_size for file in text_files(path))


def _stream(path: str, **chosen: Any) -> dict[str, Any]:
    size = _bytes_of(path)
    if size < FEWEST_BYTES:
        raise ValueError(f"{path} has {size} bytes; a text to learn from needs {FEWEST_BYTES:,} or more.")
    return {"path": path, "length": min(128, size // 400), **chosen}


def _text(path: str, **chosen: Any) -> dict[str, Any]:
    return {"path": path, "length": _side(_bytes_of(path) // 20, path) ** 2, **chosen}


def _hidden(path: str, **chosen: Any) -> dict[str, Any]:
    return {"path": path, "length": min(127, _side(_bytes_of(path) // 20, path) ** 2 - 1), **chosen}


def _sounds(path: str, **chosen: Any) -> dict[str, Any]:
    return {"path": path, "length": 1024, **chosen}


def _column(path: str, **chosen: Any) -> dict[str, Any]:
    """Levels where all cells of the column are numbers."""
    header, _ = read_table(path)
    name = chosen.pop("column", header[0] if len(header) == 1 else None)
    if name is None:
        raise ValueError(f"{path} has the columns {', '.join(header)}; say which: --data column=NAME.")
    cells = read_column(path, name)
    numbers = all(map(_is_number, cells))
    values = len(cells) if numbers else sum(len(cell) + 1 for cell in cells)
    levels = {"levels": min(256, max(8, len(cells) // 40))} if numbers else {}
    return {"path": path, "column": name, "length": _side(values // 10, path) ** 2, **levels, **chosen}


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _lines(source: str, target: str, **chosen: Any) -> dict[str, Any]:
    lines = Path(source).read_bytes().count(b"\n")
    return {
        "source_file": source,
        "target_file": target,
        "eval_share": 0.05 if lines >= 1000 else 0.1,
        "vocab_size": 4000 if lines >= 5000 else 500,
        "max_length": 64,
        **chosen,
    }


def _pairs(arguments: dict, data: LoadedData, model: dict) -> dict[str, Any]:
    return {"vocab_size": arguments["vocab_size"], "max_position_embeddings": 128}


def _picture_side(folder: str) -> int:
    """Of the sizes that models here take, the one below most pictures."""
    files = [file for file in sorted(Path(folder).rglob("*")) if file.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if not files:
        raise ValueError(f"{folder} holds no pictures (.png, .jpg, .jpeg).")
    sides = []
    for file in files[:: max(1, len(files) // 100)]:
        try:
            with require("PIL.Image").open(file) as picture:
                sides.append(min(picture.size))
        except OSError as error:
            raise ValueError(f"{file} is no picture that can be read: {error}") from error
    return next((side for side in PICTURE_SIDES if side <= statistics.median(sides)), PICTURE_SIDES[-1])


def _labelled(folder: str, **chosen: Any) -> dict[str, Any]:
    side = _picture_side(folder)
    return {"dataset": folder, "size": side, "eval_share": 0.1, "augmentation": {"flip": 0.5}, **chosen}


def _windows(arguments: dict, data: LoadedData, model: dict) -> dict[str, Any]:
    side = arguments["size"]
    return {
        "image_size": side,
        "num_labels": len(data.class_names),
        "patch_size": side // 16,
        "encoder_stride": side // 4,
    }


def _pictures(folder: str, **chosen: Any) -> dict[str, Any]:
    side = min(16, _picture_side(folder))
    return {
        "dataset": folder,
        "height": side,
        "width": side,
        "channels": 3,
        "levels": 16,
        "fit": True,
        "eval_share": 0.1,
    }


def _raster(arguments: dict, data: LoadedData, model: dict) -> dict[str, Any]:
    side, row = arguments["height"], arguments["width"] * arguments["channels"]
    patterns = [{"type": "local", "window": row}, {"type": "strided", "stride": row}]
    return {"vocab_size": data.vocab_size, "position_shape": [side, side, 3], "attention_patterns": patterns}


def _vocabulary(arguments: dict, data: LoadedData, model: dict) -> dict[str, Any]:
    return {"vocab_size": data.vocab_size}


TEXT = ("rope_decoder", "transformer_xl", "compressive_transformer", "xl_sparse", "memorizing_transformer")
SPARSE = {"sparse_transformer": "sparse_transformer/bible"}
STARTERS = {
    "text_file_stream": Starter(
        ("text or folder of texts",), {system: f"{system}/bible" for system in TEXT}, _stream, _vocabulary
    ),
    "text_file": Starter(("text or folder of texts",), SPARSE, _text, _fixed_square),
    "masked_text_file": Starter(
        ("text or folder of texts",),
        {system: f"{system}/bible" for system in ("vanilla_encoder", "long_encoder")},
        _hidden,
        _vocabulary,
    ),
    "csv_column": Starter(("csv",), SPARSE, _column, _strided_square),
    "audio_files": Starter(("folder of sounds",), SPARSE, _sounds, _strided_square),
    "translation_files": Starter(
        ("text", "its translation"), {"vanilla_transformer": "vanilla_transformer/bible_versions"}, _lines, _pairs
    ),
    "hub_labelled_images": Starter(
        ("folder with a folder of pictures for each class",),
        {"swin_transformer": "swin_transformer/emoji"},
        _labelled,
        _windows,
    ),
    "hub_images": Starter(
        ("folder of pictures",), {"sparse_transformer": "sparse_transformer/digits"}, _pictures, _raster
    ),
}

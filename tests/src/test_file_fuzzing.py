"""Files that are cut or changed anywhere, for all converters and data sources: they are read, or an error names them.

Nothing is silently less where that can be told; a text cut short is still a text.

How to draw others: tests/fuzzing.py.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BigBirdConfig,
    BigBirdForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForMaskedLM,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    SwinConfig,
    SwinForImageClassification,
)

from hf_tfamily.conversion import CONVERTERS, convert
from hf_tfamily.data import SOURCES, load_data
from tests.fuzzing import fuzz
from tests.src import test_conversion_distribution_augmentation as arrays
from tests.src.test_data_files import LEVELS, wav
from tests.src.test_data_labelled_images import needs_emoji, write_idx
from tests.tiny_models import SMALL_SWIN

pytestmark = pytest.mark.slow
datasets = pytest.importorskip("datasets")


class Damage(NamedTuple):
    """A file of a folder by its number, and what is done to it."""

    file: int
    cut: float | None  # the share that stays
    near_start: bool  # where headers are
    place: float
    byte: int

    def do(self, folder: Path, names: list[str]) -> Path:
        file = folder / names[self.file % len(names)]
        content = bytearray(file.read_bytes())
        if self.cut is not None:
            del content[int(self.cut * len(content)) :]
        elif content:
            among = min(len(content), 200) if self.near_start else len(content)
            content[int(self.place * among)] ^= self.byte
        file.write_bytes(content)
        return file


SHARES = st.floats(0, 1, exclude_max=True)
DAMAGES = st.builds(Damage, st.integers(0, 9), st.one_of(st.none(), SHARES), st.booleans(), SHARES, st.integers(1, 255))


def check_named(folder: Path, damaged: Path, error: Exception) -> None:
    assert str(folder) in str(error), f"{damaged} is not named: {error!r}"


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints to convert

SIZES = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
MARIAN = {
    "vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16,
    "pad_token_id": 19, "decoder_start_token_id": 19, "eos_token_id": 0, "forced_eos_token_id": 0,
}  # fmt: skip
STOCK: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5, num_key_value_heads=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1)),
    "marian": lambda: MarianMTModel(MarianConfig(**MARIAN)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=8, n_layer=1, n_head=2)),
    "mpt": lambda: MptForCausalLM(MptConfig(vocab_size=50, d_model=8, n_layers=1, n_heads=2, max_seq_len=16)),
    "longformer": lambda: LongformerForMaskedLM(
        LongformerConfig(**SIZES, max_position_embeddings=18, attention_window=4)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=18)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=18)),
    "big_bird": lambda: BigBirdForMaskedLM(BigBirdConfig(**SIZES, max_position_embeddings=48, block_size=4)),
    "imagegpt": lambda: ImageGPTForCausalImageModeling(
        ImageGPTConfig(vocab_size=17, n_positions=12, n_embd=8, n_layer=1, n_head=2)
    ),
    "swin": lambda: SwinForImageClassification(SwinConfig(**{**SMALL_SWIN, "depths": [1, 1]})),
}
GOLDEN = Path(__file__).parents[1] / "goldens" / "transformer_xl" / "plain"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A folder for each source type and form; those of ours are what converting the stock ones gave."""
    home, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name, build in STOCK.items():
        torch.manual_seed(0)
        model = build()
        model.save_pretrained(home / name)
        found[name] = home / name
        convert(home / name, home / f"{name} back")
        found[f"{name} back"] = home / f"{name} back"
    build = STOCK["llama"]()
    build.save_pretrained(home / "shards", max_shard_size="4KB")
    build.save_pretrained(home / "pickled")
    weights = load_file(home / "pickled" / "model.safetensors")
    (home / "pickled" / "model.safetensors").unlink()
    torch.save(weights, home / "pickled" / "pytorch_model.bin")
    tensors = load_file(GOLDEN.with_suffix(".safetensors"))
    (home / "transfo-xl").mkdir()
    shutil.copyfile(GOLDEN.with_suffix(".json"), home / "transfo-xl" / "config.json")
    torch.save(
        {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")},
        home / "transfo-xl" / "pytorch_model.bin",
    )
    arrays.checkpoint(home / "distribution_augmentation", arrays.variables())
    return found | {name: home / name for name in OTHERS}


OTHERS = ("shards", "pickled", "transfo-xl", "distribution_augmentation")
FORMS = [*STOCK, *(f"{name} back" for name in STOCK), *OTHERS]


def test_every_converter_is_here():
    assert {converter.SOURCE_TYPE for converter in CONVERTERS} == {*STOCK, *OTHERS[2:]}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints(form, checkpoints, tmp_path):
    read = [name for name in files_of(checkpoints[form]) if name.startswith(("config.json", "model", "pytorch_model"))]
    read = [name for name in read if not name.endswith(".py")]
    count = iter(range(10**9))

    def check(damage):
        folder = shutil.copytree(checkpoints[form], tmp_path / str(next(count)))
        damaged = damage.do(folder, read)
        try:
            convert(folder, folder / "out", pickled_weights=True)
        except (ValueError, OSError) as error:
            check_named(folder, damaged, error)
        finally:
            shutil.rmtree(folder)

    fuzz(check, 25, damage=DAMAGES)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def lines(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).write_text("".join(f"{name} says größer {number}\n" for number in range(40)))


def write_text(folder: Path) -> dict:
    lines(folder, ["text.txt"])
    return {"path": str(folder / "text.txt"), "length": 4}


def write_sounds(folder: Path) -> dict:
    for name in ("a.wav", "b.wav", "c.wav"):
        behind = struct.pack("<4sI", b"LIST", 4) + b"abcd"
        content = wav(np.tile(LEVELS, 30).tobytes()) + behind
        content = content[:4] + struct.pack("<I", len(content) - 8) + content[8:]
        (folder / name).write_bytes(content)
    return {"path": str(folder), "length": 4}


def write_table(folder: Path) -> dict:
    (folder / "table.csv").write_text("id,text\n" + "".join(f"{number},größer {number}\n" for number in range(40)))
    return {"path": str(folder / "table.csv"), "column": "text", "length": 4}


def write_compressed_sounds(folder: Path) -> dict:
    soundfile = pytest.importorskip("soundfile")
    for name in ("a.flac", "b.ogg", "c.flac"):
        soundfile.write(folder / name, np.sin(np.arange(400) / 5), 8000)
    return {"path": str(folder), "length": 4}


def write_clothes(folder: Path) -> dict:
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", np.arange(10 * 28 * 28).reshape(10, 28, 28) % 256)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(10))
    return {"path": str(folder)}


def write_pairs(folder: Path) -> dict:
    names = ("source_file", "target_file", "eval_source_file", "eval_target_file")
    lines(folder, list(names))
    return {"vocab_size": 270, **{name: str(folder / name) for name in names}}


def write_help(folder: Path) -> dict:
    for language in ("en-US", "de"):
        (folder / language).mkdir()
        for page in range(4):
            texts = [f'<p id="par_id{n}">{language} größer {page} {n}</p>' for n in range(5)]
            (folder / language / f"{page}.html").write_text("\n".join(texts))
    return {"path": str(folder), "vocab_size": 270, "eval_share": 0.25}


def write_rows(ending: str) -> Callable[[Path], dict]:
    def write(folder: Path) -> dict:
        rows = [{"text": f"row größer {number}"} for number in range(40)]
        for split in ("train", "test"):
            file = folder / f"{split}.{ending}"
            if ending == "jsonl":
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            elif ending == "parquet":
                datasets.Dataset.from_list(rows).to_parquet(str(file))
            elif ending == "csv":
                file.write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
            else:
                file.write_text("".join(row["text"] + "\n" for row in rows))
        return {"dataset": str(folder), "eval_split": "test"}

    return write


def write_pictures(ending: str, splits: str) -> Callable[[Path], dict]:
    def write(folder: Path) -> dict:
        draw = np.random.default_rng(0)
        for split in ("train", splits):
            for label in ("cat", "dog"):
                (folder / split / label).mkdir(parents=True)
                for number in range(2):
                    picture = Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))
                    picture.save(folder / split / label / f"{number}.{ending}")
        return {"dataset": str(folder)}

    return write


def write_emoji(folder: Path) -> dict:
    from hf_tfamily.data.labelled_images import EMOJI_FONT, EMOJI_GROUPS

    shutil.copyfile(EMOJI_FONT, folder / "font.ttf")
    rows = []
    for number, group in enumerate(EMOJI_GROUPS):
        rows += [f"# group: {group}", *(f"{0x1F600 + 5 * number + n:X} ; fully-qualified # x" for n in range(5))]
    (folder / "list.txt").write_text("\n".join(rows))
    return {"font": str(folder / "font.ttf"), "listing": str(folder / "list.txt"), "size": 4}


class Source(NamedTuple):
    """A source, the files that it reads, whether a part of a file is a file, and more of its arguments."""

    name: str
    write: Callable[[Path], dict]
    is_text: bool = False
    arguments: dict[str, Any] = {}


CASES = {
    "text_file": Source("text_file", write_text, is_text=True),
    "masked_text_file": Source("masked_text_file", write_text, is_text=True),
    "text_file_stream": Source("text_file_stream", write_text, is_text=True),
    "audio_files": Source("audio_files", write_sounds),
    "audio_files compressed": Source("audio_files", write_compressed_sounds, is_text=True),
    "csv_column": Source("csv_column", write_table, is_text=True),
    "fashion_mnist": Source("fashion_mnist", write_clothes),
    "fashion_mnist_classes": Source("fashion_mnist_classes", write_clothes),
    "translation_files": Source("translation_files", write_pairs, is_text=True),
    "libreoffice_help": Source("libreoffice_help", write_help, is_text=True),
    "hub_text txt": Source("hub_text", write_rows("txt"), True, {"length": 4}),
    "hub_text jsonl": Source("hub_text", write_rows("jsonl"), True, {"length": 4}),
    "hub_text csv": Source("hub_text", write_rows("csv"), True, {"length": 4}),
    "hub_text parquet": Source("hub_text", write_rows("parquet"), False, {"length": 4}),
    "hub_word_stream": Source("hub_word_stream", write_rows("txt"), True, {"length": 4}),
    "hub_images png": Source("hub_images", write_pictures("png", "test"), False, {"height": 16, "width": 16}),
    "hub_images jpg": Source("hub_images", write_pictures("jpg", "test"), False, {"height": 16, "width": 16}),
    "hub_labelled_images": Source("hub_labelled_images", write_pictures("png", "validation"), False, {"size": 16}),
    "emoji": Source("emoji", write_emoji, is_text=True),
}
# Those that read no file of a user's.
INSIDE_PACKAGES = {
    "algorithms",
    "digits",
    "photo_crops",
    "photo_enlargements",
    "digit_classes",
    "bible",
    "bible_stream",
    "bible_masked",
    "bible_versions",
}
EXPENSIVE = ("hub_", "emoji")


def test_every_source_is_here():
    assert {case.name for case in CASES.values()} | INSIDE_PACKAGES == set(SOURCES)


def rows_of(data) -> tuple[int, int]:
    return len(data.train), len(data.eval)


@contextmanager
def cache_of(folder: Path) -> Iterator[None]:
    """What `datasets` keeps lies in a folder that goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_emoji) if name == "emoji" else name for name in CASES])
def test_data(name, tmp_path):
    case, count = CASES[name], iter(range(10**9))

    def load(damage):
        home = tmp_path / str(next(count))
        folder = home / "data"
        folder.mkdir(parents=True)
        arguments = case.write(folder)
        damaged = None if damage is None else damage.do(folder, files_of(folder))
        try:
            with cache_of(home / "cache"):
                data = load_data({"source": case.name, **arguments, **case.arguments})
                return rows_of(data), damaged
        except (ValueError, OSError) as error:
            if damage is None:
                raise
            check_named(folder, damaged, error)
            return None, damaged
        finally:
            shutil.rmtree(home)

    whole = load(None)[0]

    def check(damage):
        found, damaged = load(damage)
        less = found is not None and found != whole
        assert not less or (case.is_text and damage), f"{damaged}: {found} rows of {whole}, and nothing is said"

    fuzz(check, 15 if name.startswith(EXPENSIVE) else 40, damage=DAMAGES)

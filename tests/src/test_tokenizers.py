"""`data.tokenizer`: what ids are of, in every text source, from the data to the figures and the saved folder."""

import json
import math

import datasets
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from hf_tfamily.data import byte_tokenizer, load_data
from hf_tfamily.data import text_tokenizers as tokenizers
from hf_tfamily.data.text_tokenizers import as_text, pieces, text_ids_and_ends, train_bpe
from hf_tfamily.evaluation import bits_per_dim
from hf_tfamily.finished import evaluate
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.stream_evaluation import stream_losses
from hf_tfamily.training import train
from tests.src.help_pages import write_help

TRAINED = {"train": "bpe", "vocab_size": 300}
LINE = "Der Größe nach: the cat sat on the mat, 漢字 and a <start> 🦔.\n"
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", ",", "."]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 40 kB, in two languages and four sizes of characters."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(LINE * 600)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with tokenizers of others."""
    place = tmp_path_factory.mktemp("tokenizers")
    (place / "vocab.txt").write_text("\n".join(BERT_WORDS))
    BertTokenizer(vocab=str(place / "vocab.txt")).save_pretrained(place / "bert")
    train_bpe(LINE * 100, 280)[0].save_pretrained(place / "pairs")
    (place / "empty").mkdir()
    return place


def stream(text, tokenizer=TRAINED, **arguments):
    return load_data(
        {"source": "text_file_stream", "path": str(text), "length": 8, "tokenizer": tokenizer, **arguments}
    )


def windows(text, tokenizer=TRAINED, **arguments):
    return load_data({"source": "text_file", "path": str(text), "length": 8, "tokenizer": tokenizer, **arguments})


def parts(text):
    """What the file's training and held-out part hold; no character is cut at their edges."""
    content = text.read_bytes()
    size = len(content)
    cuts = content[: size * 9 // 10], content[size * 9 // 10 : size * 9 // 10 + size // 20]
    return [as_text(part, "a") for part in cuts]


# ---------------------------------------------------------------------------------------------------------------------
# What the ids are


def test_a_trained_tokenizer_gives_every_text_back():
    tokenizer, ids = train_bpe(LINE * 50, 400)
    assert len(tokenizer) == 1 + max(tokenizer.get_vocab().values()) <= 400
    assert tokenizer.decode(ids) == LINE * 50
    for other in ("", "Übrigens: \0\x7f\u2028 𝔘", "a  b\n\n\tc"):
        assert tokenizer.decode(tokenizer(other)["input_ids"]) == other
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 0)
    assert tokenizer("<start>a<end>")["input_ids"][0] == 0
    assert 0 not in tokenizer("<start>", split_special_tokens=True)["input_ids"]


def test_training_is_deterministic_and_numbers_by_frequency():
    (one, ids), (other, _) = train_bpe(LINE * 50, 320), train_bpe(LINE * 50, 320)
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    counts = np.bincount(ids, minlength=len(one))[2:]
    assert (np.diff(counts) <= 0).all()
    assert len(train_bpe("ab" * 20, 4096)[0]) < 300


def test_training_sees_the_training_part_alone(text, tmp_path):
    changed = tmp_path / "text"
    changed.write_bytes(text.read_bytes()[: text.stat().st_size * 9 // 10] + b"xylophone " * 400)
    size = text.stat().st_size
    sizes = [size * 9 // 10, size // 20, 0]
    one, other = (stream(path, sizes=sizes).processor for path in (text, changed))
    assert one.get_vocab() == other.get_vocab()


def test_a_saved_tokenizer_is_what_auto_tokenizer_loads(text, tmp_path):
    for tokenizer in (windows(text).processor, byte_tokenizer(end=True)):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert isinstance(loaded, PreTrainedTokenizerFast)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded(LINE)["input_ids"] == tokenizer(LINE)["input_ids"]
        assert loaded.decode(loaded(LINE)["input_ids"]) == LINE
        assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_bytes_are_what_they_were_and_may_have_an_end_of_their_own():
    old, new = byte_tokenizer(), byte_tokenizer(end=True)
    assert (len(old), old.bos_token_id, old.eos_token_id, old.pad_token_id) == (257, 256, 256, 256)
    assert (len(new), new.bos_token_id, new.eos_token_id, new.pad_token_id) == (258, 256, 257, 256)
    assert new(LINE)["input_ids"] == old(LINE)["input_ids"]
    assert new("a<end>")["input_ids"] == [97, 257]
    for source, length in (("bible_stream", "length"), ("bible", "length")):
        data = {"source": source, length: 64, "eval_books": ["Jude"], "limit": 100}
        before, after = load_data(data), load_data({**data, "tokenizer": "bytes_with_end"})
        rows = [part if isinstance(part, np.ndarray) else part["input_ids"][:] for part in (before.eval, after.eval)]
        np.testing.assert_array_equal(*rows)
        assert (before.vocab_size, after.vocab_size) == (257, 258)


def test_bytes_of_each_token_are_counted(monkeypatch):
    tokenizer, _ = train_bpe(LINE * 50, 300)
    ids, ends = text_ids_and_ends(tokenizer, LINE * 9)
    for place in (0, 5, len(ids) // 2, len(ids) - 1):
        before = tokenizer.decode(ids[: place + 1]).rstrip("\N{REPLACEMENT CHARACTER}")
        assert 0 <= ends[place] - len(before.encode()) < 5  # a character that is cut counts whole
    monkeypatch.setattr(tokenizers, "PIECE", 100)
    assert "".join(pieces(LINE * 9)) == LINE * 9
    other_ids, other_ends = text_ids_and_ends(tokenizer, LINE * 9)
    assert tokenizer.decode(other_ids) == LINE * 9
    assert other_ends[-1] == ends[-1] == len((LINE * 9).encode())


def test_texts_of_characters_that_are_cut():
    content = "漢字🦔".encode()
    assert as_text(content[1:-1], "a") == "字"
    assert as_text(content, "a") == "漢字🦔"
    with pytest.raises(
        ValueError, match=r"held-out text is no UTF-8 \(byte 0xff at 1\), which every tokenizer but bytes"
    ):
        as_text(b"a\xffbc", "held-out")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@pytest.mark.parametrize("tokenizer", [TRAINED, "pairs"])
def test_streams(text, saved, tokenizer):
    tokenizer = str(saved / tokenizer) if isinstance(tokenizer, str) else tokenizer
    data, (train_text, held_out) = stream(text, tokenizer), parts(text)
    assert data.processor.decode(data.train) == train_text
    assert data.processor.decode(data.eval) == held_out
    assert (data.eval_bytes, data.eval_words) == (len(held_out.encode()), len(held_out.split()))
    assert data.vocab_size == len(data.processor)
    assert data.start_id == data.processor.bos_token_id
    few = stream(text, tokenizer, limit=10, eval_limit=17)
    assert (len(few.train), len(few.eval)) == (10, 17)
    assert few.eval_bytes == len(few.eval_text) == data.eval_ends[16]
    assert held_out.encode().startswith(few.eval_text)


def test_windows(text):
    data, (train_text, held_out) = windows(text), parts(text)
    ids = data.eval["input_ids"][:]
    assert (ids[:, 0] == data.processor.bos_token_id).all()
    assert held_out.startswith(data.processor.decode(ids[:, 1:].ravel()))
    assert data.eval_bytes == len(data.processor.decode(ids[:, 1:].ravel()).encode())
    assert train_text.startswith(data.processor.decode(data.train["input_ids"][:][:, 1:].ravel()))
    few = windows(text, eval_limit=3)
    assert few.eval_bytes == sum(data.eval["bytes"][list(np.linspace(0, len(ids) - 1, 3).round().astype(int))])


def test_many_ids_are_kept_whole(text, saved, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(saved / "pairs")
    tokenizer.add_tokens([f"<{number}>" for number in range(40000)])
    monkeypatch.setattr(tokenizers, "_saved", lambda choice, name: tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<far>"})
    assert set(windows(text, "any").train["input_ids"][:][:, 0].tolist()) == {tokenizer.bos_token_id}
    assert tokenizer.bos_token_id > 40000


def test_rows_of_a_hub_data_set(tmp_path, tmp_path_factory, monkeypatch, saved):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    rows = ["the cat sat on the mat", "and on the other mat"] * 20
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"text": rows}).to_json(str(tmp_path / f"{split}.jsonl"))
    place = {"dataset": str(tmp_path), "length": 4, "eval_split": "validation"}
    words = load_data({"source": "hub_word_stream", **place})
    pairs = load_data({"source": "hub_word_stream", **place, "tokenizer": TRAINED})
    assert pairs.processor.decode(pairs.eval) == "\n".join(rows)
    assert (pairs.eval_words, pairs.eval_bytes) == (words.eval_words, words.eval_bytes - 1)
    assert words.start_id == words.processor.eos_token_id
    by_bytes = load_data({"source": "hub_word_stream", **place, "tokenizer": "bytes"})
    assert bytes(by_bytes.eval).decode() == "\n".join(rows)
    of_others = load_data({"source": "hub_text", **place, "tokenizer": str(saved / "bert")})
    assert of_others.start_ids == range(2, 3)
    assert of_others.processor.decode(of_others.eval[0]["input_ids"][1:]) == "the cat sat on"
    assert of_others.eval_bytes == sum(of_others.eval["bytes"][:]) > 0


def test_masked_texts():
    data = {"source": "bible_masked", "length": 15, "eval_books": ["Jude"], "limit": 50}
    assert load_data({**data, "tokenizer": "bytes"}).vocab_size == 258
    ended = load_data({**data, "tokenizer": "bytes_with_end"})
    assert (ended.vocab_size, ended.processor.mask_token_id) == (259, 258)
    assert ended.train.column_names == ["input_ids"]


def test_masks_of_trained_and_of_other_tokenizers(saved):
    assert train_bpe(LINE * 20, 280, mask=True)[0].mask_token_id == 2
    assert tokenizers.load_tokenizer(str(saved / "bert"), mask=True).mask_token == "[MASK]"
    assert tokenizers.load_tokenizer(str(saved / "pairs"), mask=True).mask_token_id == 280


def test_translations(tmp_path, saved):
    for name, lines in (("en", ["the cat", "a mat"] * 5), ("de", ["die Katze", "eine Matte"] * 5)):
        (tmp_path / name).write_text("\n".join(lines))
    files = {"source_file": "en", "target_file": "de", "eval_source_file": "en", "eval_target_file": "de"}
    pairs = {"source": "translation_files", **{key: str(tmp_path / name) for key, name in files.items()}}
    data = load_data({**pairs, "tokenizer": "bytes_with_end"})
    assert data.eval[0]["input_ids"] == [*b"the cat", 257]
    batch = data.processor(["a", "bcd"], padding=True)
    assert batch["input_ids"] == [[97, 257, 256, 256], [98, 99, 100, 257]]
    assert load_data({**pairs, "tokenizer": str(saved / "pairs")}).eval[0]["labels"][-1] == 1
    for tokenizer, message in (
        (
            "bytes",
            "tokenizer=bytes ends texts with <start> and pads with <start>; a translation needs a token for either",
        ),
        (TRAINED, "translations train a vocabulary of both languages by themselves where none is named; leave it out"),
        (str(saved / "bert"), "ends texts with None"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data({**pairs, "tokenizer": tokenizer})
    with pytest.raises(ValueError, match="vocab_size is that of the tokenizer; leave one of both out"):
        load_data({**pairs, "tokenizer": "bytes_with_end", "vocab_size": 300})


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"train": "bpe", "vocab_size": 300, "size": 3}, "tokenizer has no key 'size'"),
        ({"train": "bpe", "vocabsize": 300}, "tokenizer has no key 'vocabsize'; did you mean 'vocab_size'"),
        ({"train": "bpe"}, "tokenizer lacks the key 'vocab_size'; to train one: {train: bpe, vocab_size: 4096}."),
        ({"vocab_size": 300}, "tokenizer lacks the key 'train'"),
        ({"train": "unigram", "vocab_size": 300}, "tokenizer.train must be 'bpe', got 'unigram'."),
        ({"train": "bpe", "vocab_size": 257}, "tokenizer.vocab_size must be at least 258, the 256 bytes and 2 special"),
        (
            {"train": "bpe", "vocab_size": "many"},
            "tokenizer.vocab_size must be a number without a fraction, got 'many'",
        ),
        (3, "tokenizer must be text or a mapping, got 3."),
        ("", "tokenizer must be bytes, bytes_with_end, a folder, a name on the Hub, or {train: bpe"),
    ],
)
def test_recipes_say_what_is_wrong_with_a_tokenizer(tokenizer, message):
    override = f"data.tokenizer={json.dumps(tokenizer)}"
    with pytest.raises(RecipeError) as error:
        load_recipe("rope_decoder/bible", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_least_vocabulary_has_room_for_a_mask():
    with pytest.raises(RecipeError, match="must be at least 259, the 256 bytes and 3 special tokens, got 258"):
        load_recipe("vanilla_encoder/bible", ["data.tokenizer={train: bpe, vocab_size: 258}"])


def test_sources_without_text_take_no_tokenizer():
    with pytest.raises(RecipeError, match="'digits' has no argument 'tokenizer'"):
        load_recipe("sparse_transformer/digits", ["data.tokenizer=bytes"])


def test_tokenizers_that_are_not_there(text, saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for tokenizer, message in (
        (saved / "empty", "there is no tokenizer in this folder (tokenizer.json)."),
        (saved / "nowhere", "there is no such folder; it must be bytes, bytes_with_end, a folder, a name on the Hub"),
        (text, "there is no such folder"),
        ("somebody/nothing", "is no folder, and the Hub gives no tokenizer of that name ("),
    ):
        with pytest.raises(ValueError, match="tokenizer=") as error:
            stream(text, str(tokenizer))
        assert f"tokenizer={tokenizer}" in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="own_bytes numbers the file's bytes, which leaves no tokenizer"):
        stream(text, own_bytes=True)


def test_texts_that_are_no_text(tmp_path):
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ValueError, match=r"the training text is no UTF-8 .*noise"):
        stream(tmp_path / "noise")
    assert len(stream(tmp_path / "noise", "bytes_with_end").train) == 256 * 18
    (tmp_path / "short").write_text("a few words " * 3)
    with pytest.raises(ValueError, match=r"length must be from 1 to the \d+ tokens of the held-out text, got 8"):
        windows(tmp_path / "short")


# ---------------------------------------------------------------------------------------------------------------------
# Runs

MICRO = """
title: A text by a model of a few thousand parameters
model: {{model_type: {model}, vocab_size: 300, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, {field}}}
data: {{source: {source}, path: {path}, length: 8, tokenizer: {{train: bpe, vocab_size: 300}}}}
training: {{max_steps: 2, per_device_train_batch_size: 4, per_device_eval_batch_size: 4, eval_strategy: 'no'}}
"""


def recipe(place, text, model="rope_decoder", field="max_position_embeddings: 16", source="text_file_stream"):
    file = place / "micro.yaml"
    file.write_text(MICRO.format(model=model, field=field, source=source, path=text))
    return file


@pytest.fixture(scope="module", params=["text_file_stream", "text_file", "transformer_xl"])
def run(request, text, tmp_path_factory):
    """(a finished run, its source); do not write into it."""
    place = tmp_path_factory.mktemp("run")
    if request.param == "transformer_xl":
        file = recipe(place, text, request.param, "mem_len: 8, cutoffs: [20, 100]")
        return train(load_recipe(file), place / "run"), "text_file_stream"
    file = recipe(place, text, source=request.param, field="max_position_embeddings: 260")
    return train(load_recipe(file), place / "run"), request.param


def test_runs_measure_bits_per_byte_and_leave_their_tokenizer(run, text):
    folder, source = run
    metrics = json.loads((folder / "metrics.json").read_text())
    data = load_data({"source": source, "path": str(text), "length": 8, "tokenizer": TRAINED})
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == data.processor.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(folder)
    if source == "text_file":
        nats, tokens = bits_per_dim(model, data.eval) * math.log(2), len(data.eval) * 8
    else:
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)
        losses = stream_losses(model, data.eval, 8, data.start_id, num_streams=4)
        nats, tokens = losses.mean(), len(losses)
    assert metrics["bits_per_byte"] == pytest.approx(nats * tokens / math.log(2) / data.eval_bytes, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats), rel=1e-3)
    card = (folder / "README.md").read_text()
    assert "bits per byte" in card
    assert "per token" in card
    assert evaluate(folder, batch_size=4, progress=False)["bits_per_byte"] == pytest.approx(metrics["bits_per_byte"])
    assert (folder / "samples.txt").read_text()


def test_fine_tuning_keeps_the_tokenizer_of_the_weights(run, text, tmp_path):
    folder, _ = run
    other = tmp_path / "other"
    other.write_text("quite another text, with a zebra and an ox.\n" * 200)
    asked = [f"data.path={other}"]
    with pytest.raises(RecipeError, match=r"is not the one beside .*; give data.tokenizer="):
        train(load_recipe(folder / "recipe.yaml", asked), tmp_path / "tuned", weights=folder)
    tuned = train(
        load_recipe(folder / "recipe.yaml", [*asked, f"data.tokenizer={folder}"]), tmp_path / "tuned", weights=folder
    )
    beside = [AutoTokenizer.from_pretrained(place).get_vocab() for place in (folder, tuned)]
    assert beside[0] == beside[1]


def test_models_that_do_not_fit_name_both(text, tmp_path):
    file = recipe(tmp_path, text)
    with pytest.raises(RecipeError, match=r"vocab_size=280 is too small: the data has 300 ids, those of its tokenizer"):
        train(load_recipe(file, ["model.vocab_size=280"]), tmp_path / "run")
    file = recipe(tmp_path, text, "transformer_xl", "mem_len: 8, cutoffs: [100, 400]")
    with pytest.raises(RecipeError, match="cutoffs must rise between 0 and vocab_size=300, both excluded"):
        train(load_recipe(file), tmp_path / "run")


def test_helps_are_translated_with_a_tokenizer_of_bytes(tmp_path):
    write_help(tmp_path)
    data = load_data({"source": "libreoffice_help", "path": str(tmp_path), "tokenizer": "bytes_with_end"})
    assert len(data.processor) == 258

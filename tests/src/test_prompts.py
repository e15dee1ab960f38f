"""Prompts from the command line: gone on with, translated, filled in, and streamed as they are made."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, TextStreamer, set_seed
from typer.testing import CliRunner

from hf_tfamily import (
    CompressiveTransformerConfig,
    CompressiveTransformerForCausalLM,
    MemorizingTransformerConfig,
    MemorizingTransformerForCausalLM,
    RoPEDecoderConfig,
    RoPEDecoderForCausalLM,
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
    VanillaEncoderConfig,
    VanillaEncoderForMaskedLM,
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    XLSparseConfig,
    XLSparseForCausalLM,
)
from hf_tfamily.data import byte_tokenizer
from hf_tfamily.finished import open_model
from hf_tfamily.prompts import fill_in, go_on, prompt_ids, room_behind
from hf_tfamily_cli import app

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MEMORY = {"mem_len": 12, "initializer_range": 0.3, **SIZES}
RECURRENT = {
    "transformer_xl": (TransformerXLForCausalLM, TransformerXLConfig(vocab_size=257, **MEMORY)),
    "compressive_transformer": (
        CompressiveTransformerForCausalLM,
        CompressiveTransformerConfig(vocab_size=257, **MEMORY),
    ),
    "memorizing_transformer": (
        MemorizingTransformerForCausalLM,
        MemorizingTransformerConfig(vocab_size=257, memory_size=40, num_neighbors=4, **MEMORY),
    ),
    "xl_sparse": (XLSparseForCausalLM, XLSparseConfig(vocab_size=257, **MEMORY)),
}
PROMPT = "In the beginning God created the heaven and the earth."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a saved model and its tokenizer for each kind; do not write into them."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("models")
    rope = RoPEDecoderConfig(vocab_size=257, max_position_embeddings=64, initializer_range=0.3, **SIZES)
    sparse = SparseTransformerConfig(vocab_size=257, position_shape=[4, 8], **SIZES)
    masked = VanillaEncoderConfig(vocab_size=258, max_position_embeddings=32, **SIZES)
    pairs = VanillaTransformerConfig(vocab_size=260, bos_token_id=0, pad_token_id=0, eos_token_id=1, **SIZES)
    made = {name: model_class(config) for name, (model_class, config) in RECURRENT.items()}
    made |= {
        "rope": RoPEDecoderForCausalLM(rope),
        "sparse": SparseTransformerForCausalLM(sparse),
        "masked": VanillaEncoderForMaskedLM(masked),
        "pairs": VanillaTransformerForConditionalGeneration(pairs),
    }
    tokenizers = {"masked": masked_bytes(), "pairs": pair_bytes()}
    for name, model in made.items():
        model.save_pretrained(place / name)
        tokenizers.get(name, byte_tokenizer()).save_pretrained(place / name)
    return place


def masked_bytes():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def pair_bytes():
    """Words of two letters' alphabet, which end with an end token, as translations need it."""
    words = ["<pad>", "</s>", "<unk>", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def run():
    def run(*arguments, stdin=None):
        result = CliRunner().invoke(app, ["sample", *map(str, arguments)], input=stdin)
        return result.exit_code, result.stdout, " ".join(result.stderr.split())

    return run


@pytest.mark.parametrize("name", [*RECURRENT, "rope"])
def test_text_file_and_standard_input_say_the_same(folders, run, name, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    options = ("--max-new-tokens", 8, "--seed", 3)
    code, said, errors = run(folders / name, "--prompt", PROMPT, *options)
    assert code == 0, errors
    assert said.strip()
    for arguments, stdin in (
        (("--prompt-file", tmp_path / "prompt.txt"), None),
        (("--prompt", "-"), PROMPT + "\n"),
        (("--prompt-file", "-"), PROMPT + "\r\n"),
    ):
        assert run(folders / name, *arguments, *options, stdin=stdin) == (0, said, "")


@pytest.mark.parametrize("name", RECURRENT)
def test_a_long_prompt_is_read_segment_by_segment(folders, name, capsys):
    """The first token is drawn from what reading by hand, with the memory in between, says."""
    opened = open_model(folders / name, None)
    model = opened.model
    assert model.config.segment_length == 12
    ids, memory = torch.tensor([prompt_ids(opened.processor, PROMPT)]), None
    for segment in ids.split(12, dim=1):
        outputs = model(segment.to(model.device), past_key_values=memory, use_cache=True)
        memory = outputs.past_key_values
    likeliest = opened.processor.decode(outputs.logits[0, -1].argmax().reshape(1), skip_special_tokens=True)
    go_on(model, opened.processor, PROMPT, max_new_tokens=1, top_k=1)
    assert capsys.readouterr().out == likeliest + "\n"


def test_what_is_made_is_what_generate_makes(folders, capsys):
    opened = open_model(folders / "rope")
    set_seed(1)
    go_on(opened.model, opened.processor, "abc", max_new_tokens=10, top_k=20, temperature=0.7)
    said = capsys.readouterr().out
    set_seed(1)
    ids = torch.tensor([[256, *b"abc"]], device=opened.model.device)
    asked = GenerationConfig(do_sample=True, max_new_tokens=10, top_k=20, temperature=0.7, pad_token_id=256)
    made = opened.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=asked)
    assert said == opened.processor.decode(made[0, 4:], skip_special_tokens=True) + "\n"


def test_words_are_printed_as_they_are_made(folders, monkeypatch):
    printed = []
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda self, text, stream_end=False: printed.append(text))
    opened = open_model(folders / "rope")
    opened.model.lm_head.weight.data[32] += 1.0  # blanks
    go_on(opened.model, opened.processor, "a", max_new_tokens=40)
    assert len(printed) > 2


def test_ids_that_the_model_does_not_know(folders, tmp_path, run):
    folder = shutil.copytree(folders / "rope", tmp_path / "copy")
    byte_tokenizer(end=True).save_pretrained(folder)
    code, _, errors = run(folder, "--prompt", "a<end>")
    assert code == 2
    assert "The tokenizer makes id 257 of the prompt, and the model has vocab_size=257" in errors


def test_several_continuations_and_the_tokenizer_of_elsewhere(folders, run):
    code, said, errors = run(
        folders / "rope", "--prompt", "a", "--count", 2, "--max-new-tokens", 3, "--tokenizer", "bytes"
    )
    assert (code, said.count("==========")) == (0, 1), errors
    code, _, errors = run(folders / "rope", "--prompt", "a", "--tokenizer", "bytes_with_end")
    assert code == 2
    assert "--tokenizer bytes_with_end has 258 ids, and the model vocab_size=257; give its own." in errors


def test_room(folders):
    model = open_model(folders / "sparse").model
    assert room_behind(model, 10, None) == 23
    assert room_behind(model, 32, None) == 1
    with pytest.raises(ValueError, match="The prompt has 33 tokens, and the model takes 32; give a shorter one"):
        room_behind(model, 33, None)
    with pytest.raises(ValueError, match=r"--max-new-tokens 24 is too many: .* leave room for 23"):
        room_behind(model, 10, 24)


def test_every_place_of_a_window_can_be_filled(folders, run):
    code, said, errors = run(folders / "sparse", "--prompt", "a" * 20)
    assert code == 0, errors
    assert said


def test_hidden_places_are_filled_in(folders, run):
    code, said, errors = run(folders / "masked", "--prompt", "In the <mask><mask>ginning")
    assert code == 0, errors
    opened = open_model(folders / "masked")
    assert said.strip("\n") == fill_in(opened.model, opened.processor, "In the <mask><mask>ginning")
    assert said.startswith("In the ")
    assert said.endswith("ginning\n")
    for prompt, message in (
        ("In the beginning", "The prompt holds no <mask> to fill in."),
        ("<mask>" * 40, "The prompt has 41 tokens, and the model takes 32; give a shorter one."),
    ):
        code, _, errors = run(folders / "masked", "--prompt", prompt)
        assert (code, errors) == (2, f"Error: {message}")
    code, _, errors = run(folders / "masked")
    assert code == 2
    assert "Give a text with hidden places" in errors


def test_lines_are_translated(folders, run):
    code, said, errors = run(folders / "pairs", "--prompt", "a b c\n\nd e", "--max-new-tokens", 4)
    assert code == 0, errors
    assert len(said.split("\n")) == 4
    assert run(folders / "pairs", "--prompt", "a b c", "--max-new-tokens", 4)[1] == said.split("\n")[0] + "\n"
    assert run(folders / "pairs", "--max-new-tokens", 4, stdin="a b c\n")[1] == said.split("\n")[0] + "\n"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rope", ("--prompt", "a", "--prompt-file", "b"), "Give --prompt or --prompt-file, not both."),
        ("rope", ("--prompt-file", "nowhere.txt"), "There is no prompt file nowhere.txt."),
        ("rope", ("--prompt", "\udcff"), "The prompt is no UTF-8 text."),
        ("rope", ("--prompt", "a" * 70), "The prompt has 71 tokens, and the model takes 64; give a shorter one."),
        ("rope", ("--prompt", "a", "--top-p", "1.5"), "--top-p must be above 0 and at most 1, got 1.5."),
        ("rope", ("--prompt", "a", "--repetition-penalty", "0"), "--repetition-penalty must be above 0, got 0.0."),
        ("masked", ("--prompt", "<mask>", "--top-k", "2"), "cannot be sampled with --top-k; options here: --prompt."),
        ("pairs", ("--prompt", "a", "--temperature", "2"), "cannot be sampled with --temperature"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(folders, run, name, arguments, message):
    code, _, errors = run(folders / name, *arguments)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_pictures_take_no_prompt(finished_once, run):
    code, _, errors = run(finished_once, "--prompt", "a")
    assert (code, errors) == (2, "Error: This model makes whole pictures; it takes no --prompt.")

"""The tools people bring, on a text, an image and an encoder-decoder system at least.

Tests of packages that are not installed are skipped; `pip install -e ".[tools]"` brings them all (docs/tools.md).
"""

import importlib
import json

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

import hf_tfamily  # noqa: F401
from hf_tfamily.auto import SYSTEMS
from hf_tfamily.data import byte_tokenizer
from hf_tfamily.hub import export
from tests.hub.examples import NAMES, example, main_head
from tests.tiny_models import TINY, batch_for, tiny_model

# A text, an image and an encoder-decoder system.
THREE = ("rope_decoder", "swin_transformer", "vanilla_transformer")
BYTES = {"vocab_size": 260, "pad_token_id": 256, "bos_token_id": 256}
TEXT = [system.name for system in SYSTEMS if AutoModelForCausalLM in system.heads and TINY[system.name].takes_ids]
RECURRENT = [name for name in NAMES if TINY[name].recurrent]
each_system = pytest.mark.parametrize("name", NAMES)
three_systems = pytest.mark.parametrize("name", THREE)


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def batch(name, labels=True):
    return batch_for(name, main_head(name), labels=labels)


def text_model(name, **changes):
    return tiny_model(name, AutoModelForCausalLM, **BYTES, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Transformers' own


WRITERS = ("rope_decoder", "sparse_transformer", "transformer_xl", "compressive_transformer", "memorizing_transformer")


@pytest.mark.parametrize("name", WRITERS)
def test_pipeline_text_generation(name):
    pipe = pipeline("text-generation", model=text_model(name), tokenizer=byte_tokenizer())
    made = pipe(["To be", "or not to be"], max_new_tokens=4, do_sample=False, batch_size=2)
    assert [result[0]["generated_text"][:5] for result in made] == ["To be", "or no"]


def test_pipeline_image_classification():
    model = tiny_model("swin_transformer", AutoModelForImageClassification, num_labels=3)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    scores = pipeline("image-classification", model=model, image_processor=processor)(Image.new("RGB", (20, 20)))
    assert sum(score["score"] for score in scores) == pytest.approx(1, abs=1e-4)


def test_pipeline_fill_mask():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = tiny_model("vanilla_encoder", AutoModelForMaskedLM, **BYTES)
    found = pipeline("fill-mask", model=model, tokenizer=tokenizer)("To b<mask>", top_k=2)
    assert len(found) == 2


def test_generate_translates():
    """Transformers 5 has no translation pipeline; AutoModelForSeq2SeqLM is the way."""
    model, inputs = tiny_model("vanilla_transformer", AutoModelForSeq2SeqLM), batch("vanilla_transformer")
    ids = model.generate(inputs["input_ids"], num_beams=2, max_new_tokens=4)
    assert ids.shape[0] == 2


@pytest.mark.slow
@three_systems
def test_compiles(name):
    model, inputs = example(name)[0], batch(name, labels=False)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        compiled = torch.compile(model)(**inputs).logits
    torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "trackio"])
def test_trainer_logs(logger, tmp_path, monkeypatch):
    needs(logger)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(1, 25).reshape(2, 12)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, logging_steps=1, report_to=logger, use_cpu=True, save_strategy="no"
    )
    Trainer(tiny_model("rope_decoder", AutoModelForCausalLM), arguments, train_dataset=rows).train()
    assert any((tmp_path / logger).rglob("*")) or any((tmp_path / "out" / "runs").rglob("events*"))


@pytest.mark.slow
def test_trl_fine_tunes_every_causal_model_from_its_folder(tmp_path):
    needs("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": ["Blessed are the peacemakers."] * 4})
    for name in TEXT:
        folder = str(tmp_path / name)
        export(tiny_model(name, AutoModelForCausalLM, vocab_size=257, pad_token_id=256), folder, byte_tokenizer())
        arguments = SFTConfig(
            f"{folder}/out", max_steps=2, logging_steps=1, report_to="none", use_cpu=True, bf16=False, max_length=32
        )
        trainer = SFTTrainer(folder, arguments, train_dataset=rows)
        assert trainer.train_dataset[0]["input_ids"][-1] == 256, "a text ends with the token that ends one"
        trainer.train()
        assert all(0 < entry["loss"] < 8 for entry in trainer.state.log_history if "loss" in entry)


# ---------------------------------------------------------------------------------------------------------------------
# lm-eval


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task of bits per byte on two texts, as lm-eval wants it: YAML beside JSON."""
    needs("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    rows = [{"text": "It was the best of times, it was the worst of times."}, {"text": "Call me Ishmael."}]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "texts.yaml").write_text(
        f"task: texts\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'texts.jsonl'}\n"
        "test_split: train\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    return tmp_path


def bits_per_byte(model, task):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    found = simple_evaluate(model=model, tasks=["texts"], task_manager=manager, bootstrap_iters=0)
    return found["results"]["texts"]["bits_per_byte,none"]


def language_model(cls, model, **options):
    return cls(pretrained=model, tokenizer=byte_tokenizer(), backend="causal", device="cpu", **options)


@pytest.mark.slow
def test_lm_eval(task):
    from lm_eval.models.huggingface import HFLM

    found = bits_per_byte(language_model(HFLM, text_model("rope_decoder"), max_length=128), task)
    assert 7 < found < 9


@pytest.mark.slow
@pytest.mark.parametrize("name", RECURRENT)
def test_lm_eval_keeps_memory(name, task):
    """Windows of 8 with memory say what one window over all says; without it they say something else."""
    from lm_eval.models.huggingface import HFLM

    from hf_tfamily.lm_eval_models import RecurrentLM

    torch.manual_seed(0)
    sizes = {"compressed_mem_len": 64} if name == "compressive_transformer" else {}
    model = text_model(name, mem_len=64, initializer_range=0.3, **sizes)
    whole = bits_per_byte(language_model(HFLM, model, max_length=64), task)
    kept = bits_per_byte(language_model(RecurrentLM, model, max_length=8), task)
    dropped = bits_per_byte(language_model(HFLM, model, max_length=8), task)
    assert kept == pytest.approx(whole, abs=1e-4)
    assert abs(dropped - whole) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation


def quantised(kind):
    if kind == "bitsandbytes":
        needs("bitsandbytes")
        return BitsAndBytesConfig(load_in_8bit=True)
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.slow
@three_systems
@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_eight_bits(name, kind, tmp_path):
    """Loaded from an ordinary checkpoint, the logits stay near; the output layer keeps its precision."""
    config = quantised(kind)
    model, inputs = example(name)[0].eval(), batch(name, labels=False)
    model.save_pretrained(tmp_path)
    small = main_head(name).from_pretrained(tmp_path, quantization_config=config)
    with torch.no_grad():
        expected, found = model(**inputs).logits, small(**inputs).logits.float()
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert (found - expected).abs().max() > 0

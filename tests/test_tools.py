"""The tools people bring, on a text, an image and an encoder-decoder system at least.

Tests of packages that are not installed are skipped; `pip install -e ".[tools]"` brings them all (docs/tools.md).
"""

import importlib
import json

import pytest
import torch
from PIL import Image
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

import hf_tfamily  # noqa: F401
from hf_tfamily.auto import SYSTEMS
from hf_tfamily.data import byte_tokenizer
from hf_tfamily.hub import export
from hf_tfamily.modeling.image_processing_tokens import ImageTokenProcessor
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


# ---------------------------------------------------------------------------------------------------------------------
# TRL and Lightning


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folder with a tiny model of bytes, its code, and a tokenizer."""
    home = tmp_path_factory.mktemp("models")
    for name in TEXT:
        export(tiny_model(name, AutoModelForCausalLM, vocab_size=257, pad_token_id=256), home / name, byte_tokenizer())
    return {name: str(home / name) for name in TEXT}


def fine_tuned(model, folder, **settings):
    """An SFTTrainer after two steps."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": ["Blessed are the peacemakers."] * 4})
    common = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    arguments = SFTConfig(f"{folder}/sft", max_length=32, **common, **settings)
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=byte_tokenizer())
    trainer.train()
    assert all(0 < entry["loss"] < 8 for entry in trainer.state.log_history if "loss" in entry)
    return trainer


@pytest.mark.slow
def test_trl_fine_tunes_every_causal_model_from_its_folder(folders):
    needs("trl")
    for folder in folders.values():
        trainer = fine_tuned(folder, folder)
        assert trainer.train_dataset[0]["input_ids"][-1] == 256, "a text ends with the token that ends one"


@pytest.mark.slow
def test_trl_packs_texts_where_a_model_keeps_them_apart(folders):
    """Models that remember segments say that they do not."""
    needs("trl")
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        if TINY[name].recurrent:
            with pytest.raises(ValueError, match="Packed documents are not supported"):
                fine_tuned(model, folder, packing=True)
        else:
            fine_tuned(model, folder, packing=True)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True], ids=["folder", "object"])
def test_trl_prefers_one_answer_to_another(loaded, folders):
    """DPO, whose reference model is loaded from where the model came from."""
    needs("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    answers = {"chosen": ["the peacemakers."] * 4, "rejected": ["the war."] * 4}
    rows = Dataset.from_dict({"prompt": ["Blessed are "] * 4, **answers})
    common = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    for folder in folders.values():
        model = AutoModelForCausalLM.from_pretrained(folder) if loaded else folder
        arguments = DPOConfig(f"{folder}/dpo", per_device_train_batch_size=4, learning_rate=1e-3, **common)
        trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=byte_tokenizer())
        trainer.train()
        first, second = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert second < first == pytest.approx(0.693, abs=2e-2)


@pytest.mark.slow
def test_lightning_trains_every_system():
    needs("lightning")
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, rows, number):
            loss = self.model(**rows).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for name in NAMES:
        inputs = batch(name)
        rows = [{key: value[row] for key, value in inputs.items()} for row in range(2)]
        trainer = lightning.Trainer(
            max_steps=2, max_epochs=2, accelerator="cpu", enable_model_summary=False, log_every_n_steps=1, **quiet
        )
        trainer.fit(Module(example(name)[0].train()), torch.utils.data.DataLoader(rows, batch_size=2))
        assert trainer.global_step == 2
        assert 0 < float(trainer.callback_metrics["loss"]) < 8


# ---------------------------------------------------------------------------------------------------------------------
# Servers


def test_the_rope_decoder_meets_what_vllm_asks_for():
    """Its backend for Transformers models gives embeddings, no cache, and its own attention layers to hand down."""
    asked = []

    def attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
        asked.append((attention_instances[module.layer_idx], attention_mask))
        key, value = (heads.repeat_interleave(query.shape[1] // key.shape[1], 1) for heads in (key, value))
        seen = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return seen.transpose(1, 2), None

    model = tiny_model("rope_decoder", AutoModel).eval()
    ids = torch.randint(1, model.config.vocab_size, (1, 9))
    expected = model(ids, use_cache=False).last_hidden_state
    AttentionInterface.register("like_vllm", attention)
    model.config._attn_implementation = "like_vllm"
    layers = {layer: f"layer {layer}" for layer in range(model.config.num_hidden_layers)}
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "position_ids": torch.arange(9)[None]}
    found = model(input_ids=None, **inputs, use_cache=False, attention_instances=layers, return_dict=False)[0]
    torch.testing.assert_close(found, expected)
    assert asked == [(layer, None) for layer in layers.values()]
    assert model.config.base_model_tp_plan
    assert model.config.base_model_pp_plan


@pytest.mark.slow
def test_the_demo_draws_digits():
    needs("gradio")
    import digits_demo

    processor = ImageTokenProcessor(height=4, width=4, channels=1, levels=5, num_classes=3)
    model = tiny_model("sparse_transformer", AutoModelForCausalLM)
    no_levels = list(range(processor.levels, model.config.vocab_size))
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_length=17, suppress_tokens=no_levels)
    page = digits_demo.app(model, processor)
    pictures = digits_demo.draw(model, processor, label=1, count=2, temperature=0.5, seed=0)
    assert [picture.size for picture in pictures] == [(digits_demo.SHOWN,) * 2] * 2
    assert "Gallery" in str(page.config)
    with pytest.raises(ValueError, match="draws no pictures of classes"):
        digits_demo.app(model, byte_tokenizer())


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

"""Label smoothing: the loss is the one written out below, for targets where each head has them, or it is refused."""

import pickle

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_tfamily import RecurrentTrainer, RoPEDecoderForCausalLM
from hf_tfamily.data import SegmentCollator, StreamDataset, byte_tokenizer
from hf_tfamily.label_smoothing import SmoothingCollator, smooth_inside
from tests.loss_cases import ROWS, cases
from tests.tiny_models import VOCABULARY, all_heads, tiny_model

SMOOTHING = 0.1
TARGETS = ("labels", "shift_labels", "counted_targets")
CASES = cases()
CAUSAL = [name for name, head in all_heads() if head is AutoModelForCausalLM]
COSTLY = ("adaptive_span", "compressive_transformer", "universal_transformer")  # whose loss is not of logits alone
PLAIN = [name for name in CAUSAL if name not in COSTLY]
# Heads whose labels are at their own positions, and for which the Trainer's smoothing is right as it is.
ALIGNED = [
    *(name for name in CASES if name.endswith("single_label_classification") and "compressive" not in name),
    *("rope_decoder-TokenClassification", "vanilla_encoder-MaskedLM"),
]
REFUSED = {
    "compressive_transformer-CausalLM": "the compression learns by a loss that only the model has",
    "compressive_transformer-adaptive": "the compression learns by a loss that only the model has",
    "compressive_transformer-auto_encoding": "the compression learns by a loss that only the model has",
    "compressive_transformer-single_label_classification": "the compression learns by a loss that only the model has",
    "adaptive_span-CausalLM": "spans pay a cost that only the model knows",
    "universal_transformer-CausalLM": "halting learns by a cost that only the model has",
    "universal_transformer-Seq2SeqLM": "halting learns by a cost that only the model has",
    "image_transformer-mixture-CausalLM": "a mixture of logistics has its own, unsmoothed",
    "image_transformer-mixture-Seq2SeqLM": "a mixture of logistics has its own, unsmoothed",
    "rope_decoder-next_token": "This batch came without its labels",
    "transformer_xl-next_token": "This batch came without its labels",
    "compressive_transformer-next_token": "This batch came without its labels",
}


def train(model, rows, folder, trainer_class=Trainer, collate=None, inside=False, **arguments):
    """A Trainer after one step or more, under label smoothing."""
    arguments = {"max_steps": 1, "per_device_train_batch_size": ROWS, "learning_rate": 0.0, **arguments}
    arguments = TrainingArguments(
        output_dir=str(folder),
        label_smoothing_factor=SMOOTHING,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = trainer_class(model=model, args=arguments, data_collator=collate, train_dataset=rows)
    if inside:
        smooth_inside(trainer)
    trainer.train()
    return trainer


def first_loss(*arguments, **options) -> float:
    return train(*arguments, **options).state.log_history[0]["loss"]


def written_out(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean over the targets [...] that count of (1 - e) -log p(target) + e mean over ids of -log p(id)."""
    nats = -logits.double().log_softmax(dim=-1)
    own = nats.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    losses = (1 - SMOOTHING) * own + SMOOTHING * nats.mean(dim=-1)
    return losses[targets != -100].mean().item()


def logits_of(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{key: value for key, value in batch.items() if key not in TARGETS}).logits


def close(value: float):
    return pytest.approx(value, abs=1e-5, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# By the stock Trainer, outside the model


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_learn_the_next_token(name, tmp_path):
    """And not to copy their input: after 20, 21, 22 comes 23."""
    torch.manual_seed(0)
    model = tiny_model(name, AutoModelForCausalLM)
    rows = [{"input_ids": torch.arange(13) + first, "labels": torch.arange(13) + first} for first in range(1, 65)]
    inside = name in COSTLY
    train(model, rows, tmp_path, inside=inside, max_steps=60, learning_rate=2e-2, per_device_train_batch_size=16)
    ids = torch.tensor([[20, 21, 22]])
    assert model.eval()(ids, use_cache=False).logits[0, -1].argmax() == 23


@pytest.mark.parametrize("name", [*(f"{name}-CausalLM" for name in PLAIN), "transformer_xl-adaptive"])
def test_causal_losses_equal_those_written_out(name, tmp_path):
    case = CASES[name]
    batch = case.collate(case.rows)
    expected = written_out(logits_of(case.build(), batch)[:, :-1], batch["labels"][:, 1:])
    options = {"per_device_train_batch_size": ROWS // 4, "gradient_accumulation_steps": 4}
    assert first_loss(case.build(), case.rows, tmp_path, **options) == close(expected)


@pytest.mark.parametrize("name", ALIGNED)
def test_aligned_losses_equal_those_written_out(name, tmp_path):
    case = CASES[name]
    batch = case.collate(case.rows)
    expected = written_out(logits_of(case.build(), batch), batch["labels"])
    assert first_loss(case.build(), case.rows, tmp_path) == close(expected)


class Tokenizer:
    """As much of one as DataCollatorForSeq2Seq asks for."""

    padding_side = "right"

    def pad(self, features, **kwargs):
        return {key: torch.stack([torch.as_tensor(row[key]) for row in features]) for key in features[0]}


@pytest.mark.parametrize("name", ["vanilla_transformer-Seq2SeqLM", "image_transformer-Seq2SeqLM"])
def test_sequence_to_sequence_with_the_collator_of_transformers(name, tmp_path):
    """The collator makes the decoder's input, since the model sees no labels."""
    case = CASES[name]
    model = case.build()
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in case.rows]
    collate = DataCollatorForSeq2Seq(Tokenizer(), model)
    batch = collate([dict(row) for row in rows])
    expected = written_out(logits_of(case.build(), batch), batch["labels"])
    assert first_loss(model, rows, tmp_path, collate=collate) == close(expected)
    with pytest.raises(ValueError, match="Give decoder_input_ids"):
        train(model, rows, tmp_path)


@pytest.mark.parametrize("name", PLAIN)
def test_under_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    case = CASES[f"{name}-CausalLM"]
    batch = case.collate(case.rows)
    expected = written_out(logits_of(case.build(), batch)[:, :-1], batch["labels"][:, 1:])
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    assert first_loss(peft.get_peft_model(case.build(), adapter), case.rows, tmp_path) == close(expected)


def test_prompt_tuning_smooths_inside():
    """The Trainer looks for the name of another class there, for Llama's too, and would not move labels."""
    peft = pytest.importorskip("peft")
    case = CASES["rope_decoder-CausalLM"]
    batch = case.collate(case.rows)
    model = peft.get_peft_model(case.build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    expected = written_out(
        logits_of(model, batch)[:, 2:-1], batch["labels"]
    )  # the prompt's end predicts the first token
    smoothed = model.train()(**SmoothingCollator(case.collate, SMOOTHING)(case.rows))
    assert smoothed.loss.item() == close(expected)


def test_a_collator_without_labels(tmp_path):
    """The Trainer would have nothing to smooth."""
    case = CASES["rope_decoder-next_token"]

    def collate(rows):
        batch = case.collate(rows)
        return {key: batch[key] for key in ("input_ids", "shift_labels")}

    expected = first_loss(case.build(), case.rows, tmp_path, collate=case.collate, inside=True)
    assert first_loss(case.build(), case.rows, tmp_path, collate=collate, inside=True) == close(expected)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_where_the_trainer_cannot(name, tmp_path):
    case = CASES[name]
    with pytest.raises(ValueError, match=REFUSED[name]) as refusal:
        train(case.build(), case.rows, tmp_path, collate=case.collate)
    assert "mixture" in name or "SmoothingCollator" in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# By the model


INSIDE = [name for name in CASES if name.endswith(("LM", "adaptive", "next_token", "auto_encoding"))]


@pytest.mark.parametrize("name", [name for name in INSIDE if "mixture" not in name])
def test_models_smooth_by_themselves(name, tmp_path):
    """In training alone, each target once, and with every part of the loss."""
    case = CASES[name]
    batch, model = case.collate(case.rows), case.build()
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    targets = batch["labels"] if case.head is AutoModelForSeq2SeqLM or "Masked" in name else shifted
    expected = written_out(logits_of(model, batch), batch.get("shift_labels", targets))
    trained = case.build().train()(**batch)
    if case.name in COSTLY:
        further = (trained.loss - model.eval()(**batch).loss).item()
        assert further > 0
        expected += further
    collate = SmoothingCollator(case.collate, SMOOTHING)
    assert case.build().train()(**collate(case.rows)).loss.item() == close(expected)
    assert first_loss(case.build(), case.rows, tmp_path, collate=case.collate, inside=True) == close(expected)
    evaluated = case.build().eval()
    assert evaluated(**collate(case.rows)).loss.item() == close(evaluated(**batch).loss.item())


@pytest.mark.parametrize("kind", ["CausalLM", "Seq2SeqLM"])
def test_a_mixture_of_logistics_refuses(kind, tmp_path):
    case = CASES[f"image_transformer-mixture-{kind}"]
    batch = SmoothingCollator(case.collate, SMOOTHING)(case.rows)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 is for output='categorical'"):
        case.build().train()(**batch)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 is for output='categorical'"):
        train(case.build(), case.rows, tmp_path, collate=case.collate, inside=True)


@pytest.mark.parametrize(
    "name",
    ["transformer_xl-CausalLM", "transformer_xl-adaptive", "xl_sparse-CausalLM", "compressive_transformer-CausalLM"],
)
def test_recurrent_trainer(name, tmp_path):
    """Its targets are in shift_labels, and its memory goes on."""
    streams = StreamDataset(np.arange(200) % (VOCABULARY - 6), ROWS, 8, VOCABULARY - 5)
    batches = [SegmentCollator()([streams[i + row] for row in range(ROWS)]) for i in (0, ROWS)]
    case = CASES[name]
    model, memory, expected = case.build().eval(), None, []
    for batch in batches:
        outputs = model(batch["input_ids"], past_key_values=memory, use_cache=True)
        memory = outputs.past_key_values
        expected.append(written_out(outputs.logits, batch["shift_labels"]))
    history = train(case.build(), streams, tmp_path, RecurrentTrainer, max_steps=2).state.log_history
    found = [entry["loss"] for entry in history if "loss" in entry]
    if name.startswith("compressive"):
        model, memory = case.build().train(), None
        for number, batch in enumerate(batches):
            outputs = model(**batch, past_key_values=memory, use_cache=True)
            memory = outputs.past_key_values
            expected[number] += outputs.compression_loss.item()
    assert found == [close(loss) for loss in expected]


def test_recurrent_trainer_with_a_loss_of_ones_own(tmp_path):
    """It is given the labels of a StreamDataset, which nobody moves."""
    streams = StreamDataset(np.arange(200) % (VOCABULARY - 6), ROWS, 8, VOCABULARY - 5)
    case = CASES["transformer_xl-CausalLM"]
    batch = SegmentCollator()([streams[row] for row in range(ROWS)])
    logits = logits_of(case.build(), {"input_ids": batch["input_ids"]})

    def smoothed(outputs, labels, num_items_in_batch=None):
        return torch.tensor(written_out(outputs.logits.detach(), labels), requires_grad=True) * 1.0

    class Trained(RecurrentTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, compute_loss_func=smoothed)

    assert first_loss(case.build(), streams, tmp_path, Trained) == close(written_out(logits, batch["shift_labels"]))


# ---------------------------------------------------------------------------------------------------------------------
# The table of names


def test_names_in_the_table_resolve_nothing():
    """AutoModelForCausalLM looks up model types."""
    ours = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]}
    assert {type(tiny_model(name, AutoModelForCausalLM)).__name__ for name in CAUSAL} <= ours
    assert "CausalLMHead" not in ours
    assert not ours & CONFIG_MAPPING_NAMES.keys()


def test_subclasses_enter_their_own_names():
    class Renamed(RoPEDecoderForCausalLM):
        pass

    assert "Renamed" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_models_are_pickled_with_their_losses():
    model = CASES["rope_decoder-CausalLM"].build()
    assert pickle.loads(pickle.dumps(model)).loss_function is model.loss_function


def test_pipelines_take_them():
    tokenizer = byte_tokenizer()
    for name in CAUSAL:
        model = tiny_model(name, AutoModelForCausalLM)
        assert pipeline("text-generation", model=model, tokenizer=tokenizer).model is model

"""torch.export with batch and length left open, and ONNX: what was exported at one size is right at another."""

import importlib.util

import pytest
import torch
from torch.export import Dim, export
from transformers import (
    AutoBackbone,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_tfamily import Local, set_attention_patterns
from tests.tiny_models import TINY, batch_for, picture_inputs, tiny_model

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BACKENDS = ("eager", "sdpa", "block_sparse")
TEXT = [
    ("rope_decoder", AutoModelForCausalLM),
    ("sparse_transformer", AutoModelForCausalLM),
    ("vanilla_encoder", AutoModelForMaskedLM),
    ("vanilla_transformer", AutoModelForSeq2SeqLM),
    ("image_transformer", AutoModelForCausalLM),
    ("image_transformer", AutoModelForSeq2SeqLM),
]
CLASSIFIERS = [
    (name, AutoModelForSequenceClassification) for name in ("rope_decoder", "sparse_transformer", "vanilla_encoder")
]
PICTURES = [AutoModelForImageClassification, AutoModelForMaskedImageModeling, AutoBackbone]
FAST = {("rope_decoder", "block_sparse"), ("vanilla_encoder", "sdpa"), ("sparse_transformer", "eager")}


def first_output(outputs):
    if "feature_maps" in outputs:
        return outputs.feature_maps[-1]
    return next(value for value in outputs.values() if torch.is_tensor(value))


def lively(model):
    """An output layer of 0 would make every comparison pass."""
    if hasattr(model, "lm_head"):
        torch.nn.init.normal_(model.lm_head.weight)
    return model


def flags_of(name):
    return {} if name in ("swin_transformer", "vanilla_encoder") else {"use_cache": False}


def text_inputs(name, head, batch_size, length, masked):
    """Rows of which the first is padded on the left."""
    inputs = TINY[name].inputs(batch_size, length)
    if head is AutoModelForSeq2SeqLM and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    if masked:
        inputs["attention_mask"] = torch.ones(batch_size, length, dtype=torch.long)
        inputs["attention_mask"][0, :3] = 0
    if masked and "decoder_input_ids" in inputs:
        inputs["decoder_attention_mask"] = torch.ones(batch_size, length, dtype=torch.long)
    return inputs


def holds_at_any_size(model, name, head, masked) -> None:
    model, flags = lively(model), flags_of(name)
    inputs = text_inputs(name, head, 2, 13, masked)
    sizes = {0: Dim("batch", max=64), 1: Dim("length", min=2, max=60)}
    shapes = {**dict.fromkeys(inputs, sizes), **dict.fromkeys(flags)}
    with torch.no_grad():
        program = export(model, (), {**inputs, **flags}, dynamic_shapes=shapes, strict=False).module()
        for batch_size, length in ((2, 13), (1, 7), (3, 21)):
            inputs = text_inputs(name, head, batch_size, length, masked)
            found, expected = (first_output(run(**inputs, **flags)) for run in (program, model))
            if masked and expected.ndim == 3 and "decoder_input_ids" not in inputs:  # padding may say anything
                found, expected = (states[inputs["attention_mask"].bool()] for states in (found, expected))
            torch.testing.assert_close(found, expected, **CLOSE)


def cases(heads, backends=BACKENDS):
    """The quick tier has each backend and most systems once."""
    for name, head in heads:
        for backend in backends:
            slow = () if (name, backend) in FAST else (pytest.mark.slow,)
            yield pytest.param(name, head, backend, marks=slow, id=f"{name}-{head.__name__}-{backend}")


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "padded"])
@pytest.mark.parametrize(("name", "head", "backend"), cases([*TEXT, *CLASSIFIERS]))
def test_text_of_any_batch_and_length(name, head, backend, masked):
    model = tiny_model(name, head)
    model.set_attn_implementation(backend)
    holds_at_any_size(model, name, head, masked)


def llama():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    set_attention_patterns(model, Local(window=4))
    return model


def test_a_stock_model_of_any_batch_and_length():
    holds_at_any_size(llama(), "rope_decoder", AutoModelForCausalLM, masked=True)


def test_a_stock_model_without_a_mask_is_refused():
    """Transformers then looks for packed documents, of which there may be any number."""
    inputs = text_inputs("rope_decoder", AutoModelForCausalLM, 2, 13, False)
    shapes = {"input_ids": {0: Dim("batch"), 1: Dim("length", max=60)}, "use_cache": None}
    with pytest.raises(ValueError, match="give a 2-D attention_mask"):
        export(llama(), (), {**inputs, "use_cache": False}, dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", PICTURES, ids=lambda head: head.__name__)
def test_pictures_of_any_batch(head, backend, training):
    """In training whole branches are left out, for each picture apart."""
    if training and head is not AutoModelForImageClassification:
        pytest.skip("one head will do")
    model = tiny_model("swin_transformer", head, drop_path_rate=0.3).train(training)
    model.set_attn_implementation(backend)
    shapes = {"pixel_values": {0: Dim("batch")}}
    with torch.no_grad():
        program = export(model, (), picture_inputs(2, 20), dynamic_shapes=shapes, strict=False).module()
        pictures = picture_inputs(5, 20)
        found, expected = first_output(program(**pictures)), first_output(model(**pictures))
    assert found.shape == expected.shape
    if not training:
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_pictures_traced_strictly(backend):
    model = tiny_model("swin_transformer", AutoModelForImageClassification)
    model.set_attn_implementation(backend)
    shapes = {"pixel_values": {0: Dim("batch")}}
    program = export(model, (), picture_inputs(2), dynamic_shapes=shapes, strict=True).module()
    pictures = picture_inputs(5)
    torch.testing.assert_close(program(**pictures).logits, model(**pictures).logits, **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


class Logits(torch.nn.Module):
    """A model that takes tensors by place, and returns one."""

    def __init__(self, model, names, flags):
        super().__init__()
        self.model, self.names, self.flags = model, names, flags

    def forward(self, *tensors):
        return self.model(**dict(zip(self.names, tensors)), **self.flags).logits


def in_onnx(name, head, backend, path, sizes=None):
    model, inputs = lively(tiny_model(name, head)), batch_for(name, head, labels=False)
    model.set_attn_implementation(backend)
    wrapped = Logits(model, list(inputs), flags_of(name))
    shapes = None if sizes is None else {"tensors": tuple(sizes for _ in inputs)}
    with torch.no_grad():
        program = torch.onnx.export(wrapped, tuple(inputs.values()), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(path)
    return wrapped, inputs


def onnx_equals(wrapped, inputs, path) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    names = [entry.name for entry in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (tensor.numpy() for tensor in inputs.values()))))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), wrapped(*inputs.values()), atol=1e-4, rtol=1e-4)


ONNX = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")


@ONNX
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "head"), [*TEXT[:-1], ("swin_transformer", AutoModelForImageClassification)], ids=str)
def test_onnx(name, head, backend, tmp_path):
    onnx_equals(*in_onnx(name, head, backend, tmp_path / "model.onnx"), tmp_path / "model.onnx")


@ONNX
@pytest.mark.slow
def test_onnx_of_windows_under_block_sparse(tmp_path):
    """Which are dense once they are cut."""
    head = AutoModelForImageClassification
    onnx_equals(*in_onnx("swin_transformer", head, "block_sparse", tmp_path / "model.onnx"), tmp_path / "model.onnx")


@ONNX
@pytest.mark.slow
def test_onnx_of_any_batch_and_length(tmp_path):
    sizes = {0: Dim("batch"), 1: Dim("length", max=60)}
    wrapped, inputs = in_onnx("sparse_transformer", AutoModelForCausalLM, "sdpa", tmp_path / "model.onnx", sizes)
    onnx_equals(wrapped, {"input_ids": inputs["input_ids"].repeat(2, 2)[:3, :20].contiguous()}, tmp_path / "model.onnx")


@ONNX
@pytest.mark.slow
def test_onnx_of_block_sparse_is_refused(tmp_path):
    with pytest.raises(Exception, match="has no form in ONNX; export under 'sdpa' or 'eager'"):
        in_onnx("sparse_transformer", AutoModelForCausalLM, "block_sparse", tmp_path / "model.onnx")

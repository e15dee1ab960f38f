"""Activations on disk or in bfloat16: where they are, that they come back, and that recipes can say it."""

import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tfamily import training
from hf_tfamily.kept_activations import KEPT_ACTIVATIONS, in_bfloat16, in_memory, on_disk
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.training import train
from tests.tiny_models import tiny_model


def gradients(name, kept, checkpointing=True):
    torch.manual_seed(0)
    model = tiny_model(name, AutoModelForCausalLM).train()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(1, 90, (2, 13), generator=torch.Generator().manual_seed(0))
    with kept:
        model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", ["sparse_transformer", "rope_decoder", "transformer_xl", "vanilla_transformer"])
def test_gradients(name, checkpointing, tmp_path):
    expected = gradients(name, in_memory(), checkpointing)
    assert torch.equal(gradients(name, on_disk(tmp_path, least_bytes=1), checkpointing), expected)
    rounded = gradients(name, in_bfloat16(least_bytes=1), checkpointing)
    assert not torch.equal(rounded, expected)
    assert (rounded - expected).norm() < 0.05 * expected.norm()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_tensor_comes_back_and_its_file_goes(dtype, tmp_path):
    states = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    moved = (states * 1).transpose(1, 2)
    with on_disk(tmp_path, least_bytes=1):
        squares = moved.pow(2)
        reference = weakref.ref(moved)
        del moved
        assert reference() is None, "it is still in memory"
        (folder,) = tmp_path.iterdir()
        assert [file.stat().st_size for file in folder.iterdir()] == [states.nbytes]
        squares.sum().backward()
        del squares
        assert not list(folder.iterdir())
    torch.testing.assert_close(states.grad, 2 * states.detach())


def test_small_tensors_and_weights_stay(tmp_path):
    weight, states = torch.nn.Parameter(torch.randn(2, 3, 4)), torch.randn(1, 2, 3, requires_grad=True)
    with on_disk(tmp_path, least_bytes=60):
        kept = weight.pow(2), (states * 1).pow(2), (torch.eye(9, requires_grad=True) * 1).pow(2)
        (folder,) = tmp_path.iterdir()
        assert not list(folder.iterdir())
        sum(part.sum() for part in kept).backward()


@pytest.mark.parametrize("kept", KEPT_ACTIVATIONS)
def test_a_recipe_says_it(kept, micro_file, tmp_path, monkeypatch):
    asked = []

    def noted(folder):
        asked.append(folder)
        return in_memory()

    monkeypatch.setitem(training.KEPT_ACTIVATIONS, kept, noted)
    changes = [f"training.kept_activations={kept}", "training.max_steps=1", "training.eval_strategy=no"]
    output = train(load_recipe(micro_file, changes), tmp_path / "run")
    assert asked == [output.with_name("run.partial")]
    assert load_recipe(output / "recipe.yaml").training["kept_activations"] == kept


def test_an_unknown_word_is_refused(micro_file):
    with pytest.raises(RecipeError, match=r"kept_activations.*'disk'"):
        load_recipe(micro_file, ["training.kept_activations=disc"])

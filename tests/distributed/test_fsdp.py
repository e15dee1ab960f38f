"""FSDP2 on two CPU processes: every head, and runs of recipes, equal one process; nobody holds more than a part.

Accelerate by itself does not shard on a CPU; how it is made to is said at `fsdp_ranks.fsdp2_on_a_cpu`.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_tfamily.processes import held_bytes
from hf_tfamily.recipes import load_recipe
from hf_tfamily.training import train
from tests.distributed import fsdp_ranks
from tests.distributed.fsdp_ranks import KINDS, RECIPES, STEPS, halves, optimizer_of, sharded_cases
from tests.distributed.pairs import run_ranks

pytestmark = pytest.mark.slow
CASES = sharded_cases()
each_recipe = pytest.mark.parametrize("name", RECIPES)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks leave."""
    folder = tmp_path_factory.mktemp("ranks")
    fsdp_ranks.write_recipes(folder)
    run_ranks(fsdp_ranks.two_ranks, folder)
    return folder


@pytest.fixture(scope="module")
def by_hand(folder):
    return [torch.load(folder / f"by-hand-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module", params=RECIPES)
def one_process(request, folder, tmp_path_factory):
    """A recipe, and what it makes in one process with batches of as many rows."""
    recipe = load_recipe(folder / f"{request.param}.yaml", ["training.per_device_train_batch_size=8"])
    return request.param, train(recipe, tmp_path_factory.mktemp("one") / request.param)


def one(case):
    """Losses of either half and weights, where one process trains on both halves alike."""
    model = case.build().train()
    optimizer, losses = optimizer_of(model), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        each = [model(**half).loss for half in halves(case)]
        (sum(each) / 2).backward()
        optimizer.step()
        losses.append([loss.item() for loss in each])
    return losses, model.state_dict(), optimizer


@pytest.mark.parametrize("name", CASES)
def test_every_head_equals_one_process(name, by_hand):
    losses, weights, optimizer = one(CASES[name])
    ranks = [found[name] for found in by_hand]
    assert list(zip(*(rank["losses"] for rank in ranks))) == [pytest.approx(each, abs=1e-5) for each in losses]
    assert abs(losses[0][0] - losses[-1][0]) > 1e-3
    assert ranks[0]["weights"].keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(ranks[0]["weights"][key], weight, rtol=0, atol=1e-5, msg=key)
    # Each rank counts its steps for itself, four bytes for each parameter.
    steps = 4 * sum(len(group["params"]) for group in optimizer.param_groups)
    assert sum(rank["held"] for rank in ranks) == held_bytes(optimizer) + steps
    assert max(rank["held"] for rank in ranks) < 0.6 * held_bytes(optimizer)


@each_kind
def test_a_resumed_run_equals_one_process(one_process, kind, folder):
    name, alone = one_process
    two = folder / f"{name}-{kind}"
    expected, found = (load_file(path / "model.safetensors") for path in (alone, two))
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-5, msg=key)
    there, here = (json.loads((path / "metrics.json").read_text()) for path in (alone, two))
    assert here["bits_per_byte" if name != "stock" else "bits_per_dim"] == pytest.approx(
        there["bits_per_byte" if name != "stock" else "bits_per_dim"], abs=1e-4
    )
    assert (there["processes"], here["processes"]) == (1, 2)
    assert {path.name for path in alone.iterdir()} == {path.name for path in two.iterdir()}
    assert "bytes_held_by_a_process" not in there
    # Weights, gradients and the two moments of Adam.
    whole = 4 * 4 * here["parameters"]
    assert 0.45 * whole < here["bytes_held_by_a_process"] < 0.6 * whole
    assert AutoModelForCausalLM.from_pretrained(two).num_parameters() == here["parameters"]


@each_recipe
def test_shards_are_put_together(name, folder):
    """The same weights as the checkpoint with a full state dict, which an equal run wrote at the same step."""
    model = AutoModelForCausalLM.from_pretrained(folder / f"{name}-SHARDED_STATE_DICT-consolidated")
    full = load_file(folder / f"{name}-FULL_STATE_DICT-kept.partial" / "checkpoint-2" / "model.safetensors")
    weights = model.state_dict()
    for key, weight in full.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-6, msg=key)


def test_what_is_refused(folder):
    for rank in range(2):
        said = json.loads((folder / f"said-{rank}.json").read_text())
        assert (
            "type SHARDED_STATE_DICT, and this run trains under FSDP with state_dict_type FULL_STATE"
            in said["another kind"]
        )
        assert "ddp_comm_hook='bf16' is for DDP; FSDP averages gradients in" in said["a hook"]
        assert "FSDP was asked for, but Accelerate does not shard in 2 processes on cpu" in said["not forced"]


def test_another_number_of_ranks(folder):
    """Shards are dealt anew; streams and memories are not."""
    run_ranks(fsdp_ranks.three_ranks, folder, ranks=3)
    metrics = json.loads((folder / "stock-SHARDED_STATE_DICT-kept" / "metrics.json").read_text())
    assert (metrics["processes"], metrics["steps"]) == (3, 4)
    for rank in range(3):
        said = (folder / f"three-{rank}.txt").read_text()
        assert "checkpoint-2 was written by 2 process(es), and 3 read it" in said
        assert "resume with 2" in said


def test_gradients_that_cross_in_bfloat16(folder):
    """They are equal but for rounding, of half the bytes; so in a recipe's run, in every step."""
    for rank in range(2):
        (plain, sent), (rounded, sent_rounded) = torch.load(folder / f"averages-{rank}.pt")
        assert sent.keys() == {"torch.float32"}
        assert sent_rounded == {"torch.bfloat16": sent["torch.float32"] // 2}
        largest = max(gradient.abs().max() for gradient in plain.values())
        assert any(not torch.equal(gradient, rounded[name]) for name, gradient in plain.items())
        for name, gradient in plain.items():
            assert (gradient - rounded[name]).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * largest
        reduced = json.loads((folder / f"reduced-{rank}.json").read_text())
        metrics = json.loads((folder / "stock-hook" / "metrics.json").read_text())
        assert reduced["torch.bfloat16"] == 2 * metrics["parameters"] * metrics["steps"]

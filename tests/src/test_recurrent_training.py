"""RecurrentTrainer: equal to a plain loop over segments, over however many steps, runs and processes it is spread."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_tfamily.data import SegmentCollator, StreamDataset
from hf_tfamily.recurrent_training import empty_memory
from hf_tfamily.stream_evaluation import stream_losses
from hf_tfamily.training import RecurrentTrainer
from tests.tiny_models import tiny_model

STREAMS, LENGTH, START = 4, 6, 90
TEXT = np.random.default_rng(0).integers(0, START, 150)  # streams of 38 tokens: the last segments are not full


def build(model_type="transformer_xl", **changes):
    torch.manual_seed(0)
    return tiny_model(model_type, AutoModelForCausalLM, mem_len=10, **changes)


def streams(ids=TEXT, length=LENGTH):
    return StreamDataset(ids, STREAMS, length, START)


def trainer(folder, model, trainer_class=RecurrentTrainer, **arguments):
    arguments = {"max_steps": 5, "per_device_train_batch_size": STREAMS, **arguments}
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=STREAMS,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    return trainer_class(
        model=model, args=arguments, train_dataset=streams(), eval_dataset=streams(), data_collator=SegmentCollator()
    )


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def assert_same(model, expected, atol=0.0):
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=atol)


def plain_loop(model, steps, accumulation):
    """Segment after segment, the memory handed on by hand; a step counts every target of its batches alike."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    items = list(streams())
    segments = [SegmentCollator()(items[i : i + STREAMS]) for i in range(0, len(items), STREAMS)]
    while steps:
        memory = None
        for first in range(0, len(segments), accumulation):
            batches = segments[first : first + accumulation]
            targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
            for batch in batches:
                outputs = model(**batch, past_key_values=memory, use_cache=True, num_items_in_batch=targets)
                outputs.loss.backward()
                memory = outputs.past_key_values
            optimizer.step()
            optimizer.zero_grad()
            steps -= 1
            if not steps:
                return


@pytest.mark.parametrize(
    "model_type", ["transformer_xl", "compressive_transformer", "memorizing_transformer", "xl_sparse"]
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_equals_a_plain_loop(model_type, accumulation, tmp_path):
    """Over the end of an epoch, with evaluation in between, and a last step of fewer batches."""
    run = trainer(
        tmp_path,
        build(model_type),
        max_steps=9,
        gradient_accumulation_steps=accumulation,
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    expected = build(model_type)
    plain_loop(expected, 9, accumulation)
    assert_same(run.model, weights(expected), atol=2e-6)


def test_memory_counts(tmp_path):
    """The comparison above would not notice if memory meant nothing."""
    run = trainer(tmp_path, build())
    run.train()
    forgetful = trainer(tmp_path, build(), Trainer)
    forgetful._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(streams())
    forgetful.train()
    difference = [(weight - weights(forgetful.model)[name]).abs().max() for name, weight in weights(run.model).items()]
    assert max(difference) > 1e-3


def test_one_step_equals_a_stock_trainer_whose_model_cuts_its_input(tmp_path):
    """In-forward segmentation: two segments in one input, or in the two batches of a step."""
    run = trainer(tmp_path, build(), max_steps=1, gradient_accumulation_steps=2)
    run.train()
    stock = trainer(tmp_path, build(segment_length=LENGTH), Trainer, max_steps=1)
    stock.train_dataset = torch.utils.data.Subset(streams(length=2 * LENGTH), range(STREAMS))
    stock.train()
    assert_same(run.model, weights(stock.model), atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "arguments"),
    [
        ("transformer_xl", {}),
        ("transformer_xl", {"bf16": True}),
        ("transformer_xl", {"gradient_accumulation_steps": 2}),
        ("transformer_xl", {"gradient_checkpointing": True}),
        ("compressive_transformer", {}),
        ("memorizing_transformer", {}),
        ("memorizing_transformer", {"bf16": True}),
        ("memorizing_transformer", {"gradient_checkpointing": True}),
        ("xl_sparse", {}),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(model_type, arguments, tmp_path):
    straight = trainer(tmp_path / "straight", build(model_type, hidden_dropout=0.1), **arguments)
    straight.train()
    resumed = trainer(tmp_path / "resumed", build(model_type, hidden_dropout=0.1), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same(resumed.model, weights(straight.model))


def test_nothing_is_carried_over_the_end_of_an_epoch(tmp_path):
    segments = len(streams()) // STREAMS
    run = trainer(tmp_path / "straight", build(), max_steps=segments + 2)
    run.args.save_steps = segments
    run.train()
    assert not list((tmp_path / "straight" / f"checkpoint-{segments}").glob("memory*"))
    resumed = trainer(tmp_path / "resumed", build(), max_steps=segments + 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{segments}"))
    assert_same(resumed.model, weights(run.model))


def test_evaluation_reads_the_stream_and_leaves_training_alone(tmp_path):
    run = trainer(tmp_path, build())
    run.train()
    memory = run.memory
    before = [layer.states.clone() for layer in memory.layers]
    loss = run.evaluate()["eval_loss"]
    assert run.memory is memory
    assert all(torch.equal(layer.states, states) for layer, states in zip(memory.layers, before))
    full = TEXT[: STREAMS * 36]  # all segments full, so that the mean over batches is the mean over tokens
    run.eval_dataset = streams(full)
    loss = run.evaluate()["eval_loss"]
    assert loss == pytest.approx(stream_losses(run.model, full, LENGTH, START, STREAMS).mean(), abs=1e-5)
    predicted = run.predict(streams(full))
    assert predicted.metrics["test_loss"] == pytest.approx(loss, abs=1e-5)
    assert predicted.predictions.shape == (STREAMS * 6, LENGTH, run.model.config.vocab_size)


def test_missing_memory_is_said(tmp_path):
    run = trainer(tmp_path, build())
    run.train()
    checkpoint = tmp_path / "checkpoint-2"
    next(checkpoint.glob("memory-0-of-1.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"memory-0-of-1.safetensors is missing: resume with as many processes"):
        trainer(tmp_path / "again", build()).train(resume_from_checkpoint=str(checkpoint))


def test_empty_memory_is_for_training():
    model = build().train()
    memory = empty_memory(model, torch.ones(2, 3, dtype=torch.long))
    assert model.training
    assert (memory.projected, memory.seen, memory.held) == (False, 0, 0)


def test_says_what_would_mix_up_streams(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset has num_streams=4, but 1 process\(es\) with batches of 3"):
        trainer(tmp_path, build(), per_device_train_batch_size=3).train()
    with pytest.raises(ValueError, match="auto_find_batch_size would mix up the streams"):
        trainer(tmp_path, build(), auto_find_batch_size=True)
    with pytest.raises(ValueError, match="split_batches would mix up the streams"):
        trainer(tmp_path, build(), accelerator_config={"split_batches": True})
    with pytest.raises(ValueError, match=r"SparseTransformerForCausalLM has no memory .*; use transformers.Trainer"):
        trainer(tmp_path, tiny_model("sparse_transformer", AutoModelForCausalLM))


SCRIPT = """
import sys
from pathlib import Path
import torch.distributed
from tests.src.test_recurrent_training import STREAMS, build, trainer
run = trainer(sys.argv[1], build(), per_device_train_batch_size=STREAMS // 2, ddp_backend="gloo")
run.eval_dataset = None
run.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
Path(sys.argv[1], f"rank-{torch.distributed.get_rank()}-of-{torch.distributed.get_world_size()}").touch()
run.save_model()
torch.distributed.barrier()  # nobody leaves while others still talk
torch.distributed.destroy_process_group()  # its threads would otherwise outlive what they use
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Each keeps its own streams and its own memory, over a resume too."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    for arguments in (["two"], ["resumed", "two/checkpoint-2"]):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, str(script), *(str(tmp_path / argument) for argument in arguments)]
        subprocess.run(command, check=True, env=environment, timeout=240)
    assert {path.name for path in (tmp_path / "two").glob("rank-*")} == {"rank-0-of-2", "rank-1-of-2"}
    memories = {path.name for path in (tmp_path / "two" / "checkpoint-2").glob("memory-*")}
    assert memories == {"memory-0-of-2.safetensors", "memory-1-of-2.safetensors"}
    one = trainer(tmp_path / "one", build())
    one.train()
    two = load_file(tmp_path / "two" / "model.safetensors")
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    for name, weight in two.items():
        torch.testing.assert_close(weight, weights(one.model)[name], rtol=0, atol=2e-6)
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)

"""A step of eight rows is one step, in however many micro-batches and processes: the same loss and gradients."""

import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.loss_cases import ROWS, Case, cases

CASES = cases()


class Gradients(TrainerCallback):
    """Keeps those of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(case: Case, micro_batches: int, folder, processes: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=ROWS // micro_batches // processes,
        gradient_accumulation_steps=micro_batches,
        max_grad_norm=0,
        learning_rate=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    gradients = Gradients()
    trainer = Trainer(case.build(), arguments, case.collate, case.rows, callbacks=[gradients])
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.found


def assert_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-5, rel=1e-5)
    assert expected[1]
    assert found[1].keys() == expected[1].keys()
    assert max(gradient.abs().max() for gradient in expected[1].values()) > 1e-3
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_make_one_step(name, tmp_path):
    case = CASES[name]
    whole = step(case, 1, tmp_path)
    model = case.build().train()
    plain = model(**case.collate(case.rows)).loss
    assert whole[0] == pytest.approx(plain.item(), abs=1e-5, rel=1e-5)
    assert_equal(step(case, 4, tmp_path), whole)


def test_rows_differ_in_what_counts():
    """A mean of means would pass otherwise."""
    for name, case in CASES.items():
        if name.endswith(("CausalLM", "MaskedLM", "Seq2SeqLM", "TokenClassification")):
            assert len({int((row["labels"] != -100).sum()) for row in case.rows}) > 2, name


@pytest.mark.slow
def test_two_processes_make_one_step(tmp_path):
    """Every head in one run of two processes with gloo, two micro-batches each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, "-m", "tests.modeling.test_accumulation", str(tmp_path)], check=True, timeout=300)
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == CASES.keys()
    for name, case in CASES.items():
        assert_equal(found[name], step(case, 1, tmp_path))


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {name: step(case, 2, sys.argv[1], processes=2) for name, case in CASES.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, f"{sys.argv[1]}/found.pt")
    torch.distributed.destroy_process_group()

"""Training stops at the first number that is none: before weights are broken, or before broken weights are written.

    stop_at_divergence(trainer)    # as `hf-tfamily train` does; trainer.train() may then raise DivergenceError

Once a step, between the gradients and the optimizer, all losses of the step and the norm of its gradients are looked
at: one look at values a step (a wait for a GPU), where `logging_nan_inf_filter`, which is off in our runs, takes two a
batch. What a step makes of the weights shows only in the next; so before anything is saved or evaluated, and when
training ends, the last batch is read once more by the weights as they are.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.utils import ModelOutput

ADVICE = "a lower learning_rate, more warmup_steps or a smaller max_grad_norm may help"


class DivergenceError(ValueError):
    """A loss, a norm of gradients or weights that are not finite. Nothing was written since the last checkpoint."""


def stop_at_divergence(trainer: Trainer) -> "DivergenceWatch":
    """Let `trainer.train()` raise DivergenceError, in all processes at once, at the first number that is not finite."""
    watch = DivergenceWatch(trainer)
    trainer.add_callback(watch)
    return watch


class DivergenceWatch(TrainerCallback):
    """Sees every batch, its loss and the norm of gradients of a trainer."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.batches: list[dict[str, Any]] = []
        self.losses: list[torch.Tensor] = []
        self.norm: Any = None
        training_step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

        def step_and_look(model, inputs, *args, **kwargs):
            loss = training_step(model, inputs, *args, **kwargs)
            self.batches.append(inputs)
            self.losses.append(loss)
            return loss

        def clip_and_look(*args, **kwargs):
            self.norm = clip(*args, **kwargs)
            return self.norm

        trainer.training_step = step_and_look
        trainer.accelerator.clip_grad_norm_ = clip_and_look

    def on_step_begin(self, args, state, control, **kwargs):
        self.batches, self.losses, self.norm = [], [], None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        finite = torch.isfinite(torch.stack([loss.float() for loss in self.losses]))
        # Loss scaling of fp16 looks for gradients that are not finite, and skips their step by itself.
        scales = self.trainer.accelerator.scaler is not None
        if isinstance(self.norm, torch.Tensor) and not scales:
            norm = self.norm.full_tensor() if isinstance(self.norm, DTensor) else self.norm
            finite = torch.cat([finite, torch.isfinite(norm).reshape(1).to(finite.device)])
        if self._everywhere(finite.all()):
            return
        ours = finite.cpu().tolist()[: len(self.losses)]
        place = ours.index(False) if False in ours else len(ours) - 1
        found = None
        if False in ours:
            found = f"the loss is {self.losses[place].item()} in batch {place + 1} of {len(ours)} of this step"
        elif not finite.all():
            found = f"the norm of gradients is {float(self.norm)}{_worst_gradient(self.trainer.model)}"
        self._stop(state.global_step + 1, self.batches[place], found, training=True)

    def on_step_end(self, args, state, control, **kwargs):
        self._look_ahead(state, control.should_save or control.should_evaluate)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._look_ahead(state, control.should_save or control.should_evaluate)

    def on_train_end(self, args, state, control, **kwargs):
        self._look_ahead(state, True)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for name, value in (metrics or {}).items():
            if name.endswith("loss"):
                check_finite(name, value, f"after step {state.global_step}")

    def _look_ahead(self, state, wanted: bool) -> None:
        """Do the weights as they are give numbers for the last batch, before they are saved or measured?"""
        if not wanted or not self.batches:
            return
        with _as_it_was(self.trainer), torch.no_grad():
            self.trainer.model.eval()
            outputs = _forward(self.trainer, self.batches[-1])
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in _floats(outputs))
        if not self._everywhere(torch.tensor(finite, device=self.trainer.args.device)):
            found = None if finite else "the weights that it made give no finite outputs for its last batch"
            self._stop(state.global_step, self.batches[-1], found, training=False)

    def _everywhere(self, fine: torch.Tensor) -> bool:
        """Is it true in all processes?"""
        accelerator = self.trainer.accelerator
        return bool(fine if accelerator.num_processes == 1 else accelerator.gather(fine.reshape(1)).all())

    def _stop(self, step: int, batch: dict[str, Any], found: str | None, training: bool) -> None:
        """Raise the same error in every process, which all make the second pass, since sharded models need them all."""
        where = first_not_finite(self.trainer, batch, training)
        args = self.trainer.args
        if found is not None:
            process = f" of process {args.process_index}" if args.world_size > 1 else ""
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in _tensors(batch))
            found = f"{found}{process} ({shapes}); {where}"
        everyone = [found] if args.world_size == 1 else gather_object([found])
        # A loss is nearer to the cause than the norm of gradients, which all processes share.
        said = min((words for words in everyone if words is not None), key=lambda words: "the loss is" not in words)
        raise DivergenceError(f"Training stopped in step {step}: {said}. {ADVICE.capitalize()}.")


def check_finite(name: str, value: Any, when: str) -> None:
    """Raise DivergenceError for a figure that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DivergenceError(f"{name} is {value} {when}: the model has diverged. {ADVICE.capitalize()}.")


def first_not_finite(trainer: Trainer, batch: dict[str, Any], training: bool) -> str:
    """In words, the module whose output is the first that is not finite in another pass of `batch`, with hooks.

    Where all outputs are finite, the one whose output gets the first gradient that is not; these gradients are added to
    those of the weights.
    """
    found: list[str] = []
    names = {module: name or "the whole model" for name, module in trainer.model.named_modules()}

    def look(module, inputs, output):
        for tensor in _floats(output):
            note(tensor, "the output", module)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: note(gradient, "the gradient of the output", module))

    def note(tensor, what, module):
        if not found and not torch.isfinite(tensor).all():
            found.append(f"first not finite is {what} of {names[module]}{_weights(module)}")

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        with _as_it_was(trainer):
            trainer.model.train(training)
            outputs = _forward(trainer, batch)
            if training and not found and outputs.get("loss") is not None:
                outputs.loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "in another pass of this batch all outputs and their gradients are finite"


def _forward(trainer: Trainer, batch: dict[str, Any]) -> Any:
    """The model's outputs with their loss, as the Trainer has it, without what a recurrent model remembers."""
    inputs = {**batch, **{name: value.to(trainer.args.device) for name, value in _tensors(batch)}}
    labels = inputs.pop("labels", None) if trainer.compute_loss_func is not None else None
    with trainer.compute_loss_context_manager():
        outputs = trainer.model(**inputs)
        if labels is not None:
            outputs["loss"] = trainer.compute_loss_func(outputs, labels)
    return outputs


@contextmanager
def _as_it_was(trainer: Trainer) -> Iterator[None]:
    """Random numbers, training mode and shards are afterwards as before, so that a run goes on as without a look."""
    accelerators = [trainer.args.device] if trainer.args.device.type != "cpu" else []
    modes = [(module, module.training) for module in trainer.model.modules()]
    with torch.random.fork_rng(accelerators, device_type=trainer.args.device.type if accelerators else "cuda"):
        yield
    for module, mode in modes:
        module.training = mode
        if isinstance(module, FSDPModule):  # a forward pass alone leaves the outermost one whole
            module.reshard()


def _weights(module: nn.Module) -> str:
    """What is remarkable about a module's own weights."""
    for name, weight in module.named_parameters(recurse=False):
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if local.numel() and not torch.isfinite(local).all():
            return f", whose {name} is not finite"
        if local.numel() and local.abs().max() > 1e4:
            return f", whose {name} reaches {local.abs().max().item():.1e}"
    return ""


def _worst_gradient(model: nn.Module) -> str:
    """The first weight whose gradient is not finite."""
    for name, weight in model.named_parameters():
        gradient = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        if gradient is not None and not torch.isfinite(gradient).all():
            return f" (that of {name} for one)"
    return ""


def _tensors(batch: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in batch.items() if isinstance(value, torch.Tensor)]


def _floats(output: Any) -> list[torch.Tensor]:
    """The floating point tensors of what a module returns, caches left out. Logits of ids may be -inf by design."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, ModelOutput):
        return [output.loss] if output.get("loss") is not None else []
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _floats(part)]
    return []

"""Training with recurrence: what a model remembers of one batch is there for the next.

    streams = StreamDataset(ids, num_streams=16, length=128, start_id=256)
    trainer = RecurrentTrainer(model=model, args=arguments, train_dataset=streams)    # per_device_train_batch_size=16

Every row of a batch goes on with the text of the same row of the batch before (hf_tfamily.data.StreamDataset). A memory
belongs to one process, which is given the same streams all the time.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.cache_utils import Cache

from .data.streams import SegmentCollator
from .label_smoothing import smooth_inside
from .stream_evaluation import has_memory


class RecurrentTrainer(Trainer):
    """A Trainer that hands a model's memory (`past_key_values`) from batch to batch.

    Training begins every epoch with an empty memory; evaluation and prediction begin with one of their own and leave
    that of training as it is. Checkpoints contain the memory of every process, so that a resumed run equals one that
    was not interrupted. Data sets are StreamDatasets, or others in the same order. What label_smoothing_factor asks for
    the model does itself, in training alone.
    """

    def __init__(self, *args, data_collator=None, **kwargs):
        super().__init__(*args, data_collator=data_collator or SegmentCollator(), **kwargs)
        if not has_memory(self.model):
            raise ValueError(
                f"{type(self.model).__name__} has no memory (no config.mem_len); use transformers.Trainer."
            )
        check_arguments(self.args)
        smooth_inside(self)
        self.memory: Cache | None = None
        self.add_callback(_ForgetAtEpochs(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.memory is None and model.training:
            self.memory = empty_memory(self.accelerator.unwrap_model(model), inputs["input_ids"])
        inputs = {**inputs, "past_key_values": self.memory, "use_cache": True}
        if self.compute_loss_func is not None:
            inputs.pop("counted_targets", None)  # a loss of one's own is given labels and moves none
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.memory = outputs["past_key_values"]
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, **kwargs):
        training_memory, self.memory = self.memory, None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.memory = training_memory

    def get_train_dataloader(self):
        self._check_streams("train_dataset", self.train_dataset, self.args.train_batch_size)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        self._check_streams("eval_dataset", dataset, self.args.eval_batch_size)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        self._check_streams("test_dataset", test_dataset, self.args.eval_batch_size)
        return super().get_test_dataloader(test_dataset)

    def _check_streams(self, name: str, dataset, batch_size: int) -> None:
        rows = batch_size * self.args.world_size
        streams = getattr(dataset, "num_streams", rows)
        if streams != rows:
            raise ValueError(
                f"{name} has num_streams={streams}, but {self.args.world_size} process(es) with batches of "
                f"{batch_size} read {rows} rows at once; these must be the same number."
            )

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)

    def _save_rng_state(self, output_dir: str) -> None:
        """The Trainer calls this in every process, for what a process alone knows."""
        super()._save_rng_state(output_dir)
        if self._within_an_epoch():
            save_memory(self.memory, self._memory_file(output_dir))
        # The main process calls the checkpoint whole after this, so everybody's file must be there.
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            check_processes(checkpoint, self.args.world_size)
        if checkpoint is not None and self._within_an_epoch():
            model = self.accelerator.unwrap_model(self.model)
            self.memory = load_memory(model, self._memory_file(checkpoint))
        super()._load_rng_state(checkpoint)

    def _within_an_epoch(self) -> bool:
        """Is there a batch to come in this epoch, which will need the memory?"""
        return not float(self.state.epoch).is_integer()

    def _memory_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"memory-{self.args.process_index}-of-{self.args.world_size}.safetensors"


class _ForgetAtEpochs(TrainerCallback):
    """An epoch begins at the start of every stream."""

    def __init__(self, trainer: RecurrentTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.memory = None


def check_arguments(arguments: TrainingArguments) -> None:
    """Raise ValueError for settings under which rows would not go on with their own stream."""
    accelerator = arguments.accelerator_config
    refused = {
        "more than one GPU in a process": (arguments.n_gpu > 1, "start one process for each with torchrun"),
        "auto_find_batch_size": (arguments.auto_find_batch_size, "choose per_device_train_batch_size"),
        "accelerator_config.split_batches": (accelerator.split_batches, "leave it false"),
        "accelerator_config.dispatch_batches": (accelerator.dispatch_batches, "leave it unset"),
        "dataloader_in_order=False": (not arguments.dataloader_in_order, "leave it true"),
    }
    for name, (asked, instead) in refused.items():
        if asked:
            raise ValueError(f"{name} would mix up the streams that a RecurrentTrainer's memory belongs to; {instead}.")


def check_processes(checkpoint: str | Path, processes: int) -> None:
    """Raise ValueError if another number of processes wrote a checkpoint: each has its own streams and memory."""
    written = len(list(Path(checkpoint).glob("rng_state*.pth")))  # the Trainer writes one in every process
    if written not in (0, processes):
        raise ValueError(
            f"{checkpoint} was written by {written} process(es), and {processes} read it. A RecurrentTrainer's streams "
            f"and memories belong to their processes: resume with {written}, or begin anew."
        )


def empty_memory(model: PreTrainedModel, input_ids: torch.Tensor) -> Cache:
    """A memory for training that holds nothing yet, as the model makes it for one token of input_ids [B, T]."""
    was_training = model.training
    model.eval()  # while it trains under gradient checkpointing, a model makes no memory; nor does this draw dropout
    with torch.enable_grad():
        memory = model(input_ids=input_ids[:1, :1], use_cache=True).past_key_values
    model.train(was_training)
    memory.reset()
    return memory


def save_memory(memory: Cache, file: Path) -> None:
    """Write the tensors, numbers and flags of a memory and its layers to a safetensors file."""
    tensors, plain = {}, {}
    for place, part in _parts(memory).items():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{place}.{name}"] = value.detach().clone(memory_format=torch.contiguous_format)
            elif value is None or isinstance(value, (bool, int)):
                plain[f"{place}.{name}"] = value
    being_written = file.with_suffix(".tmp")
    save_file(tensors, being_written, metadata={"plain": json.dumps(plain)})
    being_written.replace(file)


def load_memory(model: PreTrainedModel, file: Path) -> Cache:
    """The memory of `model` that `save_memory` wrote."""
    if not file.exists():
        raise ValueError(
            f"{file} is missing: resume with as many processes as wrote the checkpoint, and from a checkpoint that a "
            "RecurrentTrainer wrote."
        )
    memory = empty_memory(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
    with safe_open(file, "pt") as content:
        plain = json.loads(content.metadata()["plain"])
    parts = _parts(memory)
    for entry, value in {**plain, **load_file(file, device=str(model.device))}.items():
        place, name = entry.split(".")
        setattr(parts[place], name, value)
    return memory


def _parts(memory: Cache) -> dict[str, object]:
    """The memory and its layers, by name."""
    return {"memory": memory, **{str(i): layer for i, layer in enumerate(memory.layers)}}

"""SIGTERM, which schedulers send before they end a process: the step is finished and a checkpoint saved.

Not `TrainingArguments.enable_jit_checkpoint`, which waits for three seconds, saves before a step whose batches a
recurrent memory has read already, and returns as if training were over.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from transformers import TrainerCallback

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """A run was ended by SIGTERM; while it trained, a checkpoint was saved. Unless caught, the process exits with 143.

    Attributes:
        step: of that checkpoint; None if there was nothing to save.
    """

    def __init__(self, step: int | None = None):
        super().__init__(EXIT_CODE)
        self.step = step


class SaveAtSigterm(TrainerCallback):
    """Saves at the end of the step in which a process was sent SIGTERM, then raises Terminated in every process.

    Before and after training SIGTERM raises it at once. It has to be the last callback, so that others have done their
    part by then.
    """

    def __init__(self):
        self.asked = self.training = self.saving = False
        self.process = os.getpid()
        self.group = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM, unless a program around has a handler of its own or this is not its main thread."""
        is_main_thread = threading.current_thread() is threading.main_thread()
        if not is_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _take(self, number, frame) -> None:
        if not self.training or os.getpid() != self.process:  # children that were forked just end
            raise Terminated
        self.asked = True

    def on_train_begin(self, args, state, control, **kwargs):
        if distributed.is_available() and distributed.is_initialized():
            self.group = distributed.new_group(backend="gloo")
        self.training = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._anybody_asked():
            self.saving = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.saving:
            self.training = False
            raise Terminated(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        asked = self._anybody_asked()
        self.training = False
        if asked or self.asked:
            raise Terminated

    def _anybody_asked(self) -> bool:
        """Was any process? The signal reaches some of them a step later than others, or not at all."""
        if self.group is None:
            return self.asked
        asked = torch.tensor(int(self.asked))
        distributed.all_reduce(asked, distributed.ReduceOp.MAX, group=self.group)
        return bool(asked)

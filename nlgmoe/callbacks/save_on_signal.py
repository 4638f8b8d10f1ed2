"""A run that is told to stop saves first: SIGTERM, SIGUSR1 and Ctrl+C.

Lightning's own handlers are out of service meanwhile: they broadcast, and on Slurm save, inside the handler, in the middle of
whatever the process was at; a rank that waits in another collective never answers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed
from typing_extensions import override

from nlgmoe.callbacks.last_checkpoint import save_last
from nlgmoe.callbacks.slurm import queue_again, requeue_signal
from nlgmoe.device import side_stream

# torchrun and other launchers pass on the Ctrl+C that the terminal has sent to every process already.
SAME_PRESS_SECONDS = 1.0
_CHILDREN_SECONDS = 60.0  # that ranks started by this process have to end in, once everything is saved


class SaveOnSignal(Callback):
    """Ends training on a signal at the next optimizer step, with everything saved and exit code 0.

    SIGTERM is what clusters send before they take a machine away, SIGUSR1 what people ask Slurm to send before the time limit
    (`--signal=USR1@90`), SIGINT is Ctrl+C; a second Ctrl+C ends at once, as without this callback. It does not matter which
    ranks a signal reaches: all end after the same step. A validation is broken off; the resumed run begins it anew. A run that
    has taken its last step is saved, and then finishes.

    The checkpoint is the `last.ckpt` of the run's first `ModelCheckpoint`. Where `trainer.enable_checkpointing` is false
    nothing is saved, and the exit code is 128 + the signal's number. A signal that is ignored when training begins stays so.

    On Slurm the job is queued again after its requeue signal (SIGUSR1), if `SLURMEnvironment(auto_requeue=True)`, the default.

    Raises:
        SystemExit: when training ends because of a signal; Lightning tears down in good order.
    """

    def __init__(self) -> None:
        self._handlers_before: dict[int, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self._received = 0  # by this rank
        self._pressed: float | None = None  # when Ctrl+C was
        self._agreed = 0  # by all ranks
        self._question: _LargestOfAllRanks | None = None
        self._training = False
        self._validation_is_due = False

    # ---- the handlers: they set a flag

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._pressed is None:
                self._pressed = now
                if not distributed.is_initialized() or distributed.get_rank() == 0:
                    # Not print(): the handler may have interrupted one that holds the buffer.
                    os.write(2, b"\nCtrl+C: saving after this step; press it again to end at once\n")
            elif now - self._pressed > SAME_PRESS_SECONDS:
                signal.default_int_handler(number, frame)
        self._received = max(self._received, number)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep Lightning from installing its handlers, and from asking rank 0 about them in every micro-batch, waiting."""
        vars(trainer._signal_connector)["register_signal_handlers"] = _do_nothing
        vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = _do_nothing

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; up to here there is nothing to lose, and a signal does what it always does."""
        self._training = True
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers nowhere else; another rank may still tell this one
        requeue = requeue_signal(trainer)
        for number in {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT} | ({requeue} if requeue else set()):
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # None: not Python's to restore
                self._handlers_before[number] = signal.signal(number, self._notice)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put back what was there before; until now a run at its end could not be disturbed."""
        for number, handler in self._handlers_before.items():
            if signal.getsignal(number) == self._notice:  # not so after Ctrl+C: Lightning then ignores further ones
                signal.signal(number, handler)
        self._handlers_before = {}
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
        vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)
        self._forget()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self.teardown(trainer, pl_module, "fit")

    # ---- agreement: asked before a step's last micro-batch, answered after it

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End if it is time: now the last step's metrics have been logged too."""
        if self._agreed:
            self._end(trainer)
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._ask(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn whether a rank was told to stop."""
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._agreed = self._answer(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not begin where it is time to end."""
        if self._agreed:
            self._break_off_validation(trainer)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Do not go on either. Answers come a batch late: ranks need not wait for each other in a validation."""
        if self._training:
            self._agreed = self._answer(trainer)
            if self._agreed:
                self._break_off_validation(trainer)
            else:
                self._ask(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last answer."""
        if self._training:
            self._agreed = self._answer(trainer)

    def _ask(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            self._question = _LargestOfAllRanks(self._received, trainer.strategy.root_device)

    def _answer(self, trainer: Trainer) -> int:
        if trainer.world_size == 1:
            return self._received
        question, self._question = self._question, None
        return 0 if question is None else question.answer()

    # ---- the end

    def _break_off_validation(self, trainer: Trainer) -> None:
        if not trainer.should_stop and not trainer.fit_loop.epoch_loop._is_training_done:
            self._validation_is_due = True
            self._end(trainer)
        # No resumed run could make good the last validation and the summary. They are tried, with everything safe.
        where = f", and saved in {save_last(trainer)}" if trainer.checkpoint_callbacks else ""
        name = signal.Signals(self._agreed).name
        rank_zero_info(f"\n{name}: the run is at its end{where}; it finishes with this validation")
        self._training, self._agreed, self._question = False, 0, None

    def _end(self, trainer: Trainer) -> NoReturn:
        name, code, done = signal.Signals(self._agreed).name, 0, f"ended after step {trainer.global_step:,}"
        if trainer.checkpoint_callbacks:
            path = save_last(trainer, anew=self._validation_is_due)
            rank_zero_info(f"\n{name}: {done}, saved in {path}; go on with --ckpt_path last")
        else:
            rank_zero_info(f"\n{name}: {done}; nothing was saved, because trainer.enable_checkpointing is false")
            # Processes that Lightning has started end with 0: it would kill all others, this one too, for any other code.
            code = 128 + self._agreed if trainer.local_rank == 0 else 0
        for logger in trainer.loggers:
            logger.save()  # Lightning does it too, later: before that Slurm may end the job
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            _wait_for(launcher.procs)
        if self._agreed == requeue_signal(trainer) and trainer.is_global_zero and code == 0:
            queue_again()  # last: Slurm may end the job at once
        raise SystemExit(code)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say that the resumed run has to begin with a validation, where one was broken off (`resuming.py`)."""
        if self._validation_is_due:
            loop = checkpoint["loops"]["fit_loop"]
            loop["epoch_loop.val_loop.batch_progress"]["current"] |= {"ready": 1, "completed": 0}
            # It logs at one less than the steps taken; resuming adds one.
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 2


class _LargestOfAllRanks:
    """The largest of all ranks' `value`, found while they compute.

    Between question and answer lies a backward pass, in which ranks exchange gradients: by its end all have asked, and the
    answer is there on a CPU. On a GPU the question stands behind earlier micro-batches only, and is read on a stream of its
    own: neither is the GPU's queue drained nor does the CPU wait longer than for the GPU to begin what it was asked before.
    """

    def __init__(self, value: int, device: torch.device) -> None:
        self._value = torch.full((), value, dtype=torch.int32, device=device)
        self._stream = side_stream(device)
        work = distributed.all_reduce(self._value, distributed.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._work = work

    def answer(self) -> int:
        with self._stream:
            self._work.wait()
            return int(self._value)


def _wait_for(processes: list[subprocess.Popen[Any]]) -> None:
    """Let the other ranks end first: whoever has started this process knows no other."""
    patience = time.monotonic() + _CHILDREN_SECONDS
    while time.monotonic() < patience and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _do_nothing() -> None:
    pass

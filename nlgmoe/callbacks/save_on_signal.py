"""Saving before a run stops on a signal: SIGTERM, SIGUSR1 and Ctrl+C.

Lightning's own handlers are disabled meanwhile: they broadcast, and on Slurm save, inside the handler, which deadlocks with
ranks that wait in another collective.
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
from nlgmoe.callbacks.slurm import requeue, requeue_signal
from nlgmoe.checkpoint.folder import is_of_run
from nlgmoe.device import side_stream
from nlgmoe.module import MoEGPTModule

# torchrun and other launchers forward the Ctrl+C that the terminal has already sent to every process.
SAME_PRESS_SECONDS = 1.0
_CHILDREN_SECONDS = 60.0  # time for ranks started by this process to exit, once everything is saved


class SaveOnSignal(Callback):
    """Ends training on a signal at the next optimizer step, with everything saved and exit code 0.

    Clusters send SIGTERM before they reclaim a machine, Slurm sends SIGUSR1 before the time limit if asked to
    (`--signal=USR1@90`), Ctrl+C is SIGINT; a second Ctrl+C ends at once, as without this callback. If any rank gets a signal,
    all ranks end after the same step. A validation is interrupted; the resumed run repeats it. One for which a callback has
    exchanged the weights, as for their average, runs to its end: until then there are no trained weights to save. A run that
    has taken its last step is saved, and then finishes.

    The checkpoint is the run's `last.ckpt`, see `save_last`. With `trainer.enable_checkpointing=false` nothing
    is saved, and the exit code is 128 + the signal's number. A signal that is ignored when training starts remains ignored.

    The command puts it first in the list of callbacks, and so should Python: none has then begun the next micro-batch, whose
    state would be saved with the step.

    On Slurm the job is requeued after its requeue signal (SIGUSR1), if `SLURMEnvironment(auto_requeue=True)`, the default.

    Raises:
        SystemExit: when training ends because of a signal; Lightning then tears down normally.
    """

    def __init__(self) -> None:
        self._previous_handlers: dict[int, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._received = 0  # signal number, on this rank
        self._interrupted_at: float | None = None  # time of the first Ctrl+C
        self._agreed = 0  # signal number, on all ranks
        self._pending: _AsyncMax | None = None
        self._training = False

    # ---- the handler only sets a flag

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
                if not distributed.is_initialized() or distributed.get_rank() == 0:
                    # Not print(): the handler may have interrupted a print() that holds the buffer's lock.
                    os.write(2, b"\nCtrl+C: saving after this step; press it again to end at once\n")
            elif now - self._interrupted_at > SAME_PRESS_SECONDS:
                signal.default_int_handler(number, frame)
        self._received = max(self._received, number)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prevent Lightning from installing its handlers: an evaluation, which has nothing to save, ends at once."""
        vars(trainer._signal_connector)["register_signal_handlers"] = _do_nothing

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prevent Lightning's blocking broadcast in every micro-batch."""
        vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = _do_nothing

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; before training there is nothing to save."""
        self._training = True
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers only there; this rank still ends with the others
        slurm_signal = requeue_signal(trainer)
        for number in {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT} | ({slurm_signal} if slurm_signal else set()):
            previous = signal.getsignal(number)
            if previous not in (None, signal.SIG_IGN):  # Python cannot restore None, a handler installed by C code
                self._previous_handlers[number] = signal.signal(number, self._handle)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous handlers; until here a signal does not interrupt the end of a run."""
        for number, handler in self._previous_handlers.items():
            if signal.getsignal(number) == self._handle:  # false after Ctrl+C: Lightning then ignores SIGINT
                signal.signal(number, handler)
        self._previous_handlers = {}
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
        vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)
        self._reset()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers."""
        self.teardown(trainer, pl_module, "fit")

    # ---- agreement of ranks: a reduction that starts before a step's last micro-batch and is read after it

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the run if ranks have agreed to; the last step's metrics have been logged by now."""
        if self._agreed:
            self._stop(trainer)
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._start_reduction(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the signal that any rank has received."""
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._agreed = self._finish_reduction(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip the validation if the run is to end."""
        if self._agreed:
            self._interrupt_validation(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Interrupt the validation if the run is to end. The reduction is read a batch later, so that ranks do not wait."""
        if self._training and not self._agreed:
            self._agreed = self._finish_reduction(trainer)
            if self._agreed:
                self._interrupt_validation(trainer, pl_module)
            else:
                self._start_reduction(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the signal received during the last batch."""
        if self._training:
            self._agreed = self._agreed or self._finish_reduction(trainer)

    def _start_reduction(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            self._pending = _AsyncMax(self._received, trainer.strategy.root_device)

    def _finish_reduction(self, trainer: Trainer) -> int:
        if trainer.world_size == 1:
            return self._received
        pending, self._pending = self._pending, None
        return 0 if pending is None else pending.result()

    # ---- the end

    def _interrupt_validation(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, MoEGPTModule)
        if trainer.strategy.reduce_boolean_decision(module.has_other_weights(), all=False):
            return  # `_agreed` ends the run after the validation; after the last one it ends anyway
        if not trainer.should_stop and not trainer.fit_loop.epoch_loop._is_training_done:
            self._stop(trainer)
        # All that is left is one validation and the summary: save, then let them run.
        where = f", and saved in {save_last(trainer)}" if trainer.checkpoint_callbacks else ""
        name = signal.Signals(self._agreed).name
        rank_zero_info(f"\n{name}: the run is at its end{where}; it finishes with this validation")
        self._training, self._agreed, self._pending = False, 0, None

    def _stop(self, trainer: Trainer) -> NoReturn:
        name, code, done = signal.Signals(self._agreed).name, 0, f"ended after step {trainer.global_step:,}"
        if trainer.checkpoint_callbacks:
            path = save_last(trainer)
            how = "last" if is_of_run(path, trainer.default_root_dir) else path
            rank_zero_info(f"\n{name}: {done}, saved in {path}; resume with --ckpt_path {how}")
        else:
            rank_zero_info(f"\n{name}: {done}; nothing was saved, because trainer.enable_checkpointing is false")
            # Processes started by Lightning exit with 0: at any other code it kills all ranks, this one included.
            code = 128 + self._agreed if trainer.local_rank == 0 else 0
        for logger in trainer.loggers:
            logger.save()  # Lightning saves later; Slurm may end the job before
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            _wait_for(launcher.procs)
        if self._agreed == requeue_signal(trainer) and trainer.is_global_zero and code == 0:
            requeue()  # last: Slurm may end the job at once
        raise SystemExit(code)


class _AsyncMax:
    """Maximum of all ranks' `value`, reduced while they compute.

    A backward pass, which reduces gradients, lies between start and `result`: by its end all ranks have started the reduction,
    so on a CPU it is complete. On a GPU it is queued behind earlier micro-batches only, and is read on its own stream: the
    host does not drain the GPU's queue.
    """

    def __init__(self, value: int, device: torch.device) -> None:
        self._value = torch.full((), value, dtype=torch.int32, device=device)
        self._stream = side_stream(device)
        work = distributed.all_reduce(self._value, distributed.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._work = work

    def result(self) -> int:
        with self._stream:
            self._work.wait()
            return int(self._value)


def _wait_for(processes: list[subprocess.Popen[Any]]) -> None:
    """Wait for the ranks started by this process: its own parent only knows this one."""
    deadline = time.monotonic() + _CHILDREN_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _do_nothing() -> None:
    pass

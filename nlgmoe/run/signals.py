"""Signals of a run: SIGTERM, SIGUSR1 and Ctrl+C end it after a whole step, on all ranks after the same one."""

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
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed
from torch.optim import Optimizer
from typing_extensions import override

from nlgmoe.lightning_state import cluster_environment, ends_step, started_processes

# torchrun and other launchers forward the Ctrl+C that the terminal has already sent to every process.
SAME_PRESS_SECONDS = 1.0
# Added to the number of the signal that requeues, so that it outranks those that other ranks have received.
_FIRST = 256
_CHILDREN_SECONDS = 60.0  # time for ranks started by this process to exit, once everything is saved


class StopOnSignal(Callback):
    """Ends training on a signal, after the next optimizer step.

    Clusters send SIGTERM before they reclaim a machine, Slurm sends SIGUSR1 before the time limit if asked to
    (`--signal=USR1@90`), Ctrl+C is SIGINT; a second Ctrl+C ends at once. If any rank gets a signal, all ranks end after the same
    step. A signal that is ignored when training starts remains ignored. On Slurm the job is requeued after its requeue signal
    (SIGUSR1), if `SLURMEnvironment(auto_requeue=True)`, the default.

    This class saves nothing, and the exit code is 128 + the signal's number; `SaveCheckpoints` extends it.

    Raises:
        SystemExit: when training ends because of a signal; Lightning then tears down normally.
    """

    at_end = "ending"  # word of the message of Ctrl+C

    def __init__(self) -> None:
        self._previous_handlers: dict[int, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._received = 0  # signal number, on this rank
        self._requeues_at = -1  # number of the signal after which the Slurm job is requeued
        self._interrupted_at: float | None = None  # time of the first Ctrl+C
        self._agreed = 0  # the largest request of all ranks
        self._training = False

    # ---- the handler only sets a flag

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
                if not distributed.is_initialized() or distributed.get_rank() == 0:
                    # Not print(): the handler may have interrupted a print() that holds the buffer's lock.
                    os.write(2, f"\nCtrl+C: {self.at_end} after this step; press it again to end at once\n".encode())
            elif now - self._interrupted_at > SAME_PRESS_SECONDS:
                signal.default_int_handler(number, frame)
        # Keep the signal that requeues: Slurm sends SIGTERM after it.
        self._received = number if self._received != self._requeues_at else self._received

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; before training there is nothing to save."""
        self._training = True
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers only there; this rank still ends with the others
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._requeues_at = int(environment.requeue_signal)
        for number in {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, self._requeues_at} - {-1}:
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
        self._reset()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    # ---- agreement of ranks

    def _request(self) -> int:
        """Return this rank's request: 0 none, 1 save, else the signal that ends the run; the largest of all ranks applies."""
        return self._received + (_FIRST if self._received == self._requeues_at else 0)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the run if ranks have agreed to; the last step's metrics have been logged by now."""
        self._finish_step(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Give this rank's request to the module, a `TrainingStep`, whose losses carry it to the other ranks."""
        pl_module.signal = self._request()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the largest request of all ranks; a single process's is the latest."""
        if ends_step(trainer):
            self._agreed = pl_module.largest_signal if trainer.world_size > 1 else self._request()

    def _finish_step(self, trainer: Trainer) -> None:
        """End the run if ranks have agreed to; a step is finished and logged, and the next one has not begun."""
        if self._agreed:
            self._end(trainer, self._agreed, None)

    def _agree(self, trainer: Trainer) -> int:
        """Return the largest request of all ranks where no losses carry it: in a validation. A collective."""
        if trainer.world_size == 1:
            return self._request()
        largest = torch.tensor(self._request(), dtype=torch.int32, device=trainer.strategy.root_device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return int(largest)

    # ---- the end

    def _end(self, trainer: Trainer, number: int, saved: str | None) -> NoReturn:
        """End the run, by the agreed request of all ranks; `saved` is the checkpoint to resume, or None."""
        number %= _FIRST
        done, code = f"{signal.Signals(number).name}: ended after step {trainer.global_step:,}", 0
        if saved is not None:
            rank_zero_info(f"\n{done}, saved in {saved}; resume with --ckpt_path last")
        else:
            rank_zero_info(f"\n{done}; nothing was saved, because trainer.enable_checkpointing is false")
            # Processes started by Lightning exit with 0: at any other code it kills all ranks, this one included.
            code = 128 + number if trainer.local_rank == 0 else 0
        for logger in trainer.loggers:
            logger.save()  # Lightning saves later; Slurm may end the job before
        _wait_for(started_processes(trainer.strategy))
        if number == self._requeues_at and trainer.is_global_zero and saved is not None:
            _requeue()  # last: Slurm may end the job at once
        raise SystemExit(code)


def _wait_for(processes: list[subprocess.Popen[Any]]) -> None:
    """Wait for the ranks started by this process: its own parent waits for this one only."""
    deadline = time.monotonic() + _CHILDREN_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)


def _requeue() -> None:
    """Requeue the Slurm job with `scontrol`, as Lightning does. Warns if that fails, because the run is saved."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error.strerror
        rank_zero_warn(f"scontrol requeue {job} failed ({reason}); submit the job again")
    else:
        rank_zero_info(f"Slurm job {job} is requeued")

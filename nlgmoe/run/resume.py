"""How a run is resumed, in the order in which it happens; `lightning_state.py` lists what is set of Lightning's progress.

hook                where                            what it does
------------------  -------------------------------  ---------------------------------------------------------------------
RunTrainer.fit      run/trainer.py                   rank 0 locks the folder; `checkpoint_to_resume` decides which checkpoint
RunTrainer._run     run/trainer.py                   connects the ranks; all take rank 0's decision, or raise its error, and see
                                                     its folder (`require_shared_folder`)
load_checkpoint     checkpoint/portable.py, under    `choose_checkpoint`: the newest valid one of a run folder; reads it,
                    DeepSpeed parallel/strategy.py   each rank its own entries
on_load_checkpoint  module.py                        refuses another model, seed, tokenizer or frozen component
                                                     (run/checks.py); token clock, run clock, `Resuming.load`
-                   then                             Lightning: weights
load_state_dict     data/training_data.py            refuses other data; position in the data
load_state_dict     callbacks                        rows of tables, best checkpoint, sums of a logging interval
-                   then                             Lightning: progress of its loops, AdamW's moments
on_train_start      run/folder.py, callbacks         cuts the tables; renames damaged checkpoints of later steps
on_train_start      module.py                        `Resuming.begin`: a pending validation, or the end of the run

A checkpoint always holds the state after an optimizer step. A resumed run continues with the next step; a pending validation of
the last step runs first. A run resumed at its end validates again, and takes no step.
"""

import time
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.config import MoEConfig
from nlgmoe.data.training_data import training_data
from nlgmoe.lightning_state import run_validation, set_max_steps, set_progress, validation_is_due
from nlgmoe.run.checks import warn_of_another_size, warn_of_repeated_data

SPANS = ("run", "steps", "data", "validation")  # of `RunClock`


class RunClock:
    """Seconds of a run by span, and the FLOPs of its finished steps, since its beginning, over all restarts.

    Attributes:
        flops: computed from the configuration (`model/counting.py`), over all ranks.

    Spans:
        run: from the start of training, with everything between steps.
        steps: training steps, without waiting for data and without callbacks.
        data: between micro-batches, which is mainly waiting for data; without saves and validations.
        validation: validations of the fit.
    """

    def __init__(self) -> None:
        self.flops = 0
        self._seconds = dict.fromkeys(SPANS, 0.0)
        self._started: dict[str, float] = {}

    def start(self, span: str) -> None:
        """Start a span."""
        self._started[span] = time.perf_counter()

    def stop(self, span: str) -> None:
        """Stop a span, if it was started."""
        if (started := self._started.pop(span, None)) is not None:
            self._seconds[span] += time.perf_counter() - started

    def seconds(self, span: str) -> float:
        """Return the seconds of a span since the run began, up to now."""
        started = self._started.get(span)
        return self._seconds[span] + (0.0 if started is None else time.perf_counter() - started)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far."""
        return {"flops": self.flops, "seconds": {span: self.seconds(span) for span in SPANS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the sums of a checkpoint."""
        self.flops, self._started = state["flops"], {}
        self._seconds = dict.fromkeys(SPANS, 0.0) | state["seconds"]


class Resuming:
    """The last step of a checkpoint, and the first actions of a run that resumes it.

    Attributes:
        validation_due: the last step ends a validation interval. False for the validation at the end of a run, which a longer run
            does not have.
        validated: step of the last validation of the fit; None: none.
    """

    def __init__(self) -> None:
        self.validation_due = False
        self.validated: int | None = None
        self._max_steps: int | None = None  # the trainer's, while it is set to -1
        self._size: dict[str, int] = {}  # of the step after the resumed checkpoint, in the run that saved it

    def note_validation(self, trainer: Trainer) -> None:
        """Note at the end of a step whether it ends a validation interval."""
        self.validation_due = validation_is_due(trainer)

    def save(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Add to Lightning's dictionary whether a validation is pending, and set its loops to the last optimizer step."""
        step = checkpoint["global_step"]
        if step == 0:
            del checkpoint["loops"]  # nothing has been trained on: to resume is to start
            return
        validated = self.validated == step
        checkpoint["step_size"] = step_size(trainer)
        checkpoint |= {"validated": validated, "validation_due": self.validation_due and not validated}
        set_progress(checkpoint, trainer.accumulate_grad_batches)

    def load(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Restore the state from Lightning's dictionary, before the trainer reads it."""
        self.validation_due = checkpoint.get("validation_due", False)
        self.validated = checkpoint["global_step"] if checkpoint.get("validated", False) else None
        self._size = checkpoint.get("step_size") or {}
        if "loops" not in checkpoint:
            return
        set_progress(checkpoint, trainer.accumulate_grad_batches, saved=True)
        if 0 <= trainer.max_steps <= checkpoint["global_step"]:
            self._max_steps = trainer.max_steps
            set_max_steps(trainer, -1)

    def begin(self, trainer: Trainer, tokens: int, train_tokens: int | None, moe: MoEConfig | None) -> None:
        """Run a pending validation of the last step. A run that is resumed at its end is validated, and stops."""
        end = self._end(trainer, tokens, train_tokens)
        if self._max_steps is not None:
            set_max_steps(trainer, self._max_steps)
            self._max_steps = None
        if end is not None:
            rank_zero_warn(f"the run is at its end: {end}")
            trainer.should_stop = True
        elif trainer.ckpt_path is not None:
            warn_of_repeated_data(trainer)
            if self._size:
                warn_of_another_size(self._size, step_size(trainer), moe)
        due = self.validation_due and trainer.ckpt_path is not None
        if (due or end is not None) and self.validated != trainer.global_step and trainer.enable_validation:
            run_validation(trainer)
            if end is None and trainer.should_stop:
                rank_zero_warn("the run is at its end: a callback such as EarlyStopping stops it; change its settings")

    def _end(self, trainer: Trainer, tokens: int, train_tokens: int | None) -> str | None:
        """Return the reason for which the run is at its end, and the remedy; None: it continues."""
        if self._max_steps is not None:
            return f"it has taken trainer.max_steps={self._max_steps}; to go on, raise it"
        if train_tokens is not None and tokens >= train_tokens:
            remedy = "raise model.train_tokens and model.schedule.decay_tokens"
            return f"{tokens} tokens of train_tokens={train_tokens}; to go on, {remedy}"
        if trainer.ckpt_path is None:
            return None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            remaining = callback.time_remaining() if isinstance(callback, Timer) else None
            # Its own check was before DeepSpeed's strategy loaded its state. Rank 0's clock decides.
            if remaining is not None and trainer.strategy.broadcast(remaining <= 0):
                return "trainer.max_time is over; to go on, raise it"
        for stopper in trainer.early_stopping_callbacks:
            if stopper is not None and stopper.wait_count >= stopper.patience and not self.validation_due:
                return f"{type(stopper).__name__}, monitor={stopper.monitor}, has ended it; to go on, remove it"
        return None


def step_size(trainer: Trainer) -> dict[str, int]:
    """Return the size of the next step: ranks, micro-batches of a rank, and for `TrainingData` the sequences over all ranks."""
    data = training_data(trainer)
    size = {"ranks": trainer.world_size, "micro_batches": trainer.accumulate_grad_batches}
    return size | ({} if data is None else {"samples": data.batch_size_after(data.samples_consumed)})

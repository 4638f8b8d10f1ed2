"""The trainer of a run folder: which checkpoint `fit` resumes, or an evaluation reads, and who may train in the folder.

`fit` starts a run if the folder has no checkpoint, and resumes its newest valid one with `ckpt_path` `last` or `auto`. Any other
checkpoint begins a new run, in a folder without checkpoints; its starting step is saved first. A process that trains in
the folder locks it. `validate`, `test` and `predict` take `last`, `best` or any path, and use neither lock nor tables.
"""

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed
from typing_extensions import override

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import FOLDER, checkpoint_path, is_checkpoint, saved_steps
from nlgmoe.lightning_state import set_root_folder
from nlgmoe.process import prepare_allocator
from nlgmoe.ranks import of_rank_zero, raise_on_all_ranks
from nlgmoe.run.folder import is_same_path
from nlgmoe.validation import SettingError, require

LOCK_SECONDS = 10.0  # of waiting for a process that is about to end
PATIENCE = 10.0  # seconds after which a shared file system shows a new file on all nodes


class RunTrainer(Trainer):
    """Lightning's trainer for a run folder, `default_root_dir`; see the head of this file for its rules.

    `weights_only` has no effect: checkpoints here hold no pickled objects.
    """

    _refusal: Exception | None = None  # of rank 0 to train in the folder, before the ranks are connected
    _shared: Path | None = None  # the run folder, which all ranks must see; None: `fit` has none

    @override
    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train.

        Args:
            ckpt_path: checkpoint to resume: last, the newest valid one of the run folder; auto, like last, or a new run if
                there is none; or a path, which begins a new run in a folder without checkpoints.
        """
        prepare_allocator(self.strategy.root_device)
        folder = Path(self.default_root_dir)
        if self.fast_dev_run:  # type: ignore[attr-defined]
            with TemporaryDirectory(prefix="fast_dev_run-") as temporary:
                checkpoint = None if ckpt_path is None else checkpoint_to_resume(folder, ckpt_path)
                _check_warm_start(model, checkpoint)
                set_root_folder(self, temporary)
                try:
                    super().fit(model, train_dataloaders, val_dataloaders, datamodule, checkpoint)
                finally:
                    set_root_folder(self, str(folder))
            return
        self._refusal, self._shared, checkpoint = None, folder, None
        with ExitStack() as held:
            if self.is_global_zero:  # `_run` tells the others
                try:
                    held.enter_context(run_lock(folder))
                    checkpoint = checkpoint_to_resume(folder, ckpt_path)
                    _check_warm_start(model, checkpoint)
                    _sweep(folder)
                except (ValueError, OSError) as error:
                    if self._is_alone():
                        raise
                    self._refusal = error
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, checkpoint)

    @override
    def _run(
        self, model: LightningModule, ckpt_path: str | Path | None = None, weights_only: bool | None = None
    ) -> Any:
        """Connect the ranks before Lightning does, and begin what rank 0 has decided to, or raise its error on all ranks."""
        if self.state.fn == TrainerFn.FITTING and self.world_size > 1:
            self.strategy.setup_environment()
            refusal, ckpt_path = of_rank_zero((self._refusal, ckpt_path))
            with raise_on_all_ranks():
                if refusal is not None:
                    raise refusal
            if self._shared is not None:
                require_shared_folder(self._shared)
        if ckpt_path is not None:
            model.warm_start = None  # type: ignore[assignment]
        return super()._run(model, ckpt_path, weights_only)

    def _is_alone(self) -> bool:
        """Return True on rank 0 if no other process runs: there is none, or Lightning starts them all from this one."""
        if self.world_size == 1:
            return True
        environment: Any = self.strategy.cluster_environment  # type: ignore[attr-defined]
        return self.num_nodes == 1 and not environment.creates_processes_externally

    @override
    def validate(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Evaluate on validation data.

        Args:
            ckpt_path: checkpoint to evaluate: last or best of the run folder, a path, or a run's folder (its newest one).
        """
        return super().validate(model, dataloaders, self._to_evaluate(model, ckpt_path), **kwargs)

    @override
    def test(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Evaluate on test data.

        Args:
            ckpt_path: checkpoint to evaluate: last or best of the run folder, a path, or a run's folder (its newest one).
        """
        return super().test(model, dataloaders, self._to_evaluate(model, ckpt_path), **kwargs)

    @override
    def predict(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        *,
        ckpt_path: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the loss of every token.

        Args:
            ckpt_path: checkpoint to evaluate: last or best of the run folder, a path, or a run's folder (its newest one).
        """
        return super().predict(model, dataloaders, ckpt_path=self._to_evaluate(model, ckpt_path), **kwargs)

    def _to_evaluate(self, model: LightningModule | None, name: str | Path | None) -> str | Path | None:
        prepare_allocator(self.strategy.root_device)
        _check_warm_start(model, name)
        folder = Path(self.default_root_dir)
        if name in ("last", "auto"):
            require(bool(saved_steps(folder)), f"ckpt_path={name}: {folder} has no checkpoint; give the path of one")
            return str(folder)
        if name == "best":
            best = folder / FOLDER / "best.ckpt"
            require(best.exists(), f"ckpt_path=best: {folder} has no best checkpoint yet; use last, or the path of one")
            return str(best)
        if name is not None:
            require_checkpoint(name)
        return name


def checkpoint_to_resume(folder: Path, name: str | Path | None) -> str | None:
    """Return the checkpoint that `fit` resumes: the run folder (its newest valid one), a path, or None for a new run."""
    steps = saved_steps(folder)
    if name is None or (name == "auto" and not steps):
        problem = f"trainer.default_root_dir={folder} has a run with checkpoints up to step {max(steps, default=0)}"
        require(not steps, f"{problem}: resume it with ckpt_path=last, or choose another folder")
        return None
    if name in ("last", "auto"):
        remedy = "leave ckpt_path out to start a run, or set it to auto"
        require(bool(steps), f"ckpt_path=last: there is no checkpoint in {folder}; {remedy}")
        return str(folder)
    require(name != "best", "ckpt_path=best is for validate, test and predict; fit takes last, auto, or a path")
    require_checkpoint(name)
    if steps and not any(is_same_path(name, own) for own in (folder, checkpoint_path(folder, steps[-1]))):
        problem = f"ckpt_path={name} is not the newest checkpoint of trainer.default_root_dir={folder}"
        remedy = "resume that with ckpt_path=last, or choose another folder to begin a new run from this one"
        raise SettingError(f"{problem}, which is of step {steps[-1]}: {remedy}")
    return str(name)


def _check_warm_start(model: Any, checkpoint: str | Path | None) -> None:
    """Check the checkpoint of `warm_start` before a corpus is tokenised, unless another is resumed or evaluated."""
    if checkpoint is None and (start := getattr(model, "warm_start", None)) is not None:
        require_checkpoint(start.checkpoint)


def require_checkpoint(path: str | Path) -> None:
    """Check that there is a checkpoint at `path`, or that it is a run folder with some; reading it verifies it."""
    if is_checkpoint(path):
        _ = Checkpoint(path).document
    elif not saved_steps(Path(path)):
        raise SettingError(f"no checkpoint at {path}: expected one, or a run's folder with some in it")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run folder. The operating system releases the lock when the process ends, but not without `flock`."""
    lock = FileLock(folder / ".run.lock", timeout=LOCK_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        problem = f"another process trains in trainer.default_root_dir={folder}: wait, or choose another folder"
        raise SettingError(f"{problem}; if its host has crashed, delete {folder}/.run.lock") from error
    except OSError as error:
        problem = f"trainer.default_root_dir={folder} cannot be written ({error.strerror})"
        raise SettingError(f"{problem}; choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def require_shared_folder(folder: Path) -> None:
    """Check that every rank sees a new file of rank 0 in the run folder, and its newest checkpoint there. A collective."""
    wanted: list[Path] = []  # in the folder
    with raise_on_all_ranks():
        if distributed.get_rank() == 0:
            with NamedTemporaryFile(prefix=".shared.writing-", dir=folder, delete=False) as file:
                newest = (checkpoint_path(Path(), step) for step in saved_steps(folder)[-1:])
                wanted = [Path(Path(file.name).name), *newest]
    wanted = of_rank_zero(wanted)
    try:
        with raise_on_all_ranks():
            deadline = time.monotonic() + PATIENCE
            while missing := [path for path in wanted if not (folder / path).exists()]:
                if time.monotonic() > deadline:
                    problem = f"{folder} on {socket.gethostname()} lacks {missing[-1]}, which rank 0 has there"
                    remedy = "all ranks must share the run folder; choose one on a file system of all nodes"
                    raise SettingError(f"trainer.default_root_dir={problem}: {remedy}")
                time.sleep(0.1)
    finally:
        if distributed.get_rank() == 0:
            (folder / wanted[0]).unlink()


def _sweep(folder: Path) -> None:
    """Delete unfinished files of killed processes: while the folder is locked, no other process writes there."""
    for pattern in (".*.writing-*", "starts/.*.writing-*", f"{FOLDER}/.*.ckpt.*"):
        for leftover in folder.glob(pattern):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()

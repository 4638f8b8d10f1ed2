"""`summary.json`: the results of a run, in the run folder."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.device import peak_memory_bytes
from nlgmoe.files import write_json
from nlgmoe.model.counting import count_parameters, parameters_of
from nlgmoe.module import MoEGPTModule
from nlgmoe.run.loggers import ends_step
from nlgmoe.versions import versions


class RunSummary(Callback):
    """Writes `summary.json` into the run folder (`trainer.default_root_dir`) when `fit` ends; a resumed run removes it.

    `train_loss` is the mean of the finite losses of the last 50 steps. Times and tokens are summed over the resumed parts of a
    run, and `peak_memory_bytes` is the largest of them. `tokens_per_second` and `step_seconds` cover only training steps,
    `validation_seconds` only validation; `wall_seconds` includes waiting for data, other callbacks and checkpoints.
    """

    def __init__(self) -> None:
        self._begin_run()

    def _begin_run(self) -> None:
        self._losses: deque[float] = deque(maxlen=50)
        self._wall_seconds = 0.0
        self._step_seconds = self._validation_seconds = 0.0
        self._fed_tokens = self._tokens_before = 0  # before: the module's count after the last micro-batch
        self._fit_started = self._batch_started = self._validation_started = 0.0
        self._peak_memory = 0  # of earlier starts, in bytes
        self._device: torch.device | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state; in a resumed run `load_state_dict` follows."""
        if stage == "fit":
            self._begin_run()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, for a resumed run."""
        return {
            # Losses that are not finite are kept: they count among the last 50 steps.
            "losses": [loss if math.isfinite(loss) else None for loss in self._losses],
            "wall_seconds": self._wall_so_far(),
            "step_seconds": self._step_seconds,
            "validation_seconds": self._validation_seconds,
            "fed_tokens": self._fed_tokens,
            "peak_memory_bytes": self._peak_so_far(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums."""
        self._losses = deque(
            (math.nan if loss is None else float(loss) for loss in state_dict["losses"]), self._losses.maxlen
        )
        self._wall_seconds = state_dict["wall_seconds"]
        self._step_seconds = state_dict["step_seconds"]
        self._validation_seconds = state_dict.get("validation_seconds", 0.0)
        self._fed_tokens = state_dict["fed_tokens"]
        self._peak_memory = state_dict.get("peak_memory_bytes", 0)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the parameter count, and start the wall clock."""
        assert isinstance(pl_module, MoEGPTModule)
        (total, active), formula = parameters_of(pl_module.gpt), count_parameters(pl_module.config).total
        rank_zero_info(f"{total:,} parameters, {active:,} of them active for a token")
        if total != formula:
            rank_zero_warn(
                f"the model has {total:,} parameters, model.config describes {formula:,}: code has changed the model; FLOPs "
                "and MFU are computed from model.config"
            )
        if _leaves_out_domains(trainer):
            rank_zero_warn(
                f"trainer.limit_val_batches={trainer.limit_val_batches} validates only the first domains, so summary.json "
                "has no comparisons; remove it and set data.max_eval_windows, which limits each domain"
            )
        self._fit_started, self._batch_started = time.perf_counter(), 0.0
        self._tokens_before = pl_module.tokens_fed
        self._device = trainer.strategy.root_device

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the step clock; at the first step remove the summary of an earlier end."""
        if not self._batch_started and trainer.is_global_zero:
            Path(trainer.default_root_dir, "summary.json").unlink(missing_ok=True)
        self._batch_started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add the micro-batch."""
        assert isinstance(pl_module, MoEGPTModule)
        self._step_seconds += time.perf_counter() - self._batch_started
        self._fed_tokens += pl_module.tokens_fed - self._tokens_before
        self._tokens_before = pl_module.tokens_fed
        if ends_step(trainer):
            self._losses.append(pl_module.steps.losses["train/loss"])

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a validation of the fit."""
        self._validation_started = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the validation."""
        if self._fit_started:
            self._validation_seconds += time.perf_counter() - self._validation_started

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._wall_seconds, self._fit_started = self._wall_so_far(), 0.0
        assert isinstance(pl_module, MoEGPTModule)
        folder = Path(trainer.default_root_dir)
        nothing_new = not self._batch_started and not self._validation_started and (folder / "summary.json").exists()
        if not trainer.is_global_zero or nothing_new:
            return
        summary = self._summary(trainer, pl_module)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", summary, indent=2)
        rank_zero_info(format_summary(summary, _baseline(trainer, "xz_bits_per_byte") or {}, folder))

    def _wall_so_far(self) -> float:
        running = time.perf_counter() - self._fit_started if self._fit_started else 0.0
        return self._wall_seconds + running

    def _peak_so_far(self) -> int:
        return self._peak_memory if self._device is None else max(self._peak_memory, peak_memory_bytes(self._device))

    def _finite_losses(self) -> list[float]:
        return [loss for loss in self._losses if math.isfinite(loss)]

    def _summary(self, trainer: Trainer, module: MoEGPTModule) -> dict[str, Any]:
        metrics = {name: _finite(float(value)) for name, value in trainer.callback_metrics.items()}
        total, active = parameters_of(module.gpt)
        losses = self._finite_losses()
        prefix = "val/bits_per_byte/"
        return {
            "steps": trainer.global_step,
            "tokens": module.tokens_seen,
            "skipped_steps": module.skipped_steps,
            "train_loss": sum(losses) / len(losses) if losses else None,
            "val_loss": metrics.get("val/loss"),
            "unigram_entropy": _baseline(trainer, "unigram_entropy"),
            "bits_per_byte": {
                "all": metrics.get("val/bits_per_byte"),
                **{name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)},
            },
            "tokens_per_second": self._fed_tokens / self._step_seconds if self._step_seconds else None,
            "peak_memory_bytes": self._peak_so_far(),
            "params_total": total,
            "params_active": active,
            "wall_seconds": self._wall_seconds,
            "step_seconds": self._step_seconds,
            "validation_seconds": self._validation_seconds,
            "versions": versions(),
        }


def _leaves_out_domains(trainer: Trainer) -> bool:
    """Return whether `trainer.limit_val_batches` cuts off domains: validation windows are ordered by domain."""
    loader, fast_dev_run = trainer.val_dataloaders, trainer.fast_dev_run  # type: ignore[attr-defined]
    whole = sized_len(loader)  # None for a loader without a length
    return whole is not None and not fast_dev_run and sum(trainer.num_val_batches) < whole


def _baseline(trainer: Trainer, name: str) -> Any:
    """Return a baseline of the evaluated tokens; None if the data module has none or validation covers fewer tokens."""
    compute = getattr(trainer.datamodule, name, None)  # type: ignore[attr-defined]
    return compute() if compute is not None and not _leaves_out_domains(trainer) else None


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


def format_summary(summary: dict[str, Any], xz_bits_per_byte: dict[str, float], folder: Path) -> str:
    """Format the summary for the terminal, with the bits per byte of `xz -9` for comparison."""
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    lines = [
        "",
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {minutes} min {seconds:02} s"
        f" ({summary['tokens_per_second'] or 0:,.0f} tokens/s, peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB)",
    ]
    if summary["val_loss"] is not None:
        lines += [f"validation loss {summary['val_loss']:.3f} nats per token"]
    if summary["val_loss"] is not None and summary["unigram_entropy"] is not None:
        share = summary["val_loss"] / summary["unigram_entropy"]
        lines[-1] += f", {share:.2f} times the {summary['unigram_entropy']:.3f} of the best model without context"
    measured = {name: value for name, value in summary["bits_per_byte"].items() if value is not None}
    if measured:
        lines += ["", f"bits per byte of text   {'model':>6}" + (f" {'xz -9':>6}" if xz_bits_per_byte else "")]
        for name, value in measured.items():
            other = f" {xz_bits_per_byte[name]:>6.2f}" if name in xz_bits_per_byte else ""
            lines.append(f"  {name:<20}  {value:>6.2f}{other}")
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return "\n".join([*lines, "", f"written to {folder}/: {', '.join(files)}", ""])

"""`summary.json`: the results of a run, in the run folder."""

import math
from collections import deque
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.device import peak_memory_bytes
from nlgmoe.files import write_json
from nlgmoe.lightning_state import ends_step
from nlgmoe.model.counting import parameters_of
from nlgmoe.module import MoEGPTModule
from nlgmoe.versions import versions


class RunSummary(Callback):
    """Writes `summary.json` into the run folder (`trainer.default_root_dir`) when `fit` ends; a resumed run removes it.

    `train_loss` is the mean of the finite losses of the last 50 steps. Times and tokens are summed over the resumed parts of a
    run; `peak_memory_bytes` is of the last part. `tokens_per_second` and `step_seconds` cover only training steps,
    `validation_seconds` only validation; `wall_seconds` includes waiting for data, other callbacks and checkpoints.
    """

    def __init__(self) -> None:
        self._begin_run()

    def _begin_run(self) -> None:
        self._losses: deque[float] = deque(maxlen=50)
        self._has_trained = self._has_validated = False  # in this fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begin_run()

    @override
    def state_dict(self) -> dict[str, Any]:
        # Losses that are not finite are kept: they count among the last 50 steps.
        return {"losses": [loss if math.isfinite(loss) else None for loss in self._losses]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        losses = (math.nan if loss is None else float(loss) for loss in state_dict["losses"])
        self._losses = deque(losses, self._losses.maxlen)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        total, active = parameters_of(pl_module.gpt)
        rank_zero_info(f"{total:,} parameters, {active:,} of them active for a token")
        if _leaves_out_domains(trainer):
            problem = f"trainer.limit_val_batches={trainer.limit_val_batches} validates only the first domains"
            remedy = "remove it and set data.max_eval_windows, which limits each domain"
            rank_zero_warn(f"{problem}, so summary.json has no comparisons; {remedy}")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """At the first step remove the summary of an earlier end."""
        if not self._has_trained and trainer.is_global_zero:
            Path(trainer.default_root_dir, "summary.json").unlink(missing_ok=True)
        self._has_trained = True

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        if ends_step(trainer):
            self._losses.append(pl_module.losses["train/loss"])

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_validated = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        folder = Path(trainer.default_root_dir)
        nothing_new = not self._has_trained and not self._has_validated and (folder / "summary.json").exists()
        if not trainer.is_global_zero or nothing_new:
            return
        summary = self._summary(trainer, pl_module)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", summary, indent=2)
        kept = None if trainer.fast_dev_run else folder  # type: ignore[attr-defined]
        rank_zero_info(format_summary(summary, _baseline(trainer, "xz_bits_per_byte") or {}, kept))

    def _summary(self, trainer: Trainer, module: MoEGPTModule) -> dict[str, Any]:
        # JSON lacks NaN and infinity.
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.isfinite()}
        total, active = parameters_of(module.gpt)
        losses = [loss for loss in self._losses if math.isfinite(loss)]
        step_seconds = module.clock.seconds("steps")
        prefix = "val/bits_per_byte/"
        return {
            "steps": trainer.global_step,
            "tokens": module.tokens_seen,
            "skipped_steps": module.skipped_steps,
            "train_loss": sum(losses) / len(losses) if losses else None,
            "val_loss": metrics.get("val/loss"),
            "unigram_entropy": _baseline(trainer, "unigram_entropy"),
            "bits_per_byte": {"all": metrics.get("val/bits_per_byte")}
            | {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)},
            "tokens_per_second": module.tokens_seen / step_seconds if step_seconds else None,
            "peak_memory_bytes": peak_memory_bytes(trainer.strategy.root_device),
            "params_total": total,
            "params_active": active,
            "wall_seconds": module.clock.seconds("run"),
            "step_seconds": step_seconds,
            "validation_seconds": module.clock.seconds("validation"),
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


def format_summary(summary: dict[str, Any], xz_bits_per_byte: dict[str, float], folder: Path | None) -> str:
    """Format the summary for the terminal, with the bits per byte of `xz -9` for comparison; `folder` is named, and its files."""
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
    if folder is not None:
        files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        lines += ["", f"written to {folder}/: {', '.join(files)}"]
    return "\n".join([*lines, ""])

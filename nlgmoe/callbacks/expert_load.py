"""Routing statistics of each MoE layer: in the logger and in `expert_load.csv`, whose rows thin out with the steps taken."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.callbacks import routing_statistics as statistics
from nlgmoe.callbacks.routing_statistics import routing_totals, split_totals
from nlgmoe.layers.moe import moe_layers
from nlgmoe.lightning_state import ends_step, loggers_step, logs_this_step
from nlgmoe.module import MoEGPTModule
from nlgmoe.pyramid import moe_blocks
from nlgmoe.ranks import sum_over_ranks
from nlgmoe.run.folder import cut_rows, is_of_folder
from nlgmoe.validation import require

ROWS_PER_DOUBLING = 128
EVALUATED = ("load_max_over_mean", "load_cv", "dropped", "entropy", "expert_share")  # statistics that `validate` logs


def has_row(interval: int) -> bool:
    """Return True if the table has a row for a logging interval: a rule of the step alone, which restarts do not change.

    All of the first 256 intervals have one, every second of the next 256, every fourth of the next 512, and so on.
    """
    # The largest power of 2 up to interval / 128.
    spacing = 1 << max(0, (interval // ROWS_PER_DOUBLING).bit_length() - 1)
    return interval % spacing == 0


class ExpertLoad(Callback):
    """Logs load, drops, router statistics and gradient norms per MoE layer, as `experts/MOE_LAYER/...` (docs/report.md).

    A value covers a logging interval, over restarts too, and all ranks and micro-batches; skipped steps are excluded. Gradient
    norms are of the logged step.
    `expert_load.csv` in the run folder has the load of every expert in intervals that thin out; on resume the file is cut to the
    rows that the checkpoint counts. Sums stay on the device until the step is logged, or saved in a checkpoint; one collective
    then adds them over ranks.

    Args:
        dead_window: an expert without tokens in the last `dead_window` steps, rounded up to logging intervals, is dead.
    """

    def __init__(self, dead_window: int = 100) -> None:
        require(dead_window >= 1, f"dead_window={dead_window} must be at least 1 step")
        self.dead_window = dead_window
        self._experts: list[int] = []  # number of experts of each MoE layer
        self._components: list[list[nn.Parameter]] = []  # router and experts of each layer; last, all other parameters
        self._squares: Tensor | None = None  # squared gradients of the current step, this rank's part
        self._skipped = 0
        self._evaluated = torch.zeros(0)  # sums of all layers in `validate`
        self._begin_run()

    def _begin_run(self) -> None:
        self._step = self._interval = torch.zeros(0)  # sums of all layers, fp64, on the device
        self._resumed: list[float] = []  # sums over all ranks of the interval at the checkpoint
        self._last_used: list[list[int]] = []  # by MoE layer and expert: last logged step in which it got a token
        self._path: Path | None = None  # of the table, on the process that writes it
        self._rows: int | None = 0  # of the table, without the header; None: all, the checkpoint does not count them
        self._is_fork = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begin_run()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the last step in which each expert got a token, sums, and the rows. A collective once a fit has begun."""
        sums = sum_over_ranks(self._interval.clone()).tolist() if len(self._interval) else self._resumed
        interval = [None if math.isnan(total) else total for total in sums]  # JSON has no NaN
        return {"last_used": self._last_used, "interval": interval, "rows": self._rows}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether the checkpoint is another folder's: the run then begins a table of its own."""
        self._is_fork = not is_of_folder(checkpoint["path"], trainer.default_root_dir)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_used = [[int(step) for step in layer] for layer in state_dict["last_used"]]
        self._resumed = [math.nan if total is None else total for total in state_dict.get("interval", [])]
        self._rows = 0 if self._is_fork else state_dict.get("rows")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        self._experts = list(moe_blocks(pl_module.config).values())
        if not self._experts:
            return
        self._components = _components(pl_module.gpt)
        length = sum(self._experts) + len(self._experts) * (1 + len(statistics.WITH_TOTAL))
        self._step = torch.zeros(length, dtype=torch.float64, device=pl_module.device)
        self._interval = torch.zeros_like(self._step)
        self._squares, self._skipped = None, pl_module.skipped_steps
        if not self._last_used:
            self._last_used = [[trainer.global_step] * count for count in self._experts]
        if trainer.is_global_zero:
            if self._resumed:
                self._interval += torch.tensor(self._resumed, dtype=torch.float64, device=pl_module.device)
            self._path = Path(trainer.default_root_dir, "expert_load.csv")
            self._rows = cut_rows(self._path, self._rows)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure the gradients of a logged step before clipping."""
        assert isinstance(pl_module, MoEGPTModule)
        if self._experts and (logs_this_step(trainer) or pl_module.ends_run(trainer.global_step + 1)):
            self._squares = pl_module.step_gradients().squared_norms(self._components)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        if not self._experts:
            return
        self._step += torch.cat([routing_totals(routing) for routing in pl_module.routings])
        if not ends_step(trainer):
            return
        if pl_module.skipped_steps == self._skipped:
            self._interval += self._step
        else:
            self._squares = None
        self._step.zero_()
        self._skipped = pl_module.skipped_steps
        if logs_this_step(trainer):
            self._log(trainer, pl_module, self._end_interval(trainer))

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: Any
    ) -> None:
        """Add the batch in `validate`; `fit` logs training steps instead."""
        assert isinstance(pl_module, MoEGPTModule)
        if trainer.state.fn == TrainerFn.VALIDATING and pl_module.routings:
            sums = torch.cat([routing_totals(routing) for routing in pl_module.routings])
            self._evaluated = sums if batch_idx == 0 else self._evaluated + sums

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        if trainer.state.fn != TrainerFn.VALIDATING or not pl_module.routings:
            return
        self._experts = list(moe_blocks(pl_module.config).values())
        layers = split_totals(sum_over_ranks(self._evaluated).tolist(), self._experts)
        for moe_layer, totals in enumerate(layers):
            values = statistics.routing_statistics(totals)
            shown = {name: values[name] for name in EVALUATED if name in values}
            pl_module.log_dict({f"experts/{moe_layer}/{name}": value for name, value in shown.items()})

    def _end_interval(self, trainer: Trainer) -> list[float]:
        """Return the sums of an interval over all ranks, and begin the next one. A collective."""
        squares = self._squares
        if squares is None:  # the step was skipped, or a callback or signal has made it the last one
            squares = self._interval.new_full((len(self._components),), torch.nan)
        sums: list[float] = sum_over_ranks(torch.cat([self._interval, squares.double()])).tolist()
        self._interval.zero_()
        self._squares = None
        for last_used, totals in zip(self._last_used, split_totals(sums, self._experts), strict=True):
            for expert in np.flatnonzero(statistics.requests_of(totals)):
                last_used[expert] = trainer.global_step
        return sums

    def _log(self, trainer: Trainer, module: MoEGPTModule, sums: list[float]) -> None:
        layers = split_totals(sums, self._experts)
        norms = [math.sqrt(square) for square in sums[-len(self._components) :]]
        module.log_dict(self._metrics(layers, norms, trainer.global_step))
        step = loggers_step(trainer)
        interval = -(-(step + 1) // trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self._path is not None and has_row(interval):
            self._append(self._path, step, module.tokens_seen, layers)

    def _append(self, path: Path, step: int, tokens: int, layers: Sequence[Sequence[float]]) -> None:
        """Append a row for each MoE layer to the table; cells are empty where a layer has fewer experts.

            step,tokens,moe_layer,dropped,expert_0,expert_1,...

        `step` is that of `metrics.csv`; an expert's assignments are those of the interval, before dropping, over all ranks;
        `dropped` is the fraction of the layer's.
        """
        width = max(self._experts)
        rows: list[list[object]] = []
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.append(["step", "tokens", "moe_layer", "dropped", *(f"expert_{index}" for index in range(width))])
            self._rows = 0
        for moe_layer, totals in enumerate(layers):
            load, dropped = statistics.requests_of(totals), statistics.routing_statistics(totals)["dropped"]
            cells = [*(int(count) for count in load), *[""] * (width - len(load))]
            rows.append([step, tokens, moe_layer, f"{dropped:.6g}", *cells])
        with path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        assert self._rows is not None
        self._rows += len(layers)

    def _metrics(self, layers: Sequence[Sequence[float]], norms: list[float], steps: int) -> dict[str, float]:
        metrics = {"train/grad_norm_dense": norms[-1]}
        for moe_layer, (totals, last_used) in enumerate(zip(layers, self._last_used, strict=True)):
            values = statistics.routing_statistics(totals)
            values["dead"] = float(sum(steps - last >= self.dead_window for last in last_used))
            values["grad_norm_router"], values["grad_norm_experts"] = norms[2 * moe_layer : 2 * moe_layer + 2]
            metrics |= {f"experts/{moe_layer}/{name}": value for name, value in values.items()}
        return metrics


def _components(gpt: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of each MoE layer's router and experts, and last all others."""
    components: list[list[nn.Parameter]] = []
    for moe in moe_layers(gpt):
        components += [list(moe.router.parameters()), list(moe.experts.parameters())]
    listed = {parameter for component in components for parameter in component}
    return [*components, [parameter for parameter in gpt.parameters() if parameter not in listed]]

"""What each MoE layer's router does: in the logger, in `expert_load.csv` and as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from nlgmoe.config import GPTConfig
from nlgmoe.layers.moe import MoELayer
from nlgmoe.module import MoEGPTModule
from nlgmoe.monitoring.heat_map import heat_map
from nlgmoe.monitoring.load_file import LoadFile
from nlgmoe.monitoring.loggers import log_image
from nlgmoe.monitoring.logging_step import ends_step, is_logged, sum_over_ranks
from nlgmoe.monitoring.routing_statistics import GATE, SUMS, RoutingSums, has_gate, routing_statistics, routing_sums
from nlgmoe.pyramid import experts_per_layer


class ExpertLoad(Callback):
    """Logs, per MoE layer and logging interval, over all ranks and micro-batches: load, drops, the gate's entropy, confidence and
    logits, the residual mix, dead experts and gradient norms, as `experts/LAYER/...` (docs/metrics.md).

    `expert_load.csv` in the run folder has the load of every expert over time. Sums stay on the device until the step that is
    logged; then they are added up over ranks, in one collective, and read. Steps that were skipped are left out. After a restart
    the first interval begins with it.

    Args:
        dead_window: an expert is dead if it got no token in the last so many steps, rounded up to logging intervals.
        heat_maps: give loggers that take images, such as TensorBoard, one of all loads each interval.

    Raises:
        ValueError: `dead_window` is below 1.
    """

    def __init__(self, dead_window: int = 100, heat_maps: bool = True) -> None:
        if dead_window < 1:
            raise ValueError(f"dead_window={dead_window} must be at least 1 step")
        self.dead_window, self.heat_maps = dead_window, heat_maps
        self._experts: list[int] = []  # of each MoE layer
        self._parts: list[list[nn.Parameter]] = []  # of each layer its gate and its experts; the rest of the model
        self._step = self._interval = torch.zeros(0)  # sums of all layers, fp64, on the device
        self._squares: Tensor | None = None  # of the gradients of the step at hand, this rank's share
        self._skipped = 0
        self._told = False  # that the router has no gate
        self._served: list[list[int]] = []  # by layer and expert: the last step known to have brought it a token
        self._file: LoadFile | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """How long each expert has gone without a token."""
        return {"served": self._served}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._served = state_dict["served"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first interval, and open the file."""
        assert isinstance(pl_module, MoEGPTModule)
        self._experts = [count for count in experts_per_layer(pl_module.config) if count]
        if not self._experts:
            return
        self._parts = _parts(pl_module.gpt)
        length = sum(self._experts) + len(self._experts) * len(SUMS)
        self._step = torch.zeros(length, dtype=torch.float64, device=pl_module.device)
        self._interval = torch.zeros_like(self._step)
        self._squares, self._skipped = None, pl_module.guard.skipped
        if not self._served:
            self._served = [[trainer.global_step] * count for count in self._experts]
        if trainer.is_global_zero:
            self._file = LoadFile(Path(trainer.default_root_dir), self._experts, trainer.global_step)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure the gradients of a step that is logged, before they are clipped."""
        assert isinstance(pl_module, MoEGPTModule)
        if not self._experts or not is_logged(trainer):
            return
        gradients = pl_module.step_gradients()
        if gradients is not None:
            self._squares = gradients.squares(self._parts)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the micro-batch; log once per interval."""
        assert isinstance(pl_module, MoEGPTModule)
        if not self._experts:
            return
        self._step += torch.cat([routing_sums(routing) for routing in pl_module.routings])
        if not ends_step(trainer):
            return
        if pl_module.guard.skipped == self._skipped:
            self._interval += self._step
        else:
            self._squares = None
        self._step.zero_()
        self._skipped = pl_module.guard.skipped
        if is_logged(trainer):
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: MoEGPTModule) -> None:
        squares = self._squares
        if squares is None:  # the step was skipped, or nobody knew that it would be the last
            squares = self._interval.new_full((len(self._parts),), torch.nan)
        numbers = sum_over_ranks(torch.cat([self._interval, squares.double()])).tolist()
        self._interval.zero_()
        self._squares = None
        layers = self._split(numbers)
        for served, layer in zip(self._served, layers, strict=True):
            for expert in np.flatnonzero(layer.requests):
                served[expert] = trainer.global_step
        norms = [math.sqrt(square) for square in numbers[-len(self._parts) :]]
        gated = all(map(has_gate, module.routings))
        if not (gated or self._told):
            self._told = True
            rank_zero_info(f"ExpertLoad: the router has no probabilities and logits; {', '.join(GATE)} are left out")
        metrics = self._metrics(layers, norms, trainer.global_step, module.config, gated)
        module.log_dict(metrics)
        step, loads = trainer.fit_loop.epoch_loop._batches_that_stepped, [layer.requests for layer in layers]
        if self._file is not None:
            dropped = [metrics[f"experts/{layer}/dropped"] for layer in range(len(layers))]
            self._file.write(step, module.tokens_seen, loads, dropped)
        if self.heat_maps and trainer.is_global_zero:
            log_image(trainer.loggers, "experts/load", lambda: heat_map(loads), step)

    def _split(self, numbers: Sequence[float]) -> list[RoutingSums]:
        layers, begin = [], 0
        for experts in self._experts:
            end = begin + experts + len(SUMS)
            layers.append(RoutingSums.of(list(numbers[begin:end])))
            begin = end
        return layers

    def _metrics(
        self, layers: list[RoutingSums], norms: list[float], steps: int, config: GPTConfig, gated: bool
    ) -> dict[str, float]:
        found = {"train/grad_norm_dense": norms[-1]}
        for index, (layer, served) in enumerate(zip(layers, self._served, strict=True)):
            values = routing_statistics(layer, mixes(config), gated)
            values["dead"] = float(sum(steps - last >= self.dead_window for last in served))
            values["grad_norm_router"], values["grad_norm_experts"] = norms[2 * index : 2 * index + 2]
            found |= {f"experts/{index}/{name}": value for name, value in values.items()}
        return found

    def logged_names(self, trainer: Trainer, module: MoEGPTModule) -> set[str]:
        """All that it logs."""
        experts = [count for count in experts_per_layer(module.config) if count]
        nothing = RoutingSums(np.zeros(1), *([0.0] * len(SUMS)))
        names = {*routing_statistics(nothing, mixes(module.config)), "dead", "grad_norm_router", "grad_norm_experts"}
        found = {f"experts/{layer}/{name}" for layer in range(len(experts)) for name in names}
        return found | {"train/grad_norm_dense"} if experts else set()


def mixes(config: GPTConfig) -> bool:
    """Whether MoE layers learn the weight of their experts beside a shared MLP."""
    return config.moe is not None and config.moe.mlp_type == "residual" and config.moe.residual_mix == "learned"


def _parts(gpt: nn.Module) -> list[list[nn.Parameter]]:
    """Of each MoE layer the gate's parameters and the experts'; at last, all others."""
    parts: list[list[nn.Parameter]] = []
    for layer in [module for module in gpt.modules() if isinstance(module, MoELayer)]:
        parts += [list(layer.router.parameters()), list(layer.experts.parameters())]
    named = {parameter for part in parts for parameter in part}
    return [*parts, [parameter for parameter in gpt.parameters() if parameter not in named]]

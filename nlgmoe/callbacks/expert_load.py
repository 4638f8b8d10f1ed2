"""What each MoE layer's router does, in the logger."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from nlgmoe.layers.router import Routing
from nlgmoe.module import MoEGPTModule


class ExpertLoad(Callback):
    """Logs, per MoE layer and logging interval, from the latest micro-batch of every rank:

    - `load_max_over_mean`: requests of the busiest expert over an expert's fair share (1 when balanced);
    - `load_min_over_mean`: of the idlest (0: an expert nobody asks for);
    - `dropped`: fraction of requests that found no slot;
    - `entropy`: of the gate's distribution, mean over tokens, as a fraction of `log(experts)` (1 when undecided).
    """

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log once per interval; nothing is computed in between."""
        if not trainer._logger_connector.should_update_logs:
            return
        assert isinstance(pl_module, MoEGPTModule)
        for index, routing in enumerate(pl_module.routings):
            sums = trainer.strategy.reduce(routing_sums(routing), reduce_op="sum")
            for name, value in routing_statistics(sums).items():
                pl_module.log(f"experts/{index}/{name}", value, rank_zero_only=True)


@torch.no_grad()
def routing_sums(routing: Routing) -> Tensor:
    """What adds up over ranks: requests per expert, requests kept, entropy and number of tokens, `[E + 3]` fp64."""
    entropy = torch.special.entr(routing.probs).sum().double()
    tokens = torch.tensor(float(len(routing.probs)), dtype=torch.float64, device=entropy.device)
    return torch.cat([routing.tokens_per_expert.double(), torch.stack([routing.kept.sum().double(), entropy, tokens])])


def routing_statistics(sums: Tensor) -> dict[str, float]:
    """The four numbers above, from `routing_sums`."""
    *requests, kept, entropy, tokens = sums.tolist()
    total, experts = sum(requests), len(requests)
    if total == 0:
        return {}
    return {
        "load_max_over_mean": max(requests) * experts / total,
        "load_min_over_mean": min(requests) * experts / total,
        "dropped": 1 - kept / total,
        "entropy": entropy / tokens / math.log(max(2, experts)),
    }

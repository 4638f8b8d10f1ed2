"""What each MoE layer's router does, in the logger."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nlgmoe.layers.router import Routing
from nlgmoe.module import MoEGPTModule


class ExpertLoad(Callback):
    """Logs, per MoE layer and logging interval, from the latest micro-batch of this rank:

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
            for name, value in routing_statistics(routing).items():
                pl_module.log(f"experts/{index}/{name}", value)


@torch.no_grad()
def routing_statistics(routing: Routing) -> dict[str, float]:
    """The four numbers above for one layer and micro-batch."""
    requests = routing.tokens_per_expert.double()
    total = float(requests.sum())
    if total == 0:
        return {}
    mean = total / len(requests)
    entropy = torch.special.entr(routing.probs).sum(dim=-1).mean() / torch.log(
        torch.tensor(float(max(2, len(requests))))
    )
    return {
        "load_max_over_mean": float(requests.max()) / mean,
        "load_min_over_mean": float(requests.min()) / mean,
        "dropped": 1 - float(routing.kept.sum()) / total,
        "entropy": float(entropy),
    }

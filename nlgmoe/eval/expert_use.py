"""The use of each expert on a text: the sum of its weights over tokens, and REAP's saliency."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from nlgmoe.batch import Batch, loss_mask
from nlgmoe.eval.perplexity import batch_losses
from nlgmoe.layers.dispatch import LocalDispatch
from nlgmoe.layers.moe import MoELayer, moe_layers
from nlgmoe.layers.router import Routing
from nlgmoe.model.gpt import GPT
from nlgmoe.validation import RunError

CHUNK = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True)
class ExpertUse:
    """The loss of a text, and the use of each expert.

    Attributes:
        loss: mean over tokens, nats.
        tokens: number of these tokens.
        weights: `[E]` for each MoE layer: sum over tokens of the expert's weight in the output.
        saliency: `[E]` for each MoE layer: mean over the expert's tokens of weight times the L2 norm of its output, 0 for an
            expert without tokens: REAP, arXiv 2510.13999.
    """

    loss: float
    tokens: int
    weights: list[Tensor]
    saliency: list[Tensor]


class _Layer:
    """Sums over the rows of one MoE layer, fp64: of weights, of weights times norms of outputs, and their number, each `[E]`."""

    def __init__(self, layer: MoELayer) -> None:
        self.sums = torch.zeros(
            3, layer.experts.count, dtype=torch.float64, device=next(layer.experts.parameters()).device
        )
        self._routing: Routing | None = None
        self._dispatch: LocalDispatch | None = None

    def dispatched(self, module: Any, inputs: tuple[Tensor, Routing], dispatch: LocalDispatch) -> None:
        self._routing, self._dispatch = inputs[1], dispatch

    def computed(self, module: Any, inputs: Any, y: Tensor) -> None:
        assert self._routing is not None and self._dispatch is not None
        weight = self._routing.weight.flatten().double()  # [N * k], 0 where dropped
        norm = torch.linalg.vector_norm(y, dim=-1, dtype=torch.float64)[self._dispatch.row_of_assignment()]
        kept = self._routing.kept.flatten().double()
        self.sums.index_add_(1, self._routing.expert.flatten(), torch.stack([weight, weight * norm, kept]))


@contextmanager
def _measured(model: GPT) -> Iterator[list[_Layer]]:
    """Sum over the rows that the model's experts compute in the block."""
    sums, handles = [], []
    for layer in moe_layers(model):
        sums.append(measured := _Layer(layer))
        handles.append(layer.dispatcher.register_forward_hook(measured.dispatched))
        handles.append(layer.experts.register_forward_hook(measured.computed))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_use(model: GPT, batches: Iterable[Batch]) -> ExpertUse:
    """Read text with a model in evaluation mode."""
    total, tokens = 0.0, 0
    with _measured(model) as layers:
        for batch in (move_data_to_device(batch, model.unembedding.device) for batch in batches):
            losses, _ = batch_losses(model, batch, CHUNK)
            counted = loss_mask(batch)
            total += float(losses[counted].sum(dtype=torch.float64))
            tokens += int(counted.sum())
    if not tokens:
        raise RunError("there is no text to measure the use of experts on; give some")
    weights, saliency = [], []
    for layer in layers:
        weight, weighted_norm, rows = layer.sums
        weights.append(weight)
        saliency.append(weighted_norm / rows.clamp_min(1))
    return ExpertUse(total / tokens, tokens, weights, saliency)

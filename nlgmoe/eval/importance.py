"""The importance of experts and blocks on a text, by which `nlgmoe prune` and `nlgmoe student` choose what to keep.

    weight     sum over tokens of the expert's weight in the output
    saliency   mean over the expert's tokens of weight * L2 norm of its output, 0 without tokens      REAP, arXiv 2510.13999
    influence  1 - mean over tokens of cos(x_i, x_{i+1}), of the input and output of block i          ShortGPT, arXiv 2403.03853

A block with an influence of 0 passes its input on.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nlgmoe.batch import Batch, loss_mask
from nlgmoe.eval.perplexity import CHUNK, batch_losses, read_batch
from nlgmoe.layers.dispatch import LocalDispatch
from nlgmoe.layers.moe import MoELayer, moe_layers
from nlgmoe.layers.routing import Routing
from nlgmoe.model.gpt import GPT, Block
from nlgmoe.validation import RunError


@dataclass(frozen=True)
class ExpertUse:
    """The loss of a text, and the use of each expert."""

    loss: float  # mean over tokens, nats
    tokens: int  # number of these tokens
    weights: list[Tensor]  # `[E]` for each MoE layer
    saliency: list[Tensor]  # `[E]` for each MoE layer


class _Layer:
    """Sums of weights, of weights times norms of outputs, and the number of the rows of one MoE layer: fp64, each `[E]`."""

    def __init__(self, layer: MoELayer) -> None:
        device = next(layer.experts.parameters()).device
        self.sums = torch.zeros(3, layer.experts.count, dtype=torch.float64, device=device)
        self._routing: Routing | None = None
        self._dispatch: LocalDispatch | None = None

    def dispatched(self, module: Any, inputs: tuple[Tensor, Routing], dispatch: LocalDispatch) -> None:
        self._routing, self._dispatch = inputs[1], dispatch

    def computed(self, module: Any, inputs: Any, y: Tensor) -> None:
        assert self._routing is not None and self._dispatch is not None
        weight = self._routing.weight.flatten().double()  # [N * k], 0 where dropped
        norms = torch.linalg.vector_norm(y, dim=-1, dtype=torch.float64).flatten()  # [M]; [E * S] of slots
        norm = norms[self._dispatch.row_of_assignment()]
        kept = self._routing.kept.flatten().double()
        self.sums.index_add_(1, self._routing.expert.flatten(), torch.stack([weight, weight * norm, kept]))


@torch.no_grad()
def measure_use(model: GPT, batches: Iterable[Batch]) -> ExpertUse:
    """Read text with a model in evaluation mode."""
    total, tokens = 0.0, 0
    layers = []
    with ExitStack() as hooks:  # a handle is a context, which removes its hook
        for moe in moe_layers(model):
            layers.append(layer := _Layer(moe))
            hooks.enter_context(moe.dispatcher.register_forward_hook(layer.dispatched))
            hooks.enter_context(moe.experts.register_forward_hook(layer.computed))
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


@torch.no_grad()
def measure_influence(model: GPT, batches: Iterable[Batch]) -> list[float]:
    """Read text with a model in evaluation mode, and return the influence of each block, from 0 to 2."""
    device = model.unembedding.device
    sums = torch.zeros(len(model.blocks), dtype=torch.float64, device=device)
    tokens, mask = 0, torch.empty(0)

    def measured(index: int) -> Any:
        def add(block: Block, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            similarity = cosine_similarity(inputs[0].float(), output[0].float(), dim=-1)  # [B, T]
            sums[index] += ((1 - similarity.double()).clamp_min(0) * mask).sum()  # rounding: cos > 1

        return add

    with ExitStack() as hooks:
        for index, block in enumerate(model.blocks):
            hooks.enter_context(block.register_forward_hook(measured(index)))
        for batch in (move_data_to_device(batch, device) for batch in batches):
            mask = batch["token_mask"]
            read_batch(model, batch)
            tokens += int(mask.sum())
    if not tokens:
        raise RunError("there is no text to measure the influence of blocks on; give some")
    influence: list[float] = (sums / tokens).tolist()
    return influence

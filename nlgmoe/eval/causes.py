"""The change of the loss if an expert were removed: of every expert to first order, of chosen ones exactly.

    first order   - sum over tokens n of w_n dL / dw_n     one backward pass for all experts; w: weight of the expert's output
    exact         L(without the expert) - L                one pass for each expert, from its block on

L is the sum of a sequence's token losses; a sequence does not see the others, so its tokens change its own loss only. Means are
over all tokens of the text, in nats. Their 95% intervals are those of a ratio of sums over sequences:

    m = sum_s c_s / sum_s t_s,   half-width = t(S - 1) * sqrt(S / (S - 1) * sum_s (c_s - m t_s)^2) / sum_s t_s

Letters: S sequences, L MoE layers, E experts of the largest layer, B sequences of T tokens in a batch, N = B * T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from scipy import stats
from torch import Tensor

from nlgmoe.batch import Batch, loss_mask
from nlgmoe.eval.interventions import Experts, Removal, remove_experts
from nlgmoe.eval.perplexity import CHUNK, losses_of, read_batch
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.layers.moe import moe_layers
from nlgmoe.layers.routing import Routing
from nlgmoe.model.gpt import GPT, GPTOutput
from nlgmoe.pyramid import moe_blocks
from nlgmoe.validation import RunError

Observer = Callable[[Batch, Sequence[Routing]], None]


@dataclass(frozen=True)
class Changes:
    """Changes of the loss of each sequence, in nats, summed over its tokens.

    Attributes:
        sums: `[S, ...]`.
        tokens: `[S]` tokens whose loss counts.
        domain: `[S]` ids.
    """

    sums: np.ndarray
    tokens: np.ndarray
    domain: np.ndarray

    def mean(self, sequences: Any = slice(None)) -> np.ndarray:
        """Return the mean change a token, `[...]`, of some sequences."""
        mean: np.ndarray = self.sums[sequences].sum(axis=0) / max(1, self.tokens[sequences].sum())
        return mean

    def half_width(self, sequences: Any = slice(None)) -> np.ndarray:
        """Return the half-width of the mean's 95% interval, `[...]`; NaN with fewer than two sequences."""
        sums, tokens = self.sums[sequences], self.tokens[sequences]
        count = len(tokens)
        if count < 2:
            return np.full(sums.shape[1:], np.nan)
        shape = (count,) + (1,) * (sums.ndim - 1)
        residual = sums - self.mean(sequences) * tokens.reshape(shape)
        error = np.sqrt(count / (count - 1) * (residual**2).sum(axis=0)) / tokens.sum()
        half: np.ndarray = stats.t.ppf(0.975, count - 1) * error
        return half

    def agreement(self) -> float:
        """Return the rank correlation of the means of both halves of the text, every other sequence; NaN if undefined."""
        halves = [self.mean(slice(first, None, 2)).ravel() for first in (0, 1)]
        known = np.isfinite(halves).all(axis=0)
        if len(self.tokens) < 4 or known.sum() < 3 or any(np.ptp(half[known]) == 0 for half in halves):
            return float("nan")
        return float(stats.spearmanr(halves[0][known], halves[1][known]).statistic)


@dataclass(frozen=True)
class FirstOrder:
    """First-order changes of every expert, `[S, E of the layer]` of each MoE layer, and the loss of the text."""

    layers: list[Changes]
    loss: float  # mean over tokens, nats
    tokens: int  # number of these tokens


def first_order(model: GPT, batches: Iterable[Batch], observe: Observer | None = None) -> FirstOrder:
    """Read text with a model in evaluation mode, forwards and backwards.

    Args:
        observe: called with each batch and its routings, such as `TraceWriter.add`.
    """
    counts, device, total = _experts_to_evaluate(model), model.unembedding.device, 0.0
    sums: list[Tensor] = []
    tokens, domains = [], []
    with _weights_alone(model) as factors:
        for given in batches:
            batch: Batch = move_data_to_device(given, device)
            factors.clear()
            counted = loss_mask(batch)
            with torch.enable_grad():
                output = read_batch(model, batch)
                loss = _summed_loss(model, output, batch["targets"], counted)
                loss.backward()
            sums.append(_by_sequence(factors, output.routings, counts, len(counted)).cpu())
            total += float(loss.detach())
            tokens.append(counted.sum(dim=1).cpu())
            domains.append(batch["domain"].cpu())
            if observe is not None:
                observe(given, output.routings)  # as it came, so that an observer copies no text back from the device
    if not (number := int(sum(part.sum() for part in tokens))):
        raise RunError("there is no text to measure experts on; give some")
    changes, read, domain = torch.cat(sums).numpy(), torch.cat(tokens).numpy(), torch.cat(domains).numpy()
    by_layer = np.split(changes, np.cumsum(counts)[:-1], axis=1)
    return FirstOrder([Changes(part, read, domain) for part in by_layer], total / number, number)


@contextmanager
def _weights_alone(model: GPT) -> Iterator[list[Tensor]]:
    """Multiply the experts' weights by ones, which alone have gradients; yield those of the last forward pass, `[N, k]`."""
    factors: list[Tensor] = []

    def multiply(router: Any, inputs: Any, routing: Routing) -> Routing:
        factors.append(torch.ones_like(routing.weight, requires_grad=True))
        return replace(routing, weight=routing.weight * factors[-1])

    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as hooks:
        for parameter in learning:
            parameter.requires_grad_(False)
            hooks.callback(parameter.requires_grad_, True)
        for moe in moe_layers(model):
            hooks.enter_context(moe.router.register_forward_hook(multiply))
        yield factors


def _summed_loss(model: GPT, output: GPTOutput, targets: Tensor, counted: Tensor) -> Tensor:
    hidden, one = output.hidden.flatten(0, 1), output.hidden.new_ones(())
    vocab_size, unembedding = model.config.vocab_size, model.unembedding
    return cross_entropy(hidden, unembedding, vocab_size, targets.flatten(), counted.flatten(), CHUNK, one)


def _by_sequence(
    factors: Sequence[Tensor], routings: Sequence[Routing], counts: Sequence[int], sequences: int
) -> Tensor:
    """Return - w dL / dw summed over the tokens of each sequence, `[B, sum of E]` fp64."""
    columns = []
    for factor, routing, count in zip(factors, routings, counts, strict=True):
        assert factor.grad is not None  # w dL / dw
        change = factor.grad.new_zeros(sequences, count, dtype=torch.float64)
        expert = routing.expert.unflatten(0, (sequences, -1)).flatten(1)  # [B, T * k]
        columns.append(change.scatter_add_(1, expert, -factor.grad.double().view_as(expert)))
    return torch.cat(columns, dim=1)


@torch.no_grad()
def exact_changes(
    model: GPT,
    batches: Iterable[Batch],
    experts: Experts,
    removals: Sequence[Removal] = ("contribution", "route_around"),
) -> dict[tuple[int, int, Removal], Changes]:
    """Remove experts one by one, and return the change for each (MoE layer, expert, removal).

    The blocks before an expert's run once a batch.
    """
    _experts_to_evaluate(model)
    blocks, device = list(moe_blocks(model.config)), model.unembedding.device
    sums: dict[tuple[int, int, Removal], list[Tensor]] = {
        (layer, expert, removal): [] for layer in sorted(experts) for expert in experts[layer] for removal in removals
    }
    tokens, domains = [], []
    inputs: dict[int, tuple[Any, ...]] = {}
    for batch in (move_data_to_device(batch, device) for batch in batches):
        with ExitStack() as hooks:
            for layer in experts:
                keep: Any = lambda block, given, layer=layer: inputs.__setitem__(layer, given)  # noqa: E731
                hooks.enter_context(model.blocks[blocks[layer]].register_forward_pre_hook(keep))
            output = read_batch(model, batch)
        losses = _by_sequence_loss(model, output, batch)  # [B]
        for (layer, expert, removal), changes in sums.items():
            with remove_experts(model, {layer: [expert]}, removal):
                changed = model.run_blocks(blocks[layer], *inputs[layer])
            changes.append((_by_sequence_loss(model, changed, batch) - losses).cpu())
        tokens.append(loss_mask(batch).sum(dim=1).cpu())
        domains.append(batch["domain"].cpu())
    read, domain = torch.cat(tokens).numpy(), torch.cat(domains).numpy()
    return {key: Changes(torch.cat(changes).numpy(), read, domain) for key, changes in sums.items()}


def _by_sequence_loss(model: GPT, output: GPTOutput, batch: Batch) -> Tensor:
    """Return the summed loss of each sequence, `[B]` fp64."""
    return (losses_of(model, output, batch).double() * loss_mask(batch)).sum(dim=1)


def _experts_to_evaluate(model: GPT) -> list[int]:
    """Return the number of experts of each MoE layer of a mixture in evaluation mode."""
    if not (experts := list(moe_blocks(model.config).values())):
        raise RunError("the model has no experts: it is dense")
    if model.training:
        raise RunError("the model is in training mode; call model.eval() first")
    return experts

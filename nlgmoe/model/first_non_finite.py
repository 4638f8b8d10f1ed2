"""Find the first part of the model that holds NaN or infinity, and its rank. Slow; called only when one has occurred."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nlgmoe.model.gpt import GPT


def first_non_finite_weight(model: GPT) -> str | None:
    """Return the first weight that holds NaN or infinity: `blocks.0.ffn.expand.bias on rank 1`; None if there is none.

    A collective; all ranks get the same answer.
    """
    parameters = _parameters_in_order(model)
    flags = torch.stack([value.detach().isfinite().all() for _, value in parameters]).tolist()
    found = _agree(_first(not finite for finite in flags), model.token_embedding.weight.device)
    return None if found is None else f"{parameters[found[0]][0]} {found[1]}"


def first_non_finite(
    model: GPT,
    micro_batches: int,
    losses_of: Callable[[int], Iterable[Tensor]],
    loss_is_finite: bool,
    gradient_of: Callable[[nn.Parameter], Tensor | None],
) -> str:
    """Return the first non-finite output or gradient of a step with finite weights; the same on all ranks. A collective.

    Outputs of the forward pass come first, in the order of the model's parts; then gradients, in the order of the backward pass.

    Args:
        model: with the weights of the step.
        micro_batches: of the step, on every rank.
        losses_of: recomputes the losses of one micro-batch, with the same random draws.
        loss_is_finite: of the step.
        gradient_of: the gradient of a parameter.
    """
    device = model.token_embedding.weight.device
    parts = _in_order(model)
    for index in range(micro_batches):
        with _watching(model, parts) as seen, torch.no_grad():
            losses = losses_of(index)
        bad = min(seen, default=None)
        if bad is None and not all(_finite(loss) for loss in losses):
            bad = len(parts)
        if (found := _agree(bad, device)) is not None:
            name = f"the output of {parts[found[0]]}" if found[0] < len(parts) else "the loss of finite outputs"
            return f"{name} {found[1]}"
    if not loss_is_finite:
        return "nothing when recomputed, which points to a fault of the device"
    parameters = _parameters_in_order(model)[::-1]
    bad = _first([not _finite(gradient_of(value)) for _, value in parameters])  # all: ranks ask together
    if (found := _agree(bad, device)) is not None:
        return f"the gradient of {parameters[found[0]][0]} {found[1]}"
    return "no single value, but their squares are too large for float32"


def require_finite_logits(model: GPT, logits: Tensor) -> None:
    """Check logits before they are used for text or a file.

    Raises:
        ValueError: a logit is NaN or infinite; the message names the first weight that is, if one is.
    """
    if _finite(logits):
        return
    bad = next((name for name, value in model.named_parameters() if not _finite(value)), None)
    cause = f"the weight {bad} is not finite; use another checkpoint" if bad else "all weights are finite; use float32"
    raise ValueError(f"the model's logits are NaN or infinite: {cause}")


def _in_order(model: nn.Module) -> list[str]:
    """Return the names of the model's modules, each after those inside it: about the order in which they finish."""
    names: list[str] = []

    def visit(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)
        if name and not isinstance(module, nn.ModuleList):
            names.append(name)

    visit(model, "")
    return names


def _parameters_in_order(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        named
        for part in _in_order(model)
        for named in model.get_submodule(part).named_parameters(prefix=part, recurse=False)
    ]


@contextmanager
def _watching(model: nn.Module, parts: list[str]) -> Iterator[list[int]]:
    """Collect the numbers of the parts whose output is not finite."""
    seen: list[int] = []

    def watch(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(_finite(tensor) for tensor in _tensors(output)):
                seen.append(index)

        return look

    hooks = [model.get_submodule(part).register_forward_hook(watch(index)) for index, part in enumerate(parts)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in the output of a module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _finite(value: Tensor | None) -> bool:
    return value is None or bool(value.isfinite().all())


def _first(flags: Iterable[bool]) -> int | None:
    return next((index for index, flag in enumerate(flags) if flag), None)


def _agree(found: int | None, device: torch.device) -> tuple[int, str] | None:
    """Return the lowest of the ranks' findings and its ranks: `on rank 3`; None if no rank has found anything. A collective."""
    here = torch.tensor([-1 if found is None else found], device=device)
    everywhere = [here]
    if distributed.is_initialized():
        everywhere = [torch.empty_like(here) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everywhere, here)
    by_rank = [int(value) for value in everywhere]
    if max(by_rank) < 0:
        return None
    lowest = min(value for value in by_rank if value >= 0)
    ranks = [str(rank) for rank, value in enumerate(by_rank) if value == lowest]
    if len(ranks) == 1:
        return lowest, f"on rank {ranks[0]}"
    return lowest, "on all ranks" if len(ranks) == len(by_rank) else f"on ranks {', '.join(ranks)}"

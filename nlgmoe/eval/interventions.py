"""Remove experts of a model in evaluation.

    contribution   an expert's output is 0; choices and weights stay
    route_around   an expert is left out of the choice and of the softmax, as if it had been pruned: others take its tokens

Layers are MoE layers, counted from 0 by depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch

from nlgmoe.config import GPTConfig
from nlgmoe.layers.moe import moe_layers
from nlgmoe.layers.router import Router
from nlgmoe.layers.routing import Routing
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import moe_blocks
from nlgmoe.validation import RunError, SettingError, require

Removal = Literal["contribution", "route_around"]
Experts = Mapping[int, Sequence[int]]  # MoE layer -> its experts


def parse_experts(words: str | Sequence[str], config: GPTConfig, setting: str) -> dict[int, list[int]]:
    """Read experts of MoE layers, such as `0:3,7` (experts 3 and 7 of MoE layer 0), `2:all` or `all`.

    Args:
        words: one such text, or several.
        setting: name of the argument, for errors.
    """
    counts = list(moe_blocks(config).values())
    chosen: dict[int, list[int]] = {}
    for word in [words] if isinstance(words, str) else words:
        require(bool(counts), f"{setting}={word}: the model has no experts: it is dense")
        if word == "all":
            return {layer: list(range(count)) for layer, count in enumerate(counts)}
        layer_text, _, experts_text = word.partition(":")
        problem = f"{setting}={word}"
        try:
            layer = int(layer_text)
            experts = None if experts_text == "all" else [int(number) for number in experts_text.split(",")]
        except ValueError:
            raise SettingError(f"{problem} is not LAYER:EXPERT,EXPERT, such as 0:3,7, LAYER:all or all") from None
        require(
            0 <= layer < len(counts),
            f"{problem}: there is no MoE layer {layer}; the model has {len(counts)}, counted from 0 by depth",
        )
        experts = list(range(counts[layer])) if experts is None else experts
        for expert in experts:
            require(
                0 <= expert < counts[layer],
                f"{problem}: MoE layer {layer} has no expert {expert}; it has {counts[layer]}, counted from 0",
            )
        chosen[layer] = sorted({*chosen.get(layer, []), *experts})
    return chosen


def remove_experts(model: GPT, experts: Experts, removal: Removal = "route_around") -> ExitStack:
    """Remove experts until the returned context ends, or for good if it is not used as one.

        with remove_experts(model, {0: [3, 7]}):
            losses = ...

    Raises:
        ValueError: a router cannot route around experts, or too few would be left.
    """
    undo, layers = ExitStack(), moe_layers(model)
    for layer, removed in experts.items():
        router: Router = layers[layer].router
        if removal == "contribution":
            undo.enter_context(router.register_forward_hook(_Silence(removed)))
            continue
        before = [] if router.left_out is None else router.left_out.nonzero()[:, 0].tolist()
        router.leave_out(sorted({*before, *removed}))
        undo.callback(router.leave_out, before)
        undo.enter_context(router.register_forward_hook(_require_left_out))
    return undo


class _Silence:
    """A forward hook that drops the assignments of experts."""

    def __init__(self, experts: Sequence[int]) -> None:
        self.experts = list(experts)

    def __call__(self, router: Router, inputs: Any, routing: Routing) -> Routing:
        removed = torch.zeros(routing.num_experts, dtype=torch.bool, device=routing.expert.device)
        removed[self.experts] = True
        dropped = removed[routing.expert]  # [N, k]
        return replace(routing, weight=routing.weight.masked_fill(dropped, 0), kept=routing.kept & ~dropped)


def _require_left_out(router: Router, inputs: Any, routing: Routing) -> None:
    """Check the choice: a subclass may choose in a way of its own."""
    if router.left_out is not None and bool(router.left_out[routing.expert].any()):
        raise RunError(f"{type(router).__name__} chose an expert that is left out; use removal=contribution")

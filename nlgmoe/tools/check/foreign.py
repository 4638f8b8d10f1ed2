"""Layers of others: a module of the user's own, and adapters for DeepSpeed and Hugging Face."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.device import name_deepspeeds_device
from nlgmoe.layers.router import Routing
from nlgmoe.tools.check.layer import Batch, Layer, Output
from nlgmoe.validation import RunError


@dataclass(frozen=True)
class ForeignLayer(Layer):
    """A module that takes `x`, and `mask` if its `forward` has one, and returns `y`, or a tuple that begins with `y`.

    A scalar tensor among the others is the auxiliary loss, a `Routing` the routing. Its gate is its child `router` or `gate`.

    Attributes:
        factory: makes the module.
    """

    factory: Callable[[], nn.Module] | None = None

    def build(self) -> nn.Module:
        """See `Layer`."""
        assert self.factory is not None
        return self.factory()

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        """See `Layer`."""
        masked = self.takes_mask and batch.mask is not None
        found: Any = module(batch.x, mask=batch.mask) if masked else module(batch.x)
        y, *rest = found if isinstance(found, tuple | list) else (found,)
        if not isinstance(y, Tensor) or y.shape != batch.x.shape:
            is_now = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise RunError(
                f"forward returns {is_now}, not a tensor y of {list(batch.x.shape)} or a tuple that begins with it"
            )
        losses = [one for one in rest if isinstance(one, Tensor) and one.ndim == 0]
        for one in rest:  # what is like a loss, and would have no gradient or not be one
            if isinstance(one, int | float) or (isinstance(one, Tensor) and one.ndim > 0 and one.numel() == 1):
                what = f"a tensor of {list(one.shape)}" if isinstance(one, Tensor) else f"a {type(one).__name__}"
                raise RunError(f"forward returns {what} behind y; return a loss as a tensor without dimensions")
        return Output(y, next((one for one in rest if isinstance(one, Routing)), None), losses[0] if losses else None)

    def gate_weight(self, module: nn.Module) -> Tensor | None:
        """See `Layer`."""
        gate = getattr(module, "router", getattr(module, "gate", None))
        shape = (self.num_experts, self.hidden_size)
        tensors = [] if gate is None else [*gate.parameters(), *gate.buffers()]
        return next((one for one in tensors if tuple(one.shape) == shape), None)


def _last_call(module: nn.Module, call: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the result of `call`, and what `module` returned inside."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append(output))
    try:
        return call(), seen
    finally:
        handle.remove()


# ---- DeepSpeed


@dataclass(frozen=True)
class DeepSpeedLayer(Layer):
    """`deepspeed.moe.layer.MoE` with its defaults, which drop tokens in evaluation too; for k = 2 without sampling."""

    takes_mask: bool = True
    drops: bool | None = True

    def build(self) -> nn.Module:
        """See `Layer`."""
        name_deepspeeds_device()
        from deepspeed.moe.layer import MoE

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        width = self.hidden_size
        expert = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        return MoE(width, expert, self.num_experts, k=self.top_k, top2_2nd_expert_sampling=False)

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        """See `Layer`; a dropped choice has a negative index, in place of which this takes the logits' order."""
        used = None if batch.mask is None else batch.mask.flatten().long()
        gate: Any = module.deepspeed_moe.gate  # type: ignore[union-attr]
        (y, aux, _), (routed,) = _last_call(gate, lambda: module(batch.x, used))
        expert, weight = routed[3].t().long(), routed[5].t()  # [N, k]
        wanted = F.linear(batch.x.flatten(0, 1), self.gate_weight(module)).topk(self.top_k).indices
        routing = Routing(torch.where(expert >= 0, expert, wanted), weight, expert >= 0, self.num_experts)
        return Output(y, routing, aux)

    def capacity(self, tokens: int) -> int:
        """See `Layer`."""
        return max(4, math.ceil(tokens * self.top_k / self.num_experts))

    def gate_weight(self, module: nn.Module) -> Tensor:
        """See `Layer`."""
        return module.deepspeed_moe.gate.wg.weight  # type: ignore[union-attr, return-value]

    def expert(self, module: nn.Module, index: int, x: Tensor) -> Tensor:
        """See `Layer`."""
        return module.deepspeed_moe.experts.deepspeed_experts[index](x)  # type: ignore[union-attr, index, operator]

    def odd(self) -> Layer:
        """See `Layer`."""
        return replace(self, hidden_size=15)


# ---- Hugging Face


@dataclass(frozen=True)
class TransformersLayer(Layer):
    """A sparse block of `transformers`, which is dropless, with the balance loss of its model.

    Attributes:
        family: the model's module.
        block: its class.
        config: that of the model.
        settings: of the configuration, where their names differ between families.
        coefficient: of the model's balance loss, 0: it has none.
    """

    drops: bool | None = False
    family: str = "mixtral"
    block: str = "MixtralSparseMoeBlock"
    config: str = "MixtralConfig"
    settings: dict[str, Any] = field(default_factory=dict)
    coefficient: float = 0.0

    def _modeling(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}")

    def build(self) -> nn.Module:
        """See `Layer`."""
        config = getattr(importlib.import_module("transformers"), self.config)
        width: dict[str, Any] = {"hidden_size": self.hidden_size, "num_experts_per_tok": self.top_k}
        made = config(**width, **self.settings)
        made._experts_implementation = "eager"  # what a block alone uses; `grouped_mm` takes no fp64
        return getattr(self._modeling(), self.block)(made)

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        """See `Layer`."""
        y, ((logits, weight, expert),) = _last_call(module.gate, lambda: module(batch.x))  # type: ignore[arg-type]
        routing = Routing(expert, weight, torch.ones_like(expert, dtype=torch.bool), self.num_experts)
        if not self.coefficient:
            return Output(y, routing)
        loss = self._modeling().load_balancing_loss_func((logits,), self.num_experts, self.top_k)
        return Output(y, routing, self.coefficient * loss)

    def gate_weight(self, module: nn.Module) -> Tensor:
        """See `Layer`."""
        return module.gate.weight  # type: ignore[union-attr, return-value]

    def expert(self, module: nn.Module, index: int, x: Tensor) -> Tensor:
        """See `Layer`."""
        chosen = torch.full((len(x), 1), index)
        return module.experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype))  # type: ignore[operator]

    def join(self, module: nn.Module, x: Tensor, experts: Tensor) -> Tensor:
        """See `Layer`; DeepSeek's shared experts see every token."""
        shared: Any = getattr(module, "shared_experts", None)
        return experts if shared is None else experts + shared(x)

    def odd(self) -> Layer:
        """See `Layer`."""
        return replace(self, hidden_size=15)


def _family(
    name: str, family: str, prefix: str, block: str, weight_sum: Any, coefficient: float, **settings: Any
) -> Any:
    """Return a function that makes the layer of a model family."""
    config = f"{prefix}Config"
    return lambda: [
        TransformersLayer(
            name, top_k=2, weight_sum=weight_sum, family=family, block=f"{prefix}{block}", config=config,
            settings=settings, coefficient=coefficient,
        )
    ]  # fmt: skip


def _deepspeed() -> list[Layer]:
    return [
        DeepSpeedLayer("deepspeed, k 1", weight_sum="free", order="random"),
        DeepSpeedLayer("deepspeed, k 2", top_k=2, weight_sum=1.0, order="position"),
    ]


ADAPTERS: dict[str, Callable[[], list[Layer]]] = {
    "deepspeed": _deepspeed,
    "mixtral": _family(
        *("mixtral", "mixtral", "Mixtral", "SparseMoeBlock", 1.0, 0.001), intermediate_size=16, num_local_experts=8,
    ),
    "olmoe": _family(
        *("olmoe", "olmoe", "Olmoe", "SparseMoeBlock", "free", 0.01), intermediate_size=16, num_experts=8,
    ),
    "qwen3-moe": _family(
        *("qwen3-moe", "qwen3_moe", "Qwen3Moe", "SparseMoeBlock", 1.0, 0.001),
        moe_intermediate_size=16, num_experts=8, norm_topk_prob=True,
    ),
    "deepseek-v3": _family(
        *("deepseek-v3", "deepseek_v3", "DeepseekV3", "MoE", 2.5, 0.0),
        moe_intermediate_size=16, n_routed_experts=8, n_shared_experts=1, n_group=1, topk_group=1,
    ),
}  # fmt: skip

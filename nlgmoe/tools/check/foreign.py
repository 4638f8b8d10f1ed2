"""Foreign layers: a module of the user, and adapters for DeepSpeed and Hugging Face."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
    """

    factory: Callable[[], nn.Module] | None = None  # makes the module

    def build(self) -> nn.Module:
        assert self.factory is not None
        return self.factory()

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        returned: Any = module(batch.x, **({"mask": batch.mask} if self.takes_mask and batch.mask is not None else {}))
        y, *rest = returned if isinstance(returned, tuple | list) else (returned,)
        if not isinstance(y, Tensor) or y.shape != batch.x.shape:
            kind = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise RunError(
                f"forward returns {kind}, not a tensor y of {list(batch.x.shape)} or a tuple that begins with it"
            )
        losses = [value for value in rest if isinstance(value, Tensor) and value.ndim == 0]
        for value in rest:  # values like a loss, which would have no gradient or be ignored
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim > 0 and value.numel() == 1):
                kind = f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise RunError(f"forward returns {kind} behind y; return a loss as a tensor without dimensions")
        routing = next((value for value in rest if isinstance(value, Routing)), None)
        return Output(y, routing, losses[0] if losses else None)

    def gate_weight(self, module: nn.Module) -> Tensor | None:
        gate = getattr(module, "router", getattr(module, "gate", None))
        shape = (self.num_experts, self.hidden_size)
        tensors = [*gate.parameters(), *gate.buffers()] if isinstance(gate, nn.Module) else [gate]
        return next((tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.shape == shape), None)

    def gate_bias(self, module: nn.Module) -> Tensor | None:
        gate = getattr(module, "router", getattr(module, "gate", None))
        bias = getattr(gate, "bias", None)
        return bias if isinstance(gate, nn.Linear) and isinstance(bias, Tensor) else None


def _call_and_capture(module: nn.Module, call: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the result of `call`, and what `module` returned in it."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    try:
        result = call()
    finally:
        handle.remove()
    (output,) = outputs
    return result, output


# ---- DeepSpeed


@dataclass(frozen=True)
class DeepSpeedLayer(Layer):
    """`deepspeed.moe.layer.MoE` with its defaults, which drop tokens in evaluation too; for k = 2 without sampling."""

    takes_mask: bool = True
    drops: bool | None = True

    def build(self) -> nn.Module:
        name_deepspeeds_device()
        from deepspeed.moe.layer import MoE

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        width = self.hidden_size
        expert = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        return MoE(width, expert, self.num_experts, k=self.top_k, top2_2nd_expert_sampling=False)

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        """See `Layer`; a dropped choice has a negative index, which the order of the logits replaces."""
        used = None if batch.mask is None else batch.mask.flatten().long()
        gate: Any = module.deepspeed_moe.gate  # type: ignore[union-attr]
        (y, aux, _), routed = _call_and_capture(gate, lambda: module(batch.x, used))
        expert, weight = routed[3].t().long(), routed[5].t()  # [N, k]
        wanted = F.linear(batch.x.flatten(0, 1), self.gate_weight(module)).topk(self.top_k).indices
        routing = Routing(torch.where(expert >= 0, expert, wanted), weight, expert >= 0, self.num_experts)
        return Output(y, routing, aux)

    def capacity(self, tokens: int) -> int:
        return max(4, math.ceil(tokens * self.top_k / self.num_experts))

    def gate_weight(self, module: nn.Module) -> Tensor:
        return module.deepspeed_moe.gate.wg.weight  # type: ignore[union-attr, return-value]

    def expert(self, module: nn.Module, index: int, x: Tensor) -> Tensor:
        return module.deepspeed_moe.experts.deepspeed_experts[index](x)  # type: ignore[union-attr, index, operator]

    def odd(self) -> Layer:
        return replace(self, hidden_size=15)


# ---- Hugging Face


@dataclass(frozen=True)
class TransformersLayer(Layer):
    """A sparse block of `transformers`, which is dropless, with the balance loss of its model."""

    drops: bool | None = False
    family: str = "mixtral"  # the model's module; its classes begin with the same words, such as `Qwen3Moe`
    settings: dict[str, Any] = field(default_factory=dict)  # of the configuration, whose names differ between families
    coefficient: float = 0.0  # of the model's balance loss, 0: it has none

    def _modeling(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}")

    def build(self) -> nn.Module:
        prefix, modeling = self.family.title().replace("_", ""), self._modeling()
        config_class = getattr(importlib.import_module("transformers"), f"{prefix}Config")
        config = config_class(hidden_size=self.hidden_size, num_experts_per_tok=self.top_k, **self.settings)
        config._experts_implementation = "eager"  # that of a block alone; `grouped_mm` takes no fp64
        block = getattr(modeling, f"{prefix}SparseMoeBlock", None) or getattr(modeling, f"{prefix}MoE")
        return block(config)

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        y, (logits, weight, expert) = _call_and_capture(module.gate, lambda: module(batch.x))  # type: ignore[arg-type]
        routing = Routing(expert, weight, torch.ones_like(expert, dtype=torch.bool), self.num_experts)
        if not self.coefficient:
            return Output(y, routing)
        loss = self._modeling().load_balancing_loss_func((logits,), self.num_experts, self.top_k)
        return Output(y, routing, self.coefficient * loss)

    def gate_weight(self, module: nn.Module) -> Tensor:
        return module.gate.weight  # type: ignore[union-attr, return-value]

    def expert(self, module: nn.Module, index: int, x: Tensor) -> Tensor:
        chosen = torch.full((len(x), 1), index)
        return module.experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype))  # type: ignore[operator]

    def join(self, module: nn.Module, x: Tensor, experts: Tensor) -> Tensor:
        """See `Layer`; DeepSeek's shared experts see every token."""
        shared: Any = getattr(module, "shared_experts", None)
        return experts if shared is None else experts + shared(x)

    def odd(self) -> Layer:
        return replace(self, hidden_size=15)


def _block(family: str, weight_sum: float | Literal["free"], coefficient: float, **settings: Any) -> TransformersLayer:
    own: dict[str, Any] = {"family": family, "coefficient": coefficient, "settings": settings}
    return TransformersLayer(family.replace("_", "-"), top_k=2, weight_sum=weight_sum, **own)


ADAPTERS: dict[str, list[Layer]] = {
    "deepspeed": [
        DeepSpeedLayer("deepspeed, k 1", weight_sum="free", order="random"),
        DeepSpeedLayer("deepspeed, k 2", top_k=2, weight_sum=1.0, order="position"),
    ],
    "mixtral": [_block("mixtral", 1.0, 0.001, intermediate_size=16, num_local_experts=8)],
    "olmoe": [_block("olmoe", "free", 0.01, intermediate_size=16, num_experts=8)],
    "qwen3-moe": [_block("qwen3_moe", 1.0, 0.001, moe_intermediate_size=16, num_experts=8, norm_topk_prob=True)],
    "deepseek-v3": [
        _block(
            "deepseek_v3",
            2.5,
            0.0,
            moe_intermediate_size=16,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
        )
    ],
}

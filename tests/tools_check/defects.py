"""Our layer with one defect each, planted into the text of a method, under the property that finds it."""

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nlgmoe import GPTConfig, MoEConfig, MoELayer, Router
from nlgmoe.layers import dispatch
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.router import TopKRouter
from nlgmoe.layers.routing import RoutingContext
from nlgmoe.tools.check.layer import Layer
from nlgmoe.tools.check.own import OwnLayer, own_layer

CAPACITY = MoEConfig(8, loss_coeff=0.01)
TWO = MoEConfig(8, top_k=2, second_expert="argmax")
DROPLESS = replace(TWO, token_dropping=False)
Spoil = Callable[[MoELayer], None]


@dataclass(frozen=True)
class Broken(OwnLayer):
    spoil: Spoil | None = None

    def build(self) -> nn.Module:
        module = super().build()
        self.spoil(module)
        return module

    def build_on_rank(self, whole: nn.Module) -> nn.Module:
        module = super().build_on_rank(whole)
        self.spoil(module)
        return module

    def odd(self) -> Layer:
        return Broken(**vars(super().odd()), spoil=self.spoil)

    def on_ranks(self) -> OwnLayer:
        return Broken(**vars(super().on_ranks()), spoil=self.spoil)


def clean(moe: MoEConfig) -> OwnLayer:
    return own_layer(GPTConfig(61, moe=moe), "ours")


def broken(moe: MoEConfig, spoil: Spoil) -> Broken:
    return Broken(**vars(clean(moe)), spoil=spoil)


def edited(function: Callable[..., Any], *changes: tuple[str, str]) -> Callable[..., Any]:
    """Return a function with pieces of its source replaced; the new ones may use what this file has."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, (
            f"{function.__qualname__} has {source.count(old)} of {old!r}; write the defect anew"
        )
        source = source.replace(old, new)
    scope = globals() | vars(sys.modules[function.__module__])
    exec(source, scope)
    changed: Callable[..., Any] = scope[function.__name__]
    return changed


def with_methods(module: nn.Module, **methods: Any) -> None:
    module.__class__ = type(f"Broken{type(module).__name__}", (type(module),), methods)


def router(function: Callable[..., Any], *changes: tuple[str, str]) -> Spoil:
    return lambda module: with_methods(module.router, **{function.__name__: edited(function, *changes)})


def routed(statement: str, *changes: tuple[str, str]) -> Spoil:
    """Let the router run a statement before it returns the routing."""
    return router(TopKRouter.forward, *changes, ("return Routing(", f"{statement}\n    return Routing("))


def own_loss(loss: str) -> Spoil:
    return router(TopKRouter.forward, ("{}", f"{{'own_z_loss': {loss}}}"))


LOGITS = "F.linear(x, self.weight.to(x.dtype))"


def logits(new: str) -> Spoil:
    return router(TopKRouter._logits, (LOGITS, new))


def experts(*changes: tuple[str, str]) -> Spoil:
    """Edit how experts are applied in fp64."""
    return lambda module: with_methods(module.experts, _loop=edited(Experts._loop, *changes))


def layer(new: str) -> Spoil:
    change = "return y.to(x.dtype).view_as(x)", f"y = y.to(x.dtype).view_as(x)\n    return {new}"
    return lambda module: with_methods(module, forward=edited(MoELayer.forward, change))


def outputs_of_other_slots(module: MoELayer) -> None:
    """Let each row of a rank take the output of another one's slot."""
    if distributed.is_initialized():
        change = "return row_of_slot, slot_of_row", "return row_of_slot, slot_of_row.roll(1)"
        dispatch.assign_slots = edited(dispatch.assign_slots, change)


def with_load(spoil: Spoil) -> Spoil:
    def both(module: MoELayer) -> None:
        Router.register_buffer(module.router, "load", torch.zeros(8))
        spoil(module)

    return both


def after_step(load: Callable[[TopKRouter, Tensor], Tensor]) -> Spoil:
    """Keep a load, `load(router, requests)`, in a buffer after each step."""

    def step(self: TopKRouter, requests: Tensor) -> None:
        self.load.copy_(load(self, requests))

    def spoil(module: MoELayer) -> None:
        routed("self.seen = count(expert, self.num_experts)")(module)
        with_methods(module.router, after_step=step)

    return with_load(spoil)


def clipped(self: TopKRouter, requests: Tensor) -> Tensor:
    return requests / requests.sum().clamp(min=1) if requests.max() > 0 else requests


def add_lost_state(module: MoELayer) -> None:
    """A bias that balances, in a tensor that is no buffer."""
    module.router.bias = torch.zeros(8)

    def after_step(self: Any, requests: Tensor) -> None:
        self.bias = self.bias + 0.05 * (requests.float().mean() - requests).sign()

    logits(f"{LOGITS} + self.bias.to(x)")(module)
    with_methods(module.router, after_step=after_step)


def of_a_pool(always: bool) -> Spoil:
    """Let a sequence choose from a pool of experts, or do so in training."""
    of_training = "" if always else " if training else self._logits(gate_input)"
    new = f"pooled(self._logits(gate_input), context){of_training}"
    return router(TopKRouter.forward, ("self._logits(gate_input)", new))


def pooled(logits: Tensor, context: RoutingContext) -> Tensor:
    """Leave each sequence the four experts that it likes best as a whole (EMO)."""
    each = logits.unflatten(0, (len(context.tokens), -1))  # [B, T, E]
    liked = each.softmax(-1).mean(dim=1, keepdim=True).topk(4).indices
    return (torch.full_like(each[:, :1], -1e4).scatter(2, liked, 0) + each).flatten(0, 1)


class TimesRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (distributed.get_world_size() if distributed.is_initialized() else 1)


def gate_of_ranks(module: MoELayer) -> None:
    """Sum the gate's gradient over ranks instead of averaging it (transformers#48687)."""
    logits(f"TimesRanks.apply({LOGITS})")(module)


CAPACITY_OF, KEPT, SCORES = TopKRouter._capacity, TopKRouter._within_capacity, TopKRouter._scores
BY_PROPERTY: dict[str, dict[str, tuple[MoEConfig, Spoil]]] = {  # that finds them
    "weights follow the logits": {
        "double softmax": (CAPACITY, router(SCORES, ("return probs", "return probs.softmax(-1)"))),
        "double softmax, normalised": (TWO, router(SCORES, ("return probs", "return probs.softmax(-1)"))),
        "an expert twice": (DROPLESS, routed("expert = expert[:, :1].expand_as(expert)")),
        "weights in another order than experts": (DROPLESS, routed("weight = weight.flip(1)")),
    },
    "the balance loss sees a collapse": {
        "double softmax in the balance loss": (TWO, routed("probs = probs.softmax(-1)")),
    },
    "the losses reach the gate": {
        "detached auxiliary loss": (TWO, routed("probs = probs.detach()")),
        "detached weights": (CAPACITY, routed("weight = weight.detach()")),
        "a parameter that nothing uses":
            (TWO, lambda module: module.router.register_parameter("idle", nn.Parameter(torch.zeros(8)))),
        "a detached loss beside the balance loss": (TWO, own_loss("logits.logsumexp(-1).detach().square().mean()")),
    },
    "weights sum as declared": {
        "weights renormalised before dropping":
            (TWO, routed("weight = torch.where(kept, weight, 0)", ("kept if drops else None", "None"))),
    },
    "capacity is the formula": {
        "capacity off by one": (CAPACITY, router(CAPACITY_OF, ("return capacity(", "return 1 + capacity("))),
        "tokens dropped without a capacity": (DROPLESS, router(CAPACITY_OF, ("return None", "return 5"))),
        "padding takes capacity":
            (CAPACITY, router(KEPT, ("torch.where(requested, expert, self.num_experts)", "expert"))),
        "padding is computed": (DROPLESS, router(KEPT, ("token_mask is not None", "False"))),
        "capacity counted in bf16":
            (TWO, router(KEPT, ("(len(queue), device=expert.device)", "(len(queue)).bfloat16()"))),
        "a capacity below the kept tokens": (TWO, routed("capacity = 4")),
    },
    "the declared tokens are dropped": {
        "the first tokens stay": (CAPACITY, router(KEPT, ("config.random_token_selection and self.training", "False"))),
        "second choices before first": (TWO, router(KEPT, (".view(num_tokens, 2).t().flatten()", ""))),
    },
    "padding counts in no output or loss": {"padding in the balance loss": (CAPACITY, routed("token_mask = None"))},
    "evaluation does not see neighbours": {
        "evaluation drops tokens": (CAPACITY, router(CAPACITY_OF, ("config.eval_token_dropping", "True"))),
        "tokens mixed up": (DROPLESS, layer("y + 1e-2 * x.roll(1, 1)")),
    },
    "a token sees no later one": {
        "a pool of experts for a sequence": (TWO, of_a_pool(always=True)),
        "a pool of experts in training": (DROPLESS, of_a_pool(always=False)),
    },
    "micro-batches add up": {
        "statistics of the micro-batch": (DROPLESS, layer("y - y.mean(dim=(0, 1)) if self.training else y")),
        "a loss that is a sum over tokens": (DROPLESS, own_loss("logits.logsumexp(-1).square().sum()")),
    },
    "output = sum of weight * expert(x)": {
        "dropped tokens copied": (CAPACITY, layer("torch.where(routing.kept.any(1).view(*x.shape[:2], 1), y, x)")),
        "a lost expert":  # the last one, whose tokens go to the one before it
            (DROPLESS, experts(("rows = x", "counts[-2:] = sum(counts[-2:]), 0\n    rows = x"))),
    },
    "gradients equal finite differences": {
        "no gradient of an expert": (CAPACITY, experts(("(parts)", "([parts[0].detach(), *parts[1:]])"))),
    },
    "forward writes no state": {
        "state written in forward": (CAPACITY, with_load(routed("self.load += self.training * count(expert, 8)"))),
        "noise of the global generator": (TWO, logits(f"{LOGITS} + torch.randn(8, dtype=x.dtype)")),
    },
    "a resumed run is the same to the bit": {"state that no checkpoint holds": (CAPACITY, add_lost_state)},
    "types are kept": {
        "output in fp32": (CAPACITY, layer("y.float()")),
        "weights in half precision": (CAPACITY, routed("weight = weight.to(x.dtype)")),
        "overflow in fp16": (CAPACITY, layer("y * 3e5 / 3e5")),
    },
    "50 steps balance the load": {
        "an expert out of reach": (TWO, logits(f"{LOGITS} - 1e4 * torch.eye(8, dtype=x.dtype)[-1]")),
        "balance loss with the wrong sign": (TWO, routed("probs = -probs")),
    },
    "unusual sizes work": {
        "even widths only": (CAPACITY, layer("y.view(*y.shape[:2], -1, 2).flatten(2)")),
        "overflow of large logits":
            (DROPLESS, router(SCORES, ("return probs", "return logits.exp() / logits.exp().sum(-1, keepdim=True)"))),
    },
    "evaluation chooses as training does": {
        "other experts in evaluation": (TWO, logits(f"{LOGITS} if self.training else {LOGITS}.roll(1, -1)")),
    },
    "steps follow the requests": {
        "the load of the last micro-batch": (TWO, after_step(lambda self, requests: self.seen)),
        "loads counted in the weights' type": (TWO, after_step(lambda self, requests: requests.to(self.weight.dtype))),
        "shares of no request": (TWO, after_step(lambda self, requests: requests / requests.sum())),
    },
    "the host reads no device": {
        "a read by the host after a step": (TWO, after_step(clipped)),
        "a read by the host": (CAPACITY, routed("assert expert.max().item() >= 0")),
    },
}  # fmt: skip
DEFECTS = {defect: (name, made) for name, those in BY_PROPERTY.items() for defect, made in those.items()}

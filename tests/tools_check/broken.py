"""Our layer with one defect each, under the property that finds it; and a layer that knows nothing of this project."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from nlgmoe import MoEConfig, MoELayer
from nlgmoe.layers.router import TopKRouter
from tests.tools_check.defects import (
    CAPACITY,
    DROPLESS,
    TWO,
    add_load,
    add_lost_state,
    after_step,
    batch_normalised,
    capacity_of_training,
    clipped,
    copy_dropped,
    counted_in_bf16,
    even_widths,
    experts,
    first_tokens_stay,
    layer,
    lost_expert,
    normalised_before_dropping,
    of_a_pool,
    one_more,
    other_experts_in_evaluation,
    own_loss,
    padding_in_the_queue,
    padding_kept,
    read_on_host,
    routed,
    router,
    shifted,
    token_by_token,
    without_gradients_of_expert_0,
    without_last_expert,
)

Defect = tuple[MoEConfig, Callable[[MoELayer], None]]
DEFECTS: dict[str, tuple[str, Defect]] = {
    # defect -> the property that finds it, and the layer
    "double softmax": (
        "weights follow the logits",
        (CAPACITY, router(_scores=lambda self, logits, probs: probs.softmax(-1))),
    ),
    "double softmax, normalised": (
        "weights follow the logits",
        (TWO, router(_scores=lambda self, logits, probs: probs.softmax(-1))),
    ),
    "double softmax in the balance loss": (
        "the balance loss sees a collapse",
        (TWO, routed(lambda routing, x: replace(routing, probs=routing.probs.softmax(-1)))),
    ),
    "detached auxiliary loss": (
        "the losses reach the gate",
        (TWO, routed(lambda routing, x: replace(routing, probs=routing.probs.detach()))),
    ),
    "detached weights": (
        "the losses reach the gate",
        (CAPACITY, routed(lambda routing, x: replace(routing, weight=routing.weight.detach()))),
    ),
    "weights renormalised before dropping": ("weights sum as declared", (TWO, router(forward=normalised_before_dropping))),
    "capacity off by one": ("capacity is the formula", (CAPACITY, router(_capacity=one_more))),
    "tokens dropped without a capacity": ("capacity is the formula", (DROPLESS, router(_capacity=lambda self, tokens: 5))),
    "the first tokens stay": ("the declared tokens are dropped", (CAPACITY, router(_within_capacity=first_tokens_stay))),
    "second choices before first": ("the declared tokens are dropped", (TWO, router(_within_capacity=token_by_token))),
    "padding takes capacity": ("capacity is the formula", (CAPACITY, router(_within_capacity=padding_in_the_queue))),
    "padding is computed": ("capacity is the formula", (DROPLESS, router(_within_capacity=padding_kept))),
    "padding in the balance loss": (
        "padding counts in no output or loss",
        (CAPACITY, routed(lambda routing, x: replace(routing, token_mask=None))),
    ),
    "evaluation drops tokens": ("evaluation does not see neighbours", (CAPACITY, router(_capacity=capacity_of_training))),
    "tokens mixed up": ("evaluation does not see neighbours", (DROPLESS, layer(shifted))),
    "a pool of experts for a sequence": ("a token sees no later one", (TWO, of_a_pool(always=True))),
    "a pool of experts in training": ("a token sees no later one", (DROPLESS, of_a_pool(always=False))),
    "statistics of the micro-batch": ("micro-batches add up", (DROPLESS, layer(batch_normalised))),
    "dropped tokens copied": ("output = sum of weight * expert(x)", (CAPACITY, layer(copy_dropped))),
    "no gradient of an expert": (
        "gradients equal finite differences",
        (CAPACITY, experts(without_gradients_of_expert_0)),
    ),
    "a lost expert": ("output = sum of weight * expert(x)", (DROPLESS, experts(lost_expert))),
    "state written in forward": ("forward writes no state", (CAPACITY, add_load)),
    "state that no checkpoint holds": ("a resumed run is the same to the bit", (CAPACITY, add_lost_state)),
    "output in fp32": ("types are kept", (CAPACITY, layer(lambda self, x, y, routing: y.float()))),
    "weights in half precision": (
        "types are kept",
        (CAPACITY, routed(lambda routing, x: replace(routing, weight=routing.weight.to(x.dtype)))),
    ),
    "overflow in fp16": (
        "types are kept",
        (CAPACITY, layer(lambda self, x, y, routing: (y * 3e5) * torch.tensor(1 / 3e5, dtype=y.dtype))),
    ),
    "an expert out of reach": ("50 steps balance the load", (TWO, router(_logits=without_last_expert))),
    "balance loss with the wrong sign": (
        "50 steps balance the load",
        (TWO, routed(lambda routing, x: replace(routing, probs=-routing.probs))),
    ),
    "even widths only": ("unusual sizes work", (CAPACITY, layer(even_widths))),
    "a parameter that nothing uses": (
        "the losses reach the gate",
        (TWO, lambda module: module.router.register_parameter("idle", nn.Parameter(torch.zeros(8)))),
    ),
    "a detached loss beside the balance loss": (
        "the losses reach the gate",
        (TWO, own_loss(lambda log_z: log_z.detach().square().mean())),
    ),
    "a loss under another metric's name": (
        "the losses reach the gate",
        (TWO, routed(lambda routing, x: replace(routing, losses={"balance_loss": routing.logits.logsumexp(-1).mean()}))),
    ),
    "a loss for each token": ("the losses reach the gate", (TWO, own_loss(lambda log_z: log_z.square()))),
    "a loss that is a sum over tokens": (
        "micro-batches add up",
        (DROPLESS, own_loss(lambda log_z: log_z.square().sum())),
    ),
    "an expert twice": (
        "weights follow the logits",
        (DROPLESS, routed(lambda routing, x: replace(routing, expert=routing.expert[:, :1].expand_as(routing.expert)))),
    ),
    "weights in another order than experts": (
        "weights follow the logits",
        (DROPLESS, routed(lambda routing, x: replace(routing, weight=routing.weight.flip(1)))),
    ),
    "capacity counted in bf16": ("capacity is the formula", (TWO, router(_within_capacity=counted_in_bf16))),
    "all_kept of padding": (
        "capacity is the formula",
        (DROPLESS, routed(lambda routing, x: replace(routing, all_kept=True))),
    ),
    "a capacity below the kept tokens": (
        "capacity is the formula",
        (TWO, routed(lambda routing, x: replace(routing, capacity=4))),
    ),
    "overflow of large logits": (
        "unusual sizes work",
        (DROPLESS, router(_scores=lambda self, logits, probs: logits.exp() / logits.exp().sum(-1, keepdim=True))),
    ),
    "other experts in evaluation": (
        "evaluation chooses as training does",
        (TWO, router(_logits=other_experts_in_evaluation)),
    ),
    "noise of the global generator": (
        "forward writes no state",
        (TWO, router(_logits=lambda self, x: TopKRouter._logits(self, x) + torch.randn(8, dtype=x.dtype))),
    ),
    "the load of the last micro-batch": (
        "steps follow the requests",
        (TWO, after_step(lambda self, requests: self.seen)),
    ),
    "loads counted in the weights' type": (
        "steps follow the requests",
        (TWO, after_step(lambda self, requests: requests.to(self.weight.dtype))),
    ),
    "shares of no request": (
        "steps follow the requests",
        (TWO, after_step(lambda self, requests: requests / requests.sum())),
    ),
    "a read by the host after a step": ("the host reads no device", (TWO, after_step(clipped))),
    "a read by the host": ("the host reads no device", (CAPACITY, routed(read_on_host))),
}  # fmt: skip


class PlainMoE(nn.Module):
    """A layer that knows nothing of this project: dropless top-1, with the balance loss of Switch Transformers."""

    hidden_size, num_experts, top_k = 16, 8, 1

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        self.gate = nn.Linear(16, 8, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = self.gate(x).softmax(-1)
        weight, chosen = probs.max(-1, keepdim=True)
        y = sum(expert(x) * weight * (chosen == e) for e, expert in enumerate(self.experts))
        share = nn.functional.one_hot(chosen.flatten(), 8).to(probs.dtype).mean(0)
        aux = 8 * (probs.flatten(0, 1).mean(0) * share).sum()
        return y, aux.detach() if self.detached else aux


def detached_plain_moe() -> nn.Module:
    return PlainMoE(detached=True)

"""Our layer with one defect each, under the property that finds it; and a layer that knows nothing of this project."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from nlgmoe import MoEConfig, MoELayer
from nlgmoe.layers.router import TopKRouter
from tests.tools_check import defects
from tests.tools_check.defects import CAPACITY, DROPLESS, TWO, after_step, experts, layer, own_loss, routed, router

Defect = tuple[MoEConfig, Callable[[MoELayer], None]]
BY_PROPERTY: dict[str, dict[str, Defect]] = {  # that finds them
    "weights follow the logits": {
        "double softmax": (CAPACITY, router(_scores=lambda self, logits, probs: probs.softmax(-1))),
        "double softmax, normalised": (TWO, router(_scores=lambda self, logits, probs: probs.softmax(-1))),
        "an expert twice":
            (DROPLESS, routed(lambda routing, x: replace(routing, expert=routing.expert[:, :1].expand_as(routing.expert)))),
        "weights in another order than experts":
            (DROPLESS, routed(lambda routing, x: replace(routing, weight=routing.weight.flip(1)))),
    },
    "the balance loss sees a collapse": {
        "double softmax in the balance loss": (TWO, routed(lambda routing, x: replace(routing, probs=routing.probs.softmax(-1)))),
    },
    "the losses reach the gate": {
        "detached auxiliary loss": (TWO, routed(lambda routing, x: replace(routing, probs=routing.probs.detach()))),
        "detached weights": (CAPACITY, routed(lambda routing, x: replace(routing, weight=routing.weight.detach()))),
        "a parameter that nothing uses":
            (TWO, lambda module: module.router.register_parameter("idle", nn.Parameter(torch.zeros(8)))),
        "a detached loss beside the balance loss": (TWO, own_loss(lambda log_z: log_z.detach().square().mean())),
    },
    "weights sum as declared": {
        "weights renormalised before dropping": (TWO, router(forward=defects.normalised_before_dropping)),
    },
    "capacity is the formula": {
        "capacity off by one": (CAPACITY, router(_capacity=defects.one_more)),
        "tokens dropped without a capacity": (DROPLESS, router(_capacity=lambda self, tokens: 5)),
        "padding takes capacity": (CAPACITY, router(_within_capacity=defects.padding_in_the_queue)),
        "padding is computed": (DROPLESS, router(_within_capacity=defects.padding_kept)),
        "capacity counted in bf16": (TWO, router(_within_capacity=defects.counted_in_bf16)),
        "all_kept of padding": (DROPLESS, routed(lambda routing, x: replace(routing, all_kept=True))),
        "a capacity below the kept tokens": (TWO, routed(lambda routing, x: replace(routing, capacity=4))),
    },
    "the declared tokens are dropped": {
        "the first tokens stay": (CAPACITY, router(_within_capacity=defects.first_tokens_stay)),
        "second choices before first": (TWO, router(_within_capacity=defects.token_by_token)),
    },
    "padding counts in no output or loss": {
        "padding in the balance loss": (CAPACITY, routed(lambda routing, x: replace(routing, token_mask=None))),
    },
    "evaluation does not see neighbours": {
        "evaluation drops tokens": (CAPACITY, router(_capacity=defects.capacity_of_training)),
        "tokens mixed up": (DROPLESS, layer(defects.shifted)),
    },
    "a token sees no later one": {
        "a pool of experts for a sequence": (TWO, defects.of_a_pool(always=True)),
        "a pool of experts in training": (DROPLESS, defects.of_a_pool(always=False)),
    },
    "micro-batches add up": {
        "statistics of the micro-batch": (DROPLESS, layer(defects.batch_normalised)),
        "a loss that is a sum over tokens": (DROPLESS, own_loss(lambda log_z: log_z.square().sum())),
    },
    "output = sum of weight * expert(x)": {
        "dropped tokens copied": (CAPACITY, layer(defects.copy_dropped)),
        "a lost expert": (DROPLESS, experts(defects.lost_expert)),
    },
    "gradients equal finite differences": {
        "no gradient of an expert": (CAPACITY, experts(defects.without_gradients_of_expert_0)),
    },
    "forward writes no state": {
        "state written in forward": (CAPACITY, defects.add_load),
        "noise of the global generator":
            (TWO, router(_logits=lambda self, x: TopKRouter._logits(self, x) + torch.randn(8, dtype=x.dtype))),
    },
    "a resumed run is the same to the bit": {
        "state that no checkpoint holds": (CAPACITY, defects.add_lost_state),
    },
    "types are kept": {
        "output in fp32": (CAPACITY, layer(lambda self, x, y, routing: y.float())),
        "weights in half precision": (CAPACITY, routed(lambda routing, x: replace(routing, weight=routing.weight.to(x.dtype)))),
        "overflow in fp16": (CAPACITY, layer(lambda self, x, y, routing: (y * 3e5) * torch.tensor(1 / 3e5, dtype=y.dtype))),
    },
    "50 steps balance the load": {
        "an expert out of reach": (TWO, router(_logits=defects.without_last_expert)),
        "balance loss with the wrong sign": (TWO, routed(lambda routing, x: replace(routing, probs=-routing.probs))),
    },
    "unusual sizes work": {
        "even widths only": (CAPACITY, layer(defects.even_widths)),
        "overflow of large logits":
            (DROPLESS, router(_scores=lambda self, logits, probs: logits.exp() / logits.exp().sum(-1, keepdim=True))),
    },
    "evaluation chooses as training does": {
        "other experts in evaluation": (TWO, router(_logits=defects.other_experts_in_evaluation)),
    },
    "steps follow the requests": {
        "the load of the last micro-batch": (TWO, after_step(lambda self, requests: self.seen)),
        "loads counted in the weights' type": (TWO, after_step(lambda self, requests: requests.to(self.weight.dtype))),
        "shares of no request": (TWO, after_step(lambda self, requests: requests / requests.sum())),
    },
    "the host reads no device": {
        "a read by the host after a step": (TWO, after_step(defects.clipped)),
        "a read by the host": (CAPACITY, routed(defects.read_on_host)),
    },
}  # fmt: skip
DEFECTS = {defect: (name, made) for name, those in BY_PROPERTY.items() for defect, made in those.items()}


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

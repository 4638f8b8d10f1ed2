"""`MoELayer` with the routers of `layers/routers/` against the sparse blocks of `transformers`, by copied weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, OlmoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from nlgmoe import GPTConfig, MoEConfig, MoELayer, RouterConfig, SigmoidRouterConfig

WIDTH, INNER, EXPERTS, TOP_K = 16, 16, 8, 3
SHAPE: dict[str, Any] = {"hidden_size": WIDTH, "num_experts_per_tok": TOP_K}


def olmoe(normalize: bool) -> nn.Module:
    shape = {**SHAPE, "intermediate_size": INNER, "num_experts": EXPERTS}
    return OlmoeSparseMoeBlock(OlmoeConfig(**shape, norm_topk_prob=normalize))


def deepseek(normalize: bool) -> nn.Module:
    shape = {**SHAPE, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
    settings = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": normalize}
    block = DeepseekV3MoE(DeepseekV3Config(**shape, **settings))
    block.shared_experts = NoSharedExpert()
    return block


class NoSharedExpert(nn.Module):
    """Adds nothing: the shared expert beside DeepSeek's experts is no part of the router."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("make", "router", "settings"),
    [
        (lambda: olmoe(False), None, {"normalize_weights": False}),
        (lambda: olmoe(True), None, {"normalize_weights": True}),  # Mixtral's and Qwen3-MoE's too
        (lambda: deepseek(True), SigmoidRouterConfig(), {"gate_scale": 2.5}),
        (lambda: deepseek(False), SigmoidRouterConfig(), {"gate_scale": 2.5, "normalize_weights": False}),
    ],
    ids=["olmoe", "olmoe, normalised", "deepseek-v3, normalised", "deepseek-v3"],
)
def test_outputs_and_gradients_are_those_of_transformers(
    make: Callable[[], nn.Module], router: RouterConfig | None, settings: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = make().train()
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    moe = MoEConfig(EXPERTS, 1, TOP_K, token_dropping=False, router=router, **settings)
    ours = MoELayer(GPTConfig(8, 8, 1, WIDTH, 1, INNER, ffn_network="swiglu", moe=moe), 0).train()
    up, down = theirs.experts.gate_up_proj, theirs.experts.down_proj

    def same(of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Their weights by our names and in our shapes."""
        gate, expand = of(up).transpose(1, 2).chunk(2, dim=2)
        experts = {"gate_weight": gate, "expand_weight": expand, "project_weight": of(down).transpose(1, 2)}
        return {f"experts.{name}": value for name, value in experts.items()} | {"router.weight": of(theirs.gate.weight)}

    parameters = dict(ours.named_parameters())
    for parameter in parameters.values():
        nn.init.zeros_(parameter)
    for name, value in same(lambda weight: weight.detach()).items():
        parameters[name].data = value.clone(memory_format=torch.contiguous_format)
    if isinstance(router, SigmoidRouterConfig):
        theirs.gate.e_score_correction_bias.copy_(torch.randn(EXPERTS, generator=generator) * 0.3)
        ours.router.bias.copy_(theirs.gate.e_score_correction_bias)

    x = torch.randn(3, 20, WIDTH, generator=generator)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, routing = ours(inputs[0])
    expected = theirs(inputs[1])
    _, weights, chosen = theirs.gate(x)
    assert torch.equal(routing.expert.sort(dim=1).values, chosen.sort(dim=1).values)
    torch.testing.assert_close(routing.weight.sum(1), weights.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    probe = torch.randn(y.shape, generator=generator)
    (y * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    for name, value in same(lambda weight: weight.grad).items():
        torch.testing.assert_close(parameters[name].grad, value, rtol=1e-4, atol=1e-4)

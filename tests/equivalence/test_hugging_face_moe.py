"""`MoELayer` with the routers of `layers/routers/` against the sparse blocks of `transformers`, by copied weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, OlmoeConfig, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from nlgmoe import GPTConfig, MoEConfig, MoELayer, RouterConfig, SigmoidRouterConfig

WIDTH, INNER, SHARED, EXPERTS, TOP_K = 16, 16, 24, 8, 3
SHAPE: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_experts_per_tok": TOP_K}
GATED: dict[str, Any] = {"mlp_type": "residual", "residual_mix": "sigmoid", "shared_ffn_size": SHARED}


def olmoe(normalize: bool) -> nn.Module:
    shape = {**SHAPE, "intermediate_size": INNER, "num_experts": EXPERTS}
    return OlmoeSparseMoeBlock(OlmoeConfig(**shape, norm_topk_prob=normalize))


def qwen2() -> nn.Module:
    shape = {**SHAPE, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": SHARED, "num_experts": EXPERTS}
    return Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**shape, norm_topk_prob=False))


def deepseek(version: int, normalize: bool, groups: tuple[int, int] = (1, 1)) -> nn.Module:
    shape = {**SHAPE, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
    settings = {
        "n_group": groups[0],
        "topk_group": groups[1],
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": normalize,
    }
    if version == 2:
        block: nn.Module = DeepseekV2Moe(DeepseekV2Config(**shape, **settings, topk_method="group_limited_greedy"))
    else:
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
        (qwen2, None, {"normalize_weights": False} | GATED),
        (lambda: deepseek(3, True), SigmoidRouterConfig(), {"gate_scale": 2.5}),
        (lambda: deepseek(3, False), SigmoidRouterConfig(), {"gate_scale": 2.5, "normalize_weights": False}),
        (lambda: deepseek(3, True, (4, 2)), SigmoidRouterConfig(), {"gate_scale": 2.5, "groups": [4, 2]}),
        (lambda: deepseek(3, True, (2, 1)), SigmoidRouterConfig(), {"gate_scale": 2.5, "groups": [2, 1]}),
        # It ignores norm_topk_prob.
        (lambda: deepseek(2, True, (4, 2)), None, {"gate_scale": 2.5, "normalize_weights": False, "groups": [4, 2]}),
        (lambda: deepseek(2, True, (2, 1)), None, {"gate_scale": 2.5, "normalize_weights": False, "groups": [2, 1]}),
    ],
    ids=[
        *("olmoe", "olmoe, normalised", "qwen2-moe", "deepseek-v3, normalised", "deepseek-v3"),
        *(f"deepseek-v{version}, {groups}" for version in (3, 2) for groups in ("2 of 4 groups", "1 of 2 groups")),
    ],
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
        found = {f"experts.{name}": value for name, value in experts.items()} | {
            "router.weight": of(theirs.gate.weight)
        }
        if ours.mlp is not None:
            shared = theirs.shared_expert
            named = {"gate": shared.gate_proj, "expand": shared.up_proj, "project": shared.down_proj}
            found |= {f"mlp.{name}.weight": of(part.weight) for name, part in named.items()}
            found["coefficient.weight"] = of(theirs.shared_expert_gate.weight)
        return found

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
    if ours.mlp is not None:
        gate = theirs.shared_expert_gate(x).sigmoid().flatten()
        torch.testing.assert_close(routing.expert_share, 1 / (1 + gate))
    probe = torch.randn(y.shape, generator=generator)
    (y * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    for name, value in same(lambda weight: weight.grad).items():
        torch.testing.assert_close(parameters[name].grad, value, rtol=1e-4, atol=1e-4)

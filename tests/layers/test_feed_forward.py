"""The networks of dense blocks, shared MLPs and experts: against `transformers`, and experts against the dense layer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import experts as experts_module
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.feed_forward import NETWORKS, FeedForward
from nlgmoe.model.gpt import GPT


def test_swiglu_is_llamas() -> None:
    theirs = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, mlp_bias=True))
    ours = FeedForward(GPTConfig(8, 8, 1, 16, 1, ffn_network="swiglu"), 24)
    for name, other in (("gate", theirs.gate_proj), ("expand", theirs.up_proj), ("project", theirs.down_proj)):
        ours.get_submodule(name).load_state_dict(other.state_dict())
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["grouped", "loop"])
@pytest.mark.parametrize("network", NETWORKS)
def test_an_expert_is_the_dense_layer(network: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "select_backend", lambda *_: backend)
    torch.manual_seed(0)
    layer, rows = Experts(3, 16, 24, network=NETWORKS[network]), [2, 0, 5]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    dense = [FeedForward(GPTConfig(8, 8, 1, 16, 1, ffn_network=network), 24) for _ in rows]
    for index, one in enumerate(dense):
        for name, module in one.named_children():
            module.weight.data = getattr(layer, f"{name}_weight").detach()[index].t().contiguous()
            module.bias.data = getattr(layer, f"{name}_bias").detach()[index].clone()
    x = torch.randn(7, 16, requires_grad=True)
    y = layer(x, torch.tensor(rows), True)
    expected = torch.cat([one(part) for one, part in zip(dense, x.split(rows), strict=True)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    x.grad = None
    y.square().sum().backward()
    for index, one in enumerate(dense):
        for name, module in one.named_children():
            gradient = getattr(layer, f"{name}_weight").grad[index].t()
            wanted = module.weight.grad if rows[index] else torch.zeros_like(gradient)
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_widths_and_network_reach_every_part() -> None:
    moe = MoEConfig([4, 0], mlp_type="residual", expert_ffn_size=24, shared_ffn_size=40)
    model = GPT(GPTConfig(61, 16, 4, 16, 2, ffn_network="swiglu", moe=moe))
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert shapes["blocks.1.moe.experts.gate_weight"] == (4, 16, 24)
    assert shapes["blocks.1.moe.mlp.gate.weight"] == (40, 16)
    assert shapes["blocks.3.ffn.gate.weight"] == (64, 16)

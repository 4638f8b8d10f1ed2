"""The networks of experts against the dense layer, which tests/equivalence compares with `transformers`."""

import pytest
import torch

from nlgmoe.config import GPTConfig
from nlgmoe.layers import experts as experts_module
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.feed_forward import NETWORKS, FeedForward


@pytest.mark.parametrize("product", ["grouped_mm", "loop"])
@pytest.mark.parametrize("network", NETWORKS)
def test_dense_feed_forward_equals_one_expert(network: str, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "choose_product", lambda *_: product)
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
    y = layer(x, torch.tensor(rows))
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

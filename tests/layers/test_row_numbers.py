"""On CPUs in half precision experts compute round numbers of rows: few kernels are compiled, and results stay the same."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import grouped_gemm
from nlgmoe.layers.moe import MoELayer
from tests.support.devices import draw

EXPERTS, WIDTH = 6, 16
HALF = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def results(precision: str, dropping: bool) -> tuple[list[Tensor], list[int], list[int]]:
    """The output and all gradients of a layer; the rows that its experts computed, and those that they kept."""
    moe = MoEConfig(EXPERTS, 1, top_k=2, second_expert="argmax", token_dropping=dropping, train_capacity_factor=0.8)
    layer = MoELayer(GPTConfig(8, 64, 1, WIDTH, 2, 32, moe=moe), block=0)
    dtype = HALF.get(precision, torch.float32)
    draw(layer, std=0.5)
    x = torch.randn(2, 155, WIDTH, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1
    with torch.no_grad():
        layer.router.weight[-1, 0] = -100  # no token chooses the last expert
    mixed = precision == "bf16-mixed"
    leaf = x.to(torch.float32 if mixed else dtype).requires_grad_()
    layer.to(leaf.dtype)
    computed: list[int] = []
    layer.experts.register_forward_pre_hook(lambda module, inputs: computed.extend(inputs[1].tolist()))
    with torch.autocast("cpu", dtype) if mixed else nullcontext():
        y, routing = layer(leaf)
    y.float().square().mean().backward()
    kept = torch.bincount(routing.expert[routing.kept], minlength=EXPERTS).tolist()
    return [y, leaf.grad, *(parameter.grad for parameter in layer.parameters())], computed, kept


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("precision", [*HALF, "32-true"])
def test_row_numbers_do_not_change_the_layers_result(
    precision: str, dropping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, computed, kept = results(precision, dropping)
    assert kept[-1] == 0 < min(kept[:-1]) and sum(kept) < 620 if dropping else sum(kept) == 620
    numbers = [-(-n // step) * step for n in kept for step in [min(32, 2 ** max(0, n.bit_length() - 3))]]
    assert computed == (numbers if precision in HALF else kept) and (numbers != kept)
    monkeypatch.setattr(grouped_gemm, "ROW_MULTIPLE", 1)
    expected, computed, _ = results(precision, dropping)
    assert computed == kept
    for value, exact in zip(ours, expected, strict=True):
        if precision not in HALF:
            assert torch.equal(value, exact)
        error = (value.float() - exact.float()).norm() / exact.float().norm()
        assert error < 0.005, error

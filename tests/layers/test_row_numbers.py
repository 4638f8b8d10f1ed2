"""On CPUs in half precision experts compute round numbers of rows: few kernels are compiled, and results stay the same."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import expert_products
from nlgmoe.layers.expert_products import round_up_rows
from nlgmoe.layers.experts import FEW_ROWS
from nlgmoe.layers.moe import MoELayer
from tests.support.processes import python

EXPERTS, WIDTH = 6, 16
HALF = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-true": torch.float16}
ROUND = {n: n for n in range(FEW_ROWS + 1)} | {
    9: 10,
    17: 20,
    31: 32,
    33: 40,
    63: 64,
    64: 64,
    65: 80,
    129: 160,
    161: 192,
}

# Prints the number of kernels that `create:cache_miss` announces.
COMPILES = """
import torch
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.moe import MoELayer
layer = MoELayer(GPTConfig(8, 128, 1, 32, 1, 64, moe=MoEConfig(4, top_k=2, expert_interval=1, token_dropping=False)), 0)
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
for step in range(20):
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 128, 32, requires_grad=True))[0].sum().backward()
"""


def test_row_numbers_are_at_most_a_quarter_larger_and_exact_in_generation() -> None:
    numbers = torch.tensor(list(ROUND))
    used = int(numbers.sum())
    index = torch.arange(used + 3).flip(0)  # the last three rows belong to no expert
    for dtype in HALF.values():
        repeated, place, rounded = round_up_rows(index, numbers, dtype)
        assert rounded.tolist() == list(ROUND.values())
        assert torch.equal(repeated[place], index) and len(repeated) == int(rounded.sum()) + 3
        for expert, (rows, here) in enumerate(
            zip(repeated[:-3].split(rounded.tolist()), numbers.tolist(), strict=True)
        ):
            first = int(numbers[:expert].sum())
            expected = index[first : first + here]
            assert torch.equal(rows[:here], expected) and (rows[here:] == expected[-1:]).all()
    for dtype in (torch.float32, torch.float64):
        same, place, rounded = round_up_rows(index, numbers, dtype)
        assert same is index and rounded is numbers and torch.equal(place, torch.arange(len(index)))


def results(precision: str, dropping: bool) -> tuple[list[Tensor], list[int], list[int]]:
    """The output and all gradients of a layer; the rows that its experts computed, and those that they kept."""
    moe = MoEConfig(EXPERTS, 1, top_k=2, second_expert="argmax", token_dropping=dropping, train_capacity_factor=0.8)
    layer = MoELayer(GPTConfig(8, 64, 1, WIDTH, 2, 32, moe=moe), block=0)
    generator, dtype = torch.Generator().manual_seed(1), HALF.get(precision, torch.float32)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    x = torch.randn(2, 155, WIDTH, generator=generator)
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
    monkeypatch.setattr(expert_products, "ROW_MULTIPLE", 1)
    expected, computed, _ = results(precision, dropping)
    assert computed == kept
    for value, exact in zip(ours, expected, strict=True):
        if precision not in HALF:
            assert torch.equal(value, exact)
        error = (value.float() - exact.float()).norm() / exact.float().norm()
        assert error < 0.005, error


def test_row_numbers_keep_compiled_kernels_few_over_many_steps() -> None:
    done = python("-c", COMPILES, env={"ONEDNN_VERBOSE": "profile_create", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (
        0 < done.stdout.count("create:cache_miss") <= 6 * 6
    )  # 128 rows on average, from 48 to 224; two matrices and gradients

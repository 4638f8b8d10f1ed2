"""Degrees are arithmetic: no ranks needed."""

import re

import pytest
import torch

from nlgmoe import ExpertParallelStrategy, GPTConfig, MoEConfig
from nlgmoe.parallel.expert_groups import describe_degrees, layer_degrees


def pyramid(*experts: int) -> GPTConfig:
    return GPTConfig(61, 16, 2 * len(experts), 32, 2, moe=MoEConfig(list(experts)))


@pytest.mark.parametrize(
    ("experts", "ranks", "limit", "degrees"),
    [
        ([32, 64, 128], 128, 128, [32, 64, 128]),  # the paper's example
        ([32, 64], 64, 64, [32, 64]),  # where Megatron-DeepSpeed's scripts cannot start
        ([8, 8], 4, 3, [2, 2]),  # a limit, not a demand
    ],
)
def test_degree_of_a_layer_divides_its_experts_and_the_ranks(
    experts: list[int], ranks: int, limit: int, degrees: list[int]
) -> None:
    by_block = dict(zip(range(1, 2 * len(experts), 2), degrees, strict=True))
    assert layer_degrees(pyramid(*experts), ranks, limit) == by_block


@pytest.mark.parametrize(
    ("experts", "ranks", "limit", "message"),
    [
        ([8], 2, 4, "expert_parallel_size=4 is above the number of ranks, 2; lower it to 2, or run on more devices"),
        ([5], 4, 4, "no number from 2 to 4 divides both its number of experts (5) and the number of ranks (4)"),
    ],
)
def test_expert_parallel_size_that_no_layer_can_use_is_refused(
    experts: list[int], ranks: int, limit: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_degrees(pyramid(*experts), ranks, limit)


def test_a_strategy_reports_the_layout_of_experts_alone(caplog: pytest.LogCaptureFixture) -> None:
    strategy = ExpertParallelStrategy()
    strategy.parallel_devices = [torch.device("cpu")]
    assert strategy.expert_placements(GPTConfig(61, 16, 2, 32, 2), model_name="teacher") == {} and not caplog.records
    (placement,) = strategy.expert_placements(pyramid(4), model_name="teacher").values()
    assert (placement.first, placement.count, placement.group) == (0, 4, None)
    assert "of the teacher: 4 experts, expert-parallel degree 1, 4 a rank" in caplog.text
    config = pyramid(4, 4, 8)
    assert describe_degrees(config, layer_degrees(config, 4, 4), 4, "model").splitlines() == [
        "blocks 1, 3 of the model: 4 experts, expert-parallel degree 4, 1 a rank (0.0M parameters), each on 1",
        "blocks 5 of the model: 8 experts, expert-parallel degree 4, 2 a rank (0.0M parameters), each on 1",
    ]

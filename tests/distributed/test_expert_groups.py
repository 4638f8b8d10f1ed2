"""Degrees are arithmetic: no ranks needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlgmoe import GPTConfig, MoEConfig
from nlgmoe.parallel.expert_groups import layer_degrees
from nlgmoe.pyramid import expert_parallel_degree


@pytest.mark.parametrize(
    ("experts", "ranks", "limit", "expected"),  # degrees, or a part of the error
    [
        ([32, 64, 128], 128, 128, [32, 64, 128]),  # the paper's example
        ([32, 64], 64, 64, [32, 64]),  # where Megatron-DeepSpeed's scripts cannot start
        ([8, 8], 4, 3, [2, 2]),  # a limit, not a demand
        ([8], 2, 4, "expert_parallel_size=4 is above the number of ranks, 2; lower it to 2, or run on more devices"),
        ([5], 4, 4, r"no number from 2 to 4 divides both its number of experts \(5\) and the number of ranks \(4\)"),
    ],
)
def test_degree_of_a_layer_divides_its_experts_and_the_ranks(
    experts: list[int], ranks: int, limit: int, expected: list[int] | str
) -> None:
    model = GPTConfig(61, 16, 2 * len(experts), 32, 2, moe=MoEConfig(experts))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            layer_degrees(model, ranks, limit)
    else:
        by_block = dict(zip(range(1, model.num_layers, 2), expected, strict=True))
        assert layer_degrees(model, ranks, limit) == by_block


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_degree_is_the_largest_divisor_of_experts_and_ranks(experts: int, world: int, limit: int) -> None:
    fitting = [d for d in range(1, limit + 1) if experts % d == 0 and world % d == 0]
    assert expert_parallel_degree(experts, world, limit) == fitting[-1]

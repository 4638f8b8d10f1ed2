"""The degree rule against the paper's example and against its own definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlgmoe.pyramid import expert_parallel_degree


@pytest.mark.parametrize(
    ("experts", "world", "limit", "degree"),
    [
        (32, 128, 128, 32),  # the paper's three layers on 128 GPUs
        (64, 128, 128, 64),
        (128, 128, 128, 128),
        (128, 128, 64, 64),
        (64, 8, 64, 8),
        (64, 1, 64, 1),
        (6, 8, 8, 2),
        (12, 18, 5, 3),
        (5, 4, 4, 1),
    ],
)
def test_known_degrees(experts: int, world: int, limit: int, degree: int) -> None:
    assert expert_parallel_degree(experts, world, limit) == degree


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_the_degree_divides_both_and_no_larger_number_does(experts: int, world: int, limit: int) -> None:
    fitting = [d for d in range(1, limit + 1) if experts % d == 0 and world % d == 0]
    assert expert_parallel_degree(experts, world, limit) == fitting[-1]


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="expert_parallel_size=0"):
        expert_parallel_degree(4, 4, 0)

"""The degree of a layer's expert parallelism, against its definition."""

from hypothesis import given
from hypothesis import strategies as st

from nlgmoe.pyramid import expert_parallel_degree


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_degree_is_the_largest_divisor_of_experts_and_ranks(experts: int, world: int, limit: int) -> None:
    fitting = [d for d in range(1, limit + 1) if experts % d == 0 and world % d == 0]
    assert expert_parallel_degree(experts, world, limit) == fitting[-1]

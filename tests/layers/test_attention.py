"""Which keys a query sees, written out."""

import torch

from nlgmoe.layers.attention import visible_keys

CPU = torch.device("cpu")


def test_a_query_sees_the_cache_and_what_came_before_it() -> None:
    assert visible_keys(None, new=3, cached=0, device=CPU) is None  # the plain causal triangle
    seen = visible_keys(None, new=2, cached=2, device=CPU)
    assert seen[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_no_real_query_sees_padding_and_a_padded_one_sees_at_least_itself() -> None:
    seen = visible_keys(torch.tensor([[False, True, True, False]]), new=4, cached=0, device=CPU)
    assert seen[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    later = visible_keys(torch.tensor([[False, True, False, True]]), new=2, cached=2, device=CPU)
    assert later[0, 0].int().tolist() == [[0, 1, 1, 0], [0, 1, 0, 1]]

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlgmoe.data.samples import Permutation


def order(n: int, *seed_parts: int | str) -> np.ndarray:
    permutation = Permutation(n, *seed_parts)
    return np.array([permutation[i] for i in range(n)])


def chi_squared(counts: np.ndarray) -> float:
    """In standard deviations above what equal frequencies give."""
    expected, freedom = counts.mean(), len(counts) - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom))


def test_permutation_visits_every_number_of_items_whole() -> None:
    for n in (*range(1, 400), 1_024, 3_967):
        np.testing.assert_array_equal(np.sort(order(n, n % 7)), np.arange(n))


@given(st.integers(20_000, 2**48), st.integers())
def test_permutation_of_very_many_items_has_different_places_in_its_range(n: int, seed: int) -> None:
    permutation = Permutation(n, seed)
    visited = [permutation[i] for i in (*range(200), *range(n - 200, n))]
    assert len(set(visited)) == 400 and min(visited) >= 0 and max(visited) < n


def test_permutation_of_a_few_items_has_all_orders_equally_likely() -> None:
    found = Counter(tuple(order(4, seed)) for seed in range(4_800))
    assert len(found) == 24 and chi_squared(np.array(list(found.values()))) < 4


@pytest.mark.parametrize("n", [9_973, 2**14])  # a prime, a power of two
def test_permutation_looks_random(n: int) -> None:
    found, places = order(n, 1234, "epoch", 0), np.arange(n)
    others = {"epoch": order(n, 1234, "epoch", 1), "seed": order(n, 1235, "epoch", 0)}
    pairs = {"place": (places, found), "neighbour": (found[:-1], found[1:]), "ten on": (found[:-10], found[10:])}
    pairs |= {name: (found, other) for name, other in others.items()}
    for name, (first, second) in pairs.items():
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(n), name
    # Neighbours that stay neighbours, and items that stay in place, are as rare as in a random order: one or two.
    assert (np.abs(np.diff(found)) == 1).sum() < 8
    assert max((found == place).sum() for place in (places, *others.values())) < 8
    # Each run of 100 places draws from all over, and pairs of neighbours fill the plane.
    grid, _, _ = np.histogram2d(found[:-1], found[1:], 16, [[0, n], [0, n]])
    assert chi_squared(grid.ravel()) < 4
    by_hundred = found[: n // 100 * 100].reshape(-1, 100).mean(axis=1)
    assert by_hundred.std() == pytest.approx(n / np.sqrt(12 * 100), rel=0.25)

"""Windows of tokens, and the order in which an epoch visits them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlgmoe.data.samples import PackedSource, Permutation, count_windows, cut_window

EOD = 0
PERMUTATION = [4, 0, 7, 3, 1, 5, 6, 2]
FIRST_OF_MANY = 126_849_510


@given(st.integers(1, 60), st.integers(1, 13))
def test_windows_predict_every_token_exactly_once_from_its_predecessor(num_tokens: int, seq_len: int) -> None:
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint16)  # every token is its position: order and loss show
    stream = np.concatenate([[EOD], tokens])
    windows = [cut_window(tokens, i, seq_len, EOD) for i in range(count_windows(num_tokens, seq_len, keep_tail=True))]
    inputs, targets, mask = (np.concatenate(parts) for parts in zip(*windows, strict=True))
    np.testing.assert_array_equal(targets[mask], stream[1:])
    np.testing.assert_array_equal(inputs[mask], stream[:-1])
    assert (targets[~mask] == EOD).all() and (inputs[~mask] == EOD).all()
    assert mask[:num_tokens].all()  # padding only at the end
    assert count_windows(num_tokens, seq_len, keep_tail=False) == num_tokens // seq_len


def test_permutation_is_pinned() -> None:
    """A checkpoint's data order must survive upgrades, so the numbers stand here."""
    assert order(8, 1234, "epoch", 0).tolist() == PERMUTATION
    assert order(8, 1234, "epoch", 1).tolist() != PERMUTATION
    assert Permutation(146_000_000, 1234, "epoch", 2)[0] == FIRST_OF_MANY


def test_an_epoch_visits_every_window_of_every_domain_once_in_a_new_order() -> None:
    streams = [np.arange(100, 175), np.arange(1000, 1048), np.arange(7)]  # the last is shorter than a window
    source = PackedSource(streams, seq_len=10, eod_id=EOD, seed=3)
    wanted = {tuple(range(s, s + 10)) for s in (*range(100, 170, 10), *range(1000, 1040, 10))}
    assert source.num_windows == len(wanted)
    epochs = [[tuple(source.sample(e * 11 + i)["targets"].tolist()) for i in range(11)] for e in range(3)]
    for epoch in epochs:
        assert set(epoch) == wanted
    assert epochs[0] != epochs[1] != epochs[2]
    for i in range(11):  # and the domain is the one the tokens are from
        sample = source.sample(i)
        assert int(sample["domain"]) == int(sample["targets"][0] >= 1000)


def order(n: int, *seed_parts: int | str) -> np.ndarray:
    permutation = Permutation(n, *seed_parts)
    return np.array([permutation[i] for i in range(n)])


def test_permutation_visits_every_number_of_items_whole() -> None:
    for n in (*range(1, 400), 1_024, 3_967):
        np.testing.assert_array_equal(np.sort(order(n, n % 7)), np.arange(n))


@given(st.integers(20_000, 2**48), st.integers())
def test_permutation_of_very_many_items_has_different_places_in_its_range(n: int, seed: int) -> None:
    permutation = Permutation(n, seed)
    visited = [permutation[i] for i in (*range(200), *range(n - 200, n))]
    assert len(set(visited)) == 400 and min(visited) >= 0 and max(visited) < n


@pytest.mark.parametrize("n", [9_973, 2**14])  # a prime, a power of two
def test_permutation_looks_random(n: int) -> None:
    """Neighbours that stay neighbours are as rare as in a random order, one or two; pairs of neighbours fill the plane."""
    found = order(n, 1234, "epoch", 0)
    assert (np.abs(np.diff(found)) == 1).sum() < 8
    counts, _, _ = np.histogram2d(found[:-1], found[1:], 16, [[0, n], [0, n]])
    expected, freedom = counts.mean(), counts.size - 1
    chi_squared = ((counts - expected) ** 2).sum() / expected
    assert chi_squared < freedom + 4 * np.sqrt(2 * freedom)

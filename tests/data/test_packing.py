import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nlgmoe.data.samples import EvaluationSource, PackedSource, count_windows, cut_window, epoch_permutation

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
    assert list(epoch_permutation(8, seed=1234, epoch=0)) == PERMUTATION
    assert list(epoch_permutation(8, seed=1234, epoch=1)) != PERMUTATION
    assert epoch_permutation(146_000_000, seed=1234, epoch=2)[0] == FIRST_OF_MANY


def make_source() -> tuple[PackedSource, set[tuple[int, ...]]]:
    streams = [np.arange(100, 175), np.arange(1000, 1048), np.arange(7)]  # the last is shorter than a window
    source = PackedSource(streams, seq_len=10, eod_id=EOD, seed=3)
    wanted = {tuple(range(s, s + 10)) for s in (*range(100, 170, 10), *range(1000, 1040, 10))}
    return source, wanted


def test_an_epoch_visits_every_window_of_every_domain_once_in_a_new_order() -> None:
    source, wanted = make_source()
    assert source.num_windows == len(wanted)
    epochs = [[tuple(source.sample(e * 11 + i)["targets"].tolist()) for i in range(11)] for e in range(3)]
    for epoch in epochs:
        assert set(epoch) == wanted
    assert epochs[0] != epochs[1] != epochs[2]
    for i in range(11):  # and the domain is the one the tokens are from
        sample = source.sample(i)
        assert int(sample["domain"]) == int(sample["targets"][0] >= 1000)


def test_evaluation_takes_no_memory_for_its_windows() -> None:
    """2% of 300 billion tokens are 3 million windows of 2,048; here 10 million are counted in less than a megabyte."""
    tokens = [np.broadcast_to(np.int32(7), 4 * 10**7 - 1), np.broadcast_to(np.int32(8), 9)]
    tracemalloc.start()
    try:
        source = EvaluationSource(tokens, 4, 0, None)
        first, last = source.sample(0), source.sample(len(source) - 1)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert len(source) == 10**7 + 3 and first["targets"].tolist() == [7] * 4
    assert source.sample(10**7 - 1)["token_mask"].tolist() == [True, True, True, False]
    assert (int(last["domain"]), last["token_mask"].tolist()) == (1, [True, False, False, False])
    assert len(source.evaluated_tokens(0)) == 4 * 10**7 - 1 and source.evaluated_tokens(1).tolist() == [8] * 9

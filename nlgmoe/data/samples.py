"""Samples: windows of fixed length over the tokens of a split, by index, and the order of their epochs.

A source maps an index to a sample and has no state, so a batch is a function of (seed, samples consumed) alone: ranks,
workers and restarts do not change it. A new source (blended, streamed, synthetic) derives from `TokenSource`.

A domain's text is EOD, document, EOD, document, EOD, ...: every document is followed by the end-of-document
token, and one more precedes the first document, so that every token has a preceding input.
`tokens` below omits the leading EOD, as the files on disk do:

    text      EOD t0  t1  t2  t3  t4  t5  ...
    window 0  EOD t0  t1  t2               inputs     (T = 4)
              t0  t1  t2  t3               targets
    window 1                  t3  t4  t5 ...

Windows hold T + 1 tokens and start every T, so each token is a target exactly once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isqrt
from typing import NotRequired

import numpy as np
import torch

from nlgmoe.batch import Batch
from nlgmoe.data.tokens import ChainedTokens, Tokens
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import require

ORDER = "feistel-8"  # name of the order of an epoch, saved in checkpoints; another algorithm gives another order
ROUNDS = 8  # of `Permutation`, four for each digit
_WORD = (1 << 64) - 1


class Sample(Batch):
    """One sequence: the tensors of a `Batch` without the dimension B."""

    cursor: NotRequired[torch.Tensor]  # int64 [K], of a source with cursors; the data module removes it from the batch


class TokenSource(ABC):
    """An endless sequence of training samples, or a finite one of evaluation samples.

    Samples of a source that is read in order have a `cursor`: a stream index, the index of the stream's next sample, and its
    position in the files. Cursors affect only the time to the first sample.

    Attributes:
        seq_len: tokens of a sample.
        has_cursors: samples have a cursor.
    """

    seq_len: int
    has_cursors = False

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Return the `index`-th sample: a pure function of the index and of the settings of the source."""

    def seek(self, cursors: Sequence[Sequence[int]]) -> None:  # noqa: B027 (most sources have no position)
        """Continue at a run's cursors, at most one for each stream."""


class _Windows(TokenSource):
    """Windows of all domains, numbered consecutively; none crosses a border between domains.

    Args:
        tokens: tokens of each domain, without the leading EOD, each [N_d].
        counts: windows of each domain.
        seq_len: T, in tokens.
        eod_id: id of the end-of-document token, also used as padding.
    """

    def __init__(self, tokens: Sequence[Tokens], counts: Sequence[int], seq_len: int, eod_id: int) -> None:
        self.seq_len = seq_len
        self._tokens = list(tokens)
        self._eod_id = eod_id
        self._counts = counts
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.num_windows = sum(counts)

    def _window(self, number: int) -> Sample:
        domain = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[domain - 1]) if domain > 0 else 0
        tokens, targets, mask = cut_window(self._tokens[domain], number - first, self.seq_len, self._eod_id)
        return Sample(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            token_mask=torch.from_numpy(mask),
            domain=torch.tensor(domain),
        )


class PackedSource(_Windows):
    """Training samples: the windows of all domains, in a new random order every epoch, without end.

    A domain's weight is its number of tokens. The rest of a domain (less than a window) is not trained on. `seed` determines
    the order.
    """

    def __init__(self, tokens: Sequence[Tokens], seq_len: int, eod_id: int, seed: int) -> None:
        counts = [count_windows(len(array), seq_len, keep_tail=False) for array in tokens]
        super().__init__(tokens, counts, seq_len, eod_id)
        self._seed = seed
        require(self.num_windows != 0, f"No domain has {seq_len} tokens to train on: lower data.seq_len, or add text.")

    def sample(self, index: int) -> Sample:
        """Return window `order(seed, epoch)[index % n]` with `epoch = index // n`, n the number of windows."""
        epoch, position = divmod(index, self.num_windows)
        return self._window(Permutation(self.num_windows, self._seed, "epoch", epoch)[position])


class EvaluationSource(_Windows):
    """Evaluation samples: every domain's windows in order, so that each token is predicted exactly once.

    The last window of a domain is padded and masked. Index -1 is a window of padding alone, which evens out the
    number of batches between ranks. `max_windows` limits the windows of each domain, the first ones; None: all.
    """

    def __init__(self, tokens: Sequence[Tokens], seq_len: int, eod_id: int, max_windows: int | None) -> None:
        counts = [count_windows(len(array), seq_len, keep_tail=True) for array in tokens]
        super().__init__(tokens, [min(count, max_windows or count) for count in counts], seq_len, eod_id)

    def __len__(self) -> int:
        return self.num_windows

    def sample(self, index: int) -> Sample:
        """Return the `index`-th window over all domains, or padding for -1."""
        if index == -1:
            padding = torch.full((self.seq_len,), self._eod_id, dtype=torch.int64)
            mask = torch.zeros(self.seq_len, dtype=torch.bool)
            return Sample(tokens=padding, targets=padding.clone(), token_mask=mask, domain=torch.tensor(0))
        return self._window(index)

    def evaluated_tokens(self, domain: int) -> Tokens:
        """Return the targets that the domain's windows cover, in order."""
        tokens, count = self._tokens[domain], self._counts[domain] * self.seq_len
        return tokens.first(count) if isinstance(tokens, ChainedTokens) else tokens[:count]


def count_windows(num_tokens: int, seq_len: int, keep_tail: bool) -> int:
    """Return the number of windows in a text of `num_tokens` targets; the last, shorter one counts if `keep_tail`."""
    full, tail = divmod(num_tokens, seq_len)
    return full + int(keep_tail and tail > 0)


def cut_window(tokens: Tokens, index: int, seq_len: int, eod_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the `index`-th window of a text, `tokens` [N] without the leading EOD.

    Returns:
        inputs int64 [T], targets int64 [T], and mask bool [T], False where the text has ended.
    """
    start = index * seq_len
    assert 0 <= start < len(tokens), f"window {index} starts after the text's {len(tokens)} tokens"
    targets = np.full(seq_len, eod_id, dtype=np.int64)
    inputs = np.full(seq_len, eod_id, dtype=np.int64)
    length = min(seq_len, len(tokens) - start)
    targets[:length] = tokens[start : start + length]
    inputs[1:length] = targets[: length - 1]
    if start > 0:
        inputs[:1] = tokens[start - 1 : start]
    return inputs, targets, np.arange(seq_len) < length


class Permutation:
    """`permutation[i]`, 0 <= i < n: a random order that is computed in microseconds, not stored, the same on every machine.

    An epoch of the Pile at 2,048 tokens is 150 million samples: as an array, its order takes 1.2 GB in every process, and a
    minute to draw or a file that ranks have to agree on.

    It is a Feistel network. A number below a * b is two digits, (left, right) = divmod(x, b), and each round adds a random
    function of one digit to the other one. A round is invertible, so that the whole is a bijection of [0, a * b). With a * b
    slightly above n, results outside [0, n) are mapped again until they are inside, which gives a bijection of [0, n):
    J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), there FE2 and cycle-walking.

    Args:
        n: number of items, at least 1.
        seed_parts: arguments of `derive_seed`, which determine the order.
    """

    def __init__(self, n: int, *seed_parts: int | str) -> None:
        assert n > 0
        self._n = n
        self._left = isqrt(n - 1) + 1  # a: the root, rounded up
        self._right = -(-n // self._left)  # b
        self._keys = [derive_seed(*seed_parts, number) for number in range(ROUNDS)]

    def __getitem__(self, index: int) -> int:
        index = self._once(index)
        while index >= self._n:  # for one index in sqrt(n), on average
            index = self._once(index)
        return index

    def _once(self, index: int) -> int:
        left, right = divmod(index, self._right)
        keys = iter(self._keys)
        for key, next_key in zip(keys, keys, strict=True):
            left = (left + _mix(right ^ key)) % self._left
            right = (right + _mix(left ^ next_key)) % self._right
        return left * self._right + right


def _mix(x: int) -> int:
    """Mix 64 bits, so that each bit of the result depends on all of them (the finaliser of splitmix64)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)

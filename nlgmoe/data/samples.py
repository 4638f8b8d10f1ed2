"""Samples: windows of fixed length over the tokens of a split, by index.

A source maps an index to a sample and has no state, so a batch is a function of (seed, samples consumed) alone: ranks,
workers and restarts do not change it. A new source (blended, streamed, synthetic) implements `TokenSource`.

A domain's text is EOD, document, EOD, document, EOD, ...: every document is followed by the end-of-document
token, and one more precedes the first document, so that every token has a preceding input.
`tokens` below omits the leading EOD, as the files on disk do:

    text      EOD t0  t1  t2  t3  t4  t5  ...
    window 0  EOD t0  t1  t2               inputs     (T = 4)
              t0  t1  t2  t3               targets
    window 1                  t3  t4  t5 ...

Windows hold T + 1 tokens and start every T, so each token is a target exactly once.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NotRequired, Protocol, runtime_checkable

import numpy as np
import torch

from nlgmoe.batch import Batch
from nlgmoe.data.chained import Tokens, first_tokens
from nlgmoe.data.permutation import Permutation
from nlgmoe.validation import SettingError


class Sample(Batch):
    """One sequence: the tensors of a `Batch` without the dimension B."""

    cursor: NotRequired[torch.Tensor]  # int64 [K], of a `CursorSource`; the data module removes it from the batch


class TokenSource(Protocol):
    """An endless sequence of training samples, or a finite one of evaluation samples."""

    seq_len: int

    def sample(self, index: int) -> Sample:
        """Return the `index`-th sample: a pure function of the index and of the settings of the source."""
        ...


@runtime_checkable
class CursorSource(Protocol):
    """A source that is read in order and can seek.

    Every sample has a `cursor`: a stream index, the index of the stream's next sample, and its position in the files. Cursors
    affect only the time to the first sample. Stream index -1 marks samples outside all streams.

    Attributes:
        cursor_length: numbers in a cursor; 0 where samples have none.
    """

    cursor_length: int

    def seek(self, cursors: Sequence[Sequence[int]]) -> None:
        """Continue at a run's cursors, at most one for each stream."""
        ...


class _Windows:
    """Windows of all domains, numbered consecutively, `counts` of each; none crosses a border between domains."""

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

    A domain's weight is its number of tokens. The rest of a domain (less than a window) is not trained on.

    Args:
        tokens: tokens of each domain, without the leading EOD, each [N_d].
        seq_len: T, in tokens.
        eod_id: id of the end-of-document token.
        seed: seed of the order.

    Raises:
        ValueError: no domain fills a window.
    """

    def __init__(self, tokens: Sequence[Tokens], seq_len: int, eod_id: int, seed: int) -> None:
        counts = [count_windows(len(array), seq_len, keep_tail=False) for array in tokens]
        super().__init__(tokens, counts, seq_len, eod_id)
        self._seed = seed
        if self.num_windows == 0:
            raise SettingError(f"No domain has {seq_len} tokens to train on: lower data.seq_len, or add text.")

    def sample(self, index: int) -> Sample:
        """Return window `order(seed, epoch)[index % n]` with `epoch = index // n`, n the number of windows."""
        epoch, position = divmod(index, self.num_windows)
        return self._window(epoch_permutation(self.num_windows, self._seed, epoch)[position])


class EvaluationSource(_Windows):
    """Evaluation samples: every domain's windows in order, so that each token is predicted exactly once.

    The last window of a domain is padded and masked. Index -1 is a window of padding alone, which evens out the
    number of batches between ranks.

    Args:
        tokens: tokens of each domain, without the leading EOD, each [N_d].
        seq_len: T, in tokens.
        eod_id: id of the end-of-document token.
        max_windows: maximum number of windows of each domain, the first ones; None: all.
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
        return first_tokens(self._tokens[domain], self._counts[domain] * self.seq_len)


def count_windows(num_tokens: int, seq_len: int, keep_tail: bool) -> int:
    """Return the number of windows in a text of `num_tokens` targets; the last, shorter one counts if `keep_tail`."""
    full, tail = divmod(num_tokens, seq_len)
    return full + int(keep_tail and tail > 0)


def cut_window(tokens: Tokens, index: int, seq_len: int, eod_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the `index`-th window of a text.

    Args:
        tokens: the text without its leading EOD, [N].
        index: 0 <= index < count_windows(N, seq_len, keep_tail=True).
        seq_len: T, in tokens.
        eod_id: id of the end-of-document token, also used as padding.

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


@lru_cache(maxsize=64)  # neighbouring samples share an epoch; workers run ahead into the next one
def epoch_permutation(num_windows: int, seed: int, epoch: int) -> Permutation:
    """Return the order in which an epoch visits the windows, a function of its arguments alone."""
    return Permutation(num_windows, seed, "epoch", epoch)

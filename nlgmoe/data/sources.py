"""Sources map an index to a sample and have no state, so a batch is a function of (seed, samples consumed) alone.

Ranks, workers and restarts do not change it. A new source (blended, streamed, synthetic) implements `TokenSource`.
"""

from collections.abc import Sequence
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch

from nlgmoe.data.packing import count_windows, cut_window, epoch_permutation
from nlgmoe.validation import SettingError


class Sample(TypedDict):
    """One sequence; a batch has the same keys with a leading batch dimension."""

    tokens: torch.Tensor  # int64 [T], inputs
    targets: torch.Tensor  # int64 [T], the token that follows each input
    token_mask: torch.Tensor  # bool [T], False = padding
    domain: torch.Tensor  # int64 [], index into the domains
    loss_mask: NotRequired[torch.Tensor]  # bool [T], False = no loss, padding included
    document: NotRequired[torch.Tensor]  # int64 [T], which document a position belongs to, counted from 0 or 1
    cursor: NotRequired[torch.Tensor]  # int64 [K], of a `CursorSource`; the data module removes it from the batch


class TokenSource(Protocol):
    """An endless sequence of training samples, or a finite one of evaluation samples."""

    seq_len: int

    def sample(self, index: int) -> Sample:
        """Return the `index`-th sample: a pure function of the index and of what the source was made from."""
        ...


@runtime_checkable
class CursorSource(Protocol):
    """A source that is read in order and can seek.

    Every sample has a `cursor`: a stream's number, the number of the stream's next sample, and numbers to find that quickly.
    Samples do not depend on cursors, only the time until the first one. The cursor of a sample without a stream begins with -1.

    Attributes:
        cursor_length: numbers in a cursor; 0 where samples have none.
    """

    cursor_length: int

    def seek(self, cursors: Sequence[Sequence[int]]) -> None:
        """Continue at a run's cursors, at most one for each stream."""
        ...

    def reading_warning(self, micro_batch_size: int, world_size: int, num_workers: int) -> str | None:
        """Return a warning, with the remedy, if these processes would read slowly; else None."""
        ...

    def skipped_summary(self, cursors: Sequence[Sequence[int]]) -> str | None:
        """Return a summary of what was skipped up to `cursors`; None if nothing was."""
        ...


class PackedSource:
    """Training samples: the windows of all domains, in a new random order every epoch, without end.

    A domain's weight is its number of tokens. A window never crosses from one domain into the next; the rest of a
    domain (less than a window) is not trained on.

    Args:
        streams: tokens of each domain, without the leading EOD, each [N_d].
        seq_len: T, in tokens.
        eod_id: id of the end-of-document token.
        seed: of the order.

    Raises:
        ValueError: no domain fills a window.
    """

    def __init__(self, streams: Sequence[np.ndarray], seq_len: int, eod_id: int, seed: int) -> None:
        self.seq_len = seq_len
        self._streams = list(streams)
        self._eod_id = eod_id
        self._seed = seed
        counts = [count_windows(len(stream), seq_len, keep_tail=False) for stream in streams]
        self._ends = np.cumsum(counts)
        self.num_windows = int(sum(counts))
        if self.num_windows == 0:
            raise SettingError(f"No domain has {seq_len} tokens to train on: lower `seq_len` or add text.")

    def sample(self, index: int) -> Sample:
        """Window `order(seed, epoch)[index % n]` with `epoch = index // n`, n the number of windows."""
        epoch, position = divmod(index, self.num_windows)
        return self._window(epoch_permutation(self.num_windows, self._seed, epoch)[position])

    def _window(self, window: int) -> Sample:
        domain = int(np.searchsorted(self._ends, window, side="right"))
        first = int(self._ends[domain - 1]) if domain > 0 else 0
        return make_sample(self._streams[domain], window - first, self.seq_len, self._eod_id, domain)


class EvaluationSource:
    """Evaluation samples: every domain's windows in order, so that each token is predicted exactly once.

    The last window of a domain is padded and masked. Index -1 is a window of padding alone, which evens out the
    number of batches between ranks.

    Args:
        streams: tokens of each domain, without the leading EOD, each [N_d].
        seq_len: T, in tokens.
        eod_id: id of the end-of-document token.
        max_windows: at most so many windows of each domain, the first ones; None: all.
    """

    def __init__(self, streams: Sequence[np.ndarray], seq_len: int, eod_id: int, max_windows: int | None) -> None:
        self.seq_len = seq_len
        self._streams = list(streams)
        self._eod_id = eod_id
        self._windows: list[tuple[int, int]] = []
        for domain, count in enumerate(count_domain_windows(streams, seq_len, max_windows)):
            self._windows += [(domain, window) for window in range(count)]

    def __len__(self) -> int:
        return len(self._windows)

    def sample(self, index: int) -> Sample:
        """Return the `index`-th window over all domains, or padding for -1."""
        if index == -1:
            padding = torch.full((self.seq_len,), self._eod_id, dtype=torch.int64)
            mask = torch.zeros(self.seq_len, dtype=torch.bool)
            return Sample(tokens=padding, targets=padding.clone(), token_mask=mask, domain=torch.tensor(0))
        domain, window = self._windows[index]
        return make_sample(self._streams[domain], window, self.seq_len, self._eod_id, domain)

    def evaluated_tokens(self, domain: int) -> np.ndarray:
        """Return the targets that the domain's windows cover, in order."""
        windows = sum(1 for other, _ in self._windows if other == domain)
        return self._streams[domain][: windows * self.seq_len]


def count_domain_windows(streams: Sequence[np.ndarray], seq_len: int, max_windows: int | None) -> list[int]:
    """Return the number of evaluation windows of each domain; the arguments are those of `EvaluationSource`."""
    counts = [count_windows(len(stream), seq_len, keep_tail=True) for stream in streams]
    return counts if max_windows is None else [min(count, max_windows) for count in counts]


def make_sample(stream: np.ndarray, window: int, seq_len: int, eod_id: int, domain: int) -> Sample:
    """Return the `window`-th window of a domain's stream as tensors."""
    tokens, targets, mask = cut_window(stream, window, seq_len, eod_id)
    return Sample(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        token_mask=torch.from_numpy(mask),
        domain=torch.tensor(domain),
    )

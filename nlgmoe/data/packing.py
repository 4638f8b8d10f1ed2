"""Windows of fixed length over a stream of tokens, and their order. Pure functions; no files, no state.

The stream of a split is EOD, document, EOD, document, EOD, ...: every document is followed by the end-of-document
token, and one more stands at the front, so that every token, the first one included, is predicted from something.
`tokens` below is the stream without that leading EOD, which is how it lies on disk:

    stream    EOD t0  t1  t2  t3  t4  t5  ...
    window 0  EOD t0  t1  t2               inputs     (T = 4)
              t0  t1  t2  t3               targets
    window 1                  t3  t4  t5 ...

Windows hold T + 1 tokens and start every T, so each token is a target exactly once.
"""

from functools import lru_cache

import numpy as np

from nlgmoe.data.permutation import Permutation


def count_windows(num_tokens: int, seq_len: int, keep_tail: bool) -> int:
    """Windows in a stream of `num_tokens` targets; the last, shorter one counts if `keep_tail`."""
    full, tail = divmod(num_tokens, seq_len)
    return full + int(keep_tail and tail > 0)


def cut_window(tokens: np.ndarray, index: int, seq_len: int, eod_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the `index`-th window of a stream.

    Args:
        tokens: the stream without its leading EOD, [N].
        index: 0 <= index < count_windows(N, seq_len, keep_tail=True).
        seq_len: T, in tokens.
        eod_id: id of the end-of-document token, also what padding is filled with.

    Returns:
        inputs int64 [T], targets int64 [T], and mask bool [T], False where the stream has ended.
    """
    start = index * seq_len
    assert 0 <= start < len(tokens), f"window {index} starts behind the stream's {len(tokens)} tokens"
    targets = np.full(seq_len, eod_id, dtype=np.int64)
    inputs = np.full(seq_len, eod_id, dtype=np.int64)
    length = min(seq_len, len(tokens) - start)
    targets[:length] = tokens[start : start + length]
    inputs[1:length] = targets[: length - 1]
    if start > 0:
        inputs[0] = tokens[start - 1]
    return inputs, targets, np.arange(seq_len) < length


@lru_cache(maxsize=64)  # neighbouring samples share an epoch; workers run ahead into the next one
def epoch_permutation(num_windows: int, seed: int, epoch: int) -> Permutation:
    """Return the order in which an epoch visits the windows, a function of its arguments alone."""
    return Permutation(num_windows, seed, "epoch", epoch)

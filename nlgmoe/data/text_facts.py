"""Facts about the text of a data module: domains, tokenizer, and baselines of the loss.

The baselines, the best loss without context and a general-purpose compressor, are bounded in time and memory, whatever the size
of the corpus.
"""

import lzma
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from nlgmoe.data.blend import OpenBlend
from nlgmoe.data.chained import Tokens
from nlgmoe.data.corpus import OpenCorpus
from nlgmoe.data.model_files import TokenizerFiles
from nlgmoe.data.samples import EvaluationSource
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.validation import RunError

MAX_TOKENS = 50_000_000  # counted for the unigram model, in training and evaluation text each
MAX_BYTES = 20_000_000  # compressed, over all domains; xz needs about a second per MB
SLICES = 64  # of a stream too long to count


def unigram_entropy(
    train: Sequence[Tokens], evaluated: Sequence[Tokens], vocab_size: int, max_tokens: int = MAX_TOKENS
) -> float:
    """Compute the loss of the best context-free model, in nats per token.

    Cross-entropy of the training tokens' frequencies (add-one smoothed) on the evaluated tokens. A model that uses
    context has a lower loss. At most `max_tokens` are counted on either side, in evenly spaced slices of each domain.

    Args:
        train: training tokens of each domain, each [N_d].
        evaluated: evaluated tokens of each domain, each [N_d].
        vocab_size: number of token ids.
        max_tokens: maximum number of tokens counted on either side.
    """
    train_counts = count_tokens(train, vocab_size, max_tokens) + 1
    counts = count_tokens(evaluated, vocab_size, max_tokens)
    return float(-(counts * np.log(train_counts / train_counts.sum())).sum() / counts.sum())


def xz_bits_per_byte(
    evaluated: Mapping[str, Tokens], tokenizer: Tokenizer, max_bytes: int = MAX_BYTES
) -> dict[str, float]:
    """Compress the evaluated text by `xz -9`: domain -> bits per byte, and "all" for all domains together.

    Domains without text are left out; the result is empty if no domain has text.

    Args:
        evaluated: evaluated tokens of each domain, each [N_d].
        tokenizer: tokenizer of these tokens.
        max_bytes: maximum number of bytes compressed; each domain is cut to an equal share of it, from its beginning.
    """
    texts = {}
    for name, tokens in evaluated.items():
        share = max_bytes // len(evaluated)
        tokens = tokens[:share]  # each token but the end of a document has a byte or more
        tokens = tokens[tokens != tokenizer.eod_id]
        fitting = int(np.searchsorted(np.cumsum(tokenizer.token_bytes[tokens]), share, side="right"))
        if fitting > 0:
            texts[name] = tokenizer.decode(tokens[:fitting].tolist()).encode()
    if len(texts) > 1:
        texts["all"] = b"".join(texts.values())
    bits_per_byte = {name: 8 * len(lzma.compress(text, preset=9)) / len(text) for name, text in texts.items()}
    if len(texts) == 1:
        (bits_per_byte["all"],) = bits_per_byte.values()
    return bits_per_byte


def count_tokens(streams: Sequence[Tokens], vocab_size: int, max_tokens: int = MAX_TOKENS) -> np.ndarray:
    """Count each token id, [vocab_size]; above `max_tokens`, in evenly spaced slices of each stream, by its share."""
    total = sum(len(stream) for stream in streams)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for stream in streams:
        wanted = len(stream) if total <= max_tokens else len(stream) * max_tokens // total
        length = -(-wanted // SLICES) if wanted < len(stream) else len(stream)
        starts = [0] if length == len(stream) else np.linspace(0, len(stream) - length, SLICES, dtype=np.int64)
        for start in starts:
            tokens = stream[start : start + length]
            if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
                raise RunError(
                    f"The corpus holds token ids from {tokens.min()} to {tokens.max()}, but the tokenizer has {vocab_size}: "
                    "it is damaged, or made with another tokenizer. Build it again, or set data.tokenizer."
                )
            counts += np.bincount(tokens, minlength=vocab_size)
    return counts


class TextFacts:
    """Facts about an open corpus, for callbacks, checkpoints and notebooks.

    Attributes:
        seq_len: tokens per sequence.
        max_eval_windows: sequences evaluated per domain; None: all.
        mask_eod_loss: the first token of each document has no loss.
    """

    seq_len: int
    max_eval_windows: int | None
    mask_eod_loss: bool

    def _opened(self) -> OpenCorpus:
        raise NotImplementedError

    @property
    def domains(self) -> list[str]:
        """Names of the domains; a batch's `domain` indexes them."""
        return self._opened().domains

    @property
    def domain_shares(self) -> list[float] | None:
        """Share of each domain in the training samples of a blend, `[D]`; None for other corpora."""
        corpus = self._opened()
        return corpus.shares if isinstance(corpus, OpenBlend) else None

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._opened().tokenizer.vocab_size

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token."""
        return self._opened().tokenizer.eod_id

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._opened().tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._opened().tokenizer.decode(ids)

    def tokenizer_files(self) -> TokenizerFiles:
        """Return the tokenizer and the model's files beside it, for checkpoints."""
        return self._opened().tokenizer.files

    def token_byte_lengths(self) -> torch.Tensor:
        """Return the UTF-8 bytes of text of each token id, `[V]`; 0 for the end-of-document token."""
        return torch.as_tensor(self._opened().tokenizer.token_bytes)

    def token_spellings(self) -> list[bytes]:
        """Return the bytes of text of each token id, `[V]`."""
        return self._opened().tokenizer.spellings

    def unigram_entropy(self) -> float:
        """Compute the loss of the best context-free model on the tokens that have a loss in evaluation, in nats per token."""
        evaluated = list(self._evaluated_tokens().values())
        if self.mask_eod_loss:
            eod = self.eod_id
            evaluated = [tokens[1:][tokens[:-1] != eod] for tokens in evaluated]  # the first one has no loss either
        return unigram_entropy(self._opened().training_tokens(), evaluated, self.vocab_size)

    def token_counts(self) -> list[int]:
        """Return the number of training tokens of each id, `[V]`; of a long corpus, in evenly spaced slices."""
        return count_tokens(self._opened().training_tokens(), self.vocab_size).tolist()

    def xz_bits_per_byte(self) -> dict[str, float]:
        """Compress the evaluated text by a general-purpose compressor: domain -> bits per byte, and "all"."""
        return xz_bits_per_byte(self._evaluated_tokens(), self._opened().tokenizer)

    def _evaluation_source(self, split: str) -> EvaluationSource:
        tokens = self._opened().evaluation_tokens(split)
        assert tokens is not None, f"the corpus has no split {split}"
        return EvaluationSource(tokens, self.seq_len, self.eod_id, self.max_eval_windows)

    def _evaluated_tokens(self) -> dict[str, Tokens]:
        """Return the tokens that validation covers, by domain."""
        source = self._evaluation_source("validation")
        return {name: source.evaluated_tokens(domain) for domain, name in enumerate(self.domains)}

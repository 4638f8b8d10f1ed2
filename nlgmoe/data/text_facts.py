"""Facts about the text of a data module: domains, tokenizer, and baselines of the loss."""

from collections.abc import Sequence

import numpy as np
import torch

from nlgmoe.data.baselines import count_tokens, unigram_entropy, xz_bits_per_byte
from nlgmoe.data.blend import OpenBlend
from nlgmoe.data.corpus import OpenCorpus
from nlgmoe.data.samples import EvaluationSource


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

    def tokenizer_json(self) -> str:
        """Return the tokenizer, for checkpoints."""
        return self._opened().tokenizer.to_json()

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
            evaluated = [tokens[np.concatenate(([eod], tokens))[:-1] != eod] for tokens in evaluated]
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

    def _evaluated_tokens(self) -> dict[str, np.ndarray]:
        """Return the tokens that validation covers, by domain."""
        source = self._evaluation_source("validation")
        return {name: source.evaluated_tokens(domain) for domain, name in enumerate(self.domains)}

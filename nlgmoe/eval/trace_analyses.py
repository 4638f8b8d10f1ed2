"""What a trace says about the experts: OLMoE's four analyses (arXiv 2409.02060, section 5), each beside two controls.

    use            tokens with expert i in their top k / tokens                        sums to k over experts
    domain         tokens of domain D with i in their top k / tokens of D              sums to k
    co-activation  N_ij / N_i: of the tokens of i, the share that j has too            over all pairs; sums to k - 1 over j
    vocabulary     tokens x with i in their top k / tokens x                           x: the token read, or the one to predict
    saturation     |E_n and E'_n| / k, mean over tokens n                              E': the choice of another checkpoint

Shuffled: the same numbers of choices, each with another token at random: what finite text shows without any preference. Uniform:
the expected share if every token chose k experts at random. Choices are counted before dropping.

Letters: N tokens, k experts per token, E experts of a layer, D domains, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nlgmoe.eval.trace import Trace
from nlgmoe.validation import require

FREQUENT = 10  # ids of fewer tokens are left out of the mean of vocabulary: a single token has the share 1


@dataclass(frozen=True)
class Summary:
    """One number of a layer beside its controls."""

    analysis: str
    value: float
    shuffled: float
    uniform: float


class LayerAnalysis:
    """The analyses of one MoE layer, computed at their first use.

    Attributes:
        experts: `[N, k]` choices.
        tokens: `[N]` ids read.
        next_tokens: `[N]` ids to predict.
        domain: `[N]` ids of domains.
        domains: names.
        num_experts: E.
    """

    def __init__(
        self,
        experts: np.ndarray,
        tokens: np.ndarray,
        next_tokens: np.ndarray,
        domain: np.ndarray,
        domains: Sequence[str],
        num_experts: int,
    ) -> None:
        self.experts, self.tokens, self.next_tokens, self.domain = experts, tokens, next_tokens, domain
        self.domains, self.num_experts, self.top_k = list(domains), num_experts, experts.shape[1]

    @cached_property
    def shuffled(self) -> LayerAnalysis:
        """Return the control: every choice moved to a random token."""
        columns = np.random.default_rng(0).permuted(self.experts, axis=0)
        same = self.tokens, self.next_tokens, self.domain, self.domains, self.num_experts
        return LayerAnalysis(columns, *same)

    @cached_property
    def use(self) -> np.ndarray:
        """Return the share of the tokens that chose each expert, `[E]`."""
        shares: np.ndarray = np.bincount(self.experts.ravel(), minlength=self.num_experts) / max(1, len(self.experts))
        return shares

    @cached_property
    def by_domain(self) -> np.ndarray:
        """Return the shares by domain, `[D, E]`; NaN for a domain without tokens."""
        return _shares(*self._counts(self.domain, len(self.domains)))

    @cached_property
    def preference(self) -> np.ndarray:
        """Return the shares by domain over their mean, `[D, E]`; 1: no preference; NaN without tokens or choices."""
        seen = self.by_domain[~np.isnan(self.by_domain).all(axis=1)]
        mean = seen.mean(axis=0)
        return self.by_domain / np.where(mean > 0, mean, np.nan)

    @cached_property
    def pairs(self) -> np.ndarray:
        """Return N_ij / N_i, `[E, E]`; NaN on the diagonal and for unused experts."""
        together = np.zeros((self.num_experts, self.num_experts), np.int64)
        for first in range(self.top_k):
            for second in range(first + 1, self.top_k):
                index = self.experts[:, first].astype(np.int64) * self.num_experts + self.experts[:, second]
                together += np.bincount(index, minlength=together.size).reshape(together.shape)
        shares = _shares(together + together.T, np.bincount(self.experts.ravel(), minlength=self.num_experts))
        np.fill_diagonal(shares, np.nan)
        return shares

    def vocabulary(self, of: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
        """Return the shares by id, `[V, E]`, NaN for ids without tokens; and the number of tokens of each id, `[V]`.

        Args:
            of: `tokens`, which the model read, or `next_tokens`, which it had to predict.
        """
        return self._vocabularies[of]

    @cached_property
    def _vocabularies(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        both = {}
        for of, ids in (("tokens", self.tokens), ("next_tokens", self.next_tokens)):
            counts, tokens = self._counts(ids, int(ids.max()) + 1)
            both[of] = _shares(counts, tokens), tokens
        return both

    def summaries(self) -> list[Summary]:
        """Return each analysis as one number: the mean of the largest shares, of frequent ids, of experts, or of domains."""
        share = self.top_k / self.num_experts
        measured, control = self._largest(), self.shuffled._largest()
        pairs = (self.top_k - 1) / max(1, self.num_experts - 1)
        uniform = {"domain": share, "co-activation": pairs, "input token": share, "next token": share}
        return [Summary(name, value, control[name], uniform[name]) for name, value in measured.items()]

    def _largest(self) -> dict[str, float]:
        largest = {"domain": _mean_of_largest(self.by_domain.T)} if len(self.domains) > 1 else {}
        if self.top_k > 1:
            largest["co-activation"] = _mean_of_largest(self.pairs)
        for name, of in (("input token", "tokens"), ("next token", "next_tokens")):
            shares, tokens = self.vocabulary(of)
            largest[name] = _mean_of_largest(shares[tokens >= FREQUENT])
        return largest

    def _counts(self, group: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Return choices `[groups, E]` and tokens `[groups]` of the tokens' groups, `[N]`."""
        cell = group.astype(np.int64)[:, None] * self.num_experts + self.experts
        counts = np.bincount(cell.ravel(), minlength=groups * self.num_experts).reshape(groups, self.num_experts)
        return counts, np.bincount(group, minlength=groups)


def _shares(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: np.ndarray = counts / np.where(totals > 0, totals, np.nan)[:, None]
    return shares


def _mean_of_largest(shares: np.ndarray) -> float:
    """Return the mean over rows of the largest share, without rows of NaN alone; NaN if there are no others."""
    rows = shares[~np.isnan(shares).all(axis=1)]
    return float(np.nanmax(rows, axis=1).mean()) if len(rows) else float("nan")


def analyse(trace: Trace, layer: int) -> LayerAnalysis:
    """Read one MoE layer of a trace."""
    tokens, next_tokens, domain = (trace.read(name) for name in ("tokens", "next_tokens", "domain"))
    experts, facts = trace.experts_of(layer), trace.facts
    return LayerAnalysis(experts, tokens, next_tokens, domain, facts.domains, facts.experts[layer])


def saturation(earlier: Trace, later: Trace) -> list[Summary]:
    """Return the share of the choices that two checkpoints have in common on the same text, of each MoE layer.

    Raises:
        ValueError: the text or the experts differ, or both traces are of the same weights.
    """
    same = np.array_equal(earlier.read("tokens"), later.read("tokens"))
    require(same, f"{earlier.path} and {later.path} are traces of different texts; record both from one")
    shapes = [(trace.facts.blocks, trace.facts.experts) for trace in (earlier, later)]
    require(shapes[0] == shapes[1], f"{earlier.path} and {later.path} are traces of different models")
    weights = earlier.facts.weights_hash
    require(
        weights is None or weights != later.facts.weights_hash,
        f"{earlier.path} and {later.path} are of the same weights; give an earlier checkpoint",
    )
    summaries = []
    for layer, num_experts in enumerate(later.facts.experts):
        first, last = (trace.experts_of(layer) for trace in (earlier, later))
        moved = np.random.default_rng(0).permutation(first)
        uniform = first.shape[1] / num_experts
        summaries.append(Summary("saturation", _in_common(first, last), _in_common(moved, last), uniform))
    return summaries


def _in_common(first: np.ndarray, last: np.ndarray) -> float:
    common = (first[:, :, None] == last[:, None, :]).any(axis=2)  # [N, k]
    return float(common.mean())

"""Traces and their analyses: six tokens by hand, sums that hold, OLMoE's script, transformers' router logits."""

from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlgmoe import GPT, GPTConfig, MoEConfig
from nlgmoe.batch import Batch
from nlgmoe.eval.trace import Trace, TraceFacts, TraceWriter
from nlgmoe.eval.trace_analyses import LayerAnalysis, analyse, saturation
from nlgmoe.validation import SettingError
from tests.eval.test_interventions import EOD, MOES, batches_of, model_of


def record(model: GPT, path: Path) -> Trace:
    facts = TraceFacts([1, 3], [4, 4], 4, ["a", "b"])
    with TraceWriter(path, facts, EOD) as writer, torch.no_grad():
        for batch in batches_of():
            writer.add(batch, model(batch["tokens"], batch["token_mask"]).routings)
    return Trace(path)


# Six tokens, k = 2, three experts; ids 5, 5, 7, 7, 7, 9 of two domains.
SIX = LayerAnalysis(
    np.array([[0, 1], [1, 0], [0, 2], [2, 0], [0, 1], [1, 2]], np.uint8),
    np.array([5, 5, 7, 7, 7, 9]),
    np.array([5, 7, 7, 7, 9, 5]),
    np.array([0, 0, 0, 0, 1, 1]),
    ["a", "b"],
    3,
)


def test_six_tokens_by_hand() -> None:
    np.testing.assert_allclose(SIX.use, [5 / 6, 4 / 6, 3 / 6])
    np.testing.assert_allclose(SIX.by_domain, [[4 / 4, 2 / 4, 2 / 4], [1 / 2, 2 / 2, 1 / 2]])
    np.testing.assert_allclose(SIX.pairs, [[np.nan, 3 / 5, 2 / 5], [3 / 4, np.nan, 1 / 4], [2 / 3, 1 / 3, np.nan]])
    shares, tokens = SIX.vocabulary()
    assert tokens[[5, 7, 9]].tolist() == [2, 3, 1]
    np.testing.assert_allclose(shares[[5, 7, 9]], [[1, 1, 0], [1, 1 / 3, 2 / 3], [0, 1, 1]])
    np.testing.assert_allclose(
        SIX.vocabulary("next_tokens")[0][[5, 7, 9]], [[1 / 2, 1, 1 / 2], [1, 1 / 3, 2 / 3], [1, 1, 0]]
    )
    values = {summary.analysis: summary for summary in SIX.summaries()}
    assert values["domain"].value == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert values["co-activation"].value == pytest.approx((3 / 5 + 3 / 4 + 2 / 3) / 3)
    assert values["co-activation"].uniform == pytest.approx(1 / 2) and values["domain"].uniform == pytest.approx(2 / 3)


def olmoes_pairs(experts: np.ndarray) -> dict[tuple[int, int], float]:
    """Co-activation as OLMoE's `run_moe_analysis.py` counts it, over all pairs instead of neighbouring ranks."""
    together: defaultdict[tuple[int, int], int] = defaultdict(int)
    counts: Counter[int] = Counter(experts.ravel().tolist())
    for chosen in experts.tolist():
        for pair in combinations(chosen, 2):
            together[tuple(sorted(pair))] += 1  # type: ignore[index]
    return {(i, j): together[min(i, j), max(i, j)] / counts[i] for i in counts for j in counts if i != j}


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(5, 9))
def test_sums_that_hold_and_pairs_of_olmoe(seed: int, top_k: int, num_experts: int) -> None:
    random = np.random.default_rng(seed)
    experts = np.argsort(random.random((200, num_experts)), axis=1)[:, :top_k].astype(np.uint8)
    ids, domain = random.integers(0, 30, 200), random.integers(0, 3, 200)
    found = LayerAnalysis(experts, ids, ids, domain, ["a", "b", "c"], num_experts)
    assert found.use.sum() == pytest.approx(top_k)
    np.testing.assert_allclose(found.by_domain.sum(axis=1), top_k)
    np.testing.assert_allclose(np.nansum(found.vocabulary()[0], axis=1)[np.unique(ids)], top_k)
    np.testing.assert_allclose(np.nansum(found.pairs, axis=1)[found.use > 0], top_k - 1)
    for (i, j), share in olmoes_pairs(experts).items():
        assert found.pairs[i, j] == pytest.approx(share)
    np.testing.assert_allclose(found.shuffled.use, found.use)


def test_a_trace_holds_what_the_router_chose(tmp_path: Path) -> None:
    model = model_of(MOES["top-2"])
    trace = record(model, tmp_path / "trace.safetensors")
    assert trace.num_tokens == 3 * 16 + 9
    assert trace.read("experts").dtype == np.uint8
    chosen = []
    for batch in batches_of():
        real = batch["token_mask"].flatten()
        with torch.no_grad():
            routings = model(batch["tokens"], batch["token_mask"]).routings
        chosen.append(torch.stack([routing.expert[real] for routing in routings], 1))
    assert torch.equal(torch.from_numpy(trace.read("experts")).long(), torch.cat(chosen))
    assert trace.read("kept").all()
    for layer in (0, 1):
        analysis, experts = analyse(trace, layer), trace.experts_of(layer)
        for domain in (0, 1):
            of_domain = experts[trace.read("domain") == domain]
            share = [(of_domain == expert).any(1).mean() for expert in range(analysis.num_experts)]
            np.testing.assert_allclose(analysis.by_domain[domain], share)
        chosen = analysis.use > 0
        np.testing.assert_allclose(np.mean(analysis.preference, 0)[chosen], 1)
        assert np.isnan(analysis.preference[:, ~chosen]).all()


def test_documents_end_at_their_token_and_with_their_sequence(tmp_path: Path) -> None:
    tokens = torch.tensor([[EOD, 1, EOD, 2], [3, 4, EOD, EOD]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    batch = Batch(tokens=tokens, targets=tokens.roll(-1, 1), token_mask=mask, domain=torch.tensor([0, 0]))
    model = GPT(GPTConfig(61, 4, 2, 16, 2, moe=MoEConfig(300))).eval()
    path, facts = tmp_path / "trace.safetensors", TraceFacts([1], [300], 2, ["all"])
    with TraceWriter(path, facts, EOD, weights=True) as writer, torch.no_grad():
        routings = model(tokens, mask).routings
        for _ in range(2):
            writer.add(batch, routings)
    trace = Trace(path)
    assert trace.read("document").tolist() == [0, 0, 1, 1, 2, 2, 3, 5, 5, 6, 6, 7, 7, 8]
    assert trace.read("experts").dtype == np.int16  # 300 experts
    assert np.array_equal(trace.read("weights")[:7, 0], routings[0].weight[mask.flatten()].numpy())
    assert trace.read("next_tokens")[:4].tolist() == [1, EOD, 2, EOD]


def test_saturation(tmp_path: Path) -> None:
    model = model_of(MOES["top-2"])
    first, same = (record(model, tmp_path / f"{name}.safetensors") for name in ("first", "same"))
    assert [summary.value for summary in saturation(first, same)] == [1, 1]
    other = record(model_of(MOES["top-2"]).requires_grad_(False).apply(_negate), tmp_path / "other.safetensors")
    expected = np.mean([len({*a} & {*b}) / 2 for a, b in zip(first.experts_of(0), other.experts_of(0), strict=True)])
    assert saturation(first, other)[0].value == pytest.approx(float(expected))
    assert saturation(first, other)[0].uniform == 0.5
    other_text, path = Trace(tmp_path / "first.safetensors"), tmp_path / "text.safetensors"
    with TraceWriter(path, other_text.facts, EOD) as writer, torch.no_grad():
        for batch in batches_of(seed=5):
            writer.add(batch, model(batch["tokens"], batch["token_mask"]).routings)
    with pytest.raises(SettingError, match="traces of different texts"):
        saturation(other_text, Trace(path))


def _negate(module: torch.nn.Module) -> None:
    if hasattr(module, "left_out"):
        module.weight.neg_()  # type: ignore[operator, union-attr]


def test_a_failed_trace_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TraceWriter(tmp_path / "trace.safetensors", TraceFacts([1], [4], 2, ["all"]), EOD):
        raise KeyError
    writer = TraceWriter(tmp_path / "trace.safetensors", TraceFacts([1], [4], 2, ["all"]), EOD)
    with pytest.raises(SettingError, match="there is no token to route"), writer:
        pass
    assert not list(tmp_path.iterdir())

"""Blends: every part gets its share at every prefix, samples are pure, losses are known by part."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nlgmoe.cli.train import main
from nlgmoe.data import Blend, BlendPart, Corpus, MegatronIndexed, PileDataModule, PocketPile, StreamedText
from nlgmoe.data.blend import Interleaving, integer_weights
from nlgmoe.data.pocket_pile import token_folder
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import SettingError
from tests.support.commands import rows_of
from tests.support.corpora import tokens_of
from tests.support.documents import evaluated, make_texts, write

# ---- whose turn it is


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_blend_takes_samples_of_a_part_in_order_and_leaves_none_out(weights: list[int]) -> None:
    """Wherever a run stands, each part has had its share, within 1.68 samples."""
    turns, had = Interleaving(weights), [0] * len(weights)
    for index in range(300):
        part, own = turns.place(index)
        assert own == had[part]
        had[part] += 1
        for count, weight in zip(had, weights, strict=True):
            assert abs(count - (index + 1) * weight / sum(weights)) < 1.68


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ([0.1, 0.1], "01010101"),
        ([0.3, 0.1], "01000100"),  # the lighter one at 1/4 n = 1/2, 3/2, ...
        ([1e-5, 1e-5, 2e-5], "20212021"),  # half of the samples to the last one; the others take turns in the rest
    ],
)
def test_blend_turns_by_hand(weights: list[float], turns: str) -> None:
    interleaving = Interleaving(integer_weights(weights))
    assert "".join(str(interleaving.place(index)[0]) for index in range(8)) == turns


# ---- corpora


Make = Callable[..., PileDataModule]


@pytest.fixture
def make_blend(make_data: Make) -> Make:
    def make(*parts: tuple[float, str, Corpus], **options: Any) -> PileDataModule:
        return make_data(corpus=Blend([BlendPart(*part) for part in parts]), **options)

    return make


@pytest.fixture
def indexed(make_data: Make) -> MegatronIndexed:
    """A corpus in Megatron's format, with three splits: the verse of the tiny corpus."""
    data = make_data()
    return MegatronIndexed(str(token_folder(data.data_dir, data._opened().tokenizer) / "verse"), (6, 3, 1))


def two(indexed: MegatronIndexed) -> list[tuple[float, str, Corpus]]:
    return [(0.7, "books", PocketPile(["prose"])), (0.3, "poems", indexed)]


def test_blend_has_the_samples_of_its_parts(make_blend: Make, make_data: Make, indexed: MegatronIndexed) -> None:
    nested = Blend([BlendPart(1, "poems", indexed), BlendPart(3, "all", PocketPile())])
    data = make_blend((1, "pile", PocketPile()), (2, "books", PocketPile(["prose"])), (1, "mix", nested))
    assert data.domains == ["pile/prose", "pile/verse", "books", "mix/poems", "mix/all/prose", "mix/all/verse"]
    prose, verse = (len(tokens) for tokens in tokens_of(make_data(), "train"))
    of_pile = np.array([prose, verse]) / (prose + verse)
    shares = [*(0.25 * of_pile), 0.5, 0.25 * 0.25, *(0.25 * 0.75 * of_pile)]
    assert data.domain_shares == pytest.approx(shares)
    source = data._opened().training_source(32, 7)
    parts = [
        make_data(corpus=corpus)._opened().training_source(32, derive_seed(7, name))
        for name, corpus in (("pile", PocketPile()), ("books", PocketPile(["prose"])), ("mix", nested))
    ]
    first = [0, 2, 3]
    had = [0, 0, 0]
    for index in range(400):  # several epochs
        sample = source.sample(index)
        part = max(part for part in range(3) if first[part] <= sample["domain"])
        expected = parts[part].sample(had[part])
        had[part] += 1
        assert int(sample["domain"]) == first[part] + int(expected["domain"])
        assert torch.equal(sample["targets"], expected["targets"])
    assert had == [100, 200, 100]
    assert torch.equal(source.sample(5)["tokens"], data._opened().training_source(32, 7).sample(5)["tokens"])


def test_blend_resumes_with_the_same_parts_alone(make_blend: Make, indexed: MegatronIndexed) -> None:
    state = make_blend(*two(indexed)).state_dict()
    (books, pile), (poems, lines) = ((part[1], part[2]) for part in two(indexed))
    make_blend((14, books, pile), (6, poems, lines), micro_batch_size=2).load_state_dict(state)
    order = r"corpus\.parts \(saved: books 7/10, poems 3/10, now: poems 3/10, books 7/10\)\."
    with pytest.raises(SettingError, match=f"these differ: {order}"):
        make_blend((0.3, poems, lines), (0.7, books, pile)).load_state_dict(state)
    with pytest.raises(SettingError, match=r"these differ: corpus\.books/domains \(saved: prose, now: verse\)"):
        make_blend((0.7, books, PocketPile(["verse"])), (0.3, poems, lines)).load_state_dict(state)


def test_blend_evaluates_every_part_that_has_the_split(make_blend: Make, indexed: MegatronIndexed) -> None:
    def by_domain(data: PileDataModule, loader: Any) -> dict[str, list[int]]:
        windows = evaluated(data, loader)
        return {name: [int(i) for domain, row in windows if domain == name for i in row] for name in data.domains}

    data = make_blend((1, "pile", PocketPile()), (1, "poems", indexed))
    whole = {
        split: indexed.open(data.data_dir, str(data.data_dir / "tokenizer")).tokens[split][0][:].tolist()
        for split in ("validation", "test")
    }
    validated = by_domain(data, data.val_dataloader)
    assert validated["poems"] == whole["validation"] and validated["pile/prose"] and validated["pile/verse"]
    assert by_domain(data, data.test_dataloader) == {"pile/prose": [], "pile/verse": [], "poems": whole["test"]}
    without = make_blend((1, "pile", PocketPile()))
    assert by_domain(without, without.test_dataloader) == by_domain(without, without.val_dataloader)
    assert data.unigram_entropy() > 0 and set(data.xz_bits_per_byte()) == {*data.domains, "all"}


CONFIG = """
model:
  config: {{vocab_size: {vocab_size}, seq_len: 16, num_layers: 1, hidden_size: 16, num_heads: 2}}
  schedule: {{shape: constant}}
data:
  data_dir: {folder}
  tokenizer: {folder}/tokenizer
  corpus:
    class_path: nlgmoe.data.Blend
    init_args:
      parts:
      - {{weight: 0.7, name: pile, corpus: {{class_path: nlgmoe.data.PocketPile, init_args: {{domains: [prose]}}}}}}
      - weight: 0.3
        name: poems
        corpus: {{class_path: nlgmoe.data.MegatronIndexed, init_args: {{prefix: {prefix}, split: [6, 3, 1]}}}}
  micro_batch_size: 2
  max_eval_windows: 3
trainer: {{accelerator: cpu, enable_progress_bar: false, val_check_interval: 2}}
"""


def test_blend_is_trained_on_and_resumed(make_data: Make, indexed: MegatronIndexed, tmp_path: Path) -> None:
    """As its user would: the losses of the parts are in the logs and the summary, and a resumed run ends where one does."""
    data = make_data()
    config = tmp_path / "blend.yaml"
    config.write_text(CONFIG.format(vocab_size=data.vocab_size, folder=data.data_dir, prefix=indexed.prefix))

    def fit(run: str, steps: int, *more: str) -> dict[str, Any]:
        limits = [f"--trainer.default_root_dir={tmp_path / run}", f"--model.train_tokens={steps * 32}"]
        main(["fit", "--config", str(config), *limits, *more])
        summary: dict[str, Any] = json.loads((tmp_path / run / "summary.json").read_text())
        return summary

    straight = fit("straight", 6)
    assert set(straight["bits_per_byte"]) == {"all", "pile", "poems"}
    validated = [row for row in rows_of(tmp_path / "straight/metrics.csv") if row["val/loss"]]
    assert len(validated) == 3
    for row in validated:
        pile, poems = (float(row[f"val/loss/{name}"]) for name in ("pile", "poems"))
        assert float(row["val/loss"]) == pytest.approx((pile + poems) / 2, rel=3e-6)  # equally many windows of each
        assert float(row["val/blend_loss"]) == pytest.approx(0.7 * pile + 0.3 * poems, rel=3e-6)
        assert pile != pytest.approx(poems, rel=1e-5)
    fit("halves", 4)
    resumed = fit("halves", 6, "--ckpt_path=last")
    assert (resumed["val_loss"], resumed["bits_per_byte"]) == (straight["val_loss"], straight["bits_per_byte"])


# ---- mistakes


def test_blend_names_the_part_that_it_cannot_take(make_blend: Make, indexed: MegatronIndexed) -> None:
    cases: list[tuple[list[tuple[float, str, Any]], str]] = [
        ([(1, "a", indexed), (0, "b", indexed)], "weight=0 of the part 'b' must be a number above 0"),
        ([(1, "a", indexed), (1, "a", indexed)], "name=a is empty or used twice: losses are logged by it"),
        ([(1, "a", indexed), (1, "b", PocketPile(["opera"]))], r"domains=.*no opera"),
    ]
    for parts, words in cases:
        with pytest.raises(SettingError, match=words):
            make_blend(*parts)


def test_blend_refuses_a_stream(make_blend: Make, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.jsonl", make_texts(20))
    data = make_blend((1, "web", StreamedText(str(tmp_path), num_streams=2)))
    with pytest.raises(SettingError, match=r"the part 'web' is a stream, .* tokenise it in adv"):
        data.train_dataloader()

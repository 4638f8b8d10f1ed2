"""Blends: every part gets its share at every prefix, samples are pure, losses are known by part."""

import csv
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from nlgmoe.cli.train import main
from nlgmoe.config import GPTConfig
from nlgmoe.data import Blend, BlendPart, Corpus, MegatronIndexed, PileDataModule, PocketPile, TokenArrays
from nlgmoe.data.blend import Interleaving, integer_weights
from nlgmoe.data.pocket.build import read_texts, text_path
from nlgmoe.data.pocket_pile import token_folder
from nlgmoe.module import MoEGPTModule
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import SettingError
from tests.data.conftest import tokens_of
from tests.data.test_datamodule import Ranks, batches, make_trainer, rows
from tests.data.test_tokenizer import small

PAPER = [
    *(0.14336, 0.08962, 0.19336, 0.05689, 0.00859, 0.02897, 0.04771, 0.00873),
    *(0.01007, 0.00208, 0.13017, 0.09446, 0.15652, 0.01359, 0.01588),
]


# ---- whose turn it is

WEIGHTS = st.lists(st.integers(1, 100) | st.integers(1, 10**9), min_size=1, max_size=20)
SAMPLES = st.integers(0, 1000) | st.integers(0, 10**18)


def counts(turns: Interleaving, samples: int, parts: int) -> list[int]:
    """How many of the first `samples` samples come from each part: down the whole tree, not along one path."""
    found, pending = [0] * parts, [(turns._root, samples)]
    while pending:
        node, had = pending.pop()
        if isinstance(node, int):
            found[node] = had
        else:
            left = node.count_left(had)
            pending += [(node.left, left), (node.right, had - left)]
    return found


def assert_near_shares(had: list[int], weights: list[int]) -> None:
    """Within 1.68 samples, in whole numbers: floating point has no room for the difference at 1e18 samples."""
    samples, total = sum(had), sum(weights)
    for count, weight in zip(had, weights, strict=True):
        assert 100 * abs(count * total - samples * weight) < 168 * total


@given(WEIGHTS, SAMPLES)
@example(
    [1000, *[1] * 10], 500
)  # ten times almost half a sample: together five, in a tree with the heavy part far down
def test_every_part_has_had_its_share_wherever_a_run_stands(weights: list[int], samples: int) -> None:
    turns = Interleaving(weights)
    before, after = (counts(turns, first, len(weights)) for first in (samples, samples + 1))
    assert sum(before) == samples
    assert_near_shares(before, weights)
    part, own = turns.place(samples)
    assert own == before[part]
    assert [count + (other == part) for other, count in enumerate(before)] == after


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_a_parts_samples_come_in_order_and_none_is_left_out(weights: list[int]) -> None:
    turns, had = Interleaving(weights), [0] * len(weights)
    for index in range(300):
        part, own = turns.place(index)
        assert own == had[part]
        had[part] += 1
        assert_near_shares(had, weights)


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ([5], "00000000"),
        ([1, 1], "01010101"),
        ([3, 1], "01000100"),  # the lighter one at 1/4 n = 1/2, 3/2, ...
        ([1, 1, 2], "20212021"),  # half of the samples to the last one; the others take turns in the rest
    ],
)
def test_turns_by_hand(weights: list[int], turns: str) -> None:
    assert "".join(str(Interleaving(weights).place(index)[0]) for index in range(8)) == turns


def test_weights_are_what_is_written() -> None:
    assert integer_weights([0.1, 0.2]) == integer_weights([3, 6]) == [1, 2]
    assert integer_weights([1e-05, 1.5]) == [1, 150_000]
    assert sum(integer_weights(PAPER)) == 100_000


# ---- corpora


@pytest.fixture
def make_blend(make_data: Callable[..., PileDataModule]) -> Callable[..., PileDataModule]:
    def make(*parts: tuple[float, str, Corpus], **options: Any) -> PileDataModule:
        return make_data(corpus=Blend([BlendPart(*part) for part in parts]), **options)

    return make


@pytest.fixture
def indexed(make_data: Callable[..., PileDataModule]) -> MegatronIndexed:
    """A corpus in Megatron's format, with three splits: the verse of the tiny corpus."""
    data = make_data()
    return MegatronIndexed(str(token_folder(data.data_dir, data._opened().tokenizer) / "verse.train"), (6, 3, 1))


Make = Callable[..., PileDataModule]


def two(indexed: MegatronIndexed) -> list[tuple[float, str, Corpus]]:
    return [(0.7, "books", PocketPile(["prose"])), (0.3, "poems", indexed)]


def test_samples_are_those_of_the_parts(make_blend: Make, make_data: Make, indexed: MegatronIndexed) -> None:
    nested = Blend([BlendPart(1, "poems", indexed), BlendPart(3, "all", PocketPile())])
    data = make_blend((1, "pile", PocketPile()), (2, "books", PocketPile(["prose"])), (1, "mix", nested))
    assert data.domains == ["pile/prose", "pile/verse", "books", "mix/poems", "mix/all/prose", "mix/all/verse"]
    prose, verse = (len(tokens) for tokens in tokens_of(make_data(), "train"))
    of_pile = [prose / (prose + verse), verse / (prose + verse)]
    shares = [
        0.25 * of_pile[0],
        0.25 * of_pile[1],
        0.5,
        0.25 * 0.25,
        0.25 * 0.75 * of_pile[0],
        0.25 * 0.75 * of_pile[1],
    ]
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
        text = data.decode(sample["targets"].tolist())
        domain = "prose" if data.domains[int(sample["domain"])] == "books" else data.domains[int(sample["domain"])]
        whole = read_texts(text_path(data.data_dir, f"{domain.rpartition('/')[2].replace('poems', 'verse')}.train"))
        assert text in "<|endoftext|>".join([*whole, ""])
    assert had == [100, 200, 100]
    assert torch.equal(source.sample(5)["tokens"], data._opened().training_source(32, 7).sample(5)["tokens"])


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_divide_the_global_batch(make_blend: Make, indexed: MegatronIndexed, workers: int) -> None:
    one = batches(make_blend(*two(indexed), micro_batch_size=12), 20)
    three = [batches(make_blend(*two(indexed), num_workers=workers), 20, rank, 3) for rank in range(3)]
    for step in range(20):
        assert rows(one[step]) == [row for rank in range(3) for row in rows(three[rank][step])]
    domains = torch.cat([batch["domain"] for batch in one])
    assert domains.unique().tolist() == [0, 1] and int((domains == 0).sum()) == 240 * 7 // 10


def test_a_run_goes_on_with_the_next_sample_but_only_of_the_same_blend(
    make_blend: Make, indexed: MegatronIndexed
) -> None:
    straight = [row for batch in batches(make_blend(*two(indexed)), 10) for row in rows(batch)]
    data = make_blend(*two(indexed))
    batches(data, 5)
    data.advance(12)
    (books, pile), (poems, lines) = ((part[1], part[2]) for part in two(indexed))
    same = make_blend((14, books, pile), (6, poems, lines), micro_batch_size=2)
    same.load_state_dict(data.state_dict())
    assert [row for batch in batches(same, 8) for row in rows(batch)] == straight[12:28]
    shares = "books 7/10, poems 3/10"
    for other, words in (
        ([(0.6, books, pile), (0.3, poems, lines)], rf"corpus\.parts \({shares} there, books 2/3, poems 1/3 here\)\."),
        (
            [(0.3, poems, lines), (0.7, books, pile)],
            rf"corpus\.parts \({shares} there, poems 3/10, books 7/10 here\)\.",
        ),
        (
            [(0.7, "novels", pile), (0.3, poems, lines)],
            rf"corpus\.parts \({shares} there, novels 7/10, poems 3/10 here\)",
        ),
        (
            [(0.7, books, PocketPile(["verse"])), (0.3, poems, lines)],
            r"corpus\.books/domains \(prose there, verse here\)",
        ),
    ):
        with pytest.raises(ValueError, match=rf"these differ: {words}"):
            make_blend(*other).load_state_dict(data.state_dict())


def test_evaluation_covers_every_part_that_has_the_split(make_blend: Make, indexed: MegatronIndexed) -> None:
    def evaluated(data: PileDataModule, loader: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {name: [] for name in data.domains}
        data.trainer = Ranks(0, 1)  # type: ignore[assignment]
        for batch in loader():
            for domain, row, mask in zip(batch["domain"], batch["targets"], batch["token_mask"], strict=True):
                found[data.domains[int(domain)]] += row[mask].tolist()
        return found

    data = make_blend((1, "pile", PocketPile()), (1, "poems", indexed))
    whole = {
        split: indexed.open(data.data_dir, str(data.data_dir / "tokenizer")).evaluation_tokens(split)[0].tolist()  # type: ignore[index]
        for split in ("validation", "test")
    }
    validated = evaluated(data, data.val_dataloader)
    assert validated["poems"] == whole["validation"] and validated["pile/prose"] and validated["pile/verse"]
    assert evaluated(data, data.test_dataloader) == {"pile/prose": [], "pile/verse": [], "poems": whole["test"]}
    without = make_blend((1, "pile", PocketPile()))
    assert evaluated(without, without.test_dataloader) == evaluated(without, without.val_dataloader)
    assert data.unigram_entropy() > 0 and set(data.xz_bits_per_byte()) == {*data.domains, "all"}


def test_the_start_says_how_often_a_part_is_repeated(
    make_blend: Make, indexed: MegatronIndexed, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_blend(*two(indexed))
    books, poems = (len(tokens) // 32 for tokens in data._opened().training_tokens())
    with caplog.at_level(logging.INFO, "lightning"):
        data.train_dataloader()
    assert caplog.messages == [
        f"blend: books has 70.00% of the samples, used up every {round(books * 32 / 0.7):,} tokens of the blend",
        f"blend: poems has 30.00% of the samples, used up every {round(poems * 32 / 0.3):,} tokens of the blend",
    ]


def test_a_run_on_a_blend_from_training_to_resuming(
    make_data: Callable[..., PileDataModule], indexed: MegatronIndexed, tmp_path: Path
) -> None:
    """As its user would: the losses of the parts are in the logs and the summary, and a resumed run ends where one does."""
    data = make_data()
    parts = [
        {
            "weight": 0.7,
            "name": "pile",
            "corpus": {"class_path": "nlgmoe.data.PocketPile", "init_args": {"domains": ["prose"]}},
        },
        {
            "weight": 0.3,
            "name": "poems",
            "corpus": {
                "class_path": "nlgmoe.data.MegatronIndexed",
                "init_args": {"prefix": str(indexed.prefix), "split": [6, 3, 1]},
            },
        },
    ]
    settings = {
        "model": {
            "config": {
                "vocab_size": data.vocab_size,
                "seq_len": 16,
                "num_layers": 1,
                "hidden_size": 16,
                "num_heads": 2,
            },
            "schedule": {"shape": "constant"},
        },
        "data": {
            "data_dir": str(data.data_dir),
            "tokenizer": str(data.data_dir / "tokenizer"),
            "corpus": {"class_path": "nlgmoe.data.Blend", "init_args": {"parts": parts}},
            "micro_batch_size": 2,
            "max_eval_windows": 3,
        },
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "val_check_interval": 2,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val/blend_loss", "filename": "best", "save_last": True},
                }
            ],
        },
    }
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(settings))

    def fit(run: str, steps: int, *more: str) -> dict[str, Any]:
        folder = tmp_path / run
        config = folder / "config.yaml" if more else tmp_path / "blend.yaml"
        limits = [f"--trainer.default_root_dir={folder}", f"--model.train_tokens={steps * 32}"]
        main(["fit", "--config", str(config), *limits, *more])
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return summary

    straight = fit("straight", 6)
    assert set(straight["bits_per_byte"]) == {"all", "pile", "poems"}
    with (tmp_path / "straight/metrics.csv").open() as file:
        validated = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert len(validated) == 3
    for row in validated:
        pile, poems = (float(row[f"val/loss/{name}"]) for name in ("pile", "poems"))
        assert float(row["val/loss"]) == pytest.approx((pile + poems) / 2, rel=3e-6)  # equally many windows of each
        assert float(row["val/blend_loss"]) == pytest.approx(0.7 * pile + 0.3 * poems, rel=3e-6)
        assert pile != pytest.approx(poems, rel=1e-4)
    fit("halves", 4)
    resumed = fit("halves", 6, "--ckpt_path=last")
    assert (resumed["val_loss"], resumed["bits_per_byte"]) == (straight["val_loss"], straight["bits_per_byte"])


# ---- mistakes


class Other:
    """A corpus that does not mind which tokenizer it is asked for."""

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Nothing to do."""

    def open(self, data_dir: Path, tokenizer: str) -> TokenArrays:
        """Five tokens of another tokenizer."""
        return TokenArrays(small(), ["other"], {"train": [np.zeros(5, int)], "validation": [np.zeros(5, int)]}, {})


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_above_0(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight=.* of the part 'b' must be a number above 0: raise it, or remove"):
        Blend([BlendPart(1, "a", PocketPile()), BlendPart(weight, "b", PocketPile())])


def test_a_weight_that_no_run_comes_to_is_refused() -> None:
    Blend([BlendPart(1e9, "a", PocketPile()), BlendPart(2, "b", PocketPile())])
    with pytest.raises(ValueError, match=r"weight=1e-30 of the part 'b' is less than a billionth of all weights"):
        Blend([BlendPart(1, "a", PocketPile()), BlendPart(1e-30, "b", PocketPile())])


@pytest.mark.parametrize(("weight", "warned"), [(0.01, True), (0.1, False)])
@pytest.mark.parametrize("end", ["train_tokens", "max_steps"])
def test_a_part_that_the_run_does_not_come_to_is_warned_of(
    weight: float, warned: bool, end: str, make_blend: Make, indexed: MegatronIndexed, tmp_path: Path
) -> None:
    data = make_blend((1 - weight, "books", PocketPile(["prose"])), (weight, "poems", indexed))
    module = MoEGPTModule(
        GPTConfig(data.vocab_size, 32, 1, 16, 2), train_tokens=5 * 4 * 32 if end == "train_tokens" else None
    )
    steps = 5 if end == "max_steps" else -1
    trainer = make_trainer(tmp_path, max_steps=steps, max_epochs=-1, enable_checkpointing=False, limit_val_batches=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, data)
    words = "poems has 0.01 of the samples, less than one in the 20 of this run; raise the weight of its part"
    assert any(words in str(one.message) for one in said) == warned


@pytest.mark.parametrize("names", [("a", "a"), ("a", "")])
def test_names_tell_parts_apart(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"name={names[1]} is empty or used twice: losses are logged by it"):
        Blend([BlendPart(1, name, PocketPile()) for name in names])
    with pytest.raises(ValueError, match=r"parts=\[\] is empty: give each corpus as"):
        Blend([])


def test_what_cannot_be_blended_is_named_by_its_part(
    make_blend: Make, indexed: MegatronIndexed, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"In the part 'b' of the blend: .*nowhere\.idx is missing: set `prefix`"):
        make_blend((1, "a", indexed), (1, "b", MegatronIndexed(str(tmp_path / "nowhere"))))
    with pytest.raises(ValueError, match=r"In the part 'b' of the blend: domains=.*no opera; choose from prose, verse"):
        make_blend((1, "a", indexed), (1, "b", PocketPile(["opera"])))
    with pytest.raises(ValueError, match="In the part 'mix' of the blend: In the part 'b' of the blend: domains="):
        make_blend((1, "mix", Blend([BlendPart(1, "b", PocketPile(["opera"]))])))
    with pytest.raises(ValueError, match=r"part 'b' is tokenised with small, 'a' with .*: give .* one tokenizer"):
        make_blend((1, "a", indexed), (1, "b", Other()))
    with pytest.raises(SettingError, match="two domains of the blend are called a/prose; change the name of a part"):
        make_blend((1, "a", PocketPile()), (1, "a/prose", indexed))
    with pytest.raises(ValueError, match="In the part 'a' of the blend: No domain has 5000 tokens to train on"):
        make_blend((1, "a", indexed), seq_len=5000).train_dataloader()

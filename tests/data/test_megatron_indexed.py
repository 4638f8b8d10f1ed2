"""A corpus in Megatron's format, from files to batches and back to its text."""

import lzma
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlgmoe import PileDataModule
from nlgmoe.data import IndexedWriter, MegatronIndexed
from nlgmoe.data.megatron_indexed import split_documents
from nlgmoe.data.text_facts import unigram_entropy, xz_bits_per_byte
from nlgmoe.data.tokenizer_loading import train_byte_level_bpe
from tests.data.conftest import tokens_of

Write = Callable[..., Path]
Open = Callable[..., PileDataModule]


@pytest.fixture
def write(make_data: Callable[..., PileDataModule], tmp_path: Path) -> Write:
    """Writes documents as Megatron's tool does: their ids and the end-of-document token."""
    tokenizer = make_data()._opened().tokenizer

    def write(texts: list[str], extra: tuple[int, ...] = (), name: str = "pile") -> Path:
        prefix = tmp_path / "corpus" / name
        prefix.parent.mkdir(exist_ok=True)
        with IndexedWriter(prefix, np.dtype(np.int32)) as writer:
            for text in texts:
                writer.add_document([*tokenizer.encode(text), *extra, tokenizer.eod_id])
        return prefix

    return write


@pytest.fixture
def open_corpus(tiny_corpus: Path, tmp_path: Path) -> Open:
    def make(prefix: Path, split: Any = (98, 2, 0), **options: Any) -> PileDataModule:
        defaults: dict[str, Any] = {"micro_batch_size": 2, "seq_len": 16}
        corpus = MegatronIndexed(str(prefix), split)
        data = PileDataModule(str(tmp_path / "built"), str(tiny_corpus / "tokenizer"), corpus, **(defaults | options))
        data.prepare_data()
        data.setup()
        return data

    return make


TEXTS = [f"document {number} " + "reading books " * (number % 5 + 1) for number in range(20)]


@pytest.mark.parametrize(
    ("documents", "split", "bounds"),
    [
        (100, (98, 2, 0), [0, 98, 100, 100]),
        (10, (98, 2, 0), [0, 10, 10, 10]),  # 9.8 and 0.2
        (10, (8, 1, 1), [0, 8, 9, 10]),
        (7, (0.5, 0.25, 0.25), [0, 3, 5, 7]),  # 3.5 -> 4, 1.75 -> 2 twice: one too many, taken from the first
        (101, (1, 1, 1), [0, 33, 67, 101]),  # 33.67 -> 34 three times
    ],
)
def test_documents_are_split_as_megatron_rounds(documents: int, split: tuple[float, ...], bounds: list[int]) -> None:
    assert split_documents(documents, split) == bounds


def test_each_split_holds_its_documents(write: Write, open_corpus: Open) -> None:
    data = open_corpus(write(TEXTS), (14, 4, 2))
    assert data.domains == ["pile"]
    found = {
        split: data.decode(list(tokens_of(data, split)[0])).split("<|endoftext|>")[:-1]
        for split in ("train", "validation", "test")
    }
    assert found == {"train": TEXTS[:14], "validation": TEXTS[14:18], "test": TEXTS[18:]}

    def tokens(loader: Any) -> list[int]:
        return [int(token) for batch in loader for token in batch["targets"][batch["token_mask"]]]

    assert tokens(data.test_dataloader()) == tokens_of(data, "test")[0].tolist()
    without = open_corpus(data.corpus.prefix, (16, 4, 0))  # type: ignore[attr-defined]
    assert tokens(without.test_dataloader()) == tokens_of(without, "validation")[0].tolist()
    assert set(data.xz_bits_per_byte()) == {"pile", "all"} and data.unigram_entropy() > 0


def test_a_run_is_resumed_on_a_copy_but_not_on_another_corpus(write: Write, open_corpus: Open, tmp_path: Path) -> None:
    data = open_corpus(write(TEXTS), (16, 4, 0))
    open_corpus(write(TEXTS, name="copy"), (16, 4, 0)).load_state_dict(data.state_dict())
    for other in (
        open_corpus(write(["another " + TEXTS[0], *TEXTS[1:]], name="other"), (16, 4, 0)),
        open_corpus(data.corpus.prefix, (15, 5, 0)),  # type: ignore[attr-defined]
    ):
        with pytest.raises(ValueError, match=r"these differ: corpus\.(idx|training documents) \("):
            other.load_state_dict(data.state_dict())


def test_one_bad_document_is_enough_to_refuse(write: Write, open_corpus: Open) -> None:
    """Two corpora merged, one without --append-eod; a hole of zeros, the end-of-document token of this tokenizer too."""
    prefix = write(["", *TEXTS])  # an empty document is not bad
    open_corpus(prefix, (16, 4, 0))
    tokens = np.memmap(prefix.with_suffix(".bin"), np.int32, mode="r+")
    tokens[-1] = 5
    with pytest.raises(ValueError, match=r"1 of 21 sampled documents .* do not end with .* --append-eod"):
        open_corpus(prefix, (16, 4, 0))
    tokens[-1] = tokens[: len(tokens) // 10] = 0
    with pytest.raises(ValueError, match=r"2 of 21 sampled documents in .* hold end-of-document tokens alone"):
        open_corpus(prefix, (16, 4, 0))
    with pytest.raises(ValueError, match=r"leaves validation none of the 20 documents"):
        open_corpus(write(TEXTS), (1, 0, 0))
    with pytest.raises(ValueError, match=r"nowhere\.idx is missing: set `prefix` of the corpus"):
        open_corpus(prefix.with_name("nowhere"))


def test_an_id_beyond_the_vocabulary_is_found_when_it_is_read(write: Write, open_corpus: Open) -> None:
    """It need not be in a sample that is looked at on opening."""
    prefix = write(TEXTS)
    tokens = np.memmap(prefix.with_suffix(".bin"), np.int32, mode="r+")
    data = open_corpus(prefix, (16, 4, 0))
    size = data.vocab_size
    tokens[-30] = size
    with pytest.raises(ValueError, match=rf"Sample \d+ of pile holds token ids from \d+ to {size}, but .* has {size}"):
        list(data.val_dataloader())
    with pytest.raises(ValueError, match=rf"The corpus holds token ids from \d+ to {size}"):
        data.unigram_entropy()
    tokens[30] = -5
    with pytest.raises(ValueError, match=r"Sample \d+ of pile holds token ids from -5 to"):
        list(islice(data.train_dataloader(), 50))


def test_a_tokenizer_with_as_many_tokens_is_not_the_same(write: Write, open_corpus: Open, tmp_path: Path) -> None:
    """Small ones look alike: their end-of-document token is 0, their bytes the ids behind it."""
    prefix = write([f"{text} quietly" * 20 for text in TEXTS])
    size = open_corpus(prefix, (16, 4, 0)).vocab_size
    other = train_byte_level_bpe(iter([str(number**9) for number in range(400)]), size)
    (tmp_path / "other").mkdir()
    other.save(str(tmp_path / "other" / "tokenizer.json"))
    data = PileDataModule(str(tmp_path), str(tmp_path / "other"), MegatronIndexed(str(prefix), (16, 4, 0)))
    with pytest.raises(ValueError, match=r"holds another tokenizer's ids: \d+% of .* tokenised with .*other: set"):
        data.setup()


def test_the_baselines_of_a_long_corpus_come_from_a_sample(make_data: Callable[..., PileDataModule]) -> None:
    """The sample has the size that was asked for, is spread over the corpus, and gives about what the whole gives."""
    data = make_data()
    train, evaluated = tokens_of(data, "train"), tokens_of(data, "validation")
    whole = unigram_entropy(train, evaluated, data.vocab_size)
    sampled = unigram_entropy(train, evaluated, data.vocab_size, max_tokens=2_000)
    assert sampled != whole and sampled == pytest.approx(whole, rel=0.05)
    halves = [np.concatenate([np.full(5_000, 1), np.full(5_000, 2)])]
    assert unigram_entropy(halves, halves, 3, max_tokens=640) == pytest.approx(np.log(2), rel=0.01)

    tokenizer = data._opened().tokenizer
    text = b""  # as many whole tokens as fit into 200 bytes
    for token in evaluated[0][evaluated[0] != tokenizer.eod_id]:
        spelled = tokenizer.decode([token]).encode()
        if len(text) + len(spelled) > 200:
            break
        text += spelled
    expected = 8 * len(lzma.compress(text, preset=9)) / len(text)
    for limit in (200, len(text)):
        assert xz_bits_per_byte({"prose": evaluated[0]}, tokenizer, limit) == {"prose": expected, "all": expected}
    assert xz_bits_per_byte({"prose": np.array([tokenizer.eod_id] * 2), "code": np.array([], int)}, tokenizer) == {}

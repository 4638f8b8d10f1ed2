"""A corpus in Megatron's format, from files to batches and back to its text."""

import lzma
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlgmoe import PileDataModule
from nlgmoe.data import IndexedWriter, MegatronIndexed
from nlgmoe.data.megatron_indexed import split_documents
from nlgmoe.data.prefix import Sidecar, describe
from nlgmoe.data.samples import EvaluationSource, PackedSource
from nlgmoe.data.tokenizer_loading import train_byte_level_bpe
from nlgmoe.data.tokens import count_tokens, unigram_entropy, xz_bits_per_byte
from tests.support.corpora import tokens_of
from tests.support.documents import evaluated

Write = Callable[..., Path]
Open = Callable[..., PileDataModule]


@pytest.fixture
def write(make_data: Open, tmp_path: Path) -> Write:
    """Writes documents as Megatron's tool does: their ids and the end-of-document token."""
    tokenizer = make_data()._opened().tokenizer

    def write(texts: list[str], name: str = "pile", held_out: int | None = None, **options: Any) -> Path:
        """With `held_out`, as `prepare-data` does: with a sidecar."""
        prefix = tmp_path / "corpus" / name
        prefix.parent.mkdir(exist_ok=True)
        with IndexedWriter(prefix, np.dtype(options.get("dtype", np.int32))) as writer:
            for text in texts:
                writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])
            if held_out is not None:
                writer.sidecar = describe(prefix, tokenizer, options.get("domain"), held_out)
        return prefix

    return write


@pytest.fixture
def open_corpus(tiny_corpus: Path, tmp_path: Path) -> Open:
    def make(prefix: Any, split: Any = (98, 2, 0), **options: Any) -> PileDataModule:
        defaults: dict[str, Any] = {"micro_batch_size": 2, "seq_len": 16, "tokenizer": str(tiny_corpus / "tokenizer")}
        corpus = MegatronIndexed(str(prefix) if isinstance(prefix, Path) else prefix, split)
        data = PileDataModule(str(tmp_path / "built"), corpus=corpus, **(defaults | options))
        data.prepare_data()
        data.setup()
        return data

    return make


def texts_of(data: PileDataModule, split: str) -> list[str]:
    """Documents of the first domain."""
    return data.tokenizer.decode(tokens_of(data, split)[0][:].tolist()).split("<|endoftext|>")[:-1]


TEXTS = [f"document {number} " + "reading books " * (number % 5 + 1) for number in range(20)]


@pytest.mark.parametrize(
    ("documents", "split", "bounds"),
    [
        (100, (98, 2, 0), [0, 98, 100, 100]),
        (7, (0.5, 0.25, 0.25), [0, 3, 5, 7]),  # 3.5 -> 4, 1.75 -> 2 twice: one too many, taken from the first
        (101, (1, 1, 1), [0, 33, 67, 101]),  # 33.67 -> 34 three times
    ],
)
def test_documents_are_split_as_megatron_rounds(documents: int, split: tuple[float, ...], bounds: list[int]) -> None:
    assert split_documents(documents, split) == bounds


def test_splits_hold_their_documents_also_when_resumed(write: Write, open_corpus: Open) -> None:
    data = open_corpus(write(TEXTS), (14, 4, 2))
    assert data.domains == ["pile"]
    for split, expected in {"train": TEXTS[:14], "validation": TEXTS[14:18], "test": TEXTS[18:]}.items():
        assert texts_of(data, split) == expected
    without = open_corpus(data.corpus.prefix, (16, 4, 0))  # type: ignore[attr-defined]
    open_corpus(write(TEXTS, name="copy"), (14, 4, 2)).load_state_dict(data.state_dict())
    for other in (without, open_corpus(write(["another " + TEXTS[0], *TEXTS[1:]], name="other"), (14, 4, 2))):
        with pytest.raises(ValueError, match=r"these differ: corpus\.(idx|training documents) \("):
            other.load_state_dict(data.state_dict())
    for corpus, split in ((data, "test"), (without, "validation")):
        targets = torch.cat([row for _, row in evaluated(corpus, corpus.test_dataloader)])
        assert targets.tolist() == tokens_of(corpus, split)[0][:].tolist()
    assert set(data.xz_bits_per_byte()) == {"pile", "all"} and data.unigram_entropy() > 0


def test_megatron_corpus_is_refused_for_one_bad_document(write: Write, open_corpus: Open) -> None:
    """Two corpora merged, one without --append-eod."""
    prefix = write(["", *TEXTS])  # an empty document is not bad
    open_corpus(prefix, (16, 4, 0))
    tokens = np.memmap(prefix.with_suffix(".bin"), np.int32, mode="r+")
    tokens[-1] = 5
    with pytest.raises(ValueError, match=r"1 of 21 sampled documents .* do not end with .* --append-eod"):
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
    with pytest.raises(
        ValueError, match=r"holds another tokenizer's ids: \d+ of \d+ sampled documents .* tokenised with .*other; set"
    ):
        data.setup()


def test_the_baselines_of_a_long_corpus_come_from_a_sample(make_data: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample has the size that was asked for, and gives about what the whole gives."""
    data = make_data()
    train, evaluated = tokens_of(data, "train"), tokens_of(data, "validation")
    whole = unigram_entropy(train, evaluated, data.vocab_size)
    monkeypatch.setattr("nlgmoe.data.tokens.MAX_TOKENS", 2_000)
    sampled = unigram_entropy(train, evaluated, data.vocab_size)
    assert sampled != whole and sampled == pytest.approx(whole, rel=0.05)
    halves = [np.full(5_000, 1), np.full(5_000, 2)]
    assert count_tokens(halves, 3).tolist() == [0, 1_000, 1_000]

    tokenizer = data._opened().tokenizer
    ids = evaluated[0][evaluated[0] != tokenizer.eod_id]
    fit = int((tokenizer.token_bytes[ids].cumsum() <= 200).sum())  # as many whole tokens as fit into 200 bytes
    text = tokenizer.decode(ids[:fit].tolist()).encode()
    expected = 8 * len(lzma.compress(text, preset=9)) / len(text)
    for limit in (200, len(text)):
        monkeypatch.setattr("nlgmoe.data.tokens.MAX_BYTES", limit)
        assert xz_bits_per_byte({"prose": evaluated[0]}, tokenizer) == {"prose": expected, "all": expected}
    assert xz_bits_per_byte({"prose": np.array([tokenizer.eod_id] * 2), "code": np.array([], int)}, tokenizer) == {}


# ---- sidecars, and many prefixes


def test_prefix_suffices_where_a_sidecar_has_tokenizer_and_split(write: Write, open_corpus: Open) -> None:
    """Tokenizer and documents for validation are the sidecar's; a given split wins, and another tokenizer is refused."""
    prefix = write(TEXTS, held_out=5)
    data = open_corpus(prefix, None, tokenizer=None)
    assert len(texts_of(data, "validation")) == 5
    assert len(tokens_of(open_corpus(prefix, (10, 6, 4)), "test")[0]) > 0
    other = str(Path(__file__).parents[1] / "golden" / "corpus" / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer=.*golden.* is not .*pile's, .*; leave data\.tokenizer out"):
        open_corpus(prefix, None, tokenizer=other)
    with pytest.raises(ValueError, match=r"split=null leaves validation none of the 1 documents"):
        open_corpus(write(TEXTS[:1], held_out=0), None)
    for options in ({"tokenizer": None}, {}):
        with pytest.raises(ValueError, match=r"no bare\.json, .*; set data\.tokenizer to .*, and split"):
            open_corpus(write(TEXTS, "bare"), None, **options)


def test_a_sidecar_that_does_not_fit_is_refused(write: Write, open_corpus: Open) -> None:
    path = write(TEXTS, held_out=5).with_suffix(".json")
    path.write_text(path.read_text().replace('"documents": 20', '"documents": 19'))
    with pytest.raises(ValueError, match=r"describes 19 documents of .*, the \.idx has 20"):
        open_corpus(path.with_suffix(""), None)


def test_prefixes_are_read_as_one_array(
    write: Write, open_corpus: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, their order and evaluation are those of one file with the training documents of all, then those held out."""
    monkeypatch.setattr("nlgmoe.data.tokens.OPEN_FILES", 2)
    parts = [("b", TEXTS[:6], 2, "prose"), ("a", TEXTS[6:9], 1, "prose"), ("c", TEXTS[9:13], 1, "verse")]
    parts.append(("d", TEXTS[13:20], 3, "prose"))
    for name, texts, held_out, domain in parts:
        write(texts, name, held_out, domain=domain)
    words = [str(tmp_path / "corpus" / word) for word in ("b", "[a-c]", "d")]
    with pytest.raises(ValueError, match=r"twice, as .*b and as .*b; name it once"):
        open_corpus(words, None)
    data = open_corpus([words[0], *(str(tmp_path / "corpus" / name) for name in "acd")], None, tokenizer=None)
    assert data.domains == ["prose", "verse"]
    tokenizer = data._opened().tokenizer

    def joined(domain: str, held_out: bool) -> np.ndarray:
        kept = [(texts[-n:] if held_out else texts[:-n]) for _, texts, n, name in parts if name == domain]
        return np.array([i for texts in kept for text in texts for i in [*tokenizer.encode(text), tokenizer.eod_id]])

    wanted = {held_out: [joined(domain, held_out) for domain in data.domains] for held_out in (False, True)}
    source, reference = data._opened().training_source(16, 7), PackedSource(wanted[False], 16, tokenizer.eod_id, 7)
    for index in range(2 * reference.num_windows):
        assert all((source.sample(index)[key] == reference.sample(index)[key]).all() for key in reference.sample(index))  # type: ignore[literal-required]
    evaluation = EvaluationSource(wanted[True], 16, tokenizer.eod_id, None)
    found = [row for batch in data.val_dataloader() for row in batch["targets"].tolist()]
    assert found == [evaluation.sample(index)["targets"].tolist() for index in range(len(evaluation))]
    assert data.token_counts() == np.bincount(np.concatenate(wanted[False]), minlength=data.vocab_size).tolist()
    assert data.unigram_entropy() == unigram_entropy(wanted[False], wanted[True], data.vocab_size)
    evaluated = dict(zip(data.domains, wanted[True], strict=True))
    assert data.xz_bits_per_byte() == xz_bits_per_byte(evaluated, tokenizer)
    state = data.state_dict()
    more = open_corpus([words[0], *(str(tmp_path / "corpus" / name) for name in "ac")], None)
    with pytest.raises(ValueError, match=r"differ: corpus\.prefixes \(saved: 4 of \w+, now: 3 of \w+\)"):
        more.load_state_dict(state)


def test_index_is_checked_as_a_whole_by_one_process_per_node(write: Write, open_corpus: Open) -> None:
    prefix = write(TEXTS, held_out=5)
    data = open_corpus(prefix, None)
    lengths = np.memmap(prefix.with_suffix(".idx"), "<i4", mode="r+", offset=34, shape=20)
    lengths[2:4] += np.array([1, -1], np.int32)
    with pytest.raises(ValueError, match=r"pile\.idx is damaged: sequence 3 has"):
        data.prepare_data()
    data.corpus.open(data.data_dir, data._named_tokenizer())  # headers, sizes and a sample alone: no rank reads it all


def test_prefix_pattern_reads_all_shards_or_names_the_missing_one(
    write: Write, open_corpus: Open, tmp_path: Path
) -> None:
    for number in range(11):
        write(TEXTS[number : number + 2], f"text-{number + 1}-of-11", 1)
    write(TEXTS, "text-else-1-of-1", 0)
    for word in ("text", "text-*-of-11"):
        data = open_corpus(str(tmp_path / "corpus" / word), None, tokenizer=None)
        assert data.domains == ["text"]
        assert texts_of(data, "train") == TEXTS[:11]  # the tenth follows the ninth
    write(TEXTS, "text-3-of-4", 0)
    with pytest.raises(ValueError, match=r"text has shards of 4 and of 11; delete"):
        open_corpus(str(tmp_path / "corpus" / "text"), None)
    for name in ("text-3-of-4", "text-11-of-11"):
        for kind in ("idx", "bin"):
            (tmp_path / "corpus" / f"{name}.{kind}").unlink()
    for word in ("text", "*"):
        with pytest.raises(ValueError, match=r"text-11-of-11\.idx is missing, 10 of 11 shards are there; wait"):
            open_corpus(str(tmp_path / "corpus" / word), None)


def test_prefixes_that_name_one_file_twice_are_refused(write: Write, open_corpus: Open, tmp_path: Path) -> None:
    prefix = write(TEXTS, "a", 2)
    for kind in ("bin", "idx", "json"):
        (tmp_path / f"link.{kind}").symlink_to(f"{prefix}.{kind}")
    for words in ([str(prefix), str(tmp_path / "link")], [str(prefix), str(tmp_path / "corpus" / "*")]):
        with pytest.raises(ValueError, match="prefix names one file twice, as"):
            open_corpus(words, None)


def test_prefixes_that_are_not_one_corpus_are_refused(write: Write, open_corpus: Open, tmp_path: Path) -> None:
    pattern = str(tmp_path / "corpus" / "*")
    bare = [write(TEXTS[:10], "a"), write(TEXTS[10:], "b")]
    assert open_corpus(pattern, (4, 1, 0)).domains == ["corpus"]  # of Megatron's files: the folder
    write(TEXTS, "b", dtype=np.uint16)
    with pytest.raises(ValueError, match=r"prefix=.*b: its tokens are of type uint16, those of .*a of int32"):
        open_corpus(pattern, (4, 1, 0))
    for prefix in bare:
        write(TEXTS, prefix.name, 2)
    sidecar = Sidecar.read(bare[1])
    assert sidecar is not None
    replace(sidecar, fingerprint="0" * 64, tokenizer="other").write(tmp_path / "corpus" / "b.json")
    with pytest.raises(ValueError, match=r"tokenizer=.* is not .*corpus/b's, other \(0{12}\)"):
        open_corpus(pattern, None, tokenizer=None)

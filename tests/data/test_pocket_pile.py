"""The pocket Pile: how it is built, and the real one, in the folder that the quickstart and `make test` use; built if missing."""

import hashlib
import json
import subprocess
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import xxhash

from nlgmoe.commands.prepare_data import prepare_data
from nlgmoe.data import PileDataModule, load_tokenizer, packages, pocket_documents
from nlgmoe.data.pocket_build import GENSIM, SPLITS, open_corpus, text_path, write_corpus
from tests.support.corpora import make_documents, tokens_of

ROOT = Path(__file__).parents[2] / "data" / "pocket_pile"

# Of pocket-4k: number of tokens, and xxh3 of them as uint16. Another token changes every batch, and voids recorded runs.
TOKENS = {
    ("literature", "train"): (3_746_814, "0221f826ade235a3"),
    ("literature", "validation"): (151_052, "66d635f75426a3d5"),
    ("wikipedia", "train"): (914_546, "6a72d509b82146ee"),
    ("wikipedia", "validation"): (38_298, "81e0d7265cf027e3"),
    ("manuals", "train"): (2_812_480, "0ca8df9564cd291a"),
    ("manuals", "validation"): (116_048, "f827907e19020b1c"),
    ("code", "train"): (2_580_741, "c295c381fd3710f8"),
    ("code", "validation"): (117_220, "e96f446a8ef4d8da"),
}
# sha256 of tokens and domains of 50 batches.
BATCHES = "aa16b7badbfb1c84acc8453ea9d0469529ea11a54db6101171cf10aa52c9a95e"


def test_pocket_pile_is_the_one_that_its_manifest_describes() -> None:
    prepare_data(str(ROOT), "pocket-8k")
    manifest = open_corpus(ROOT)
    assert manifest.domains == ["literature", "wikipedia", "manuals", "code"]
    assert (total := sum(file.bytes for file in manifest.files.values())) > 25e6
    texts: dict[str, set[str]] = {}
    for name, file in manifest.files.items():
        assert file.bytes < 0.45 * total
        lines = [json.loads(line) for line in text_path(ROOT, name).open(encoding="utf-8")]
        assert all(line["domain"] == name.split(".")[0] and line["source"] for line in lines)
        texts[name] = {line["text"] for line in lines}
        assert len(texts[name]) == file.documents >= 10
    for domain in manifest.domains:
        train, validation = (texts[f"{domain}.{split}"] for split in SPLITS)
        assert not train & validation
        # Nor paragraphs: long ones of validation that training has seen are a few standard phrases.
        seen = {paragraph for text in train for paragraph in text.split("\n\n")}
        shares = [p in seen for text in validation for p in text.split("\n\n") if len(p) > 200]
        assert sum(shares) < 0.02 * len(shares), domain

    data = PileDataModule(str(ROOT))
    data.prepare_data()
    assert data.vocab_size == 8192
    assert 1 < data.xz_bits_per_byte()["all"] < 4 and 5 < data.unigram_entropy() < 8


def test_tokens_and_batches_are_those_of_recorded_runs(pocket_pile: Path) -> None:
    data = PileDataModule(str(pocket_pile), "pocket-4k")
    data.prepare_data()
    found = {
        (domain, split): (len(tokens), xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tokens[:]).data))
        for split in SPLITS
        for domain, tokens in zip(data.domains, tokens_of(data, split), strict=True)
    }
    assert found == TOKENS
    digest = hashlib.sha256()
    for batch in islice(data.train_dataloader(), 50):
        digest.update(batch["tokens"].numpy().tobytes() + batch["domain"].numpy().tobytes())
    assert digest.hexdigest() == BATCHES


def test_gpt2_tokenizer_has_the_published_ids() -> None:
    tokenizer = load_tokenizer("gpt2", ROOT)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50257, 50256)
    assert tokenizer.eod_id not in tokenizer.encode("<|endoftext|>")


def test_a_package_that_is_not_the_pinned_one_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command  # before pip runs a source archive's code
        (Path(command[command.index("--dest") + 1]) / GENSIM.archive).write_bytes(b"another")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", download)
    with pytest.raises(ValueError, match=GENSIM.archive):
        packages.fetch(GENSIM, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_split_is_by_group_disjoint_and_independent_of_order() -> None:
    documents = make_documents(200, "prose", 5)
    documents = [replace(d, group=f"work {i // 4}") for i, d in enumerate(documents)]
    parts = pocket_documents.split(documents)
    groups = {name: {document.group for document in part} for name, part in parts.items()}
    assert not groups["train"] & groups["validation"]
    assert sorted(d.source for part in parts.values() for d in part) == sorted(d.source for d in documents)
    size = {name: sum(d.num_bytes for d in part) for name, part in parts.items()}
    assert 0.02 < size["validation"] / sum(size.values()) <= pocket_documents.VALIDATION_SHARE
    assert pocket_documents.split(documents[::-1]) == parts
    assert (
        len(pocket_documents.split(make_documents(10, "prose", 5))["validation"])
        == pocket_documents.MIN_VALIDATION_DOCUMENTS
    )
    assert len(pocket_documents.split(make_documents(2, "prose", 5))["train"]) == 1


def test_corpus_is_reproducible_verified_and_never_half_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = make_documents(30, "prose", 1) + make_documents(20, "verse", 2)
    first = write_corpus(tmp_path, "tiny", documents, {})
    assert write_corpus(tmp_path / "again", "tiny", documents, {}) == first == open_corpus(tmp_path)
    line = json.loads(text_path(tmp_path, "verse.train").read_text(encoding="utf-8").splitlines()[0])
    assert set(line) == {"text", "domain", "source"} and line["domain"] == "verse"

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nlgmoe.data.pocket_build._write_jsonl", full_disk)
        with pytest.raises(OSError):
            write_corpus(tmp_path, "tiny", documents[:40], {})
    assert open_corpus(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "manifest.json", "text"]

    with text_path(tmp_path, "verse.train").open("a") as handle:
        handle.write("\n")
    with pytest.raises(ValueError, match=r"verse\.train\.jsonl should have sha256"):
        open_corpus(tmp_path)

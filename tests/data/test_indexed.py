"""Megatron's format, with `megatron-core`'s own builder and reader as the oracle."""

import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlgmoe.data.indexed import DTYPES, IndexedDataset, IndexedWriter, token_dtype
from tests.data.oracles import IndexedDatasetBuilder, MegatronDataset, content

Sequences = list[list[list[int]]]  # documents of sequences of ids


def write_documents(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(np.array(document, int))
    return prefix


def write_with_megatron(prefix: Path, documents: Sequences, dtype: Any) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(np.array([i for s in document for i in s], int), [len(s) for s in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


def as_sequences(dataset: Any) -> Sequences:
    bounds = pairwise(dataset.document_indices.tolist())
    return [[dataset[i].tolist() for i in range(first, end)] for first, end in bounds]


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Any, Sequences]:
    """A token type and documents: of several sequences, of none, of empty ones; ids up to the type's ends."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    info = np.iinfo(dtype)
    sequence = st.lists(st.integers(int(info.min), int(info.max)), max_size=5)
    return dtype, draw(st.lists(st.lists(sequence, max_size=3), max_size=8))


@given(corpora())
def test_indexed_files_are_megatrons_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, corpus: tuple[Any, Sequences]
) -> None:
    folder = tmp_path_factory.mktemp("oracle")
    dtype, documents = corpus
    sequences = [sequence for document in documents for sequence in document]
    ours = write_documents(folder / "ours", sequences, dtype)
    alone = [[sequence] for sequence in sequences]
    assert content(ours) == content(write_with_megatron(folder / "alone", alone, dtype))
    theirs = write_with_megatron(folder / "theirs", documents, dtype)
    dataset = IndexedDataset(theirs)
    assert dataset.dtype == dtype and as_sequences(dataset) == documents
    assert dataset.tokens.tolist() == [i for sequence in sequences for i in sequence]
    starts = [dataset.first_token(document) for document in range(len(documents) + 1)]
    assert np.diff(starts).tolist() == [sum(map(len, document)) for document in documents]
    if len(dataset.tokens):  # megatron-core maps no empty file
        assert as_sequences(MegatronDataset(str(ours))) == alone


def test_indexed_type_follows_the_vocabulary(tmp_path: Path) -> None:
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32
    with pytest.raises(ValueError, match="does not fit"), IndexedWriter(tmp_path / "x", token_dtype(100)) as writer:
        writer.add_document([70_000])
    assert list(tmp_path.iterdir()) == []  # nothing half-written stays


def damaged(start: int, dtype: str, values: list[int]) -> Callable[[bytes], bytes]:
    new = np.array(values, dtype).tobytes()
    return lambda content: content[:start] + new + content[start + len(new) :]


# Of three sequences: 34 bytes of header, lengths from 34, pointers from 46, documents from 70 on.
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("data.bin", lambda content: content[:-2], r"data\.bin has 6 bytes, .*data\.idx says 8"),
        ("data.idx", lambda content: content[:-8], "cut off"),
        ("data.idx", lambda content: b"", "does not start with"),
        ("data.idx", damaged(17, "<u1", [7]), "type code 7; known are version 1 and integers"),
        ("data.idx", damaged(34, "<i4", [2, 1, 1]), "sequence 1 has 1 tokens from byte 6 on, .* end at byte 4"),
        ("data.idx", damaged(34, "<i4", [4, -1, 1]), "sequence 1 has -1 tokens"),
        ("data.idx", damaged(46, "<i8", [0, 6, 0]), "sequence 2 has 1 tokens from byte 0 on, .* at byte 6"),
        ("data.idx", damaged(70, "<i8", [0, 2, 1, 3]), "documents do not rise from sequence 0 to 3"),
        ("data.idx", damaged(70, "<i8", [0, 1, 2, 2]), "documents do not rise"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_indexed_files_that_are_damaged_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Any, message: str, chunk: int
) -> None:
    """However many entries of the index are looked at together."""
    monkeypatch.setattr("nlgmoe.data.indexed.CHUNK", chunk)
    write_documents(tmp_path / "data", [[1, 2, 300], [], [65000]], np.uint16)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "data").check()


def test_indexed_corpus_is_read_in_constant_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 documents have an index of 2 MB; neither writing nor opening it holds a tenth of that."""
    monkeypatch.setattr("nlgmoe.data.indexed.CHUNK", 1 << 10)
    tracemalloc.start()
    try:
        with IndexedWriter(tmp_path / "data", np.dtype(np.uint16)) as writer:
            for _ in range(100_000):
                writer.add_document([])
        (dataset := IndexedDataset(tmp_path / "data")).check()
        assert len(dataset) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 0.2e6
    finally:
        tracemalloc.stop()

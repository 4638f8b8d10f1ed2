from pathlib import Path

import numpy as np
import pytest

from nlgmoe.data.indexed import IndexedDataset, IndexedWriter, token_dtype

DOCUMENTS = [[1, 2, 300], [], [65000]]


def write(prefix: Path) -> Path:
    with IndexedWriter(prefix, token_dtype(65499)) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return prefix


def test_bytes_are_megatrons(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data")
    assert (tmp_path / "data.bin").read_bytes() == np.array([1, 2, 300, 65000], "<u2").tobytes()
    expected = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08"
    expected += (3).to_bytes(8, "little") + (4).to_bytes(8, "little")
    expected += np.array([3, 0, 1], "<i4").tobytes() + np.array([0, 6, 6], "<i8").tobytes()
    expected += np.array([0, 1, 2, 3], "<i8").tobytes()
    assert (tmp_path / "data.idx").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]
    dataset = IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.tokens.tolist() == [1, 2, 300, 65000]


def test_types_follow_the_vocabulary(tmp_path: Path) -> None:
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32
    with pytest.raises(ValueError, match="does not fit"), IndexedWriter(tmp_path / "x", token_dtype(100)) as writer:
        writer.add_document([70_000])
    assert list(tmp_path.iterdir()) == []  # nothing half-written stays


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("data.bin", lambda content: content[:-2], "data.bin has 6 bytes"),
        ("data.bin", lambda content: content + b"\x00\x00", "data.bin has 10 bytes"),
        ("data.idx", lambda content: b"X" + content[1:], "does not start with"),
        ("data.idx", lambda content: content[:9] + b"\x02" + content[10:], "version 2"),
        ("data.idx", lambda content: content[:-8], "cut off"),
        ("data.idx", lambda content: content[:5], "does not start with"),
        ("data.idx", lambda content: content[:46] + b"\xff" + content[47:], "impossible"),
        ("data.bin", None, "data.bin is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "data")
    path = tmp_path / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "data")


def test_nothing_but_empty_documents(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "empty", np.dtype(np.int32)) as writer:
        writer.add_document([])
    assert len(IndexedDataset(tmp_path / "empty")) == 1

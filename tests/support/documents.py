"""Documents in files, and the tokens of documents that a data module evaluates."""

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from torch import Tensor

from nlgmoe import PileDataModule
from tests.support.corpora import WORDS, Ranks

SEQ_LEN = 16


def make_texts(count: int, name: str = "text") -> list[str]:
    return [f"{name} {i}: " + " ".join(WORDS[(i * j) % len(WORDS)] for j in range(i % 11)) for i in range(count)]


def lines(texts: Iterable[str]) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, compressed as its name says; .zst of two frames in a row, which are a file too."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        half = len(content) // 2
        content = b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    if path.suffix != ".parquet":
        return write_bytes(path, b"".join(json.dumps(record).encode() + b"\n" for record in records))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    return path


def write(path: Path, texts: list[str], domains: int = 1) -> Path:
    return write_records(
        path, [{"text": text, "meta": {"name": f"domain {i % domains}"}} for i, text in enumerate(texts)]
    )


def evaluated(
    data: PileDataModule, loader: Callable[[], Any], rank: int = 0, world_size: int = 1
) -> list[tuple[str, Tensor]]:
    """Domain and targets of each window that a rank evaluates, in their order; without padding."""
    data.trainer = Ranks(rank, world_size)  # type: ignore[assignment]
    found = []
    for batch in loader():
        assert batch["padded"] is (not bool(batch["token_mask"].all()))
        for domain, row, mask in zip(batch["domain"], batch["targets"], batch["token_mask"], strict=True):
            found.append((data.domains[int(domain)], row[mask]))
    return found

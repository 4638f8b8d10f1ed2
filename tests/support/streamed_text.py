"""Files of documents to stream."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tests.support.corpora import WORDS

SEQ_LEN = 16


def make_texts(count: int, name: str = "text") -> list[str]:
    return [f"{name} {i}: " + " ".join(WORDS[(i * j) % len(WORDS)] for j in range(i % 11)) for i in range(count)]


def write(path: Path, texts: list[str], domains: int = 1) -> str:
    records = [{"text": text, "meta": {"name": f"domain {i % domains}"}} for i, text in enumerate(texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    else:
        path.write_bytes(zstandard.ZstdCompressor().compress(content) if path.suffix == ".zst" else content)
    return str(path)

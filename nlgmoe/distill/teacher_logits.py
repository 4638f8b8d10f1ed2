"""Recorded teacher logits: at each position the K likeliest next tokens, their log-probabilities, and that of all others.

    FOLDER/header.json       teacher, data and settings of the recording, and a checksum of them
    FOLDER/logits-00000.bin  a record for each of the first training samples, in the order of the run; and so on
    FOLDER/position.json     until the folder is complete: its progress, and the position in the data

    record   checksum        uint64, XXH3 of what follows, seeded with the sample's number
             ids             [T, K] uint16 (uint32 if there are more than 65,536 tokens), the likeliest first
             log_probs       [T, K + 1] float16; the last one is the tail's: the log of all other tokens' probability

T positions of a sample. A token takes K * (2 or 4) + 2 * (K + 1) + 8 / T bytes. A sample's number and the data's fingerprint
determine its tokens, so they are the key. `record_logits.py` writes the folder, `offline_teacher.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from nlgmoe.checkpoint.reading import checksum_of_manifest
from nlgmoe.validation import RunError, SettingError

FORMAT, VERSION = "nlgmoe-teacher-logits", 2
HEADER, POSITION = "header.json", "position.json"
_CHECKSUM_BYTES = 8


class TeacherLogits:
    """A complete folder, memory-mapped. Every record is checked when it is read.

    Args:
        folder: its path.

    Attributes:
        header: the content of `header.json`.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.header = read_header(self._folder)
        if (self._folder / POSITION).exists():
            raise RunError(f"{folder} is not finished; run the command that records it again")
        dtype, self._per_file = record_type(self.header), self.header["samples_per_file"]
        self._files: list[np.ndarray] = []
        for number, first in enumerate(range(0, len(self), self._per_file)):
            path, size = self._folder / file_name(number), min(self._per_file, len(self) - first) * dtype.itemsize
            if not path.is_file() or path.stat().st_size != size:
                problem = f"has {path.stat().st_size:,} bytes, not {size:,}" if path.is_file() else "is missing"
                raise RunError(f"{path} {problem}: it is damaged; delete {folder} and record it again")
            self._files.append(np.memmap(path, dtype, "r"))

    def __len__(self) -> int:
        return int(self.header["samples"])

    def read(self, samples: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first positions of some samples: ids `[B, length, K]`, log-probabilities `[B, length, K + 1]`."""
        if (last := max(samples)) >= len(self):
            raise RunError(
                f"{self._folder} holds {len(self):,} samples, training has come to sample {last:,}; record more, or end "
                "distillation earlier"
            )
        records = np.stack([self._files[sample // self._per_file][sample % self._per_file] for sample in samples])
        for sample, record in zip(samples, records, strict=True):
            if checksum(np.frombuffer(record.tobytes(), np.uint8), sample) != record["checksum"]:
                file = self._folder / file_name(sample // self._per_file)
                raise RunError(
                    f"{file} is damaged (the checksum of sample {sample:,} differs); delete the folder and record it again"
                )
        # contiguous copies: fields of records are strided, which the copy to a device would not take from pinned memory
        ids, log_probs = (np.ascontiguousarray(records[name][:, :length]) for name in ("ids", "log_probs"))
        return ids, log_probs


def file_name(number: int) -> str:
    """Return the name of a file of records."""
    return f"logits-{number:05}.bin"


def read_header(folder: Path) -> dict[str, Any]:
    """Read the `header.json` of a folder."""
    file = folder / HEADER
    if not file.is_file():
        raise SettingError(f"no teacher's logits at {folder}; record them with nlgmoe distill-logits")
    try:
        header = json.loads(file.read_text())
        intact = header["checksum"] == checksum_of_manifest(header)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise RunError(f"{file} is damaged (its checksum differs); delete {folder} and record it again")
    if (header["format"], header["version"]) != (FORMAT, VERSION):
        raise RunError(
            f"{folder} is {header['format']} version {header['version']}; this nlgmoe reads {FORMAT} version {VERSION}"
        )
    assert isinstance(header, dict)
    return header


def record_type(header: dict[str, Any]) -> np.dtype:
    """Return the dtype of a sample's record; `header` has `vocab_size`, `seq_len` and `top_k`."""
    length, top = header["seq_len"], header["top_k"]
    ids = "<u2" if header["vocab_size"] <= 1 << 16 else "<u4"
    return np.dtype(
        [("checksum", "<u8"), ("ids", ids, (length, top)), ("log_probs", "<f2", (length, top + 1))], align=False
    )


def checksum(record: np.ndarray, sample: int) -> int:
    """Compute the checksum of a record's bytes `[N]` uint8, the stored checksum excluded."""
    return xxhash.xxh3_64_intdigest(record[_CHECKSUM_BYTES:].data, seed=sample)

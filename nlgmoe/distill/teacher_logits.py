"""Recorded teacher logits: at each position the K likeliest next tokens, their log-probabilities, and that of all others.

    FOLDER/header.json    teacher, data and settings of the recording
    FOLDER/logits.bin     a record for each of the first training samples, in the order of the run
    FOLDER/position.json  until the folder is complete: its progress, and the position in the data

    record   ids             [T, K] uint16 (uint32 if there are more than 65,536 tokens), the likeliest first
             log_probs       [T, K + 1] float16; the last one is the tail's: the log of all other tokens' probability

T positions of a sample. A token takes K * (2 or 4) + 2 * (K + 1) bytes. A sample's number and the data's fingerprint determine
its tokens, so they are the key. `record_logits.py` writes the folder, `offline_teacher.py` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nlgmoe.checkpoint.reading import read_json
from nlgmoe.validation import RunError, SettingError

FORMAT, VERSION = "nlgmoe-teacher-logits", 3
HEADER, RECORDS, POSITION = "header.json", "logits.bin", "position.json"


class TeacherLogits:
    """A complete folder, memory-mapped.

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
        file, dtype = self._folder / RECORDS, record_type(self.header)
        size = len(self) * dtype.itemsize
        if not file.is_file() or file.stat().st_size != size:
            problem = f"has {file.stat().st_size:,} bytes, not {size:,}" if file.is_file() else "is missing"
            raise RunError(f"{file} {problem}: it is damaged; delete {folder} and record it again")
        self._records = np.memmap(file, dtype, "r")

    def __len__(self) -> int:
        return int(self.header["samples"])

    def read(self, samples: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first positions of some samples: ids `[B, length, K]`, log-probabilities `[B, length, K + 1]`."""
        if (last := max(samples)) >= len(self):
            raise RunError(
                f"{self._folder} holds {len(self):,} samples, training has come to sample {last:,}; record more, or end "
                "distillation earlier"
            )
        records = self._records[list(samples)]
        # contiguous copies: fields of records are strided, which the copy to a device would not take from pinned memory
        ids, log_probs = (np.ascontiguousarray(records[name][:, :length]) for name in ("ids", "log_probs"))
        return ids, log_probs


def read_header(folder: Path) -> dict[str, Any]:
    """Read the `header.json` of a folder."""
    file = folder / HEADER
    if not file.is_file():
        raise SettingError(f"no teacher's logits at {folder}; record them with nlgmoe distill-logits")
    header = read_json(file, f"delete {folder} and record it again")
    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise RunError(
            f"{folder} is {header.get('format')} version {header.get('version')}; this nlgmoe reads {FORMAT} version {VERSION}"
        )
    return header


def record_type(header: dict[str, Any]) -> np.dtype:
    """Return the dtype of a sample's record; `header` has `vocab_size`, `seq_len` and `top_k`."""
    length, top = header["seq_len"], header["top_k"]
    ids = "<u2" if header["vocab_size"] <= 1 << 16 else "<u4"
    return np.dtype([("ids", ids, (length, top)), ("log_probs", "<f2", (length, top + 1))], align=False)

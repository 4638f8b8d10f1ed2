"""Divide the input of a build into N parts, which N processes prepare without knowledge of each other.

All files, in order, are one line of bytes, which is cut into N equal pieces. JSON lines and Parquet are cut with it: a line, or a
row group, belongs to the piece in which it begins. Any other file belongs to the piece in which its middle lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nlgmoe.data.documents import WHOLE
from nlgmoe.data.source_files import JSON_LINES, DataFile, is_local
from nlgmoe.validation import SettingError


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, word: str) -> "Shard":
        """Read I/N.

        Raises:
            SettingError: it is not I/N, or I is not one of 1 to N.
        """
        number, _, count = word.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise SettingError(f"shard={word} is not I/N with I from 1 to N; give 1/4 to 4/4 for four shards")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def prefix(self, prefix: Path) -> Path:
        """Return the prefix of this part of a corpus."""
        return prefix.with_name(f"{prefix.name}-{self.number}-of-{self.count}")

    def spans(self, files: Sequence[DataFile]) -> list[range]:
        """Return which bytes of each file belong to this part: `WHOLE`, or an empty range, for all or none."""
        sizes = [max(1, file.bytes) for file in files]  # 0: empty, or not known
        first, last = (sum(sizes) * number // self.count for number in (self.number - 1, self.number))
        spans, begin = list[range](), 0
        for file, size in zip(files, sizes, strict=True):
            start, stop = max(0, first - begin), min(size, last - begin)
            if not _is_divisible(file.path):
                start, stop = 0, size if first <= begin + size // 2 < last else 0
            spans.append(WHOLE if range(start, stop) == range(size) else range(start, stop))
            begin += size
        return spans


def _is_divisible(path: str) -> bool:
    return path.endswith(".parquet") or (is_local(path) and path.endswith(JSON_LINES))

"""A prefix: the files `PREFIX.bin`, `PREFIX.idx` (`indexed.py`) and `PREFIX.json`, which says what they hold.

Files that Megatron has written have no `PREFIX.json`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from glob import escape, glob, has_magic
from pathlib import Path

from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import BUILT
from nlgmoe.files import write_json
from nlgmoe.validation import RunError, SettingError

FORMAT = 1
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)")  # PREFIX-I-of-N: part I of N of a corpus


@dataclass(frozen=True)
class Sidecar:
    """The content of `PREFIX.json`."""

    tokenizer: str  # a name, or a folder: relative to the prefix's if it is below it, so that both can be moved
    fingerprint: str  # the tokenizer's
    eod_id: int  # id of the end-of-document token, which ends each document
    domain: str  # of all documents
    documents: int  # their number
    held_out: int  # those for validation, the last ones
    tokens: int  # their number, one end-of-document token per document included
    bytes: int  # UTF-8, of the documents' text
    text: str | None = None  # hash of the text; None: not recorded
    xxh3: str | None = None  # hash of `PREFIX.bin`; None: not recorded

    def write(self, path: Path) -> None:
        """Write the file."""
        write_json(path, {"format": FORMAT} | asdict(self))

    @classmethod
    def read(cls, prefix: Path) -> Sidecar | None:
        """Read `PREFIX.json`; None if there is none."""
        path = Path(f"{prefix}.json")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if (number := facts.pop("format")) == FORMAT:
                sidecar = cls(**facts)
                if not 0 <= sidecar.held_out <= sidecar.documents:
                    raise ValueError(f"{sidecar.held_out} of {sidecar.documents} documents are held out")
                return sidecar
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is damaged ({error!r}); write the corpus again") from error
        raise RunError(f"{path} has format {number}, this version reads {FORMAT}; write the corpus again")

    def tokenizer_of(self, prefix: Path) -> str:
        """Return the tokenizer as `load_tokenizer` takes it."""
        return self.tokenizer if self.tokenizer in BUILT else str(prefix.parent / self.tokenizer)

    def check(self, prefix: Path, documents: int, tokens: int, tokenizer: Tokenizer) -> None:
        """Check the counts against those of the other files, and the tokenizer."""
        if (documents, tokens) != (self.documents, self.tokens):
            described = f"{self.documents:,} documents of {self.tokens:,} tokens"
            problem = f"{prefix}.json describes {described}, the .idx has {documents:,} of {tokens:,}"
            remedy = "copy all files of the corpus, or delete the .json and set split and data.tokenizer"
            raise RunError(f"{problem}; {remedy}")
        if tokenizer.fingerprint != self.fingerprint:
            given = f"tokenizer={tokenizer.name} (fingerprint {tokenizer.fingerprint[:12]})"
            problem = f"{given} is not {prefix}'s, {self.tokenizer} ({self.fingerprint[:12]})"
            raise SettingError(f"{problem}; leave data.tokenizer out, or set it to null where a file gives it")


def describe(
    prefix: Path,
    tokenizer: Tokenizer,
    domain: str | None = None,
    held_out: int = 0,
    text_bytes: int = 0,
    text: str | None = None,
) -> Sidecar:
    """Return a sidecar, without the counts that `IndexedWriter` adds; the domain is named after the prefix by default."""
    name = tokenizer.name
    if name not in BUILT:
        folder, home = Path(name).resolve(), prefix.parent.resolve()
        name = str(folder.relative_to(home) if folder.is_relative_to(home) else folder)
    domain = domain or _shard(prefix.name)[0]
    return Sidecar(name, tokenizer.fingerprint, tokenizer.eod_id, domain, 0, held_out, 0, text_bytes, text)


def find_prefixes(given: Sequence[str]) -> list[Path]:
    """Return the prefixes of a corpus in order.

    Args:
        given: each a prefix, a prefix whose files are shards (`PREFIX-1-of-4.idx`, ...), or a pattern such as `data/pile/*`.
    """
    prefix_of_file: dict[str, Path] = {}
    for prefix in (prefix for word in given for prefix in _matching(word)):
        if (other := prefix_of_file.setdefault(os.path.realpath(f"{prefix}.bin"), prefix)) is not prefix:
            raise SettingError(f"prefix names one file twice, as {other} and as {prefix}; name it once")
    return list(prefix_of_file.values())


def _matching(word: str) -> list[Path]:
    if os.path.exists(f"{word}.idx"):
        return [Path(word)]
    pattern = word if has_magic(word) else f"{escape(word)}-*-of-*"
    matches = [(*_shard(name), Path(name)) for file in glob(f"{pattern}.idx") for name in [file.removesuffix(".idx")]]
    if not has_magic(word):
        matches = [(base, number, count, prefix) for base, number, count, prefix in matches if base == word and count]
    if not matches:
        writers = "`nlgmoe prepare-data --input` or Megatron's tools/preprocess_data.py --append-eod"
        raise SettingError(f"{word}.idx is missing: set `prefix` of the corpus to files that {writers} has written.")
    shards: dict[str, dict[int, set[int]]] = {}
    for base, number, count, _ in matches:
        if count:
            shards.setdefault(base, {}).setdefault(count, set()).add(number)
    for base, divisions in shards.items():
        if len(divisions) > 1:
            counts = " and of ".join(map(str, sorted(divisions)))
            raise SettingError(f"prefix={word}: {base} has shards of {counts}; delete those that are not wanted")
        ((count, numbers),) = divisions.items()
        if missing := sorted(set(range(1, count + 1)) - numbers):
            problem = f"{base}-{missing[0]}-of-{count}.idx is missing, {len(numbers)} of {count} shards are there"
            raise SettingError(f"prefix={word}: {problem}; wait for it, or write it again")
    for file in glob(f"{pattern}.bin"):
        if not os.path.exists(index := f"{file.removesuffix('.bin')}.idx"):
            raise SettingError(f"prefix={word}: {index} is missing; wait for it, or write it again, or move {file}")
    return [prefix for *_, prefix in sorted(matches)]


def _shard(name: str) -> tuple[str, int, int]:
    """Return the prefix, I and N of `PREFIX-I-of-N`; of another name itself and zeros."""
    shard = SHARD.fullmatch(name)
    return (shard[1], int(shard[2]), int(shard[3])) if shard else (name, 0, 0)

"""Read a tokenizer from files, or train one. `pocket/tokenizers.py` has those that go by a name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nlgmoe.data.model_files import BESIDE, TOKENIZER, read_beside
from nlgmoe.data.tokenizer import EOD, Tokenizer
from nlgmoe.files import atomic_write
from nlgmoe.validation import RunError


def read_tokenizer(name: str, folder: Path) -> Tokenizer | None:
    """Read the tokenizer.json of a folder, or its vocabulary and merges, and the files beside it; None if there are none.

    Unchanged files are read once: GPT-2's take a second, and each part of a blend reads them.
    """
    files = [folder / TOKENIZER]
    if not files[0].exists():
        files = [folder / "vocab.json", folder / "merges.txt"]
        if not all(file.exists() for file in files):
            return None
    read = [*files, *(file for beside in BESIDE if (file := folder / beside).is_file())]
    return _read_version(name, tuple((file.absolute(), file.stat().st_size, file.stat().st_mtime_ns) for file in read))


@lru_cache(maxsize=4)
def _read_version(name: str, versions: tuple[tuple[Path, int, int], ...]) -> Tokenizer:
    files = [file for file, _, _ in versions if file.name not in BESIDE]
    contents = read_beside(files[0].parent)
    try:
        if len(files) == 1:
            contents[TOKENIZER] = files[0].read_bytes().decode()
            backend = tokenizers.Tokenizer.from_str(contents[TOKENIZER])
        else:  # GPT-2's, whose end-of-document token is a plain entry that no merge produces
            backend = _byte_level(models.BPE.from_file(*map(str, files)))
    except BaseException as error:  # the library raises `Exception` itself, or Rust's panic, without the file's name
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        names = " or ".join(map(str, files))
        raise RunError(f"{names} is damaged or not a tokenizer ({error}); replace it") from error
    return Tokenizer(backend, name, contents)


def train_tokenizer(texts: Iterator[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids, and save it as `folder/tokenizer.json`."""
    backend = train_byte_level_bpe(texts, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "tokenizer.json") as temporary:
        temporary.write_text(backend.to_str(pretty=True), encoding="utf-8")
    return Tokenizer(backend, str(folder))


def train_byte_level_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenisation; `vocab_size` includes the 256 bytes and `EOD` (id 0)."""
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Return a tokenizer with GPT-2's pre-tokenisation."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend

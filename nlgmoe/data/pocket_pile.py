"""`PocketPile`: a corpus in the data folder, text and tokens. `pocket/` builds it on first use.

    data_dir/text/{domain}.{train,validation}.jsonl  one {"text", "domain", "source"} a line, the shape of a Pile file
    data_dir/manifest.json                           sha256, documents and bytes of each file, licences
    data_dir/tokenized/FINGERPRINT/                  of a tokenizer: {domain}.{split}.bin, .idx, and meta.json

A document's sequence is its tokens and the end-of-document token; the .bin is what `packing.py` calls `tokens`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nlgmoe.data.corpus import OpenCorpus, Streams
from nlgmoe.data.description import Description
from nlgmoe.data.indexed import IndexedDataset
from nlgmoe.data.text.bad_data import BadData
from nlgmoe.data.text.documents import read_documents
from nlgmoe.data.text.records import Fields
from nlgmoe.data.tokenizer import Tokenizer, load_tokenizer
from nlgmoe.files import require_regular
from nlgmoe.validation import RunError, SettingError

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TextFile:
    """One split of one domain.

    Args:
        sha256: of the jsonl file.
        documents: number of lines.
        bytes: UTF-8 bytes of the texts alone (not of the JSON around them).
    """

    sha256: str
    documents: int
    bytes: int


@dataclass(frozen=True)
class TokenFile:
    """One split of one domain, tokenised.

    Args:
        text_sha256: of the jsonl file.
        tokens: number of tokens, one end-of-document token per document included.
        documents: number of documents.
        bytes: UTF-8 bytes of the texts.
        xxh3: checksum of the tokens.
    """

    text_sha256: str
    tokens: int
    documents: int
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """Contents of a corpus folder.

    Args:
        name: of the corpus.
        domains: names, in the order of the domain ids.
        files: `{domain}.{split}` -> text file.
        sources: licence of each package.
    """

    name: str
    domains: list[str]
    files: dict[str, TextFile]
    sources: dict[str, str]

    @property
    def total_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(file.bytes for file in self.files.values())


class PocketPile:
    """The corpus in `data_dir`, tokenised there once: the pocket Pile, or one written by `write_corpus`.

    Args:
        domains: names of the domains to read, in this order; None: all.

    Raises:
        ValueError: `domains` is empty, or names one twice.
    """

    def __init__(self, domains: list[str] | None = None) -> None:
        if domains is not None and (not domains or len(set(domains)) < len(domains)):
            raise RunError(f"domains={domains} must name one domain or several, each once; leave it out for all.")
        self._domains = domains

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Build what is missing of text, tokenizer and tokens, of all domains."""
        from nlgmoe.data.pocket.build import prepare  # no other part of training needs the builder

        prepare(data_dir, tokenizer)

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Map the tokens of a tokenizer.

        Raises:
            ValueError: there is no corpus, it is not tokenised with this tokenizer, or it has no such domain.
        """
        manifest = read_manifest(data_dir)
        if manifest is None:
            raise RunError(f"No corpus in {data_dir}: run `nlgmoe prepare-data --data_dir {data_dir}` first.")
        domains = manifest.domains if self._domains is None else self._domains
        if unknown := sorted(set(domains) - set(manifest.domains)):
            raise SettingError(
                f"domains={self._domains}: {data_dir} has no {unknown[0]}; choose from {', '.join(manifest.domains)}."
            )
        loaded = load_tokenizer(tokenizer, data_dir)
        tokenised = read_token_files(data_dir, loaded)
        for name, file in manifest.files.items():
            if name not in tokenised or tokenised[name].text_sha256 != file.sha256:
                raise RunError(
                    f"{name} in {data_dir} is not tokenised with {tokenizer}: run `nlgmoe prepare-data "
                    f"--data_dir {data_dir} --tokenizer {tokenizer}` first."
                )
        folder = token_folder(data_dir, loaded)
        tokens = {
            split: [IndexedDataset(folder / f"{domain}.{split}").tokens for domain in domains] for split in SPLITS
        }
        files = {domain: manifest.files[f"{domain}.train"] for domain in domains}
        fingerprint = hashlib.sha256(" ".join(file.sha256 for file in files.values()).encode()).hexdigest()[:16]
        facts: Description = {
            domain: {"documents": file.documents, "text": file.sha256[:16]} for domain, file in files.items()
        }
        return Streams(loaded, list(domains), tokens, fingerprint, facts)


def read_manifest(root: Path) -> Manifest | None:
    """Return the manifest under `root`, unverified, or None if there is none."""
    path = root / "manifest.json"
    if not path.exists():
        return None
    require_regular(path, "delete it and build the corpus again")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        files = {name: TextFile(**facts) for name, facts in fields["files"].items()}
        return Manifest(fields["name"], fields["domains"], files, fields["sources"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); delete it and build the corpus again") from error


def text_path(root: Path, name: str) -> Path:
    """Return the path of the jsonl file of `{domain}.{split}`."""
    return root / "text" / f"{name}.jsonl"


def read_texts(path: Path) -> Iterator[str]:
    """Yield the texts of a jsonl file."""
    for record in read_documents(path, Fields(), BadData()):
        assert isinstance(record.content, str)
        yield record.content


def token_folder(data_dir: Path, tokenizer: Tokenizer) -> Path:
    """Return the folder of a tokenizer's tokens."""
    return data_dir / "tokenized" / tokenizer.fingerprint[:12]


def read_token_files(data_dir: Path, tokenizer: Tokenizer) -> dict[str, TokenFile]:
    """Return `{domain}.{split}` -> what is tokenised; empty if nothing is."""
    path = token_folder(data_dir, tokenizer) / "meta.json"
    if not path.exists():
        return {}
    try:
        return {name: TokenFile(**facts) for name, facts in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); delete {path.parent} to tokenise again") from error

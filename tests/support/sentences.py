"""One sentence a line: the lines of Markdown prose."""

import re
from collections.abc import Iterator

_ITEM = re.compile(r"(?P<indent> *)(?P<marker>[-*] |\d+\. )")
_BOUNDARY = re.compile(r"""(?<=[.!?])(?P<closing>[)"'*_\]]*) +(?=[("'*\[]*[A-Z`\x00])""")  # \x00: a code span
_ABBREVIATION = re.compile(r"(\b(e\.g|i\.e|vs|cf|al|etc|No|Fig|St)|\b[A-Z]|\.\.)\.$")


def sentences(text: str) -> list[str]:
    """Return the sentences of a paragraph; code spans and addresses are whole."""
    spans: list[str] = []

    def hide(match: re.Match[str]) -> str:
        spans.append(match[0])
        return "\x00" + chr(0xE000 + len(spans) - 1)

    hidden = re.sub(r"`+[^`]+`+", hide, text)
    parts, begin = [], 0
    for match in _BOUNDARY.finditer(hidden):
        if not _ABBREVIATION.search(hidden[begin : match.start()]):
            parts.append(hidden[begin : match.end("closing")])
            begin = match.end()
    parts.append(hidden[begin:])
    return [re.sub(r"\x00(.)", lambda match: spans[ord(match[1]) - 0xE000], part) for part in parts]


def blocks(lines: list[str]) -> Iterator[tuple[bool, list[str]]]:
    """Yield (is prose, lines): paragraphs and items of lists; all else, such as code, tables and headings, line by line."""
    fenced = generated = False
    prose: list[str] = []
    is_code = False  # a paragraph of four spaces or more
    for number, line in enumerate(lines):
        text = line.strip()
        if text.startswith(("```", "~~~")):
            fenced = not fenced
        if text.startswith("<!--") and not text.startswith("<!-- end"):
            generated = text.endswith("-->")
        if text.startswith("<!-- end"):
            generated = False
        blank_before = number == 0 or not lines[number - 1].strip()
        if blank_before and text:
            is_code = line.startswith("    ") and not _ITEM.match(line)
        starts = bool(_ITEM.match(line))
        marked = not text or text[0] in "|#<`~" or text.startswith("![") or line[:3] == "---"
        other = marked or fenced or generated or is_code
        if (other or starts) and prose:
            yield True, prose
            prose = []
        if other:
            yield False, [line]
        else:
            prose.append(line)
    if prose:
        yield True, prose


def one_sentence_a_line(text: str) -> str:
    """Return Markdown with each sentence of its prose on a line of its own."""
    result: list[str] = []
    for is_prose, lines in blocks(text.split("\n")):
        if not is_prose:
            result += lines
            continue
        item = _ITEM.match(lines[0])
        first = item[0] if item else re.match(" *", lines[0])[0]  # type: ignore[index]
        words = " ".join([lines[0][len(first) :].strip(), *(line.strip() for line in lines[1:])])
        one, *more = sentences(words)
        result += [first + one, *(" " * len(first) + sentence for sentence in more)]
    return "\n".join(result)

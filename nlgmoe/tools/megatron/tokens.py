"""The tokens of a launch script: words with their quotes, operators, here-documents."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Literal, NamedTuple

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
REDIRECTIONS = {"&>>", "&>", ">>", ">&", ">|", "<<<", "<<-", "<<", "<&", "<", ">"}
_OPERATOR = re.compile(r"&>>|&>|&&|\|\||\|&|;;|;|>>|>&|>\||<<<|<<-|<<|<&|<|>|&|\||\(|\)|\n")
_OPENERS = {"if", "elif", "then", "else", "while", "until", "do", "!", "{", "for"}  # after these a command begins


class ScriptError(ValueError):
    """A line that is not understood, or not supported.

    Args:
        line: its number, from 1.
        message: what is wrong and what to do.
    """

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def closing(text: str, start: int) -> int:
    r"""Index after the construct that begins at `start`: a quote, backticks, `(...)`, `{...}`, `$(...)`, `${...}`.

    Raises:
        IndexError, ValueError: it does not end.
    """
    opener = text[start]
    if opener == "'":
        return text.index("'", start + 1) + 1
    if opener == "$":
        return closing(text, start + 1)
    closer = {'"': '"', "`": "`", "(": ")", "{": "}"}[opener]
    i = start + 1
    while True:
        char = text[i]  # an IndexError here means that the construct is open at the end
        if char == "\\":
            i += 2
        elif char == closer:
            return i + 1
        elif text.startswith(("$(", "${"), i) or char in ("`", opener) or (char in "'\"" and opener != '"'):
            i = closing(text, i)
        else:
            i += 1


class Token(NamedTuple):
    """A piece of the script: a word, an operator, the inside of `(( ))`, or a here-document's body."""

    kind: Literal["word", "operator", "arithmetic", "document", "literal_document", "end"]
    text: str
    line: int


def tokenize(source: str, first_line: int) -> list[Token]:
    """Cut a script into tokens, closed by one of kind `end`.

    Raises:
        ScriptError: a quote, bracket or here-document is open at the end.
    """
    newlines = [match.start() for match in re.finditer("\n", source)]
    tokens: list[Token] = []
    waiting: list[int] = []  # tokens that are delimiters of here-documents whose bodies come after this line
    i = 0

    def line() -> int:
        return bisect_right(newlines, i - 1) + first_line

    while i < len(source):
        char = source[i]
        if char in " \t\r" or source.startswith("\\\n", i):
            i += 2 if char == "\\" else 1
        elif char == "#":
            i = source.find("\n", i) if "\n" in source[i:] else len(source)
        elif source.startswith("((", i) and _command_begins(tokens):
            end = _end(source, i, line())
            tokens.append(Token("arithmetic", source[i + 2 : end - 2], line()))
            i = end
        elif operator := _OPERATOR.match(source, i):
            tokens.append(Token("operator", operator[0], line()))
            i = operator.end()
            if operator[0] == "\n":
                for index in waiting:
                    delimiter = tokens[index].text
                    word, dash = delimiter.strip("'\"\\"), tokens[index - 1].text == "<<-"
                    body, i = _document(source, i, word, dash, tokens[index].line)
                    literal = word != delimiter
                    tokens[index] = Token("literal_document" if literal else "document", body, tokens[index].line)
                waiting = []
        else:
            start, started = i, line()
            i = _word_end(source, i, started)
            if source[start:i].isdigit() and source[i : i + 1] in ("<", ">"):
                continue  # a file descriptor, part of the redirection that follows
            if tokens and tokens[-1].kind == "operator" and tokens[-1].text in ("<<", "<<-"):
                waiting.append(len(tokens))
            tokens.append(Token("word", source[start:i], started))
    i = len(source)
    tokens.append(Token("operator", "\n", line()))
    tokens.append(Token("end", "the end of the script", line()))
    return tokens


def _command_begins(tokens: list[Token]) -> bool:
    last = tokens[-1] if tokens else None
    return last is None or (last.kind == "operator" and last.text not in REDIRECTIONS) or last.text in _OPENERS


def _end(source: str, start: int, line: int) -> int:
    try:
        return closing(source, start)
    except (IndexError, ValueError):
        raise ScriptError(line, f"`{source[start : start + 20].strip()}` is never closed") from None


def _word_end(source: str, start: int, line: int) -> int:
    i = start
    while i < len(source):
        char = source[i]
        if char == "\\":
            i += 2
        elif char in "'\"`" or source.startswith(("$(", "${"), i):
            i = _end(source, i, line)
        elif char == "(" and ASSIGNMENT.fullmatch(source, start, i):  # an array
            return _end(source, i, line)
        elif char in " \t\r\n;&|<>()":
            break
        else:
            i += 1
    return min(i, len(source))


def _document(source: str, start: int, delimiter: str, dash: bool, line: int) -> tuple[str, int]:
    body: list[str] = []
    for text in source[start:].splitlines(keepends=True):
        start += len(text)
        bare = text.rstrip("\n")
        if (bare.lstrip("\t") if dash else bare) == delimiter:
            return "".join(body), start
        body.append(text)
    raise ScriptError(line, f"the here-document never ends: no line {delimiter!r}")

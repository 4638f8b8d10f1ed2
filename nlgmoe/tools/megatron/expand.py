"""Values of shell words: variables, defaults, integer arithmetic and tests, without running anything.

What cannot be known from the text (a command's output, an environment variable, a file's existence) becomes an
`Unknown`, written into the text as a marker that goes wherever the value goes. It is an error only where a flag that
matters needs it; the error then names the variable at the root. In the same way every `--flag` carries the line it
was written on, through any number of variables.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nlgmoe.tools.megatron.tokens import closing

_UNKNOWN = re.compile("\ue000(\\d+)\ue001")
_LINE = re.compile("\ue002(\\d+)\ue003")
_PARAMETER = re.compile(r"([A-Za-z_]\w*|\d+|[@*#])(\[[^\]]*\])?(:?[-=+?])?(.*)", re.DOTALL)
_ALL_OF = re.compile(r"\$(@|\{(@|\w+\[@\])\})")
_NAME = re.compile(r"[A-Za-z_]\w*|[0-9@*#?$!-]")

Value = str | list[str]


@dataclass
class Unknown:
    """Something the text does not tell.

    Attributes:
        line: where it comes in.
        what: what it is, to be read after "depends on".
        name: the variable whose value would settle it; None where there is no such variable.
    """

    line: int
    what: str
    name: str | None


def with_lines(source: str) -> str:
    """The script with its line number hidden in front of every `--flag`."""
    return "\n".join(
        re.sub(r"(?<![\w-])(?=--[A-Za-z])", f"\ue002{number}\ue003", text)
        for number, text in enumerate(source.split("\n"), start=1)
    )


def plain(text: str) -> str:
    """The text without hidden line numbers."""
    return _LINE.sub("", text)


def line_of(text: str, otherwise: int) -> int:
    """The line hidden in a word."""
    match = _LINE.search(text)
    return int(match[1]) if match else otherwise


class Expander:
    """Knows the variables and gives words their values.

    Attributes:
        variables: name -> text, or list for an array.
        positional: `$1`, `$2`, ...
    """

    def __init__(self) -> None:
        self.variables: dict[str, Value] = {}
        self.positional: list[str] = []
        self._unknowns: list[Unknown] = []

    # ---- what is not known

    def unknown(self, line: int, what: str, name: str | None = None) -> str:
        """The marker of something that is not known."""
        self._unknowns.append(Unknown(line, what, name))
        return f"\ue000{len(self._unknowns) - 1}\ue001"

    def first_unknown(self, text: str) -> Unknown | None:
        """The first thing in a text that is not known."""
        match = _UNKNOWN.search(text)
        return self._unknowns[int(match[1])] if match else None

    def marker(self, text: str) -> str | None:
        """The marker of the first thing in a text that is not known."""
        match = _UNKNOWN.search(text)
        return match[0] if match else None

    def readable(self, text: str) -> str:
        """A text for messages: no hidden line numbers, a variable's name or `?` for what is not known."""

        def named(marker: re.Match[str]) -> str:
            name = self._unknowns[int(marker[1])].name
            return f"${name}" if name else "?"

        return _UNKNOWN.sub(named, plain(text))

    # ---- words

    def text(self, raw: str, line: int) -> str:
        """The value of a word where it is not split, as in an assignment."""
        return "".join(
            " ".join(value) if isinstance(value, list) else value for value, _ in self._parts(raw, line, quoted=False)
        )

    def document(self, raw: str, line: int) -> str:
        """The value of a here-document: quotes mean nothing in it."""
        return self.text('"' + raw.replace('"', '\\"') + '"', line)

    def fields(self, raw: str, line: int) -> list[str]:
        """The words that a word becomes: unquoted values are split at blanks."""
        done: list[str] = []
        open_field: str | None = None
        for value, splits in self._parts(raw, line, quoted=False):
            if isinstance(value, list):  # "${ARRAY[@]}": one field an element
                pieces: Sequence[str] = value
                edges = False
            elif splits:
                pieces = value.split()
                edges = True
            else:
                open_field = (open_field or "") + value
                continue
            if edges and value[:1].isspace() and open_field is not None:  # type: ignore[union-attr]
                done.append(open_field)
                open_field = None
            for index, piece in enumerate(pieces):
                if index and open_field is not None:
                    done.append(open_field)
                    open_field = None
                open_field = (open_field or "") + piece
            if edges and value[-1:].isspace() and open_field is not None:  # type: ignore[union-attr]
                done.append(open_field)
                open_field = None
        return done if open_field is None else [*done, open_field]

    def _parts(self, raw: str, line: int, quoted: bool) -> Iterator[tuple[Value, bool]]:
        """(value, whether it is split at blanks), one after the other."""
        i = 0
        while i < len(raw):
            char = raw[i]
            if char == "\\":
                following = raw[i + 1 : i + 2]
                if following != "\n":
                    keeps = quoted and following not in ('"', "\\", "$", "`")
                    yield ("\\" + following if keeps else following), False
                i += 2
            elif char in "'\"" and not quoted:
                end = closing(raw, i)
                if char == "'":
                    yield raw[i + 1 : end - 1], False
                else:
                    inside = raw[i + 1 : end - 1]
                    if not _ALL_OF.fullmatch(inside):  # an empty string is a word, an empty list is none
                        yield "", False
                    yield from self._parts(inside, line, quoted=True)
                i = end
            elif char == "`":
                end = closing(raw, i)
                yield self._command(raw[i + 1 : end - 1], line), not quoted
                i = end
            elif char == "$" and raw[i + 1 : i + 2] in ("(", "{"):
                end = closing(raw, i)
                if raw.startswith("$((", i) and raw[end - 2 : end] == "))":
                    yield self.arithmetic(raw[i + 3 : end - 2], line), not quoted
                elif raw[i + 1] == "(":
                    yield self._command(raw[i + 2 : end - 1], line), not quoted
                else:
                    yield self._parameter(raw[i + 2 : end - 1], line, quoted), not quoted
                i = end
            elif char == "$" and (name := _NAME.match(raw, i + 1)):
                yield self._parameter(name[0], line, quoted), not quoted
                i = name.end()
            else:
                end = next((at for at in range(i + 1, len(raw)) if raw[at] in "\\'\"`$"), len(raw))
                yield raw[i:end], False
                i = end

    def _command(self, command: str, line: int) -> str:
        """A command's output is not known, but for the folder that relative paths start from."""
        return "." if command.strip() == "pwd" else self.unknown(line, f"the output of `{plain(command).strip()}`")

    def _parameter(self, inside: str, line: int, quoted: bool) -> Value:
        match = _PARAMETER.fullmatch(inside)
        if not match:
            return self.unknown(line, f"`${{{inside}}}`, which is not read here")
        name, index, action, rest = match.groups()
        if rest and not action:
            return self.unknown(line, f"`${{{inside}}}`, which is not read here")
        value = self._lookup(name)
        if index is not None and isinstance(value, list):
            if index in ("[@]", "[*]"):
                return value if index == "[@]" or not quoted else " ".join(value)
            number = self.arithmetic(index[1:-1], line)
            value = value[int(number)] if number.isdigit() and int(number) < len(value) else None
        elif isinstance(value, list):
            value = value if name == "@" else " ".join(value) if name == "*" else (value or [""])[0]
        missing = value is None or (action and action[0] == ":" and value == "")
        kind = action[-1] if action else ""
        if kind == "+":
            return "" if missing else self.text(rest, line)
        if kind in ("-", "=") and missing:
            value = self.text(rest, line)
            if kind == "=":
                self.variables[name] = value
        if value is None:
            return self.unknown(line, f"{name}, which the script does not set", name)
        return value

    def _lookup(self, name: str) -> Value | None:
        if name in self.variables:
            return self.variables[name]
        if name in ("@", "*"):
            return list(self.positional)
        if name == "#":
            return str(len(self.positional))
        if name.isdigit() and 1 <= int(name) <= len(self.positional):
            return self.positional[int(name) - 1]
        return "." if name == "PWD" else None

    # ---- arithmetic

    def arithmetic(self, expression: str, line: int) -> str:
        """The value of `$((expression))` in bash's integers, or the marker of what it hangs on."""
        text = plain(self.text('"' + expression.replace('"', "") + '"', line)).strip()
        if marker := _UNKNOWN.search(text):
            return marker[0]
        try:
            tree = ast.parse(text.replace("&&", " and ").replace("||", " or ") or "0", mode="eval")
            return str(self._evaluate(tree.body, line, depth=0))
        except _NotKnown as hangs:
            return str(hangs)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
            return self.unknown(line, f"the arithmetic `{text}`, which is not read here")

    def _evaluate(self, node: ast.expr, line: int, depth: int) -> int:
        def value(child: ast.expr) -> int:
            return self._evaluate(child, line, depth)

        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return _BINARY[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
            return value(node.operand) if isinstance(node.op, ast.UAdd) else -value(node.operand)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
            return int(_COMPARE[type(node.ops[0])](value(node.left), value(node.comparators[0])))
        if isinstance(node, ast.BoolOp):
            holds = [value(child) != 0 for child in node.values]
            return int(all(holds) if isinstance(node.op, ast.And) else any(holds))
        if isinstance(node, ast.Name) and depth < 10:
            text = self._parameter(node.id, line, quoted=True)
            text = plain(text if isinstance(text, str) else " ".join(text)).strip()
            if marker := _UNKNOWN.search(text):
                raise _NotKnown(marker[0])
            return self._evaluate(ast.parse(text or "0", mode="eval").body, line, depth + 1)
        raise ValueError(ast.dump(node))


class _NotKnown(Exception):
    pass


def _divide(left: int, right: int) -> int:
    """Bash rounds towards zero, Python down."""
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


def _power(base: int, exponent: int) -> int:
    if not 0 <= exponent <= 64:
        raise ValueError(exponent)
    return int(base**exponent)


_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.Mod: lambda left, right: left - right * _divide(left, right),
    ast.Pow: _power,
}
_COMPARE: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}

"""The grammar of a launch script: shell text -> a tree of commands. Nothing is expanded and nothing is run here.

Words stay raw, quotes and dollars included; `expand.py` gives them their values. What the grammar does not cover
(`case`, `select`) is an error that names the line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nlgmoe.tools.megatron.tokens import REDIRECTIONS, ScriptError, Token, tokenize

_UNSUPPORTED = {"case", "select", "coproc"}


@dataclass(frozen=True)
class Command:
    """A simple command or test; a test's operators and `((`'s expression are words too."""

    line: int
    words: list[str]
    redirects: list[tuple[str, str]] = field(default_factory=list)  # (operator, raw target)
    document: str | None = None  # body of a here-document
    document_is_literal: bool = False  # its delimiter was quoted: no expansion


@dataclass(frozen=True)
class Pipeline:
    """`a | b`, perhaps negated."""

    line: int
    commands: list[Node]
    negated: bool = False


@dataclass(frozen=True)
class AndOr:
    """`a && b || c`."""

    line: int
    first: Node
    rest: list[tuple[str, Node]]


@dataclass(frozen=True)
class If:
    """(test, body) for `if` and every `elif`, then the `else`."""

    line: int
    branches: list[tuple[list[Node], list[Node]]]
    otherwise: list[Node]


@dataclass(frozen=True)
class Loop:
    """`for` over words; `words` is None for every other kind of loop."""

    line: int
    variable: str | None
    words: list[str] | None
    body: list[Node]


@dataclass(frozen=True)
class Function:
    """A definition; its body runs when it is called."""

    line: int
    name: str
    body: list[Node]


@dataclass(frozen=True)
class Group:
    """`{ ...; }`, or `( ... )` whose assignments stay inside."""

    line: int
    body: list[Node]
    subshell: bool


Node = Command | Pipeline | AndOr | If | Loop | Function | Group


def parse(source: str, first_line: int = 1) -> list[Node]:
    """Parse a script.

    Args:
        source: its text.
        first_line: number of its first line, for messages.

    Raises:
        ScriptError: a line is not understood.
    """
    return _Parser(tokenize(source, first_line)).statements(until=())


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def take(self) -> Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def is_word(self, *texts: str) -> bool:
        return self.token.kind == "word" and self.token.text in texts

    def is_operator(self, *texts: str) -> bool:
        return self.token.kind == "operator" and self.token.text in texts

    def expect(self, text: str, opened: int) -> None:
        self.skip_separators()
        if self.token.text != text or self.token.kind not in ("word", "operator"):
            raise ScriptError(self.token.line, f"expected `{text}` for line {opened}, not `{self.token.text}`")
        self.take()

    def skip_separators(self) -> None:
        while self.is_operator("\n", ";", "&"):
            self.take()

    def statements(self, until: tuple[str, ...]) -> list[Node]:
        nodes: list[Node] = []
        while True:
            self.skip_separators()
            if self.token.kind == "end" or self.is_word(*until) or (")" in until and self.is_operator(")")):
                return nodes
            nodes.append(self.and_or())

    def and_or(self) -> Node:
        line, first, rest = self.token.line, self.pipeline(), []
        while self.is_operator("&&", "||"):
            operator = self.take().text
            self.skip_separators()
            rest.append((operator, self.pipeline()))
        return AndOr(line, first, rest) if rest else first

    def pipeline(self) -> Node:
        line, negated = self.token.line, False
        while self.is_word("!"):
            self.take()
            negated = not negated
        commands = [self.command()]
        while self.is_operator("|", "|&"):
            self.take()
            self.skip_separators()
            commands.append(self.command())
        return Pipeline(line, commands, negated) if negated or len(commands) > 1 else commands[0]

    def command(self) -> Node:
        line, token = self.token.line, self.token
        node: Node
        if self.is_word(*_UNSUPPORTED):
            raise ScriptError(line, f"`{token.text}` is not read here; write it as `if`, or set its variables directly")
        if self.is_word("if"):
            node = self.if_(line)
        elif self.is_word("for"):
            node = self.for_(line)
        elif self.is_word("while", "until"):
            self.take()
            test = self.statements(until=("do",))
            node = Loop(line, None, None, test + self.do(line))
        elif self.is_word("{") or self.is_operator("("):
            subshell = self.take().text == "("
            end = ")" if subshell else "}"
            node = Group(line, self.statements(until=(end,)), subshell)
            self.expect(end, line)
        elif self.is_word("function") or self.is_function():
            node = self.function(line)
        else:
            return self.simple(line)
        self.redirects()  # of a compound command: nothing that a flag needs
        return node

    def if_(self, line: int) -> If:
        branches, otherwise = [], []
        while self.is_word("if", "elif"):
            self.take()
            test = self.statements(until=("then",))
            self.expect("then", line)
            branches.append((test, self.statements(until=("elif", "else", "fi"))))
        if self.is_word("else"):
            self.take()
            otherwise = self.statements(until=("fi",))
        self.expect("fi", line)
        return If(line, branches, otherwise)

    def for_(self, line: int) -> Loop:
        self.take()
        if self.token.kind == "arithmetic":  # for (( ...; ...; ... ))
            self.take()
            return Loop(line, None, None, self.do(line))
        variable, words = self.take().text, None
        if self.is_word("in"):
            self.take()
            words = []
            while self.token.kind == "word":
                words.append(self.take().text)
        return Loop(line, variable, words, self.do(line))

    def do(self, line: int) -> list[Node]:
        self.expect("do", line)
        body = self.statements(until=("done",))
        self.expect("done", line)
        return body

    def is_function(self) -> bool:
        following = [token.text for token in self.tokens[self.at + 1 : self.at + 3] if token.kind == "operator"]
        return self.token.kind == "word" and following == ["(", ")"]

    def function(self, line: int) -> Function:
        if self.is_word("function"):
            self.take()
        name = self.take().text
        if self.is_operator("("):
            self.take()
            self.expect(")", line)
        self.skip_separators()
        return Function(line, name, [self.command()])

    def redirects(self) -> list[tuple[str, str]]:
        found = []
        while self.token.kind == "operator" and self.token.text in REDIRECTIONS:
            operator = self.take().text
            found.append((operator, self.take().text))
        return found

    def simple(self, line: int) -> Command:
        words: list[str] = []
        redirects: list[tuple[str, str]] = []
        document, literal = None, False
        if self.token.kind == "arithmetic":
            return Command(line, ["((", self.take().text])
        in_test = self.is_word("[[")
        while True:
            token = self.token
            if token.kind == "word":
                words.append(self.take().text)
                if in_test and token.text == "]]":
                    in_test = False
            elif in_test and token.kind == "operator":  # inside [[ ]] operators and newlines are part of the test
                if self.take().text != "\n":
                    words.append(token.text)
            elif token.kind == "operator" and token.text in REDIRECTIONS:
                operator = self.take().text
                if self.token.kind in ("document", "literal_document"):
                    document, literal = self.token.text, self.token.kind == "literal_document"
                redirects.append((operator, self.take().text))
            else:
                break
        if not words and not redirects:
            raise ScriptError(line, f"`{self.token.text.strip() or 'newline'}` is not expected here")
        return Command(line, words, redirects, document, literal)

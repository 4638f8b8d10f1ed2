"""What a simple command does to the variables of a script; external commands do nothing to them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NoReturn

from nlgmoe.tools.megatron.conditions import Verdict, decide
from nlgmoe.tools.megatron.expand import Expander, Value, line_of, plain
from nlgmoe.tools.megatron.launch import Given, Launch, Word
from nlgmoe.tools.megatron.shell import Command, Node, parse
from nlgmoe.tools.megatron.tokens import ASSIGNMENT, ScriptError, closing

ENTRY_POINT = re.compile(r"(.*/)?pretrain_gpt\w*\.py")
_LAUNCHERS = {"deepspeed", "torchrun", "python", "python3", "srun", "mpirun", "mpiexec", "nohup", "numactl", "time"}
SPEAKERS = {"echo", "printf", "cat", "ls", "cp", "tee", "grep", "wc", "chmod"}  # may name the entry point in passing
_DECLARERS = {"export", "declare", "typeset", "local", "readonly"}
READERS = {"read", "mapfile", "readarray", "getopts", "let"}
_SOURCES_OF_ENVIRONMENTS = {"activate", ".bashrc", ".bash_profile", ".profile", "conda.sh", "modules.sh"}
_SUBSTITUTION = re.compile(r"s([/|#,])(.*?)\1(.*)\1[gI]*")


class Stop(Exception):
    """The script ends."""

    def __init__(self, line: int) -> None:
        self.line = line


class Commands(ABC):
    """State of a script that is followed, and the effect of each simple command on it.

    Args:
        fixed: variables whose values are given; the script's own assignments to them have no effect.
    """

    def __init__(self, fixed: dict[str, str]) -> None:
        self.expander = Expander()
        self.expander.variables |= fixed
        self.fixed = fixed
        self.functions: dict[str, list[Node]] = {}
        self.launches: list[Launch] = []
        self.substitutions: dict[str, Given] = {}
        self.documents: dict[str, Given] = {}

    @abstractmethod
    def run(self, nodes: Iterable[Node]) -> Verdict:
        """Follow statements; the exit status of the last as a truth value."""

    def command(self, node: Command) -> Verdict:
        """Follow one simple command."""
        line, words = node.line, list(node.words)
        if node.document is not None:
            self._write_document(node)
        if words and words[0] == "((":
            return self._arithmetic_command(words[1], line)
        assignments = []
        while words and ASSIGNMENT.match(words[0]):
            assignments.append(words.pop(0))
        if not words:
            for word in assignments:
                self._assignment(word, line)
            return True
        if words[0] in ("[", "[[", "test"):
            inside = words[1:] if words[0] == "test" else words[1:-1]
            return decide(self.expander, inside, line)
        if words[0] in _DECLARERS:
            for word in words[1:]:
                if ASSIGNMENT.match(word):
                    self._assignment(word, line)
            return True
        fields = [field for word in words for field in self.expander.fields(word, line)]
        return self._call(fields, line) if fields else True

    def _call(self, fields: list[str], line: int) -> Verdict:
        words = [plain(field) for field in fields]
        name = PurePosixPath(words[0]).name
        if name in ("true", ":", "false"):
            return name != "false"
        if name == "exec":
            return self._call(fields[1:], line) if fields[1:] else True
        if name == "eval":
            return self.run(parse(" ".join(fields[1:]), line))
        if name in ("source", "."):
            self._source(words, line)
        elif name in ("exit", "return"):
            raise Stop(line)
        elif name == "shift" or (name == "set" and "--" in words):
            self._not_read(words, line, "set the variables directly")
        elif name == "unset":
            for variable in words[1:]:
                self.expander.variables.pop(variable, None)
        elif name in READERS or (name == "printf" and "-v" in words):
            self.forget(words[1:], self.expander.unknown(line, f"`{' '.join(words)}`, which is not run"))
        elif name in self.functions:
            kept, self.expander.positional = self.expander.positional, fields[1:]
            self.run(self.functions[name])
            self.expander.positional = kept
        elif name == "sed":
            for word in fields[1:]:
                if match := _SUBSTITUTION.fullmatch(word):
                    self.substitutions[plain(match[2])] = Given(plain(match[3]), line)
        elif any(ENTRY_POINT.search(word) for word in words[1:]) and name not in SPEAKERS:
            self._launch(name, fields, line)
        return True  # of any other command success is assumed: it changes no variable

    def _launch(self, name: str, fields: list[str], line: int) -> None:
        words = [plain(field) for field in fields]
        entry = next((index for index, word in enumerate(words) if ENTRY_POINT.fullmatch(word)), None)
        if entry is None or name not in _LAUNCHERS:
            self._not_read(words, line, "launch pretrain_gpt.py with deepspeed, torchrun, python, srun or mpirun")
        end = next((i for i, word in enumerate(words) if re.fullmatch(r"\d?(&>>?|>>?|>&).*", word)), len(words))
        launcher = [Word(plain(word), line_of(word, line)) for word in fields[:entry]]
        arguments = [Word(plain(word), line_of(word, line)) for word in fields[entry + 1 : end]]
        self.launches.append(
            Launch(line, launcher, arguments, dict(self.expander.variables), self.substitutions, dict(self.documents))
        )

    def _source(self, words: list[str], line: int) -> None:
        if PurePosixPath(words[1]).name not in _SOURCES_OF_ENVIRONMENTS:
            self._not_read(words, line, "put its assignments into this script, or remove the line if it has none")

    def _not_read(self, words: list[str], line: int, remedy: str) -> NoReturn:
        raise ScriptError(line, f"`{self.expander.readable(' '.join(words))[:80]}` is not read here; {remedy}")

    def _arithmetic_command(self, expression: str, line: int) -> Verdict:
        if match := re.match(r"\s*([A-Za-z_]\w*)\s*([-+*/%]?=[^=]|\+\+|--)", plain(expression)):
            self.assign(match[1], self.expander.unknown(line, f"`(({expression}))`, which is not read here"))
            return True
        value = self.expander.arithmetic(expression, line)
        return value if self.expander.first_unknown(value) else value != "0"

    # ---- variables and files

    def _assignment(self, word: str, line: int) -> None:
        match = ASSIGNMENT.match(word)
        assert match
        name, adds, raw = match[1], bool(match[2]), word[match.end() :]
        value: Value
        if raw.startswith("(") and closing(raw, 0) == len(raw):
            value = [f for n in parse(raw[1:-1].replace("\n", " ")) for f in self._array_words(n, line)]
        else:
            value = self.expander.text(raw, line)
        before = self.expander.variables.get(name)
        if adds and before is not None:
            if isinstance(before, list):
                value = before + (value if isinstance(value, list) else [value])
            else:
                value = before + (" ".join(value) if isinstance(value, list) else value)
        self.assign(name, value)

    def _array_words(self, node: Node, line: int) -> list[str]:
        if not isinstance(node, Command):
            raise ScriptError(line, "an array of anything but words is not read here")
        return [field for word in node.words for field in self.expander.fields(word, line)]

    def assign(self, name: str, value: Value) -> None:
        """Give a variable its value, unless that is fixed."""
        if name in self.fixed:
            return
        unknown = self.expander.first_unknown(value if isinstance(value, str) else " ".join(value))
        if unknown and unknown.name is None:
            unknown.name = name  # the variable at the root: the one whose value would settle it
        self.expander.variables[name] = value

    def _write_document(self, node: Command) -> None:
        assert node.document is not None
        body = node.document if node.document_is_literal else self.expander.document(node.document, node.line)
        for operator, target in node.redirects:
            if operator in (">", ">|"):
                self.documents[plain(self.expander.text(target, node.line))] = Given(plain(body), node.line)

    def forget(self, words: list[str], marker: str) -> None:
        """The variables named in the words of `read` and its kind hang on what is behind `marker`."""
        for word in words:
            for variable in re.findall(r"[A-Za-z_]\w*", word.partition("=")[0]):
                self.doubt(variable, marker)

    def doubt(self, variable: str, marker: str) -> None:
        """A variable hangs on what is behind `marker`; on itself where that has no variable that would settle it."""
        reason = self.expander.first_unknown(marker)
        assert reason
        self.assign(variable, marker if reason.name else self.expander.unknown(reason.line, reason.what, variable))

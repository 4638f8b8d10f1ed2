"""A launch script of Megatron-DeepSpeed -> the command it would launch. The script is followed, never run.

The dialect is that of the tutorial's folder: assignments, integer arithmetic, flag lists that grow from string to
string, `if` on simple tests, a DeepSpeed configuration made by `sed` or a here-document, and one launch of
`pretrain_gpt.py`. External commands change no variable, so they are passed over. A branch or loop that cannot be decided
makes the variables it sets unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nlgmoe.tools.megatron.commands import ENTRY_POINT, READERS, SPEAKERS, Commands, Stop
from nlgmoe.tools.megatron.conditions import Verdict
from nlgmoe.tools.megatron.expand import Expander, plain, with_lines
from nlgmoe.tools.megatron.launch import Launch, explain
from nlgmoe.tools.megatron.shell import AndOr, Command, Function, Group, If, Loop, Node, Pipeline, parse
from nlgmoe.tools.megatron.tokens import ASSIGNMENT, ScriptError


def read_launch(source: str, variables: dict[str, str] | None = None) -> tuple[Launch, Expander]:
    """Follow a script to its launch.

    Args:
        source: the script's text.
        variables: values for what the text does not tell; they win over the script's own assignments.

    Returns:
        The launch, and the expander that explains what in it is unknown.

    Raises:
        ScriptError: a line is not understood, or there is not exactly one launch.
    """
    reader = _Reader(variables or {})
    for name in reader.fixed:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise ScriptError(1, f"there is no variable {name} in the script; check the name given with --variables")
    try:
        reader.run(parse(with_lines(source)))
    except Stop as stop:
        if not reader.launches:
            raise ScriptError(stop.line, "the script ends here, before it launches anything") from None
    if not reader.launches:
        raise ScriptError(
            source.count("\n") + 1, "nothing launches pretrain_gpt.py; give the script that calls it through deepspeed"
        )
    if len(reader.launches) > 1:
        first, second = reader.launches[:2]
        raise ScriptError(second.line, f"a second launch after line {first.line}; keep one of them")
    return reader.launches[0], reader.expander


class _Reader(Commands):
    def run(self, nodes: Iterable[Node]) -> Verdict:
        verdict: Verdict = True
        for node in nodes:
            verdict = self.node(node)
        return verdict

    def node(self, node: Node) -> Verdict:
        match node:
            case Command():
                return self.command(node)
            case Pipeline():
                verdict = self.run(node.commands)
                return verdict if isinstance(verdict, str) else verdict != node.negated
            case AndOr():
                return self.and_or(node)
            case If():
                return self.if_(node)
            case Loop():
                return self.loop(node)
            case Function():
                self.functions[node.name] = node.body
                return True
            case Group():
                kept = dict(self.expander.variables)
                verdict = self.run(node.body)
                if node.subshell:
                    self.expander.variables = kept
                return verdict

    def and_or(self, node: AndOr) -> Verdict:
        verdict = self.node(node.first)
        for operator, following in node.rest:
            if isinstance(verdict, str):
                self.undecided([following], verdict)
            elif verdict == (operator == "&&"):
                verdict = self.node(following)
        return verdict

    def if_(self, node: If) -> Verdict:
        for index, (test, body) in enumerate(node.branches):
            verdict = self.run(test) if _is_test(test) else self.outcome(test, node.line)
            if verdict is True:
                return self.run(body)
            if isinstance(verdict, str):
                self.undecided(body, verdict)
                for later_test, later_body in node.branches[index + 1 :]:
                    self.undecided([*later_test, *later_body], verdict)
                self.undecided(node.otherwise, verdict)
                return verdict
        return self.run(node.otherwise)

    def outcome(self, test: list[Node], line: int) -> str:
        """Whether a command succeeds is not known."""
        return self.expander.unknown(line, "a test that runs a command, which is not done here")

    def loop(self, node: Loop) -> Verdict:
        words: list[str] | None = None
        if node.words is not None:
            words = [field for raw in node.words for field in self.expander.fields(raw, node.line)]
        if words is None or any("{" in word or self.expander.first_unknown(word) for word in words):
            marker = self.expander.unknown(node.line, "a loop, which is not followed here")
            self.undecided([node], marker)
            return True
        assert node.variable is not None
        for word in words:
            self.assign(node.variable, word)
            self.run(node.body)
        return True

    def undecided(self, nodes: Iterable[Node], marker: str) -> None:
        """What these commands would set is unknown, for the reason behind `marker`."""
        for node in nodes:
            match node:
                case Command():
                    self.undecided_command(node, marker)
                case Pipeline():
                    self.undecided(node.commands, marker)
                case AndOr():
                    self.undecided([node.first, *(following for _, following in node.rest)], marker)
                case If():
                    for test, body in node.branches:
                        self.undecided([*test, *body], marker)
                    self.undecided(node.otherwise, marker)
                case Loop():
                    if node.variable:
                        self.doubt(node.variable, marker)
                    self.undecided(node.body, marker)
                case Function() | Group():
                    self.undecided(node.body, marker)

    def undecided_command(self, node: Command, marker: str) -> None:
        words = [plain(word) for word in node.words]
        name = words[0] if words else ""
        launches = any(ENTRY_POINT.search(word) for word in words[1:]) and name not in SPEAKERS
        if launches or name in ("eval", "source", ".", "shift"):
            reason = self.expander.first_unknown(marker)
            assert reason
            raise ScriptError(node.line, f"`{' '.join(words)[:60]}` depends on {explain(reason)}")
        for word in words:
            if match := ASSIGNMENT.match(word):
                self.doubt(match[1], marker)
        if name in READERS:
            self.forget(words[1:], marker)
        if name in self.functions:
            self.undecided(self.functions[name], marker)


def _is_test(nodes: list[Node]) -> bool:
    """Whether an `if`'s condition consists of tests alone, so that its outcome can be worked out."""
    for node in nodes:
        parts = (
            [node.first, *(following for _, following in node.rest)]
            if isinstance(node, AndOr)
            else node.commands
            if isinstance(node, Pipeline) and len(node.commands) == 1
            else [node]
        )
        for part in parts:
            inner = part.commands[0] if isinstance(part, Pipeline) and len(part.commands) == 1 else part
            if not isinstance(inner, Command) or inner.words[:1] not in _TESTS:
                return False
    return True


_TESTS = [["["], ["[["], ["test"], ["(("], ["true"], ["false"], [":"]]

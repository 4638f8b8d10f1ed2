"""Whether a test of the shell holds: `[ ... ]`, `[[ ... ]]`, `test ...`."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable

from nlgmoe.tools.megatron.expand import Expander, plain
from nlgmoe.tools.megatron.tokens import ScriptError

Verdict = bool | str  # a string is the marker of the unknown that the test hangs on


def decide(expander: Expander, words: list[str], line: int) -> Verdict:
    """Whether a test, its raw words without the brackets, holds.

    Raises:
        ScriptError: it is not a test.
    """
    condition = _Condition(expander, words, line)
    verdict = condition.any_of()
    if condition.at != len(words):
        raise ScriptError(line, f"the test `{' '.join(map(plain, words))}` is not understood")
    return verdict


class _Condition:
    """Recursive descent over a test's words: or, and, not, comparison."""

    def __init__(self, expander: Expander, words: list[str], line: int) -> None:
        self.expander, self.words, self.line = expander, words, line
        self.at = 0

    def any_of(self) -> Verdict:
        verdict = self.all_of()
        while self.next_is("||", "-o"):
            other = self.all_of()
            verdict = True if True in (verdict, other) else other if verdict is False else verdict
        return verdict

    def all_of(self) -> Verdict:
        verdict = self.one()
        while self.next_is("&&", "-a"):
            other = self.one()
            verdict = False if False in (verdict, other) else other if verdict is True else verdict
        return verdict

    def one(self) -> Verdict:
        if self.next_is("!"):
            verdict = self.one()
            return verdict if isinstance(verdict, str) else not verdict
        if self.next_is("("):
            verdict = self.any_of()
            self.next_is(")")
            return verdict
        left = self.take()
        following = self.words[self.at] if self.at < len(self.words) else ""
        if following in _RELATIONS:
            self.at += 1
            return self.compare(left, following, self.take())
        if following and left in ("-z", "-n"):
            return self.empty(self.take(), left == "-z")
        if following and re.fullmatch("-[a-zA-Z]", left):
            subject = self.expander.readable(self.expander.text(self.take(), self.line))
            return self.expander.unknown(self.line, f"the test `{left} {subject}`, which is not carried out")
        if following in ("=~", "<", ">"):
            self.at += 2
            return self.expander.unknown(self.line, f"a test with `{following}`, which is not read here")
        return self.empty(left, wanted=False)

    def compare(self, left: str, relation: str, right: str) -> Verdict:
        one, other = plain(self.expander.text(left, self.line)), plain(self.expander.text(right, self.line))
        if relation in _NUMBERS:
            one, other = self.expander.arithmetic(one, self.line), self.expander.arithmetic(other, self.line)
        if marker := self.expander.marker(f"{one} {other}"):
            return marker
        if relation in _NUMBERS:
            return _NUMBERS[relation](int(one), int(other))
        matches = fnmatch.fnmatchcase(one, other) if right[:1] not in ("'", '"') else one == other
        return matches != (relation == "!=")

    def empty(self, raw: str, wanted: bool) -> Verdict:
        text = self.expander.text(raw, self.line)
        return self.expander.marker(text) or (text == "") == wanted

    def next_is(self, *words: str) -> bool:
        found = self.at < len(self.words) and self.words[self.at] in words
        self.at += found
        return found

    def take(self) -> str:
        if self.at >= len(self.words):
            raise ScriptError(self.line, f"the test `{' '.join(map(plain, self.words))}` is not understood")
        self.at += 1
        return self.words[self.at - 1]


_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-lt": operator.lt,
    "-le": operator.le,
    "-gt": operator.gt,
    "-ge": operator.ge,
}
_RELATIONS = {*_NUMBERS, "=", "==", "!="}

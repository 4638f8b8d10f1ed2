"""The words of a launch -> values of flags, with every mistake collected instead of the first one raised."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nlgmoe.tools.megatron.expand import Expander
from nlgmoe.tools.megatron.flags import FLAGS, Flag, Row
from nlgmoe.tools.megatron.launch import Launch, Word, explain


@dataclass(frozen=True)
class Problem:
    """What stands in the way of a translation.

    Attributes:
        line: in the script.
        subject: the flag with its values, or the variable.
        message: the reason, a semicolon, the remedy.
    """

    line: int
    subject: str
    message: str


@dataclass(frozen=True)
class Use:
    """A flag as the script gives it."""

    flag: Flag
    row: Row
    values: list[Word]
    line: int
    text: str


class Arguments:
    """The flags of a launch.

    Args:
        launch: the launch.
        expander: explains what is unknown in them.
        skip_unknown: pass over flags that are in no table instead of refusing them.

    Attributes:
        uses: name -> its last use, as Megatron's parser has it.
        problems: what was found wrong; grows while values are asked for.
        skipped: flags in no table, with `skip_unknown`.
        complete: whether all flags are seen; not if a word that is unknown may hold some.
    """

    def __init__(self, launch: Launch, expander: Expander, skip_unknown: bool = False) -> None:
        words = launch.arguments
        self.launch_line = launch.line
        self.expander = expander
        self.uses: dict[str, Use] = {}
        self.problems: list[Problem] = []
        self.skipped: list[str] = []
        self.complete = True
        index = 0
        while index < len(words):
            name, equals, attached = words[index].text.partition("=")
            line = words[index].line
            values = [Word(attached, line)] if equals else []
            index += 1
            while index < len(words) and not _is_flag(words[index].text):
                values.append(words[index])
                index += 1
            self._add(name, values, line, skip_unknown)

    def has(self, *names: str) -> bool:
        """Whether any of the flags is given."""
        return any(name in self.uses for name in names)

    def line(self, name: str) -> int:
        """Where a flag is given; the launch if it is not."""
        return self.uses[name].line if name in self.uses else self.launch_line

    def value(self, name: str) -> Any:
        """A flag's value, Megatron's default where it is not given, None where it is not usable."""
        flag, row = FLAGS[name]
        use = self.uses.get(name)
        if use is None:
            return flag.default
        parsed = [self._parsed(use, value) for value in use.values]
        if None in parsed:
            return None
        if flag.many:
            return parsed
        if flag.allowed and parsed[0] not in flag.allowed:
            allowed = ", ".join(map(str, flag.allowed))
            reason = row.note if row.kind == "refused" else f"only {allowed} can be had here; change it"
            self.refuse(name, reason)
            return None
        return parsed[0]

    def required(self, name: str) -> Any:
        """A flag's value; that it is missing is a problem."""
        if name not in self.uses:
            self.problem(self.launch_line, name, "is not given, and there is no default for it; add it to the script")
            return None
        return self.value(name)

    def problem(self, line: int, subject: str, message: str) -> None:
        """Note what stands in the way, once."""
        problem = Problem(line, subject, message)
        if problem not in self.problems:
            self.problems.append(problem)

    def refuse(self, name: str, message: str) -> None:
        """Note that a flag, as it is given, cannot be had."""
        use = self.uses.get(name)
        self.problem(self.line(name), use.text if use else name, message)

    def _add(self, name: str, values: list[Word], line: int, skip_unknown: bool) -> None:
        text = self.expander.readable(" ".join([name, *(value.text for value in values)]))
        if not name.startswith("-"):
            self._stray(values=[Word(name, line), *values], line=line, text=text)
        elif name not in FLAGS:
            if skip_unknown:
                self.skipped.append(f"{text} (line {line})")
            else:
                self.problem(line, text, "is not known here; remove it, or pass over such flags with --skip-unknown")
        else:
            flag, row = FLAGS[name]
            wanted = "no value" if flag.parse is None else "one value" if not flag.many else "a value"
            fits = len(values) == (flag.parse is not None) if not flag.many else bool(values)
            if not fits:
                self._stray(values, line, text, f"takes {wanted}; correct it")
                return
            self.uses[name] = Use(flag, row, values, line, text)
            if row.kind == "refused" and not flag.allowed:
                self.refuse(name, row.note)
            elif row.kind == "refused" or (row.kind == "ignored" and flag.allowed):
                self.value(name)

    def _stray(self, values: list[Word], line: int, text: str, otherwise: str = "is no flag; remove it") -> None:
        """Words too many: where one is unknown, flags may be in it."""
        unknown = next(filter(None, (self.expander.first_unknown(value.text) for value in values)), None)
        self.complete = self.complete and unknown is None
        self.problem(line, text, f"depends on {explain(unknown)}" if unknown else otherwise)

    def _parsed(self, use: Use, value: Word) -> Any:
        if unknown := self.expander.first_unknown(value.text):
            self.problem(use.line, use.text, f"depends on {explain(unknown)}")
            return None
        assert use.flag.parse is not None
        try:
            return use.flag.parse(value.text)
        except ValueError:
            kind = "an integer" if use.flag.parse.__name__ == "whole" else "a number"
            self.problem(use.line, use.text, f"{value.text!r} is not {kind}; correct it")
            return None


def _is_flag(text: str) -> bool:
    return text.startswith("-") and not re.fullmatch(r"-[\d.]+(e[-+]?\d+)?", text)

"""The words of a launch -> values of flags. Mistakes are collected, so that all are reported at once."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nlgmoe.tools.megatron.flags import FLAGS, Flag, Row


@dataclass(frozen=True)
class Use:
    """A flag with its values, and both as one text."""

    flag: Flag
    row: Row
    values: list[str]
    text: str


class Arguments:
    """The flags of a launch.

    Args:
        words: the flags and their values.
        skip_unknown: pass over flags that are in no table instead of refusing them.

    Attributes:
        uses: name -> its last use, as in argparse.
        problems: reasons why the launch is not translated, `SUBJECT: REASON; REMEDY`; grows while values are asked for.
        skipped: flags in no table, with `skip_unknown`.
    """

    def __init__(self, words: Sequence[str], skip_unknown: bool = False) -> None:
        self.uses: dict[str, Use] = {}
        self.problems: list[str] = []
        self.skipped: list[str] = []
        starts = [index for index, word in enumerate(words) if index == 0 or _is_flag(word)]
        for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
            name, equals, attached = words[start].partition("=")
            self._add(
                name, [attached, *words[start + 1 : end]] if equals else list(words[start + 1 : end]), skip_unknown
            )

    def has(self, *names: str) -> bool:
        """Return True if any of the flags is given."""
        return any(name in self.uses for name in names)

    def value(self, name: str) -> Any:
        """Return a flag's value, Megatron's default where it is not given, None where it is not usable."""
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
            self.refuse(name, row.note if row.kind == "refused" else f"only {allowed} can be had here; change it")
            return None
        return parsed[0]

    def required(self, name: str) -> Any:
        """Return a flag's value; a missing flag is a problem."""
        if name not in self.uses:
            if not any(problem.startswith((f"{name} ", f"{name}:")) for problem in self.problems):
                self.problem(name, "is not given, and there is no default for it; add it")
            return None
        return self.value(name)

    def problem(self, subject: str, message: str) -> None:
        """Add a problem, once."""
        text = f"{subject}: {message}"
        if text not in self.problems:
            self.problems.append(text)

    def refuse(self, name: str, message: str) -> None:
        """Add the problem of a flag."""
        use = self.uses.get(name)
        self.problem(use.text if use else name, message)

    def _add(self, name: str, values: list[str], skip_unknown: bool) -> None:
        text = " ".join([name, *values])
        if not name.startswith("-"):
            self.problem(text, "is no flag; remove it")
            return
        if name not in FLAGS:
            if skip_unknown:
                self.skipped.append(text)
            else:
                self.problem(text, "is not known here; remove it, or pass over such flags with --skip-unknown")
            return
        flag, row = FLAGS[name]
        if flag.parse is None and values:
            self.problem(text, "takes no value; correct it")
        elif flag.parse is not None and not values:
            self.problem(text, "has no value; give it (a script's unset variable is empty: --variables.NAME VALUE)")
        elif len(values) > 1 and not flag.many:
            self.problem(text, "takes one value; correct it")
        else:
            self.uses[name] = Use(flag, row, values, text)
            if row.kind == "refused" and not flag.allowed:
                self.refuse(name, row.note)
            elif row.kind == "refused" or (row.kind == "ignored" and flag.allowed):
                self.value(name)

    def _parsed(self, use: Use, value: str) -> Any:
        assert use.flag.parse is not None
        try:
            parsed = use.flag.parse(value)
        except ValueError:
            kind = "an integer" if use.flag.parse is int else "a number"
            self.problem(use.text, f"{value!r} is not {kind}; correct it")
            return None
        least = use.flag.least
        if isinstance(parsed, int | float) and not least <= parsed < math.inf:  # nor NaN
            self.problem(use.text, f"is not {f'at least {least}' if least else 'a number from 0 on'}; correct it")
            return None
        return parsed


def is_count(text: str) -> bool:
    """Return whether a text is a whole number from 0 on that 64 bits hold."""
    return text.isdecimal() and len(text) < 19


def _is_flag(text: str) -> bool:
    return text.startswith("-") and not re.fullmatch(r"-[\d.]+(e[-+]?\d+)?", text)

"""The table of Megatron-DeepSpeed's flags (`flags.yaml`), the flags of one launch, and the settings that they become.

A flag becomes a setting or is ignored, as the table says; all others are refused as unknown.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nlgmoe.validation import SettingError

IGNORED = "Not needed here"  # a section; the flags of the others become settings
_TYPES = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class Row:
    """Flags that belong together."""

    section: str  # its heading in the table
    flags: Mapping[str, Mapping[str, Any]]  # name of each flag, with its dashes -> the keys that `flags.yaml` explains
    note: str = ""  # a remark


_SECTIONS = yaml.safe_load(Path(__file__).with_name("flags.yaml").read_text(encoding="utf-8"))
TABLE = [
    Row(section, {name: keys or {} for name, keys in entry["flags"].items()}, entry.get("note", ""))
    for section, entries in _SECTIONS.items()
    for entry in entries
]
ROWS = {name: row for row in TABLE for name in row.flags}  # flag -> its row
FLAGS = {name: keys for row in TABLE for name, keys in row.flags.items()}  # flag -> its keys


class Arguments:
    """The flags of a launch, parsed by argparse with the table's names and types."""

    def __init__(self, words: Sequence[str], skip_unknown: bool = False) -> None:
        # Reasons why the launch is not translated, `SUBJECT: REASON; REMEDY`, collected to be reported together.
        self.problems: list[str] = []
        # Flag that is not given -> Megatron's default, where its value was asked for.
        self.defaults: dict[str, Any] = {}
        parser = argparse.ArgumentParser(
            add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
        )
        for name, keys in FLAGS.items():
            if "type" in keys:
                parser.add_argument(name, dest=name, nargs="+" if keys.get("many") else 1)
            else:
                parser.add_argument(name, dest=name, action="store_const", const=[])
        try:
            namespace, self.unknown = parser.parse_known_args(list(words))  # unknown: words of flags not in the table
        except argparse.ArgumentError as error:
            raise SettingError(f"{error.argument_name}: {error.message}; correct it") from error
        self.given: dict[str, list[str]] = vars(namespace)  # flag -> its words; the last use counts
        if self.unknown and not skip_unknown:
            self.add_problem(" ".join(self.unknown), "is unknown; remove it, or skip such flags with --skip-unknown")
        for name, values in self.given.items():
            if values:
                self.value(name)  # adds a problem if it is not a number, or not allowed

    def has(self, *names: str) -> bool:
        """Return True if any of the flags is given."""
        return any(name in self.given for name in names)

    def value(self, name: str) -> Any:
        """Return a flag's value, Megatron's default if it is not given, None if there is none or it is a problem."""
        keys = FLAGS[name]
        if name not in self.given:
            if "default" in keys:
                self.defaults[name] = keys["default"]
            return keys.get("default")
        values = [self._parsed(name, word) for word in self.given[name]]
        if None in values:
            return None
        if keys.get("many"):
            return values
        allowed = keys.get("allowed")
        if allowed and values[0] not in allowed:
            reason = f" ({ROWS[name].note})" if ROWS[name].section == IGNORED else ""
            self.refuse(name, f"only {', '.join(map(str, allowed))} can be translated{reason}; change it")
            return None
        return values[0]

    def required(self, name: str) -> Any:
        """Return a flag's value; a missing flag is a problem."""
        if name not in self.given:
            self.add_problem(name, "is not given, and there is no default for it; add it")
            return None
        return self.value(name)

    def add_problem(self, subject: str, message: str) -> None:
        """Add a problem, unless it is already listed."""
        if (line := f"{subject}: {message}") not in self.problems:
            self.problems.append(line)

    def refuse(self, name: str, message: str) -> None:
        """Add the problem of a flag."""
        self.add_problem(" ".join([name, *self.given.get(name, [])]), message)

    def _parsed(self, name: str, word: str) -> Any:
        keys = FLAGS[name]
        try:
            value = _TYPES[keys["type"]](word)
        except ValueError:
            kind = "an integer" if keys["type"] == "int" else "a number"
            self.refuse(name, f"{word!r} is not {kind}; correct it")
            return None
        least = keys.get("least", 0)
        if isinstance(value, int | float) and not least <= value < math.inf:  # nor NaN
            self.refuse(name, f"is not {f'at least {least}' if least else 'a number from 0 on'}; correct it")
            return None
        return value


class Translation:
    """Settings and notes of a launch; what cannot be translated is added to the problems of its arguments."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.tree: dict[str, Any] = {
            "model": {},
            "data": {},
            "trainer": {},
        }  # nested settings, in the order of the YAML
        self.notes: list[str] = []  # sentences for the header

    @property
    def seq_len(self) -> int | None:
        """Tokens of a sequence; None where that is a problem."""
        value: int | None = self.arguments.required("--seq-length")
        return value

    @property
    def global_batch(self) -> int | None:
        """Sequences a step; None where that is a problem."""
        value: int | None = self.arguments.required("--global-batch-size")
        return value

    @property
    def is_moe(self) -> bool:
        """True if there are MoE layers; `--num-experts 1` means none."""
        return max(self.arguments.value("--num-experts") or [1]) > 1

    def set(self, path: str, value: Any) -> None:
        """Give a setting its value."""
        *sections, name = path.split(".")
        node = self.tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value

    def copy(self, section: str, prefix: str) -> None:
        """Set the settings below `prefix` that take the value of one flag of a section of the table unchanged."""
        for name, keys in FLAGS.items():
            if ROWS[name].section == section and keys.get("setting", "").startswith(prefix):
                has_none = "default" not in keys and not keys.get("optional")
                value = self.arguments.required(name) if has_none else self.arguments.value(name)
                if value is not None:
                    self.set(keys["setting"], value)

    def _note_flags_without_setting(self) -> None:
        """Add notes for flags that have no effect, flags that are not given, and unknown flags."""
        reasons: dict[str, list[str]] = {}
        for name in self.arguments.given:
            if ROWS[name].section == IGNORED:
                reasons.setdefault(ROWS[name].note, []).append(name)
            if ROWS[name].section == "Experts" and name != "--num-experts" and not self.is_moe:
                reasons.setdefault("no effect: the model is dense", []).append(name)
            if ROWS[name].section == "Distillation" and not self.arguments.has("--mos", "--kd"):
                reasons.setdefault("no effect without --mos or --kd", []).append(name)
        self.notes += [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]
        defaults = [f"{name} {value}" for name, value in self.arguments.defaults.items()]
        self.notes.append(f"Not given, so Megatron-DeepSpeed's default: {'; '.join(defaults)}.")
        if self.arguments.unknown:
            self.notes.append(f"NOT TRANSLATED, unknown: {' '.join(self.arguments.unknown)}.")

    def text(self) -> str:
        """Return the YAML file, with the notes as comments."""
        self._note_flags_without_setting()
        lines = [
            "# A launch of Megatron-DeepSpeed, translated by `nlgmoe from-megatron`; docs/coming_from.md explains it.",
            "#   python train.py fit --config THIS_FILE",
        ]
        for note in self.notes:
            lines += textwrap.wrap(note, 120, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
        return "\n".join([*lines, yaml.safe_dump(self.tree, sort_keys=False)])

"""What a parser accepts: the names of its settings, and their types in words."""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from nlgmoe.cli.classes import arguments, check_inside, classes_in, find_class, is_path, is_section, parts_of
from nlgmoe.cli.errors import UsageError
from nlgmoe.cli.given import Given
from nlgmoe.validation import is_finite

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    Path: "a path",
    timedelta: "a duration",
}


class Settings:
    """The settings of one parser.

    Attributes:
        types: dotted name -> type.
        options: dotted name, or `h` and `help` -> whether it takes a value.
        sections: names that hold other settings.
        links: name -> the setting that it always equals.
        sentences: dotted name -> its help.
        positionals: whether there are arguments without a name.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.types: dict[str, Any] = {}
        self.options: dict[str, bool] = {}
        self.links: dict[str, str] = {}
        self.sentences: dict[str, str] = {}
        self.positionals = False
        for action in parser._actions:
            if " --> " in "".join(action.option_strings):
                self.links[action.dest] = action.option_strings[0].partition(" --> ")[0]
                continue
            for option in action.option_strings:
                self.options[option.lstrip("-").rstrip("+")] = action.nargs != 0
            if action.option_strings or not isinstance(action, argparse._SubParsersAction):
                self.positionals |= not action.option_strings
                hint = getattr(action, "_typehint", action.type)
                if isinstance(action, argparse._AppendAction):  # texts as they stand, empty ones and "null" too
                    hint = list[str] | None
                self._add(action.dest, hint, action.help)
        self.sections = {
            ".".join(parts[:end])
            for name in self.types
            for parts in [name.split(".")]
            for end in range(1, len(parts))
            if not name.endswith(".help")
        }

    def _add(self, name: str, hint: Any, sentence: str | None) -> None:
        self.types[name] = hint
        self.sentences[name] = sentence or ""
        for kind in parts_of(hint):
            if is_section(kind) and not name.endswith(".help"):
                for field, field_type in typing.get_type_hints(kind).items():
                    self._add(f"{name}.{field}", field_type, None)

    def names(self) -> list[str]:
        """Every setting that can be given a value, sections and help options aside."""
        return [name for name in self.types if name not in self.sections and not name.endswith(".help")]

    def holder(self, name: str) -> str | None:
        """The setting that `name` lies inside, where that holds classes: `trainer.callbacks` of `trainer.callbacks[0].x`."""
        for known in self.types:
            if name.startswith((f"{known}.", f"{known}[")) and self.bases(known):
                return known
        return None

    def check(self, given: Given, earlier: list[Given]) -> None:
        """Refuse a setting that does not exist, and say which one may have been meant.

        Args:
            given: the setting.
            earlier: settings given before it, which say what class `init_args` belong to.

        Raises:
            UsageError: it does not exist, is a section, names a class that does not exist, or is a number that YAML reads as
                another one.
        """
        name = given.name.rstrip("+")
        # On the command line text stands without quotes, and is taken as it stands.
        if given.misread and (given.origin or self._takes_numbers_alone(given, earlier)):
            raise UsageError(
                f"{name}{given.place}: YAML reads {given.misread} as {yaml.safe_load(given.misread)}; write the number without a "
                "leading 0 and without colons, or text in quotes"
            )
        if name in self.links:
            raise UsageError(f"{name}{given.place} always equals {self.links[name]}; set that instead")
        if holder := self.holder(name):
            if name.endswith(".help"):
                return
            if not is_finite(given.value):
                raise UsageError(f"{given}: must be finite")
            check_inside(given, holder, self.types[holder], earlier)
        elif name in self.sections and not any(is_section(k) for k in parts_of(self.types.get(name))):
            self._check_section(given, name)
        elif self._in_mapping(name):
            return  # `max_time: {hours: 1}`
        elif name not in self.types and name not in self.options:
            near = self._nearest(name)
            hint = f"did you mean {near}?" if near else "--help lists all of them"
            raise UsageError(f"unknown setting {name}{given.place}; {hint}")
        elif given.value is None and not self._takes_null(name):
            raise UsageError(f"{given}: expected {in_words(self.types[name])}")
        for value in given.value if isinstance(given.value, list) else [given.value]:
            if not is_finite(_as_number(value, self.types.get(name))):
                raise UsageError(f"{given}: must be finite")
            if self.bases(name) and is_path(value, dotted=True) and not Path(value).is_file():
                find_class(given, value, ())

    def _nearest(self, name: str) -> str | None:
        """The known name that `name` may stand for: a typing error in its section, or the right name in another one."""
        known = [one for one in (*self.names(), *self.sections) if not name.startswith(f"{one}.")]
        parent, _, leaf = name.rpartition(".")
        for pool in ([one for one in known if one.rpartition(".")[0] == parent], known):
            leaves = sorted({one.rpartition(".")[2] for one in pool})
            for close in difflib.get_close_matches(leaf, leaves, n=1):
                same = [one for one in pool if one.rpartition(".")[2] == close]
                return max(same, key=lambda one: difflib.SequenceMatcher(None, name, one).ratio())
        return None

    def bases(self, name: str) -> list[Any]:
        """The classes whose subclasses a setting holds; empty for a plain one."""
        return classes_in(self.types.get(name))

    def _takes_numbers_alone(self, given: Given, earlier: list[Given]) -> bool:
        hint = self.types.get(given.name.rstrip("+"))
        if holder := self.holder(given.name):
            inside = list(arguments(given, holder, self.types[holder], earlier))
            hint = inside[-1].hint if inside else None
        kinds = set(parts_of(hint))
        return bool(kinds & {int, float}) and not kinds & {str, Path}

    def _takes_null(self, name: str) -> bool:
        hint = self.types.get(name)
        return hint in (None, Any) or any(kind in (type(None), Any) for kind in parts_of(hint))

    def _in_mapping(self, name: str) -> bool:
        parents = (name.rpartition(".")[0], name.rpartition(".")[0].partition("[")[0])
        return any(_is_mapping(self.types[parent]) for parent in parents if parent in self.types)

    def _check_section(self, given: Given, name: str) -> None:
        """A section is a mapping, or the path of a file with one."""
        if given.value == {} or (isinstance(given.value, str) and Path(given.value).is_file()):
            return
        inside = [known for known in self.names() if known.startswith(f"{name}.")]
        raise UsageError(f"{given}: {name} is a section with settings such as {inside[0]}; give those")


def _as_number(value: Any, hint: Any) -> Any:
    """The number for text that a setting of this type takes for one, such as `nan`; anything else as it is."""
    if isinstance(value, str) and any(kind is float or typing.get_origin(kind) is tuple for kind in parts_of(hint)):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _is_mapping(hint: Any) -> bool:
    if hint is Any or hint is dict or typing.get_origin(hint) is dict:
        return True
    return typing.get_origin(hint) in (Union, types.UnionType) and any(map(_is_mapping, typing.get_args(hint)))


def in_words(hint: Any) -> str:
    """A type as its user would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(kind) for kind in arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}: {', '.join(in_words(kind) for kind in arguments)}"
    if origin is dict:
        return "a mapping"
    if origin is not None:
        return f"a list, each item {in_words(arguments[0])}" if arguments else "a list"
    if hint is None:
        return "a value"
    if is_section(hint):
        return "a section of settings"
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)} by class_path")

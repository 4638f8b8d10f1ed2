"""The settings given to `train.py`, checked against those that it takes; one line for each error about them.

Before jsonargparse parses, this refuses unknown names, null, a list in place of a section, and classes that do not exist. When
jsonargparse refuses anything else, each setting is tried by itself, to name the wrong one with its place.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlgmoe.cli import type_hints
from nlgmoe.cli.errors import did_you_mean, one_line
from nlgmoe.cli.yaml_places import Setting, read_arguments, read_value
from nlgmoe.validation import SettingError

_OURS = re.compile(r"(\w+)=(\[[^\]]*\]|\([^)]*\)|[^\s:;,]+)")  # the start of a message of this project


class GivenSettings:
    """The settings of one command line.

    Names are compared without `init_args`, which the command line may leave out: `trainer.callbacks[0].monitor`.
    """

    def __init__(self, parser: ArgumentParser) -> None:
        self.settings: list[Setting] = []
        self._known: dict[str, Any] = {}  # name -> type; grows by the arguments of classes that are named
        # Name of a setting whose value is a section, or of a class that is named -> its arguments without default.
        self._required: dict[str, list[str]] = {}
        for name, hint in type_hints.settings_of_parser(parser)[0].items():
            self._add(name, hint)
        self._of_parser = list(self._known)

    def _add(self, name: str, hint: Any) -> None:
        self._known[name] = hint
        for kind in type_hints.members(hint):
            if type_hints.is_section(kind):
                self._add_arguments(name, kind)

    def _add_arguments(self, name: str, kind: type) -> None:
        """Add the arguments of the class or section that is a setting's value."""
        self._known = {other: hint for other, hint in self._known.items() if not other.startswith(f"{name}.")}
        arguments, self._required[name] = type_hints.settings_of_class(kind)
        for argument, hint in (arguments | {"class_path": str, "init_args": dict, "dict_kwargs": dict}).items():
            self._add(f"{name}.{argument}", hint)

    def read(self, words: Sequence[str]) -> list[str]:
        """Record and check the settings of a command line.

        Returns:
            The words, with `--LIST=[]` before an argument that replaces a list: otherwise jsonargparse would keep arguments of
            the earlier list's items.
        """
        read: list[str] = []
        lists: set[str] = set()
        last = 0
        for index, settings in read_arguments(words):
            new = {item.name.partition("[")[0] for item in settings if "]." in item.name and not item.appends}
            read += [*words[last:index], *(f"--{name}=[]" for name in sorted(new) if _plain(name) in lists)]
            lists |= set(map(_plain, new))
            last = index
            for setting in settings:
                self._check(setting, _plain(setting.name))
                self.settings.append(setting)
        return [*read, *words[last:]]

    def _check(self, setting: Setting, name: str) -> None:
        """Refuse a setting that is unknown, null, no section or no class."""
        if name.endswith("]"):
            self._add(name, type_hints.item_of(self._known.get(name[: name.rindex("[")])))
        elif name not in self._known:
            holder = name
            while holder and holder not in self._known:
                holder = holder.rpartition(".")[0]
            outer = self._known.get(holder)
            if outer is None or holder in self._required or type_hints.SCALARS.issuperset(type_hints.members(outer)):
                raise SettingError(f"unknown setting {setting.name}{setting.place}{self._nearest(setting.name, name)}")
            self._known[name] = Any  # inside a dictionary, or an object of an unknown class
        hint = self._known[name]
        if isinstance(setting.value, str):
            self._name_class(setting, name.removesuffix(".class_path"))
        elif setting.value is None and hint is not None:
            if {Any, object, type(None)}.isdisjoint(type_hints.members(hint)):
                raise SettingError(f"{setting}: null is not accepted here; give a value")
        elif not isinstance(setting.value, dict) and type_hints.is_only_section(hint):
            example = next((other for other in self._known if other.startswith(f"{name}.")), f"{name}.class_path")
            raise SettingError(f"{setting}: it is a section with settings such as {example}; write `name: value`")

    def _name_class(self, setting: Setting, name: str) -> None:
        """Find the class that a setting names, and add its arguments."""
        hint, path = self._known.get(name), setting.value
        bases = type_hints.bases_of(hint)
        if not bases or (str in type_hints.members(hint) and "." not in path):
            return
        self._required.pop(name, None)
        if all(part.isidentifier() for part in path.split(".")) and not Path(path).is_file():
            try:
                kind = type_hints.class_named(path, bases)
            except SettingError as error:
                # a type that is read from text
                if str not in type_hints.members(hint) and type_hints.accepts(hint, setting):
                    return
                raise SettingError(f"{setting}: {error}") from error
            if isinstance(kind, type):
                self._add_arguments(name, kind)

    def _nearest(self, full_name: str, name: str) -> str:
        """Suggest a name of the same section or class, or else any of the parser's."""
        leaf = name.rpartition(".")[2]
        start, written = name.removesuffix(leaf), full_name.removesuffix(leaf)
        inside = {other.removeprefix(start) for other in self._known if other.startswith(start)}
        beside = {other: written + other for other in inside}
        anywhere = {other.rpartition(".")[2]: other for other in self._of_parser}
        close = did_you_mean(leaf, beside, beside) or did_you_mean(leaf, anywhere, anywhere)
        return close or "; --help lists all of them"

    def explain(self, message: str) -> str:
        """Return one line for an error of jsonargparse: a setting that is missing, or one that it refuses by itself."""
        if missing := self._missing():
            return missing
        for setting in reversed(self.settings):  # those inside another one first
            hint = self._known.get(_plain(setting.name))
            if hint not in (None, Any) and not type_hints.accepts(hint, setting):
                return f"{setting}: expected {type_hints.words_of(hint)}"
        return one_line(message.strip().splitlines()[-1])

    def _missing(self) -> str | None:
        for name, required in self._required.items():
            inside = [setting for setting in self.settings if _is_in(setting, name)]
            for argument in required if inside else ():
                if not any(_is_in(setting, f"{name}.{argument}") for setting in inside):
                    place = inside[-1].place
                    return f"missing setting {name}.{argument}{place}; give it in a file, or on the command line"
        return None

    def placed(self, text: str) -> str:
        """Replace `leaf=value` at the start of a message by the setting's full name and place."""
        match = _OURS.match(text)
        leaf, value = match.groups() if match else ("", "")
        for given in reversed(self.settings):
            same = str(given.value) == value or given.value == read_value(value)
            if match and given.name.rpartition(".")[2] == leaf and same:
                return f"{given.name}={value}{given.place}{text[match.end() :]}"
            if not match and given.name.startswith("trainer.") and f"'{given.value}'" in text:  # Lightning's own name
                return f"{given}: {text}"
        names = [name for name in self._known if leaf and name.rpartition(".")[2] == leaf]
        return f"{names[0].rpartition('.')[0]}.{text}".removeprefix(".") if len(names) == 1 else text


def _plain(name: str) -> str:
    return name.replace(".init_args.", ".")


def _is_in(setting: Setting, name: str) -> bool:
    return f"{_plain(setting.name)}.".startswith(f"{name}.")

"""The settings given to `train.py`, checked against those that it takes; one line for each error about them.

Before jsonargparse parses, this refuses unknown names, null, a list in place of a section, and classes that do not exist. When
jsonargparse refuses anything else, each setting is tried by itself, to name the wrong one with its place.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type
from typing_extensions import is_protocol

from nlgmoe.cli.errors import did_you_mean, import_module, one_line
from nlgmoe.cli.yaml_places import Setting, read_arguments, read_value
from nlgmoe.parts import AttentionConfig, ExpertConfig, RotaryScaling, RouterConfig
from nlgmoe.validation import SettingError

_OURS = re.compile(r"(\w+)=(\[[^\]]*\]|\([^)]*\)|[^\s:;,]+)")  # the start of a message of this project


class GivenSettings:
    """The settings of one command line.

    Names are compared without `init_args`, which the command line may leave out: `trainer.callbacks[0].monitor`.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.settings: list[Setting] = []
        self._known: dict[str, Any] = {}  # name -> type; grows by the arguments of classes that are named
        # Name of a setting whose value is a section, or of a class that is named -> its arguments without default.
        self._required: dict[str, list[str]] = {}
        for name, hint in settings_of_parser(parser)[0].items():
            self._add(name, hint)
        self._of_parser = list(self._known)

    def _add(self, name: str, hint: Any) -> None:
        self._known[name] = hint
        for kind in members(hint):
            if is_section(kind):
                self._add_arguments(name, kind)

    def _add_arguments(self, name: str, kind: type) -> None:
        """Add the arguments of the class or section that is a setting's value."""
        self._known = {other: hint for other, hint in self._known.items() if not other.startswith(f"{name}.")}
        arguments, self._required[name] = settings_of_class(kind)
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
            self._add(name, item_of(self._known.get(name[: name.rindex("[")])))
        elif name not in self._known:
            holder = name
            while holder and holder not in self._known:
                holder = holder.rpartition(".")[0]
            outer = self._known.get(holder)
            if outer is None or holder in self._required or SCALARS.issuperset(members(outer)):
                raise SettingError(f"unknown setting {setting.name}{setting.place}{self._nearest(setting.name, name)}")
            self._known[name] = Any  # inside a dictionary, or an object of an unknown class
        hint = self._known[name]
        if isinstance(setting.value, str):
            self._name_class(setting, name.removesuffix(".class_path"))
        elif setting.value is None and hint is not None:
            if {Any, object, type(None)}.isdisjoint(members(hint)):
                raise SettingError(f"{setting}: null is not accepted here; give a value")
        elif not isinstance(setting.value, dict) and is_only_section(hint):
            example = next((other for other in self._known if other.startswith(f"{name}.")), f"{name}.class_path")
            raise SettingError(f"{setting}: it is a section with settings such as {example}; write `name: value`")

    def _name_class(self, setting: Setting, name: str) -> None:
        """Find the class that a setting names, and add its arguments."""
        hint, path = self._known.get(name), setting.value
        bases = bases_of(hint)
        if not bases or (str in members(hint) and "." not in path):
            return
        self._required.pop(name, None)
        if all(part.isidentifier() for part in path.split(".")) and not Path(path).is_file():
            try:
                kind = class_named(path, bases)
            except SettingError as error:
                # a type that is read from text
                if str not in members(hint) and accepts(hint, setting):
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
            if hint not in (None, Any) and not accepts(hint, setting):
                return f"{setting}: expected {words_of(hint)}"
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


# ---- type hints

# dataclasses whose subclasses a configuration names by `class_path`
NAMED_BY_CLASS = (AttentionConfig, RotaryScaling, RouterConfig, ExpertConfig)

SCALARS = {bool, int, float, str, type(None)}


def _duration(text: str) -> timedelta:
    """Read HH:MM:SS, Lightning's DD:HH:MM:SS or Python's `D days, H:MM:SS`."""
    *days, hours, minutes, seconds = text.replace(" days, ", ":").replace(" day, ", ":").split(":")
    return timedelta(int(*days), hours=int(hours), minutes=int(minutes), seconds=float(seconds))


set_parsing_settings(subclasses_enabled=list(NAMED_BY_CLASS))  # else jsonargparse treats these dataclasses as sections
# jsonargparse's own type reads DD:HH:MM:SS as H:MM:SS, and ignores the rest.
register_type(timedelta, deserializer=_duration)
# Defaults of Lightning's `Timer` are members of enumerations, which jsonargparse dumps as they are.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def settings_of_parser(parser: argparse.ArgumentParser) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a parser.

    Returns:
        Name, dotted inside sections -> type hint, None for a section as a whole; and the names without a default.
    """
    options = [(option, action) for action in parser._actions for option in action.option_strings]
    settings = [pair for pair in options if pair[0].startswith("--") and not pair[0].endswith((".help", "+"))]
    actions = {option.removeprefix("--"): action for option, action in settings}
    hints = {name: getattr(action, "_typehint", action.type) for name, action in actions.items()}
    sections = {name for name in hints if any(other.startswith(f"{name}.") for other in hints)}
    hints = {name: None if name in sections else Any if hint is None else hint for name, hint in hints.items()}
    return hints, [name for name, action in actions.items() if action.required]


@functools.cache
def settings_of_class(kind: type) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of a class, those that its `**kwargs` pass on included."""
    parser = ArgumentParser(print_config=None, add_help=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return settings_of_parser(parser)


def members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself: `int | None` -> int, NoneType."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def item_of(hint: Any) -> Any:
    """Return the type of a list's items: `list[int] | None` -> int."""
    lists = [kind for kind in members(hint) if typing.get_origin(kind) in (list, tuple, set, Iterable, Sequence)]
    items = [item for kind in lists for item in typing.get_args(kind) if item is not Ellipsis]
    return typing.Union[tuple(items)] if items else Any  # noqa: UP007 (its members are not known here)


def is_section(kind: Any) -> bool:
    """Return True for a dataclass of settings that no `class_path` names."""
    return inspect.isclass(kind) and dataclasses.is_dataclass(kind) and not issubclass(kind, NAMED_BY_CLASS)


def bases_of(hint: Any) -> list[type]:
    """Return the classes of which a configuration names a subclass by `class_path`; those of a list's items included."""
    kinds = [kind for kind in (*members(hint), *members(item_of(hint))) if inspect.isclass(kind)]
    ours = [kind for kind in kinds if kind.__module__.partition(".")[0] not in sys.stdlib_module_names]
    return [kind for kind in ours if not is_section(kind) and not issubclass(kind, int | float | str)]


def is_only_section(hint: Any) -> bool:
    """Return True if a value of this type is a section or null, and nothing else."""
    return all(kind in (None, type(None)) or is_section(kind) for kind in members(hint))


def words_of(hint: Any) -> str:
    """Return a type as messages name it: `int, list[int], null`."""
    words: list[str] = []
    for kind in members(hint):
        if typing.get_origin(kind) is Literal:
            words += map(str, typing.get_args(kind))
        else:
            name = str(kind) if typing.get_args(kind) else getattr(kind, "__name__", str(kind))
            words.append("null" if kind is type(None) else name.removeprefix("typing."))
    return ", ".join(dict.fromkeys(words))


def accepts(hint: Any, setting: Setting) -> bool:
    """Return True if jsonargparse takes the setting's value for this type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if setting.word is None:
            parser.parse_object({"value": setting.value})
        else:
            parser.parse_args([f"--value={setting.word}"])
    except ArgumentError:
        return False
    return True


def class_named(path: str, bases: list[type]) -> Any:
    """Return the class of a `class_path`: its import path, or the name of an imported subclass of `bases`."""
    by_name = {kind.__name__: kind for base in bases for kind in _subclasses(base)}
    if "." not in path and path not in by_name:
        raise SettingError(f"there is no such class{did_you_mean(path, by_name)}")
    kind: Any = find_class(path) if "." in path else by_name[path]
    if inspect.isclass(kind) and not any(map(is_protocol, bases)) and not issubclass(kind, tuple(bases)):
        raise SettingError(f"it is no {' or '.join(base.__name__ for base in bases)}")
    return kind


def find_class(path: str) -> Any:
    """Import a class."""
    module_name, _, name = path.rpartition(".")
    module = import_module(module_name, "put its file beside train.py or on PYTHONPATH")
    if not hasattr(module, name):
        classes = [other for other in (*getattr(module, "__all__", ()), *vars(module)) if other[:1].isupper()]
        raise SettingError(f"{module_name} has no class {name}{did_you_mean(name, classes)}")
    return getattr(module, name)


def _subclasses(base: Any) -> Iterator[Any]:
    yield base
    for kind in type.__subclasses__(base):
        yield from _subclasses(kind)

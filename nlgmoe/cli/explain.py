"""jsonargparse's errors as one line: the setting, where it is written, what is wrong with it, and near names."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from nlgmoe.cli.config_entries import ConfigEntry
from nlgmoe.cli.errors import UsageError, did_you_mean, one_line
from nlgmoe.parts import ExpertConfig, RouterConfig
from nlgmoe.validation import fits_64_bits

NAMED_BY_CLASS = (RouterConfig, ExpertConfig)  # dataclasses of which a configuration names a subclass
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    Path: "a path",
    timedelta: "a duration such as 00:12:00:00 (12 hours)",
    None: "a value",
    Any: "a value",
}

_NUMBERS = {bool, int, float}

# Parts of jsonargparse's messages. It names settings and classes from the outermost to the innermost.
_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN = re.compile(
    r"unrecognized arguments: (\S+)|Group '([^']+)' does not accept option '(.+?)'|ption '([^']+)'(?: is not accepted|$)"
)
_MISSING = re.compile(r"the following arguments are required: ([^,\n]+)")
_NO_CLASS = re.compile(
    r"class_path '([^']+)':\s+(?:module '\S+' has no attribute|No module named)|Expected a dot import path string: (\S+)"
    r"|Unexpected import path format: (\S+)|Import path (\S+) does not correspond to a subclass of (?P<base>\w+)"
)
_ASSIGNMENT = re.compile(r"(?P<leaf>\w+)=(?P<value>\[[^\]]*\]|\([^)]*\)|\S+)(?P<rest>.*)", re.DOTALL)


class Explainer:
    """Finds the setting that an error is about.

    Args:
        parser: of the command, or of the subcommand that is given.
        entries: the settings that are given; may grow.
    """

    def __init__(self, parser: argparse.ArgumentParser, entries: Sequence[ConfigEntry]) -> None:
        self.entries = entries
        self.known = known_settings(parser)
        self.repeated = {one.dest for one in parser._actions if isinstance(one, argparse._AppendAction)}
        self.help = {action.dest: action.help for action in parser._actions}
        self.positionals = {a.dest: getattr(a, "_typehint", a.type) for a in parser._actions if not a.option_strings}
        self.subcommands = list(subcommands_of(parser))

    def check(self, entry: ConfigEntry) -> None:
        """Refuse a value in place of a section, a number beyond 64 bits, and null: jsonargparse accepts it for every setting.

        Raises:
            UsageError: `entry` is such a one, or is inside a setting that is none of parts.
        """
        if not fits_64_bits(entry.value):
            raise UsageError(f"{entry} has more than 64 bits; give a smaller number")
        if entry.leaf == "init_args" and entry.value is None:
            raise UsageError(f"{entry}: expected settings of the class; leave init_args out if there are none")
        self._check_outer(entry)
        hint = self.known.get(re.sub(r"\[\d+\]$", "", entry.name))  # None: of a section, or of a class's argument
        if entry.value == {} and not any(kind in (None, Any, dict) or is_section(kind) for kind in parts_of(hint)):
            raise UsageError(f"{entry}: expected {in_words(hint)}")
        if inside := self.inside(entry.name):
            if entry.value != {} and not (isinstance(entry.value, str) and os.path.isfile(entry.value)):
                example = next(one for one in inside if not self.inside(one))
                raise UsageError(f"{entry}: {entry.name} is a section with settings such as {example}; give those")
        elif entry.name in self.repeated:  # an option with a text, which may be `null`; in a file a list of them
            if entry.file and not isinstance(entry.value, list | None):
                raise UsageError(f"{entry}: expected {in_words(self.known[entry.name])}")
        elif entry.value is None and not {Any, None, type(None)} & set(parts_of(self.known.get(entry.name))):
            raise UsageError(f"{entry}: expected {in_words(self.known[entry.name])}")

    def _check_outer(self, entry: ConfigEntry) -> None:
        """Check that `entry` is in no list that stands for a section, and in no mapping that stands for a single value."""
        for end in (match.start() for match in re.finditer(r"[.\[]", entry.name)):
            outer, is_list = entry.name[:end], entry.name[end] == "["
            if is_list and (inside := self.inside(outer)):
                raise UsageError(
                    f"{outer}{entry.place}: it is a section with settings such as {inside[0]}, not a list; write them without "
                    "a dash"
                )
            hint = self.known.get(outer, Any)  # of text nothing is known: `runs/a: b` looks like a mapping
            if not is_list and set(parts_of(hint)) <= {*_NUMBERS, type(None)}:
                raise UsageError(f"{outer}{entry.place}: expected {in_words(hint)}, not a mapping")

    def check_nulls(self, value: Any, name: str = "") -> None:
        """Refuse null for an argument of a class of nlgmoe's that takes none.

        Args:
            value: what was parsed, or a part of it.
            name: of that part.

        Raises:
            UsageError: there is one.
        """
        if isinstance(value, list):
            for index, item in enumerate(value):
                self.check_nulls(item, f"{name}[{index}]")
        inner = vars(value) if isinstance(value, argparse.Namespace) else value if isinstance(value, dict) else {}
        arguments = inner.get("init_args")
        if str(inner.get("class_path")).startswith("nlgmoe.") and isinstance(arguments, argparse.Namespace):
            kind = find_class(inner["class_path"])
            hints, parameters = typing.get_type_hints(kind.__init__), inspect.signature(kind).parameters
            for key, given in vars(arguments).items():
                takes_null = key not in parameters or parameters[key].default is None
                if given is not None or takes_null or not set(parts_of(hints.get(key))) <= {*_NUMBERS, str, Path}:
                    continue
                path = f"{name}.init_args.{key}"
                places = [one.place for one in self.entries if one.value is None and _plain(one.name) == _plain(path)]
                raise UsageError(f"{path}=null{places[-1] if places else ''}: expected {in_words(hints[key])}")
        for key, part in inner.items():
            self.check_nulls(part, f"{name}.{key}".lstrip("."))

    def inside(self, name: str) -> list[str]:
        """Return the settings of the section `name`; empty if it is no section, or one that may be null."""
        optional = any(is_section(kind) for kind in parts_of(self.known.get(name)))
        return [] if optional else [one for one in self.known if one.startswith(f"{name}.")]

    def explain(self, message: str) -> str:
        """Put a message of jsonargparse or argparse into one line about one setting."""
        subcommands = ", ".join(self.subcommands)
        if found := re.search(r"^argument subcommand: invalid choice: '(.*?)'", message):
            return f"unknown subcommand {found[1]}{did_you_mean(found[1], self.subcommands)} (one of {subcommands})"
        if "but it was not provided" in message:
            return f"no subcommand; give one of {subcommands}, or --help"
        if found := re.search(r"^argument (?:-\w/)?--(\S+): expected one argument", message):
            return f"--{found[1]} has no value; write --{found[1]}=..., {in_words(self.known.get(found[1]))}"
        if found := re.search(r'^Linked "(.+)" must be given via "(.+)"', message):
            return f"{found[1]}{self._place(found[1])} always equals {found[2]}; set that instead"
        for pattern, explain in ((_UNKNOWN, self._unknown), (_MISSING, self._missing), (_NO_CLASS, self._no_class)):
            if found := pattern.search(message):
                keys, classes = _KEY.findall(message[: found.start()]), _CLASS.findall(message[: found.start()])
                return explain(found, ".".join(keys), classes[-1] if classes else "")
        if keys := _KEY.findall(message):
            return self._wrong_value(keys, _CLASS.findall(message), re.search(r"Got value: (.*)", message))
        return self.qualified(one_line(message))

    def qualified(self, text: str) -> str:
        """Put the setting's full name and place where `text` starts with `leaf=value`."""
        match = _ASSIGNMENT.fullmatch(text)
        if match is None:
            return text
        value = match["value"].rstrip(":;,")
        rest = text.partition("=")[2][len(value) :]
        same = [one for one in self.entries if one.leaf == match["leaf"] and _same(one.value, value)]
        if same := [one for one in same if one.name in self.known] or same:
            entry = same[-1]
            return f"{entry.name}={value}{entry.place}{rest}"
        names = [name for name in self.known if name.rpartition(".")[2] == match["leaf"]]
        return f"{names[0].rpartition('.')[0]}.{text}".removeprefix(".") if len(names) == 1 else text

    def _unknown(self, found: re.Match[str], path: str, owner: str) -> str:
        name = ".".join(filter(None, (path, *found.groups())))
        if found[1] and not found[1].startswith("-"):
            return f"unexpected argument {found[1]}; settings are written --name=value"
        name = name.lstrip("-").partition("=")[0]
        entry = self._find(_plain(name), owner)
        shown, place = (entry.name, entry.place) if entry else (name, "")
        if before := re.search(r"before subcommand '(.*)'", found.string):
            return f"unknown setting {shown}{place}; settings stand behind `{before[1]}`"
        if place and re.match(r"(model|data|trainer|seed_everything)\b", shown) and "model" not in self.known:
            return (
                f"unknown setting {shown}{place}; --config takes this command's options, not the settings of train.py"
            )
        if not owner:
            return f"unknown setting {shown}{place}; {_nearest(shown, self.known)}"
        kind, holder = find_class(owner), _holder(shown, path)
        if not is_section(kind) and self._class_of(holder) is None:
            return f"unknown setting {shown}{place}; set {holder}.class_path first, to a subclass of {kind.__name__}"
        accepted = [f"{shown.rpartition('.')[0]}.{one}" for one in inspect.signature(kind).parameters]
        of = "" if is_section(kind) else f" of {owner}"
        return f"unknown setting {shown}{place}{of}; {_nearest(shown, [*accepted, *self.known])}"

    def _missing(self, found: re.Match[str], path: str, owner: str) -> str:
        name = ".".join(filter(None, (path, found[1])))
        if not path and name not in self.known:  # of a subcommand
            name = name.partition(".")[2] or name
        if not owner or name in self.known:
            about = one_line(self.help.get(name) or "").partition(" (required")[0].rstrip(".")
            about = f" ({about})" if about else ""
            if name in self.positionals:
                return f"missing {name}{about}; write it behind the command"
            return f"missing setting {name}{about}; give it as --{name}=..., or a --config file that has it"
        # Where the class is written; there may be several in a list.
        places = {_holder(one.name, path): one.place for one in self.entries if _holder(one.name, path)}
        written = {one.name for one in self.entries}
        for holder, place in places.items():
            begin = f"{holder}.init_args" if self._class_of(holder) else holder
            if self._class_of(holder) in (None, _short(owner)) and f"{begin}.{found[1]}" not in written:
                return f"missing setting {begin}.{found[1]}; give it beside the others{place}"
        return f"missing setting {name} of {owner}; give it under init_args"

    def _no_class(self, found: re.Match[str], path: str, owner: str) -> str:
        name = next(filter(None, found.groups()))
        under = [one for one in self.entries if _plain(one.name).startswith(path) and name in (one.value, *_items(one))]
        shown = str(under[-1]) if under else f"{path}={name}"
        if found["base"]:
            return f"{shown}: it is no {found['base']}"
        try:
            find_class(name, self._hint(path, owner))
        except ValueError as error:
            return f"{shown}: {error}"
        return f"{shown}: cannot be imported"

    def _wrong_value(self, keys: list[str], classes: list[str], got: re.Match[str] | None) -> str:
        path = ".".join(keys)
        hint = self._hint(path, classes[-1] if len(keys) > 1 and classes else "")
        entry = self._find(path, classes[-1] if classes else "", got[1] if got else None)
        named = [one for one in self.entries if one.leaf == "class_path" and _plain(one.name).startswith(path)]
        if entry is not None and "by class_path" in in_words(hint) and re.fullmatch(r"\w+(\.\w+)+", str(entry.value)):
            named = [entry]
        if named:
            try:
                find_class(str(named[-1].value), hint)
            except ValueError as error:
                return f"{named[-1]}: {error}"
        if entry is None or _plain(entry.name) != path:
            return f"{path}{entry.place if entry else ''}: expected {in_words(hint)}"
        choices = [str(one) for kind in parts_of(hint) if typing.get_origin(kind) is Literal for one in kind.__args__]
        return f"{entry}: expected {in_words(hint)}{did_you_mean(str(entry.value), choices)}"

    def _hint(self, path: str, owner: str) -> Any:
        if path in self.known or not owner:
            return self.known.get(path, self.positionals.get(path))
        try:
            return typing.get_type_hints(find_class(owner).__init__).get(path.rpartition(".")[2])
        except (NameError, TypeError):  # another package's annotations may name what only type checkers import
            return None

    def _place(self, name: str) -> str:
        entry = self._find(name)
        return entry.place if entry else ""

    def _find(self, path: str, owner: str = "", value: str | None = None) -> ConfigEntry | None:
        """Return the last entry of this name, or inside it; if possible one of the class `owner`, or with this value."""
        found = [one for one in self.entries if _plain(one.name) == path]
        found = found or [one for one in self.entries if _plain(one.name).startswith(f"{path}.")]
        parent = path.rpartition(".")[0]
        found = [one for one in found if self._class_of(_holder(one.name, parent)) == _short(owner)] or found
        found = [one for one in found if value is not None and _same(one.value, value)] or found
        return found[-1] if found else None

    def _class_of(self, holder: str) -> str | None:
        """Return the name of the class that is given for `holder`, without its module."""
        names = (holder, f"{holder}.class_path")
        paths = [str(one.value) for one in self.entries if one.name in names and isinstance(one.value, str)]
        return _short(paths[-1]) if paths else None


def subcommands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of its subcommands, by their names."""
    return next((one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction)), {})


def known_settings(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return settings of a parser, sections and those inside them included: dotted name -> type."""
    known: dict[str, Any] = {}

    def add(name: str, hint: Any) -> None:
        known[name] = hint
        for kind in parts_of(hint):
            for field, field_hint in typing.get_type_hints(kind).items() if is_section(kind) else ():
                add(f"{name}.{field}", field_hint)

    for action in parser._actions:
        for option in action.option_strings:
            if not option.endswith((".help", "+")) and " --> " not in option:
                hint = getattr(action, "_typehint", action.type)
                add(option.lstrip("-"), list[str] if isinstance(action, argparse._AppendAction) else hint)
    return known


def _plain(name: str) -> str:
    """Return a name as in jsonargparse's messages: `trainer.callbacks.monitor` for `trainer.callbacks[0].init_args.monitor`."""
    return re.sub(r"\[\d+\]|\.init_args|\.dict_kwargs", "", name)


def _holder(name: str, path: str) -> str:
    """Return the beginning of `name` that `path` stands for, such as `trainer.callbacks[0]` for `trainer.callbacks`; or empty."""
    words = name.split(".")
    return next((one for end in range(len(words)) if _plain(one := ".".join(words[: end + 1])) == path), "")


def _items(entry: ConfigEntry) -> list[Any]:
    return entry.value if isinstance(entry.value, list) else []


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _same(given: Any, text: str) -> bool:
    try:
        value = yaml.safe_load(text)
        return bool(given == value or float(given) == float(value))
    except (yaml.YAMLError, TypeError, ValueError, OverflowError):
        return str(given) == text


def _nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name nearest to `name`: one of its section, or the same name in another section."""
    pool = [one for one in known if not name.startswith(f"{one}.")]
    siblings = [one for one in pool if one.rpartition(".")[0] == name.rpartition(".")[0]]
    for some in (siblings, pool):
        leaves = sorted({_short(one) for one in some})
        for close in difflib.get_close_matches(_short(name), leaves, n=1):
            same = [one for one in some if _short(one) == close]
            return f"did you mean {max(same, key=lambda one: difflib.SequenceMatcher(None, name, one).ratio())}?"
    return "--help lists all of them"


def find_class(path: str, hint: Any = None) -> Any:
    """Import a class.

    Args:
        path: with its module, or the name alone of a known subclass of one in `hint`.
        hint: the type of the setting that it is for.

    Raises:
        ValueError: there is none; the message names the closest one.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        bases = [kind for kind in parts_of(hint) if inspect.isclass(kind)]
        known = {kind.__name__: kind for base in bases for kind in _subclasses(base)}
        if name in known:
            return known[name]
        raise ValueError(f"there is no such class{did_you_mean(name, known)}")
    module = import_by_name(module_name)
    if not hasattr(module, name):
        classes = [other for other in (*getattr(module, "__all__", ()), *vars(module)) if other[:1].isupper()]
        raise ValueError(f"{module_name} has no class {name}{did_you_mean(name, classes)}")
    return getattr(module, name)


def import_by_name(name: str) -> types.ModuleType:
    """Import a user's module.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"cannot import {name} ({error}); put its file beside train.py or on PYTHONPATH") from error
    except Exception as error:
        raise ValueError(
            f"cannot import {name} ({type(error).__name__}: {error}); put that right in its file"
        ) from error


def _subclasses(base: Any) -> Iterator[Any]:
    yield base
    for kind in type.__subclasses__(base):
        yield from _subclasses(kind)


def parts_of(hint: Any) -> Iterator[Any]:
    """Return the types that a type hint is made of, `MoEConfig | None` -> MoEConfig, NoneType."""
    arguments = typing.get_args(hint) if typing.get_origin(hint) is not Literal else ()
    for argument in arguments:
        yield from parts_of(argument)
    if not arguments:
        yield hint


def is_section(kind: Any) -> bool:
    """Return whether a type is a dataclass whose fields are settings, and not one that is named by `class_path`."""
    return dataclasses.is_dataclass(kind) and not (inspect.isclass(kind) and issubclass(kind, NAMED_BY_CLASS))


def in_words(hint: Any) -> str:
    """Describe a type in a user's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(kind) for kind in arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}: {', '.join(in_words(kind) for kind in arguments)}"
    if origin is dict:
        return f"a mapping, each value {in_words(arguments[1])}"
    if origin is not None:
        return f"a list, each item {in_words(arguments[0])}" if arguments else "a list"
    if is_section(hint):
        return "a section of settings"
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)} by class_path"

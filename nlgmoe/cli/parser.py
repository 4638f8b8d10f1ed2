"""jsonargparse's parser, whose errors are one line about the setting to change: name, value, place, remedy."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import Enum
from typing import Any, Literal, NoReturn, Union

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

from nlgmoe.cli.errors import did_you_mean, is_wrong_setting, one_line
from nlgmoe.cli.places import Setting, read_arguments
from nlgmoe.files import expand_home
from nlgmoe.parts import ExpertConfig, RouterConfig
from nlgmoe.validation import SettingError

NAMED_BY_CLASS = (RouterConfig, ExpertConfig)  # dataclasses whose subclasses a configuration names by `class_path`
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    dict: "a mapping",
}
_DURATION = re.compile(
    r"((?P<days>\d+)( days?, |:))?(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+(\.\d+)?)"  # as Lightning and Python write it
)
_ITEM = re.compile(r"([^\[]+)\[\d+\]\.")  # name of a list of objects, at the start of the name of an item's setting

# Defaults of Lightning's `Timer` are members of enumerations, which jsonargparse dumps as they are.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
set_parsing_settings(subclasses_enabled=list(NAMED_BY_CLASS))  # else jsonargparse treats these dataclasses as sections


def _duration(text: str) -> timedelta:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text} is no duration; write DD:HH:MM:SS or HH:MM:SS")
    return timedelta(**{unit: float(match[unit] or 0) for unit in ("days", "hours", "minutes", "seconds")})


# jsonargparse's own type reads DD:HH:MM:SS as H:MM:SS, and ignores the rest.
register_type(timedelta, deserializer=_duration)


class OneLineParser(ArgumentParser):
    """Raises `SettingError` where jsonargparse prints its usage and ends the process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # No abbreviations: a setting added later could make one ambiguous or change its meaning.
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))
        self.given: list[Setting] = []
        self.known: dict[str, Any] = {}  # name -> type, sections included
        self._refusal: tuple[Exception, Exception] | None = None  # a constructor's exception, and the one to report

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse the arguments and the files that they name."""
        if self.exit_on_error and getattr(self, "parent_parser", None) is None:
            args = _with_home(list(sys.argv[1:] if args is None else args))
            choices = subcommands_of(self)
            name = next((word for word in args if word in choices), "")
            parser = choices.get(name, self)
            configs = {o for a in parser._actions if isinstance(a, ActionConfigFile) for o in a.option_strings}
            self.known = known_settings(parser)
            _print_section_help(parser, args)
            args = self._read(args, configs)
        return super().parse_args(args, namespace, **kwargs)

    def _read(self, args: list[str], configs: set[str]) -> list[str]:
        """Record and check the settings that are given.

        Returns:
            The arguments, with `--LIST=[]` before an argument that replaces a list: otherwise jsonargparse would keep arguments
            of the earlier list's items.
        """
        arguments: list[str] = []
        lists: set[str] = set()
        last = 0
        for index, settings in read_arguments(args, configs):
            new = {match[1] for item in settings if not item.appends and (match := _ITEM.match(item.name))}
            repeated = sorted(name for name in new if _plain(name) in lists)
            arguments += [*args[last:index], *(f"--{name}=[]" for name in repeated)]
            lists |= set(map(_plain, new))
            last = index
            for setting in settings:
                self._check(setting)
                self.given.append(setting)
        return [*arguments, *args[last:]]

    def _check(self, setting: Setting) -> None:
        """Refuse a list, number or null that jsonargparse would accept for any section or setting."""
        inside = [name for name in self.known if name.startswith(f"{setting.name}.")]
        hint = self.known.get(setting.name)
        if inside and not _takes_null(hint) and not isinstance(setting.value, dict | str):
            raise SettingError(
                f"{setting}: it is a section with settings such as {inside[0]}; write them as `name: value`"
            )
        if setting.leaf == "init_args" and setting.value is None:
            raise SettingError(f"{setting}: expected settings of the class; leave init_args out if there are none")
        if setting.value is None and hint is not None and not _takes_null(hint):
            raise SettingError(f"{setting}: expected {in_words(hint)}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage."""
        if not self.exit_on_error:  # an inner parser, one attempt of several
            super().error(message, ex)
        outermost = getattr(self, "parent_parser", None) or self
        raise SettingError(outermost.explain(message)) from ex

    def explain(self, message: str) -> str:
        """Return one line for a message of jsonargparse: its innermost reason, with the setting's full name.

        jsonargparse nests a reason in those of the enclosing settings and classes, the outermost first.
        """
        keys, owner, reason = [], "", one_line(message)
        for line in message.splitlines():
            if match := re.search(r'Parser key "([^"]+)":\s*(.*)', line):
                keys.append(match[1])
                reason = match[2] or reason
            elif match := re.search(r"Problem with given class_path '([^']+)':\s*(.*)", line):
                owner, reason = match[1], match[2] or reason
            elif not re.match(r"\s*(Does not validate|Subtypes:|Errors:|$)", line):
                reason = line.strip().removeprefix("- ")
                break
        path = ".".join(keys)
        if match := re.search(r"(?:does not accept option|Option) '([^']+)'|unrecognized arguments: (\S+)", reason):
            if match[2] and not match[2].startswith("-"):
                return f"unexpected argument {match[2]}; settings are written --name=value"
            return self._unknown(".".join(filter(None, (path, match[1] or match[2]))), owner)
        if match := re.search(r"the following arguments are required: ([^,\s]+)", reason):
            return self._missing(".".join(filter(None, (path, match[1]))), owner)
        if match := re.search(r"^argument subcommand: invalid choice: '(.*?)'", reason):
            names = list(subcommands_of(self))
            return f"unknown subcommand {match[1]}{did_you_mean(match[1], names)} (one of {', '.join(names)})"
        if "but it was not provided" in reason:
            return f"no subcommand; give one of {', '.join(subcommands_of(self))}, or --help"
        if match := re.search(r'^Linked "(.+)" must be given via "(.+)"', reason):
            return f"{match[1]} always equals {match[2]}; set that instead"
        if not path:
            return self.qualified(one_line(message))
        setting = self._find(path, owner)
        subject = str(setting) if setting else path
        takes_class = any(inspect.isclass(kind) and kind not in _WORDS for kind in parts_of(self.known.get(path)))
        named = [given for given in self.given if given.leaf == "class_path" and _plain(given.name).startswith(path)]
        named += [setting] if setting and takes_class and isinstance(setting.value, str) else []
        for class_path in named:
            try:
                find_class(str(class_path.value), self.known.get(path))
            except SettingError as error:
                return f"{class_path}: {error}"
        if reason.startswith("Expected a") or "Expected" in message:
            hint = self._hint(path, owner)
            choices = [
                str(choice) for kind in parts_of(hint) if typing.get_origin(kind) is Literal for choice in kind.__args__
            ]
            value = str(setting.value) if setting else ""
            return f"{subject}: expected {in_words(hint)}{did_you_mean(value, choices)}"
        return f"{subject}: {one_line(reason)}"

    def qualified(self, text: str) -> str:
        """Replace `leaf=value` at the start of `text` by the setting's full name and place."""
        match = re.match(r"(?P<leaf>\w+)=(?P<value>\[[^\]]*\]|\([^)]*\)|[^\s:;,]+)", text)
        if match is None:  # Lightning's messages quote the value, under Lightning's own names
            quoted = [given for given in self.given if given.name.startswith("trainer.") and f"'{given.value}'" in text]
            return f"{quoted[-1]}: {text}" if quoted else text
        rest = text[match.end() :]
        same = [given for given in self.given if given.leaf == match["leaf"] and _same(given.value, match["value"])]
        if same:
            return f"{same[-1].name}={match['value']}{same[-1].place}{rest}"
        names = [name for name in self.known if name.rpartition(".")[2] == match["leaf"]]
        return f"{names[0].rpartition('.')[0]}.{text}".removeprefix(".") if len(names) == 1 else text

    def construct(self, kind: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Construct an object of a configuration, and store the exception of its constructor.

        For `add_instantiator`: if a value may have several types, jsonargparse reports all attempts in one message, without the
        constructor's.
        """
        try:
            if kind.__module__.startswith("nlgmoe."):
                hints = typing.get_type_hints(kind.__init__)
                for name in (name for name, value in kwargs.items() if value is None):
                    if name in hints and not _takes_null(hints[name]):
                        raise SettingError(f"{name}=null: expected {in_words(hints[name])}")
            return kind(*args, **kwargs)
        except Exception as error:
            of_arguments = isinstance(error, TypeError | OverflowError) and not kind.__module__.startswith("nlgmoe.")
            reported = SettingError(f"{kind.__name__} cannot take its arguments: {error}") if of_arguments else error
            self._refusal = error, reported
            raise

    @contextmanager
    def blaming_settings(self) -> Iterator[None]:
        """Add the setting's place to errors of the constructors in the block."""
        self._refusal = None
        try:
            yield
        except Exception as error:
            raised, reported = self._refusal or (error, error)
            cause = reported if error is raised or "Union subtypes" in str(error) else error
            if isinstance(cause, ValueError) or is_wrong_setting(cause):
                raise SettingError(self.qualified(one_line(str(cause)))) from error
            raise cause from None  # as it was raised, without jsonargparse's message around it

    def _unknown(self, name: str, owner: str) -> str:
        name = name.lstrip("-").partition("=")[0]
        setting = self._find(name, owner)
        full_name, place = (setting.name, setting.place) if setting else (name, "")
        accepted: list[str] = []
        if owner and "." in full_name:
            with suppress(SettingError):
                holder = full_name.rpartition(".")[0]
                accepted = [f"{holder}.{name}" for name in inspect.signature(find_class(owner)).parameters]
        return f"unknown setting {full_name}{place}{_nearest(full_name, [*accepted, *self.known])}"

    def _missing(self, name: str, owner: str) -> str:
        if owner and name not in self.known:
            leaf = name.rpartition(".")[2]
            if classes := [setting for setting in self.given if setting.value == owner]:
                holder = classes[-1].name.removesuffix(".class_path")
                return f"missing setting {holder}.init_args.{leaf}; give it beside the others{classes[-1].place}"
            outer = self._find(name.rpartition(".")[0])
            return f"missing setting {leaf} of {owner.rpartition('.')[2]}{f' in {outer.name}{outer.place}' if outer else ''}"
        name = next((known for known in self.known if name.endswith(known)), name)  # without the subcommand
        return f"missing setting {name}; give it as --{name}=..., or in a --config file"

    def _hint(self, path: str, owner: str) -> Any:
        if path in self.known or not owner:
            return self.known.get(path)
        try:
            return typing.get_type_hints(find_class(owner).__init__).get(path.rpartition(".")[2])
        except (NameError, TypeError, SettingError):  # annotations may name what only type checkers import
            return None

    def _find(self, path: str, owner: str = "") -> Setting | None:
        """Return the last setting of this name in jsonargparse's messages; if possible inside the class `owner`."""
        same = [setting for setting in self.given if _plain(setting.name) == path and not setting.name.endswith("]")]
        classes = {
            setting.name.removesuffix(".class_path")
            for setting in self.given
            if setting.leaf == "class_path" and setting.value == owner
        }
        of_owner = [setting for setting in same if any(setting.name.startswith(holder) for holder in classes)]
        return (of_owner or same or [None])[-1]  # type: ignore[list-item]


def _with_home(words: list[str]) -> list[str]:
    """Expand `~/` at the start of words and in `--name=~/...`."""
    parts = (word.partition("=") if word.startswith("--") else (word, "", "") for word in words)
    return [expand_home(name) + equals + expand_home(value) for name, equals, value in parts]


def _print_section_help(parser: argparse.ArgumentParser, args: list[str]) -> None:
    """Print the settings of a section and exit, for `--SECTION.help`, which jsonargparse has for classes only."""
    options = {option for action in parser._actions for option in action.option_strings}
    for word in args:
        section = word.removeprefix("--").removesuffix("help")
        inside = [action for action in parser._actions if action.dest.startswith(section) and section.endswith(".")]
        if word.endswith(".help") and word not in options and inside:
            for action in inside:
                hint = in_words(getattr(action, "_typehint", action.type))
                print(f"  --{action.dest} ({hint}, default: {action.default})\n      {action.help}")
            raise SystemExit(0)


def subcommands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of its subcommands, by their names."""
    return next((action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


def known_settings(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return settings of a parser, sections and those inside them included: dotted name -> type."""
    known: dict[str, Any] = {}

    def add(name: str, hint: Any) -> None:
        known[name] = hint
        for kind in parts_of(hint):
            for field, field_hint in typing.get_type_hints(kind).items() if is_section(kind) else ():
                add(f"{name}.{field}", field_hint)

    for action in parser._actions:
        for option in action.option_strings or [action.dest]:
            if not option.endswith((".help", "+")) and " --> " not in option:
                hint = getattr(action, "_typehint", action.type)
                add(option.lstrip("-"), hint)
    return known


def _plain(name: str) -> str:
    """Return a name as in jsonargparse's messages: `trainer.callbacks.monitor` for `trainer.callbacks[0].init_args.monitor`."""
    return re.sub(r"\[\d+\]|\.init_args|\.dict_kwargs", "", name)


def _same(given: Any, text: str) -> bool:
    try:
        value = yaml.safe_load(text)
        return bool(given == value or float(given) == float(value))
    except (yaml.YAMLError, TypeError, ValueError, OverflowError):
        return str(given) == text


def _nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name nearest to `name`: one of its section, or the same name in another section."""
    pool = [other for other in known if not name.startswith(f"{other}.")]
    siblings = [other for other in pool if other.rpartition(".")[0] == name.rpartition(".")[0]]
    leaf = name.rpartition(".")[2]
    for candidates in (siblings, pool):
        leaves = sorted({other.rpartition(".")[2] for other in candidates})
        for close in difflib.get_close_matches(leaf, leaves, n=1):
            same_leaf = [other for other in candidates if other.rpartition(".")[2] == close]
            nearest = max(same_leaf, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
            return f"; did you mean {nearest}?"
    return "; --help lists all of them"


def find_class(path: str, hint: Any = None) -> Any:
    """Import a class.

    Args:
        path: with its module, or the name alone of a known subclass of one in `hint`.
        hint: type of the setting.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        bases = [kind for kind in parts_of(hint) if inspect.isclass(kind)]
        known = {kind.__name__: kind for base in bases for kind in _subclasses(base)}
        if name in known:
            return known[name]
        raise SettingError(f"there is no such class{did_you_mean(name, known)}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise SettingError(
            f"cannot import {module_name} ({reason}); put its file beside train.py or on PYTHONPATH"
        ) from error
    if not hasattr(module, name):
        classes = [other for other in (*getattr(module, "__all__", ()), *vars(module)) if other[:1].isupper()]
        raise SettingError(f"{module_name} has no class {name}{did_you_mean(name, classes)}")
    return getattr(module, name)


def _subclasses(base: Any) -> Iterator[Any]:
    yield base
    for kind in type.__subclasses__(base):
        yield from _subclasses(kind)


def parts_of(hint: Any) -> Iterator[Any]:
    """Return the members of a type hint, `MoEConfig | None` -> MoEConfig, NoneType."""
    arguments = typing.get_args(hint) if typing.get_origin(hint) is not Literal else ()
    for argument in arguments:
        yield from parts_of(argument)
    if not arguments:
        yield hint


def _takes_null(hint: Any) -> bool:
    return bool({Any, None, type(None)} & set(parts_of(hint))) and hint is not None


def is_section(kind: Any) -> bool:
    """Return whether a type is a dataclass of settings that no `class_path` names."""
    return dataclasses.is_dataclass(kind) and not (inspect.isclass(kind) and issubclass(kind, NAMED_BY_CLASS))


def in_words(hint: Any) -> str:
    """Describe a type for a message."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(kind) for kind in arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each {in_words(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(in_words(kind) for kind in arguments)}"
    if origin is not None:
        return f"a list, each {in_words(arguments[0])}" if origin in (list, Sequence) else str(hint)
    if is_section(hint):
        return "a section of settings"
    return _WORDS.get(hint) or ("a value" if hint in (None, Any) else f"a {getattr(hint, '__name__', hint)}")

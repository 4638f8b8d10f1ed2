"""jsonargparse's parser, whose errors are one line about the setting to change: name, value, place, remedy."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import Enum
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

from nlgmoe.cli.errors import did_you_mean, is_wrong_setting, one_line
from nlgmoe.cli.places import Setting, read_arguments
from nlgmoe.files import expand_home
from nlgmoe.parts import ExpertConfig, RouterConfig
from nlgmoe.validation import SettingError

NAMED_BY_CLASS = (RouterConfig, ExpertConfig)  # dataclasses whose subclasses a configuration names by `class_path`
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
        self._refusal: Exception | None = None  # of the last constructor that raised one

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
            raise SettingError(f"{setting}: null is not accepted here; give a value")

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
        keys, owner, kinds, reason = [], "", "", one_line(message)
        for line in message.splitlines():
            if match := re.search(r'Parser key "([^"]+)":\s*(.*)', line):
                keys.append(match[1])
                kinds, reason = "", match[2] or reason
            elif match := re.search(r"Subtypes: \[(.*)\]", line):
                kinds = match[1]
            elif match := re.search(r"Problem with given class_path '([^']+)':\s*(.*)", line):
                owner, reason = match[1], match[2] or reason
            elif not re.match(r"\s*(- )?(Does not validate|Errors:|Expected a path|$)", line):
                reason = line.strip().removeprefix("- ")
                break
        path = ".".join(keys)
        if match := re.search(r"(?:does not accept option|Option) '([^']+)'|unrecognized arguments: (\S+)", reason):
            if match[2] and not match[2].startswith("-"):
                return f"unexpected argument {match[2]}; settings are written --name=value"
            return self._unknown(".".join(filter(None, (path, match[1] or match[2]))), owner)
        if match := re.search(r"the following arguments are required: ([^,\s]+)", reason):
            name = ".".join(filter(None, (path, match[1])))
            place = next((f" of {given}" for given in reversed(self.given) if owner and given.value == owner), "")
            return f"missing setting {name}{place}; give it in a file, or on the command line"
        if not path:
            return self.qualified(one_line(message))
        setting = self._find(path, reason)
        named = [given for given in self.given if given.leaf == "class_path" and _plain(given.name).startswith(path)]
        bases = [
            kind for kind in parts_of(self.known.get(path)) if inspect.isclass(kind) and kind.__module__ != "builtins"
        ]
        names = [name for base in bases for name in _names_of_subclasses(base)]
        for class_path in [*named, setting] if setting and bases else named:
            if "." in (value := str(class_path.value)):
                try:
                    find_class(value)
                except SettingError as error:
                    return f"{class_path}: {error}"
            elif value.isidentifier() and value not in names:
                return f"{class_path}: there is no such class{did_you_mean(value, names)}"
        reason = f"expected {kinds}" if kinds and reason.startswith("Expected a") else reason
        plain = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", reason)
        return f"{setting or path}: {one_line(plain.replace('NoneType', 'null'))}"

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
                        raise SettingError(f"{name}=null: null is not accepted here; give a value")
            return kind(*args, **kwargs)
        except Exception as error:
            self._refusal = error
            raise

    @contextmanager
    def blaming_settings(self) -> Iterator[None]:
        """Add the setting's place to errors of the constructors in the block."""
        self._refusal = None
        try:
            yield
        except Exception as error:
            cause = self._refusal if self._refusal and "Union subtypes" in str(error) else error
            if isinstance(cause, ValueError) or is_wrong_setting(cause):
                raise SettingError(self.qualified(one_line(str(cause)))) from error
            raise cause from None  # as it was raised, without jsonargparse's message around it

    def _unknown(self, name: str, owner: str) -> str:
        name = name.lstrip("-").partition("=")[0]
        setting = self._find(name, "")
        full_name, place = (setting.name, setting.place) if setting else (name, "")
        accepted: list[str] = []
        if owner and "." in full_name:
            with suppress(SettingError):
                holder = full_name.rpartition(".")[0]
                accepted = [f"{holder}.{name}" for name in inspect.signature(find_class(owner)).parameters]
        return f"unknown setting {full_name}{place}{_nearest(full_name, [*accepted, *self.known])}"

    def _find(self, path: str, reason: str) -> Setting | None:
        """Return the last setting of this name in jsonargparse's messages; of several, one whose value the reason names."""
        same = [setting for setting in self.given if _plain(setting.name) == path and not setting.name.endswith("]")]
        named = [setting for setting in same if str(setting.value) in reason]
        return (named or same or [None])[-1]  # type: ignore[list-item]


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
                hint = getattr(action, "_typehint", action.type)
                kind = hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)
                print(f"  --{action.dest} ({kind}, default: {action.default})\n      {action.help}")
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
    """Suggest the known name whose last part is nearest to that of `name`; of equal ones the nearest as a whole."""
    ordered = sorted(known, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
    by_leaf = {other.rpartition(".")[2]: other for other in ordered}
    close = difflib.get_close_matches(name.rpartition(".")[2], by_leaf, n=1)
    return f"; did you mean {by_leaf[close[0]]}?" if close else "; --help lists all of them"


def find_class(path: str) -> Any:
    """Import a class."""
    module_name, _, name = path.rpartition(".")
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


def _names_of_subclasses(base: Any) -> Iterator[str]:
    yield base.__name__
    for kind in type.__subclasses__(base):
        yield from _names_of_subclasses(kind)


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

"""What a parser or class takes: the names and type hints of its settings, and the classes that a configuration names."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from enum import Enum
from types import UnionType
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type
from typing_extensions import is_protocol

from nlgmoe.cli.errors import did_you_mean, import_module
from nlgmoe.cli.yaml_places import Setting
from nlgmoe.parts import AttentionConfig, ExpertConfig, RotaryScaling, RouterConfig
from nlgmoe.validation import SettingError

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

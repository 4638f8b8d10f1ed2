"""Settings that hold classes, `class_path` and `init_args`: which class a path names, and which arguments it takes."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from nlgmoe.cli.errors import UsageError, did_you_mean
from nlgmoe.cli.given import Given
from nlgmoe.parts import ExpertConfig, RouterConfig

NAMED_BY_CLASS = (RouterConfig, ExpertConfig)  # dataclasses of which a configuration names a subclass
_PLAIN = (bool, int, float, str, type(None), dict, Path, timedelta, object)


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument, of a class or a section inside a setting, that a given setting sets or lies in.

    Attributes:
        section: what the names of its owner's arguments begin with, such as `trainer.callbacks[0].init_args`.
        owner: the class, or the dataclass of a section.
        path: the class as it was named.
        name: of the argument.
    """

    section: str
    owner: Any
    path: str
    name: str

    @property
    def hint(self) -> Any:
        """Its type; None if it is not known."""
        constructor = self.owner.__init__ if inspect.isclass(self.owner) else self.owner
        try:
            return typing.get_type_hints(constructor).get(self.name)
        except (NameError, TypeError):  # another package's annotations may name what only type checkers import
            return None

    def accepted(self) -> list[str]:
        """The names that its owner takes; its own too where that takes any."""
        parameters = inspect.signature(self.owner).parameters
        takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        return [*parameters, *([self.name] if takes_any else [])]


def arguments(given: Given, setting: str, hint: Any, earlier: Sequence[Given]) -> Iterator[Argument]:
    """The arguments that `given` leads through, from the outermost on: two in `data.corpus.init_args.parts[0].weight`.

    Args:
        given: the setting as it is written.
        setting: the one of the parser's that it lies in.
        hint: that one's type.
        earlier: settings given before it, which say what class `init_args` belong to.
    """
    index, *words = given.name.removeprefix(setting).split(".")
    section = setting + index
    for word in words:
        if word == "dict_kwargs":  # whatever the class passes on
            return
        if word not in ("class_path", "init_args"):
            sections: list[Any] = [kind for kind in parts_of(hint) if is_section(kind)]
            path = sections[0].__name__ if sections else _path_of(section.removesuffix(".init_args"), earlier)
            owner = sections[0] if sections else find_class(given, path, classes_in(hint)) if is_path(path) else None
            if owner is None:
                return
            argument = Argument(section, owner, path, word.partition("[")[0].rstrip("+"))
            yield argument
            hint = argument.hint
        section += f".{word}"


def check_inside(given: Given, setting: str, hint: Any, earlier: Sequence[Given]) -> None:
    """Check a setting inside one that holds classes: `trainer.callbacks[0].init_args.prompts`.

    Args:
        given, setting, hint, earlier: as in `arguments`.

    Raises:
        UsageError: there is no such class, or it takes no such argument.
    """
    for argument in arguments(given, setting, hint, earlier):
        accepted = argument.accepted()
        if argument.name not in accepted:
            near = did_you_mean(argument.name, accepted)
            raise UsageError(f"unknown setting {given.name}{given.place} of {argument.path}{near}")
        hint = argument.hint
    if given.leaf == "class_path":
        find_class(given, str(given.value), classes_in(hint))


def _path_of(holder: str, earlier: Sequence[Given]) -> str:
    """The class path given for what `holder` names; the last one counts. Empty if there is none."""
    paths = [
        str(one.value)
        for one in earlier
        if one.name.rstrip("+") == holder
        or (one.leaf == "class_path" and one.name.startswith((f"{holder}.class_path", f"{holder}[")))
    ]
    return paths[-1] if paths else ""


def find_class(given: Given, path: str, bases: Sequence[Any]) -> Any:
    """What a path names: dotted, or the name alone of a known subclass of `bases`; None if nothing is known about it.

    Raises:
        UsageError: there is none; the message names the closest one.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        known = {kind.__name__: kind for base in bases for kind in _subclasses(base)}
        if known and name not in known:
            raise UsageError(f"{given}: there is no such class{did_you_mean(name, known)}")
        return known.get(name)
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name, None)
    except ImportError as error:
        raise UsageError(f"{given}: cannot import {module_name} ({error})") from error
    if found is None:
        classes = [other for other in (*getattr(module, "__all__", ()), *vars(module)) if other[:1].isupper()]
        raise UsageError(f"{given}: {module_name} has no class {name}{did_you_mean(name, classes)}")
    return found


def is_path(value: Any, dotted: bool = False) -> bool:
    """Whether a value is a class path in form; with `dotted`, one with a module."""
    return isinstance(value, str) and all(part.isidentifier() for part in value.split(".")) and dotted <= ("." in value)


def _subclasses(base: Any) -> Iterator[Any]:
    yield base
    for kind in base.__subclasses__():
        yield from _subclasses(kind)


def parts_of(hint: Any) -> Iterator[Any]:
    """The types that a type hint is made of, `MoEConfig | None` -> MoEConfig, NoneType."""
    arguments = typing.get_args(hint)
    if not arguments or typing.get_origin(hint) is Literal:
        yield hint
    for argument in arguments if typing.get_origin(hint) is not Literal else ():
        yield from parts_of(argument)


def classes_in(hint: Any) -> list[Any]:
    """The classes of a type hint whose objects are configured by `class_path` and `init_args`."""
    return [kind for kind in parts_of(hint) if inspect.isclass(kind) and kind not in _PLAIN and not is_section(kind)]


def is_section(kind: Any) -> bool:
    """Whether a type is a dataclass whose fields are settings, and not one that is named by `class_path`."""
    named = inspect.isclass(kind) and issubclass(kind, NAMED_BY_CLASS)
    return dataclasses.is_dataclass(kind) and not named


def import_allowed(modules: Sequence[str] | None) -> None:
    """Import modules that the user trusts, for checkpoints that name their classes.

    Raises:
        UsageError: there is no such module.
    """
    for module in modules or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(
                f"allow_code={module} cannot be imported ({error}); start the command where it is"
            ) from error

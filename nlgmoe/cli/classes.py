"""Settings that hold classes, `class_path` and `init_args`: which class a path names, and which arguments it takes."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from nlgmoe.cli.errors import UsageError, did_you_mean
from nlgmoe.cli.given import Given


def check_inside(given: Given, bases: Sequence[Any], earlier: list[Given]) -> None:
    """Check a setting inside one that holds classes: `trainer.callbacks[0].init_args.prompts`.

    Args:
        given: the setting.
        bases: classes whose subclasses the outer setting holds.
        earlier: settings given before it, which say what class `init_args` belong to.

    Raises:
        UsageError: there is no such class, or it takes no such argument.
    """
    if given.leaf == "class_path":
        find_class(given, str(given.value), bases if ".init_args." not in given.name else ())
        return
    field, path = owner_of(given, earlier)
    owner = find_class(given, path, bases) if path and is_path(path) else None
    if owner is None or field in ("init_args", "dict_kwargs"):
        return
    accepted = inspect.signature(owner).parameters
    if field not in accepted and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        raise UsageError(f"unknown setting {given.name}{given.place} of {path}{did_you_mean(field, accepted)}")


def argument_type(given: Given, bases: Sequence[Any], earlier: list[Given]) -> Any:
    """Type of the constructor's argument that `given` sets; None if it is not known."""
    field, path = owner_of(given, earlier)
    owner = find_class(given, path, bases) if path else None
    try:
        return typing.get_type_hints(owner.__init__ if inspect.isclass(owner) else owner).get(field)
    except (NameError, TypeError):  # annotations of another package that name what is imported for type checkers alone
        return None


def owner_of(given: Given, earlier: list[Given]) -> tuple[str, str]:
    """The argument that `given` sets or lies in, and the class path given for it; the last one counts."""
    prefix, dot, field = given.name.partition(".init_args.")
    if not dot:  # the command line may leave `init_args` out
        prefix, _, field = given.name.rpartition(".")
    paths = [
        str(one.value)
        for one in earlier
        if one.name.rstrip("+") == prefix
        or (one.leaf == "class_path" and one.name.startswith((f"{prefix}.class_path", f"{prefix}[")))
    ]
    return field.partition(".")[0].partition("[")[0].rstrip("+"), paths[-1] if paths else ""


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

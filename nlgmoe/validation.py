"""Errors; checks of settings by their type hints, else `noise="jiter"` would mean no noise, `"false"` true; their differences."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


class SettingError(ValueError):
    """A setting or an argument that cannot be used; a command ends with one line and exit code 2."""


class RunError(ValueError):
    """An error that ends a run or command: damaged data, a full disk, a step that is not finite. One line, exit code 1."""


def error_type_like(error: Exception) -> type[ValueError]:
    """Return the type for an error that adds to the message of `error`: `SettingError` if that is one, else `RunError`."""
    return SettingError if isinstance(error, SettingError) else RunError


def require_valid(settings: Any) -> None:
    """Check the fields of a dataclass, whose values may come from Python or JSON."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        if not _has_type(value, hints[field.name]):
            raise SettingError(f"{field.name}={value!r} must be of the type {field.type}")
        numbers = value if isinstance(value, tuple | list) else [value]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise SettingError(f"{field.name}={value} must be finite")


def require(condition: bool, message: str) -> None:
    """Raise a SettingError with `message` unless `condition` is true."""
    if not condition:
        raise SettingError(message)


def require_at_least(least: float, settings: Any, *names: str, remedy: str = "") -> None:
    """Check fields that are not null; `remedy` ends the message."""
    for name in names:
        if (value := getattr(settings, name)) is not None and not value >= least:
            raise SettingError(f"{name}={value} must be at least {least}{remedy}")


def require_above(limit: float, settings: Any, *names: str, remedy: str = "") -> None:
    """Check fields that are not null; `remedy` ends the message."""
    for name in names:
        if (value := getattr(settings, name)) is not None and not value > limit:
            raise SettingError(f"{name}={value} must be above {limit}{remedy}")


def as_yaml(value: Any) -> str:
    """Format a value as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            return isinstance(value, tuple | list) and all(_has_type(item, kinds[0]) for item in value)
        return isinstance(value, tuple | list) and len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_has_type(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is dict:
        keys, values = get_args(hint)
        return isinstance(value, dict) and all(_has_type(k, keys) and _has_type(v, values) for k, v in value.items())
    if get_args(hint):
        return any(_has_type(value, kind) for kind in get_args(hint))
    if hint in (int, float):  # of Python: a checkpoint's JSON takes no integer of NumPy
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


_MISSING = "missing"
_EXPERT = re.compile(r"\.experts\.\d+\.")


def list_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Collection[str] = (), limit: int | None = 5
) -> list[str]:
    """Return `name (saved: value, now: value)` for each value that differs; one that a mapping lacks is "missing".

    Values of nested mappings have dotted names. Lines with a missing value come last. Experts of a layer that differ alike share
    a line: `blocks.1.moe.experts.*.up_bias (saved: missing, now: [64]; 4 experts)`.
    Names to ignore are ignored at any depth. After `limit` lines follows "and N more"; None: all lines.
    """
    pairs = sorted(_pairs(saved, current, ignore, ""), key=lambda pair: _MISSING in pair[1:])
    counts = Counter((_EXPERT.sub(".experts.*.", name), old, new) for name, old, new in pairs)
    lines = [
        f"{name} (saved: {old}, now: {new}{f'; {count} experts' if '.*.' in name else ''})"
        for (name, old, new), count in counts.items()
    ]
    return lines if limit is None or len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]


def _pairs(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Collection[str], prefix: str
) -> Iterator[tuple[str, str, str]]:
    """Yield the name and both values of each difference, as text."""
    for name in {**current, **saved}:
        if name in ignore:
            continue
        old, new = saved.get(name, _MISSING), current.get(name, _MISSING)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _pairs(old, new, ignore, f"{prefix}{name}.")
        elif old != new:
            # As a list a tuple, and torch.Size.
            old, new = (str(list(value) if isinstance(value, tuple) else value) for value in (old, new))
            yield prefix + name, old, new

"""The rows of the table of Megatron-DeepSpeed's flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["setting", "ignored", "refused"]
Parse = Callable[[str], Any]


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: with its dashes.
        parse: int, float or str; None for a switch, which has no value.
        many: takes any number of values.
        default: Megatron-DeepSpeed's; None where it has none.
        setting: dotted path of the setting that takes the value unchanged; "" where it is derived.
        allowed: the only values that work here; empty: any.
        optional: there is no default, and without it the setting is left out.
        least: the lowest number that works here.
    """

    name: str
    parse: Parse | None = None
    many: bool = False
    default: Any = None
    setting: str = ""
    allowed: tuple[Any, ...] = ()
    optional: bool = False
    least: int = 0


@dataclass(frozen=True)
class Row:
    """Flags that belong together: a row of the README's table.

    Attributes:
        flags: the flags.
        kind: they become a setting, are ignored, or are refused.
        here: their settings; empty unless `kind` is "setting".
        note: the reason, or a remark; for a refused flag the reason and, after a semicolon, the remedy.
    """

    flags: tuple[Flag, ...]
    kind: Kind
    here: str = ""
    note: str = ""


def same(
    setting: str,
    name: str,
    parse: Parse | None,
    default: Any = None,
    note: str = "",
    optional: bool = False,
    least: int = 0,
) -> Row:
    """One flag that is one setting."""
    flag = Flag(name, parse, default=default, setting=setting, optional=optional, least=least)
    return Row((flag,), "setting", f"`{setting}`", note)


def derived(here: str, flags: Sequence[Flag], note: str = "") -> Row:
    """Make a row of flags whose setting `here` is computed from their values."""
    return Row(tuple(flags), "setting", here, note)


def ignored(note: str, *flags: Flag) -> Row:
    """Make a row of flags that need no setting."""
    return Row(flags, "ignored", note=note)


def refused(note: str, *flags: Flag) -> Row:
    """Make a row of refused flags; `note` is the reason and, after a semicolon, the remedy."""
    return Row(flags, "refused", note=note)


def switches(*names: str) -> list[Flag]:
    """Make flags without a value."""
    return [Flag(name) for name in names]

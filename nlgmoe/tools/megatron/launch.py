"""What a launch script comes to: the command it would run, and what it says beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nlgmoe.tools.megatron.expand import Unknown, Value


class Word(NamedTuple):
    """An argument and the line it was written on."""

    text: str
    line: int


class Given(NamedTuple):
    """A value that the script gives something, and where."""

    value: str
    line: int


@dataclass
class Launch:
    """What a script launches.

    Attributes:
        line: of the launch.
        launcher: the words before the entry point, such as `deepspeed --num_gpus 8`.
        arguments: the words after it.
        variables: the script's variables at the launch.
        substitutions: `sed`'s, key -> value; the tutorial fills a template of the DeepSpeed configuration with them.
        documents: files that a here-document writes, path -> text.
    """

    line: int
    launcher: list[Word]
    arguments: list[Word]
    variables: dict[str, Value]
    substitutions: dict[str, Given] = field(default_factory=dict)
    documents: dict[str, Given] = field(default_factory=dict)


def explain(unknown: Unknown) -> str:
    """What something depends on, and how to settle it."""
    remedy = f"; give it with --variables.{unknown.name} VALUE" if unknown.name else "; write it out in the script"
    return f"{unknown.what} (line {unknown.line}){remedy}"

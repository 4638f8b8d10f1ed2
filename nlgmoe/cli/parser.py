"""jsonargparse's parser with errors of one line, each about the setting to change."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from enum import Enum
from itertools import groupby
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

from nlgmoe.cli.config_entries import ConfigEntry, read_arguments, read_file
from nlgmoe.cli.errors import UsageError, one_line
from nlgmoe.cli.explain import NAMED_BY_CLASS, Explainer, subcommands_of
from nlgmoe.cli.tracebacks import is_complaint, raised_in
from nlgmoe.files import expand_home

_DURATION = re.compile(
    r"((?P<days>\d+)( days?, |:))?(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+(\.\d+)?)"  # as Lightning and Python write it
)
_ITEM = re.compile(r"([^\[]+)\[\d+\]\.")  # the name of a list of objects, in that of a setting of one of them

# Defaults of Lightning's `Timer` are members of enumerations, which jsonargparse dumps as they are.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
set_parsing_settings(subclasses_enabled=list(NAMED_BY_CLASS))  # of jsonargparse, which takes dataclasses for sections


def _duration(text: str) -> timedelta:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text} is no duration; write DD:HH:MM:SS or HH:MM:SS")
    try:
        return timedelta(**{unit: float(match[unit] or 0) for unit in ("days", "hours", "minutes", "seconds")})
    except OverflowError as error:
        raise ValueError(f"{text} is above the largest duration, {timedelta.max.days} days; leave it out") from error


# jsonargparse's own reads DD:HH:MM:SS as H:MM:SS, and leaves out the rest.
register_type(timedelta, deserializer=_duration)


def _with_home(words: list[str]) -> list[str]:
    """Expand `~/` in `--name=~/...` and in words of their own, but in no prompt."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        found.append(word if name == "--prompt" else f"{name}={expand_home(value)}" if equals else expand_home(word))
    return found


def _config_options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for one in parser._actions if isinstance(one, ActionConfigFile) for name in one.option_strings}


class OneLineParser(ArgumentParser):
    """Raises `UsageError` where jsonargparse prints its usage and ends the process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation that works today becomes ambiguous, or another setting, with the next one that is added.
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))
        self.entries: list[ConfigEntry] = []
        self._explainer: Explainer | None = None
        self._refusal: Exception | None = None
        self._refused = ""  # the class whose constructor raised it

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse the arguments and the files that they name.

        Raises:
            UsageError: the arguments or a configuration file are wrong.
        """
        outermost = self.exit_on_error and getattr(self, "parent_parser", None) is None
        if outermost:
            args = self._read(_with_home(list(sys.argv[1:] if args is None else args)))
        parsed = super().parse_args(args, namespace, **kwargs)
        if outermost and self._explainer is not None:
            self._explainer.check_nulls(parsed.get(parsed.get("subcommand") or "", parsed))
        return parsed

    def _read(self, args: list[str]) -> list[str]:
        """Note where each setting is given, for messages.

        Returns:
            The arguments, with `--LIST=[]` before one that gives a list again: jsonargparse would keep the earlier items'
            arguments, which the later one does not name, where both lists have as many items.
        """
        choices = subcommands_of(self)
        subcommand = next((word for word in args if word in choices), "")
        parser = choices.get(subcommand, self)
        configs = _config_options(parser)
        if found := (_config_options(self) - configs) & {word.partition("=")[0] for word in args}:
            raise UsageError(f"unknown setting {found.pop().lstrip('-')}; {subcommand} takes no file of settings")
        self._explainer = Explainer(parser, self.entries)
        lists: set[str] = set()
        read: list[str] = []
        last = 0
        for index, given in read_arguments(args, configs):
            new = {match[1] for one in given if not one.appends and (match := _ITEM.match(one.name))}
            again = [name for name in sorted(new) if name.replace(".init_args", "") in lists]
            read += [*args[last:index], *(f"--{name}=[]" for name in again if not name.startswith(f"{subcommand}."))]
            lists |= {name.replace(".init_args", "") for name in new}
            last = index
            for one in given:
                entry = replace(one, name=one.name.removeprefix(f"{subcommand}."))  # as before the subcommand
                self._explainer.check(entry)
                self.entries.append(entry)
                section = entry.name if self._explainer.inside(entry.name) else ""
                if section and isinstance(entry.value, str):  # a file with the section's settings
                    self.entries += [replace(one, name=f"{section}.{one.name}") for one in read_file(entry.value)]
        return [*read, *args[last:]]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage."""
        if not self.exit_on_error:  # an inner parser, one attempt of several
            super().error(message, ex)
        outermost = getattr(self, "parent_parser", None) or self
        explainer = outermost._explainer  # none if parsed from an object: nothing was written
        raise UsageError(explainer.explain(message) if explainer else one_line(message)) from ex

    def construct(self, kind: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Make an object of a configuration, and keep what its constructor raises.

        To be registered with `add_instantiator`: of a value that may have several types jsonargparse reports every attempt
        in one dump, in which the constructor's own words are lost.
        """
        try:
            return kind(*args, **kwargs)
        except Exception as error:
            self._refusal, self._refused = error, kind.__name__
            raise

    @contextmanager
    def blaming_settings(self) -> Iterator[None]:
        """Blame the configuration for what the block's constructors and checks complain about.

        Raises:
            UsageError: in place of a complaint of this project or of Lightning. Files that fail, and bugs, pass.
        """
        self._refusal = None
        try:
            yield
        except UsageError:
            raise
        except Exception as error:
            cause = self._refusal if raised_in(error).startswith("jsonargparse") and self._refusal else error
            if (
                cause is self._refusal
                and isinstance(cause, TypeError | OverflowError)
                and raised_in(cause).startswith("lightning")
            ):
                raise UsageError(f"{self._refused} cannot take its arguments: {one_line(str(cause))}") from error
            if isinstance(cause, OSError) or not is_complaint(cause):
                if cause is error:
                    raise
                raise cause from None  # as it was raised, without jsonargparse's dump around it
            raise UsageError(self._explain_refusal(cause)) from error

    def _explain_refusal(self, error: BaseException) -> str:
        """Return the line for what a constructor raised: `lr=-1 must be ...` with the setting's full name and place."""
        text = one_line(str(error))
        text = self._explainer.qualified(text) if self._explainer else text
        if not raised_in(error).startswith("lightning") or text.startswith("trainer."):
            return text
        # Lightning quotes the value that it refuses, under names of its own.
        quoted = [one for one in self.entries if one.name.startswith("trainer.") and f"'{one.value}'" in text]
        return f"{quoted[-1]}: {text}" if quoted else text

    def replaced_classes(self, setting: str) -> list[str]:
        """Name what a list of classes has lost to a later file: `NAME (FILE, line N)` each.

        A list that is written again, without `+`, takes the place of the earlier one. On the command line that is plain to see.
        """
        written: dict[str, str] = {}  # the class -> where
        lost: dict[str, str] = {}
        names = (setting, f"{setting}.class_path")  # of one class without a list
        items = [one for one in self.entries if one.name in names or one.name.startswith(f"{setting}[")]
        for file, group in groupby(items, key=lambda one: one.file):
            entries = list(group)
            if not entries[0].appends:
                lost, written = lost | written if file else lost, {}
            written |= {str(one.value).rpartition(".")[2]: one.place for one in entries if one.leaf == "class_path"}
        return [f"{name}{place}" for name, place in lost.items() if name not in written]

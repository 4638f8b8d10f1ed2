"""jsonargparse's parser with errors that people can act on: names are checked first, and every message is one line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from nlgmoe.cli.classes import NAMED_BY_CLASS, Argument, arguments, parts_of
from nlgmoe.cli.errors import UsageError, did_you_mean, is_complaint, one_line, raised_in
from nlgmoe.cli.given import Given, read_file, split_arguments
from nlgmoe.cli.settings import Settings, in_words

set_parsing_settings(subclasses_enabled=list(NAMED_BY_CLASS))  # of jsonargparse, which takes dataclasses for sections

_BLAMED = re.compile(r'Parser key "([^"]+)"')  # in jsonargparse's messages, from the outermost setting to the innermost
_GOT = re.compile(r"Got value: (.*)")
_MISSING = re.compile(
    r"(?:Problem with given class_path '(?P<owner>[^']+)':\s+)?the following arguments are required: (?P<names>.*)"
)
_ASSIGNMENT = re.compile(r"(?P<leaf>\w+)=(?P<value>\[[^\]]*\]|\([^)]*\)|\S+)(?P<rest>.*)", re.DOTALL)


class OneLineParser(ArgumentParser):
    """Raises `UsageError` where jsonargparse prints its usage and ends the process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation that works today becomes ambiguous, or another setting, with the next one that is added.
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))
        self.given: list[Given] = []
        self.settings: Settings | None = None
        self._refusal: Exception | None = None

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Check every name that is given, then parse.

        Raises:
            UsageError: the arguments or a configuration file are wrong.
        """
        if self._is_outermost():
            self._check(list(sys.argv[1:] if args is None else args))
        return super().parse_args(args, namespace, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage."""
        if not self.exit_on_error:  # an inner parser, one attempt of several
            super().error(message, ex)
        outermost = getattr(self, "parent_parser", None) or self
        raise UsageError(outermost._explain(message)) from ex

    def construct(self, kind: Any, *args: Any, **kwargs: Any) -> Any:
        """Make an object of a configuration, and keep what its constructor raises.

        To be registered with `add_instantiator`: of a value that may have several types jsonargparse reports every attempt
        in one dump, in which the constructor's own words are lost.
        """
        try:
            return kind(*args, **kwargs)
        except Exception as error:
            self._refusal = error
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
            if isinstance(cause, OSError) or not is_complaint(cause):
                if cause is error:
                    raise
                raise cause from None  # as it was raised, without jsonargparse's dump around it
            raise UsageError(self._explain_refusal(cause)) from error

    def replaced_classes(self, setting: str) -> list[str]:
        """What a list of classes has lost to a later file: `NAME (FILE, line N)` each.

        A list that is written again, without `+`, takes the place of the earlier one. On the command line that is plain to see.
        """
        written: list[Given] = []
        lost: list[Given] = []
        origin: str | None = None  # of the list that is being read
        for given in self.given:
            if given.name != setting and not given.name.startswith(f"{setting}["):
                continue
            source = given.origin.rpartition(", line ")[0]
            if source != origin and not given.appends:
                lost, written = [*lost, *written] if source else lost, []
            origin = source
            if given.leaf == "class_path":
                written.append(given)
        names = {str(given.value).rpartition(".")[2] for given in written}
        return [f"{name}{one.place}" for one in lost if (name := str(one.value).rpartition(".")[2]) not in names]

    # ---- names

    def _is_outermost(self) -> bool:
        return self.exit_on_error and getattr(self, "parent_parser", None) is None

    def _check(self, args: list[str]) -> None:
        main, subcommands = Settings(self), self._subparsers_by_name()
        if not subcommands:
            self._check_arguments(main, args)
            return
        ahead: list[str] = []
        while args and (args[0].startswith("-") or ahead[-1:] in (["--config"], ["-c"])):
            ahead.append(args.pop(0))
        if any(option in ahead for option in ("-h", "--help")):
            return
        choices = ", ".join(subcommands)
        if not args:
            raise UsageError(f"no subcommand; give one of {choices}, or --help")
        if args[0] not in subcommands:
            raise UsageError(f"unknown subcommand {args[0]}{did_you_mean(args[0], subcommands)} (one of {choices})")
        self.settings = Settings(subcommands[args[0]])
        for given in split_arguments(ahead, frozenset(), ("--config", "-c"))[0]:
            section, _, name = given.name.partition(".")
            if section == args[0] and name:
                self._accept(self.settings, Given(name, given.value, given.origin))
            elif section not in subcommands and given.name not in main.options:
                raise UsageError(f"unknown setting {given.name}{given.place}; settings stand behind `{args[0]}`")
        self._check_arguments(self.settings, args[1:])

    def _check_arguments(self, settings: Settings, args: list[str]) -> None:
        self.settings = settings
        flags = frozenset(("--" if len(n) > 1 else "-") + n for n, takes in settings.options.items() if not takes)
        config = tuple(option for option in ("--config", "-c") if option.lstrip("-") in settings.options)
        given, bare, loose = split_arguments(args, flags, config)
        if loose and not settings.positionals:
            raise UsageError(f"unexpected argument {loose[0]}; settings are written --name=value")
        for option in bare:
            if settings.options.get(option.lstrip("-")) and not option.endswith((".help", "print_config")):
                kind = in_words(settings.types.get(option.lstrip("-")))
                raise UsageError(f"{option} has no value; write {option}=..., {kind}")
            self._accept(settings, Given(option.lstrip("-"), None))
        for one in given:
            self._accept(settings, one)

    def _accept(self, settings: Settings, given: Given) -> None:
        settings.check(given, self.given)
        self.given.append(given)
        name = given.name.rstrip("+")
        if name in settings.sections and isinstance(given.value, str):  # a file with the section's settings
            for inner in read_file(given.value):
                self._accept(settings, Given(f"{name}.{inner.name}", inner.value, inner.origin))

    def _subparsers_by_name(self) -> dict[str, argparse.ArgumentParser]:
        actions = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(actions[0].choices) if actions else {}

    # ---- values

    def _explain(self, message: str) -> str:
        """jsonargparse's message as one line about one setting."""
        if self.settings is None:  # parsed from an object: nothing was written
            return one_line(message)
        if missing := _MISSING.search(message):
            return self._missing(missing["names"].split(", ")[0], missing["owner"])
        if blamed := _BLAMED.findall(message):
            return self._wrong_value(blamed, _GOT.search(message))
        return self._qualified(one_line(message))

    def _explain_refusal(self, error: BaseException) -> str:
        """The line for what a constructor raised: `lr=-1 must be ...` with the setting's full name and place."""
        text = self._qualified(one_line(str(error)))
        if not raised_in(error).startswith("lightning") or text.startswith("trainer."):
            return text
        # Lightning quotes the value that it refuses, under names of its own.
        quoted = [one for one in self.given if one.name.startswith("trainer.") and f"'{one.value}'" in text]
        return f"{quoted[-1]}: {text}" if quoted else text

    def _missing(self, name: str, owner: str | None) -> str:
        assert self.settings is not None
        if owner is not None and (line := self._missing_inside(name, owner)):
            return line
        for subcommand in self._subparsers_by_name():
            name = name.removeprefix(f"{subcommand}.")
        # Of a section that may be null, such as `model.warm_start`, jsonargparse names the setting alone.
        begun = {given.name.rpartition(".")[0] for given in self.given}
        inside = [one for one in self.settings.names() if one.rpartition(".")[0] in begun and one.endswith(f".{name}")]
        name = inside[0] if name not in self.settings.types and len(inside) == 1 else name
        sentence = one_line(self.settings.sentences.get(name, ""))
        about = f" ({sentence.partition(' (required')[0].rstrip('.')})" if sentence else ""
        if name not in self.settings.types:  # inside a class of the configuration
            return f"missing setting {name}; give it under init_args of its class"
        return f"missing setting {name}{about}; give it as --{name}=..., or a --config file that has it"

    def _missing_inside(self, name: str, owner: str) -> str | None:
        """The line for an argument that a class, or a section in a list, lacks; None if nothing of that was written."""
        written: dict[str, tuple[str, set[str]]] = {}  # where arguments of `owner` stand -> the place, and their names
        for index, given in enumerate(self.given):
            if given.leaf == "class_path":  # what an earlier file says about that is gone
                holder = given.name.removesuffix("class_path")
                written = {section: found for section, found in written.items() if not section.startswith(holder)}
            for argument in self._arguments(given, self.given[: index + 1]):
                if argument.owner.__name__ == owner.rpartition(".")[2]:
                    written.setdefault(argument.section, (given.place, set()))[1].add(argument.name)
        for section, (place, names) in written.items():
            if name not in names:
                return f"missing setting {section}.{name}; give it beside the others{place}"
        return None

    def _arguments(self, given: Given, earlier: Sequence[Given]) -> list[Argument]:
        assert self.settings is not None
        holder = self.settings.holder(given.name)
        return list(arguments(given, holder, self.settings.types[holder], earlier)) if holder else []

    def _wrong_value(self, blamed: list[str], got: re.Match[str] | None) -> str:
        """Of the settings that jsonargparse blames, the innermost may lack the names of what it lies in."""
        assert self.settings is not None
        name, leaf = blamed[-1], blamed[-1].rpartition(".")[2]
        exact = [given for given in self.given if given.name.rstrip("+") == name]
        given = exact[-1] if exact else self._find(leaf, got[1] if got else None) or self._find(leaf, None)
        if given is None:
            inside = [one for one in self.given if one.name.startswith(blamed[0])]
            place = inside[-1].place if inside else ""
            return f"{blamed[0]}{place}: expected {in_words(self.settings.types.get(blamed[0]))}"
        hint = self.settings.types.get(given.name.rstrip("+"))
        if hint is None and (led_through := self._arguments(given, self.given)):
            hint = led_through[-1].hint
        choices = [str(c) for kind in parts_of(hint) if get_origin(kind) is Literal for c in kind.__args__]
        close = did_you_mean(str(given.value), choices) if choices and given.value is not None else ""
        return f"{given}: expected {in_words(hint)}{close}"

    def _qualified(self, text: str) -> str:
        """Put the setting's full name and place where `text` starts with `leaf=value`."""
        match = _ASSIGNMENT.fullmatch(text)
        if match is None or self.settings is None:
            return text
        value = match["value"].rstrip(":;,")
        if given := self._find(match["leaf"], value):
            return f"{given.name}={text.partition('=')[2][: len(value)]}{given.place}{text.partition('=')[2][len(value) :]}"
        names = [name for name in self.settings.names() if name.rpartition(".")[2] == match["leaf"]]
        return f"{names[0].rpartition('.')[0]}.{text}" if len(names) == 1 and "." in names[0] else text

    def _find(self, leaf: str, value: str | None) -> Given | None:
        """The last given setting of this name that has this value, settings of the parser before those inside classes."""
        assert self.settings is not None
        last = {given.name.rstrip("+"): given for given in self.given if given.leaf.rstrip("+") == leaf}
        found = [given for given in last.values() if value is None or _same(given.value, value)]
        own = [given for given in found if given.name.rstrip("+") in self.settings.types]
        return (own or found or [None])[-1]  # type: ignore[list-item]


def _same(given: Any, text: str) -> bool:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    try:
        return bool(given == value or float(given) == float(value))
    except (TypeError, ValueError):
        return str(given) == text

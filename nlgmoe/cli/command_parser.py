"""The parser of the `nlgmoe` command, with forms of options that jsonargparse does not derive from a signature."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, get_type_hints

from docstring_parser import parse as parse_docstring
from typing_extensions import override

from nlgmoe.cli.parser import OneLineParser
from nlgmoe.validation import SettingError


class text(str):  # --help shows the name
    """Type of an option that may be repeated: one text of the command line, or the list of texts in a file."""

    def __new__(cls, value: Any) -> Any:
        """Return the value unchanged; `str` would convert a list to text."""
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            return value
        raise ValueError("expected a list, each item text")


class CommandParser(OneLineParser):
    """Derives options from a function's signature.

    A required list takes one word or more, a tuple any number of words. An optional list is an option that may be repeated, a
    bool with the default False a flag without a value, a required keyword-only parameter an option. `--two-words` means
    `--two_words`; words after a bare `--` are values of `--flags`.
    """

    @override
    def add_function_arguments(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Add `function`'s parameters; their help is its docstring's."""
        types = get_type_hints(function)
        texts = {entry.arg_name: entry.description for entry in parse_docstring(function.__doc__ or "").params}
        added = set()
        for name, parameter in inspect.signature(function).parameters.items():
            if types[name] == list[str] and _is_positional(parameter):
                self.add_argument(name, nargs="+", type=str, help=texts.get(name))
            elif types[name] == tuple[str, ...]:
                self.add_argument(name, nargs="*", type=str, default=argparse.SUPPRESS, help=texts.get(name))
            elif types[name] == list[str] | None:
                self.add_argument(f"--{name}", action="append", type=text, help=texts.get(name))
            elif types[name] is bool and parameter.default is False:
                self.add_argument(f"--{name}", action="store_true", help=texts.get(name))
            elif _is_positional(parameter):
                self.add_argument(name, type=types[name], help=texts.get(name))
            elif parameter.default is parameter.empty:
                self.add_argument(f"--{name}", type=types[name], required=True, help=texts.get(name))
            else:
                continue
            added.add(name)
        return super().add_function_arguments(function, *args, **{**kwargs, "skip": added})

    @override
    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse; a dash inside an option's name means an underscore."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        options = [word.partition("=") if word.startswith("--") else (word, "", "") for word in words[:end]]
        for previous, (word, equals, value) in zip(["", *words], options, strict=False):  # such as --output=$UNSET
            name = word if equals else previous if previous.startswith("--") else "an argument"
            if (value if equals else word) == "" and name != "--prompt":
                raise SettingError(f"{name} is empty; give a value, or leave it out")
        names = Counter("--" + word[2:].replace("-", "_") for word, _, _ in options if word.startswith("--"))
        for action in self._actions:
            for name in action.option_strings:
                if names[name] > 1 and not isinstance(action, argparse._AppendAction):
                    takes_list = "list" in str(getattr(action, "_typehint", ""))
                    remedy = f"give a list, {name}='[A, B]'" if takes_list else "give it once"
                    raise SettingError(
                        f"{name} is given {names[name]} times, and only one of them would count; {remedy}"
                    )
        return super().parse_args(
            [
                ("--" + word[2:].replace("-", "_") if word.startswith("--") else word) + equals + value
                for word, equals, value in options
            ]
            + [f"--flags={word}" for word in words[end + 1 :]],
            *rest,
            **kwargs,
        )

    @override
    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Show option names with dashes, `--two-words`."""
        return re.sub(
            r"(?<![\w-])--[a-z]+(_[a-z]+)+\b", lambda match: match[0].replace("_", "-"), super().format_help()
        )

    @override
    def _check_value_key(self, action: argparse.Action, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Convert a file's value for an argument of several words: a text is one word, null is none."""
        if action.nargs in ("+", "*") and (value is None or isinstance(value, str)):
            value = [] if value is None else [value]
        return super()._check_value_key(action, value, *args, **kwargs)


def _is_positional(parameter: inspect.Parameter) -> bool:
    """Return True if the argument is positional: required and not keyword-only, or a tuple of words."""
    required = parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
    return required or "tuple[str, ...]" in str(parameter.annotation)


def name_as_typed(error: ValueError, function: Callable) -> None:
    """Rewrite `NAME=VALUE` at the start of an error's message as on the command line: `--NAME=VALUE`, or a positional VALUE."""

    def typed(message: Any) -> Any:
        name, equals, rest = str(message).partition("=")
        parameter = signature.parameters.get(name)
        if not equals or parameter is None:
            return message
        return rest if _is_positional(parameter) else f"--{name.replace('_', '-')}={rest}"

    signature = inspect.signature(function)
    error.args = tuple(map(typed, error.args))

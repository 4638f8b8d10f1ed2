"""The settings that a command line and its YAML files give, each with its place, for messages.

jsonargparse reads the same files by the same loader, but does not record where a value is, and uses the last of two equal names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_loader

from nlgmoe.cli.errors import one_line
from nlgmoe.files import expand_home
from nlgmoe.validation import SettingError

CONFIG_OPTIONS = ("--config", "-c")  # LightningCLI's
_MERGE = "tag:yaml.org,2002:merge"  # the name `<<`


class ConfigLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads files and values: numbers as jsonargparse does, dates as text, `~/` as the home folder."""


def _text(loader: Any, node: yaml.ScalarNode) -> Any:
    return expand_home(node.value)


# A number, which PyYAML takes for text, and jsonargparse does not: 1e-3
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
ConfigLoader.add_constructor("tag:yaml.org,2002:str", _text)
ConfigLoader.add_constructor("tag:yaml.org,2002:timestamp", _text)
set_loader("yaml", lambda text: yaml.load(text, Loader=ConfigLoader), (yaml.YAMLError,))


def read_value(text: str) -> Any:
    """Read a value; text that is no YAML stands for itself."""
    try:
        return yaml.load(text, Loader=ConfigLoader)
    except yaml.YAMLError:
        return text


@dataclass(frozen=True)
class Setting:
    """One setting as written."""

    name: str  # dotted, list items in brackets: `trainer.callbacks[0].class_path`
    value: Any  # as YAML reads it
    place: str = ""  # ` (FILE, line N)`; empty for the command line
    appends: bool = False  # it, or the list that contains it, is written with `+` and extends the earlier list
    word: str | None = None  # its text on the command line; None in a file, and inside another setting's value

    def __str__(self) -> str:
        dumped = yaml.safe_dump(self.value, default_flow_style=True, width=10_000).removesuffix("...\n")
        value = self.value if isinstance(self.value, str) else dumped
        return f"{self.name}={one_line(value, limit=80)}{self.place}"


def read_arguments(words: Sequence[str]) -> Iterator[tuple[int, list[Setting]]]:
    """Read `--name=value`, `--name value` and the configuration files, in their order.

    Yields:
        The index of an argument, and its settings.
    """
    rest = list(words)
    while rest:
        index = len(words) - len(rest)
        option, equals, text = rest.pop(0).partition("=")
        if not option.startswith("-"):
            raise SettingError(f"unexpected argument {words[index]}; settings are written --name=value")
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        if option in CONFIG_OPTIONS:
            yield index, list(read_file(text))
        elif option.startswith("--") and not option.endswith(".help"):
            name, appends = option[2:].removesuffix("+"), option.endswith("+")
            settings = [Setting(name, text, appends=appends)]  # plain text, unless it is YAML
            with suppress(yaml.YAMLError):
                node, loader = _compose(text)
                if node is not None:
                    settings = list(_walk(node, name, loader, "", appends=appends))
            yield index, [replace(settings[0], word=text), *settings[1:]]


def read_file(path: str) -> Iterator[Setting]:
    """Yield the settings of a configuration file, in its order."""
    if path.lstrip().startswith("{"):  # jsonargparse also accepts a configuration in place of a path
        text, path = path, "--config"
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise SettingError(f"--config {path}: {error.strerror}; name a YAML file") from error
        except UnicodeDecodeError as error:
            raise SettingError(f"--config {path} is not a text file; give a checkpoint to --ckpt_path") from error
    try:
        node, loader = _compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # a control character has none
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        reason = getattr(error, "problem", None) or one_line(str(error))
        raise SettingError(f"{path}{place} is not YAML: {reason}") from error
    if not isinstance(node, yaml.MappingNode):
        raise SettingError(f"{path} {'is empty' if node is None else 'holds no settings'}; write them as `name: value`")
    yield from _walk(node, "", loader, path)


def _compose(text: str) -> tuple[yaml.Node | None, Any]:
    loader = ConfigLoader(text)
    return loader.get_single_node(), loader


def _walk(
    node: yaml.Node, name: str, loader: Any, file: str, line: int = 0, appends: bool = False
) -> Iterator[Setting]:
    """Yield a setting as a whole, then those inside it: `class_path` first, since the others depend on it."""
    place = f" ({file}, line {line})" if file else ""
    if name:
        try:
            yield Setting(name, loader.construct_object(node, deep=True), place, appends)
        except yaml.YAMLError as error:  # an unknown tag
            if not file:
                raise
            raise SettingError(f"{name}{place}: {one_line(str(error))}") from error
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, f"{name}[{index}]", loader, file, item.start_mark.line + 1, appends)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        in_value = name.rpartition("init_args")[2].startswith(".")  # of a class's argument, whose names are its own
        for key, value in sorted(node.value, key=lambda entry: entry[0].value != "class_path"):
            if key.tag == _MERGE:
                yield from _walk(value, name, loader, file, line, appends)
                continue
            leaf, key_line = key.value.removesuffix("+"), key.start_mark.line + 1
            full = f"{name}.{leaf}".removeprefix(".")
            for other in lines if file else ():
                if other == leaf or (not in_value and f"{max(other, leaf)}.".startswith(f"{min(other, leaf)}.")):
                    again = f"{full} is given again, after line {lines[other]}; remove one"
                    raise SettingError(f"{file}, line {key_line}: {again}")
            lines[leaf] = key_line
            yield from _walk(value, full, loader, file, key_line, appends or key.value.endswith("+"))

"""The settings that a command line and its YAML files give, each with its place, for messages.

jsonargparse reads the same files, but does not record where a value is, and uses the last of two equal names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse._loaders_dumpers import get_yaml_default_loader

from nlgmoe.cli.errors import one_line
from nlgmoe.files import expand_home
from nlgmoe.validation import SettingError

ConfigLoader = get_yaml_default_loader()  # jsonargparse's own, for files and for single values
ConfigLoader.add_constructor("tag:yaml.org,2002:str", lambda loader, node: expand_home(loader.construct_scalar(node)))
_MERGE = "tag:yaml.org,2002:merge"  # the name `<<`


@dataclass(frozen=True)
class Setting:
    """One setting as written.

    Attributes:
        name: dotted, list items in brackets: `trainer.callbacks[0].class_path`.
        value: as YAML reads it.
        place: ` (FILE, line N)`; empty for the command line.
        appends: the setting, or the list that contains it, is written with `+` and extends the earlier list.
    """

    name: str
    value: Any
    place: str = ""
    appends: bool = False

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def __str__(self) -> str:
        dumped = yaml.safe_dump(self.value, default_flow_style=True, width=10_000).removesuffix("...\n")
        value = self.value if isinstance(self.value, str) else dumped
        return f"{self.name}={one_line(value, limit=80)}{self.place}"


def read_arguments(args: Sequence[str], config_options: Collection[str]) -> Iterator[tuple[int, list[Setting]]]:
    """Read `--name=value`, `--name value` and the files that `config_options` name, in their order.

    Yields:
        The index of an argument, and its settings.
    """
    rest = list(args)
    while rest:
        index = len(args) - len(rest)
        option, equals, text = rest.pop(0).partition("=")
        if not option.startswith("-"):
            continue
        if not equals and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        if option in config_options:
            yield index, list(read_file(text))
        elif equals:
            name, appends = option.lstrip("-").rstrip("+"), option.endswith("+")
            settings = [Setting(name, text, "", appends)]  # plain text, unless it is YAML
            with suppress(yaml.YAMLError):
                node, loader = _compose(text)
                if node is not None:
                    settings = list(_walk(node, name, loader, "", appends=appends))
            yield index, settings


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
        raise SettingError(
            f"{path}{place} is not YAML: {getattr(error, 'problem', None) or one_line(str(error))}"
        ) from error
    if not isinstance(node, yaml.MappingNode):
        raise SettingError(f"{path} {'is empty' if node is None else 'holds no settings'}; write them as `name: value`")
    yield from _walk(node, "", loader, path)


def _compose(text: str) -> tuple[yaml.Node | None, Any]:
    loader = ConfigLoader(text)
    return loader.get_single_node(), loader


def _walk(
    node: yaml.Node, name: str, loader: Any, file: str, line: int = 0, appends: bool = False
) -> Iterator[Setting]:
    """Yield the settings of `node`: a list or mapping as a whole, then its items."""
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
        in_value = name.rpartition("init_args")[2].startswith(".")
        for key, value in node.value:
            if key.tag == _MERGE:
                yield from _walk(value, name, loader, file, line, appends)
                continue
            full, key_line = f"{name}.{key.value}".removeprefix("."), key.start_mark.line + 1
            setting = key.value.removesuffix("+")
            for other in lines if file else ():  # the names in the value of a class's argument are its own
                inside = not in_value and f"{max(other, setting)}.".startswith(f"{min(other, setting)}.")
                if other == setting or inside:
                    raise SettingError(
                        f"{file}, line {key_line}: {full} is given again, after line {lines[other]}; remove one"
                    )
            lines[setting] = key_line
            yield from _walk(value, full.removesuffix("+"), loader, file, key_line, appends or key.value.endswith("+"))

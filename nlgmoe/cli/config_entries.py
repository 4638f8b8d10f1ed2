"""The settings that a command line and its `--config` files give, each with its file and line, for messages.

jsonargparse reads the same files, but forgets where a value is from, and takes the last of two equal keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse._loaders_dumpers import get_yaml_default_loader

from nlgmoe.cli.errors import UsageError, one_line
from nlgmoe.files import expand_home, require_regular

MAX_NODES = 100_000  # of a file; it is walked several times
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_COLLECTIONS = (f"{_TAG}map", f"{_TAG}seq")
ConfigLoader = get_yaml_default_loader()  # jsonargparse's own, for files and for single values
# Numbers as in YAML 1.2: 0640 is 640, 1:30 is text. `.nan` and `.inf` are text too, which no setting of a number takes, and so
# is a number that begins or ends with `_`.
_DIGITS = "[0-9]{1,99}(_[0-9]{1,99}){0,9}"  # Python converts no more than 4,300 digits
_NUMBERS = {
    f"{_TAG}int": re.compile(rf"([-+]?{_DIGITS}|0x[0-9a-fA-F]+)$"),
    f"{_TAG}float": re.compile(rf"[-+]?({_DIGITS}(\.({_DIGITS})?)?|\.{_DIGITS})([eE][-+]?[0-9]+)?$"),
}
ConfigLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in known if tag not in _NUMBERS]
    for letter, known in ConfigLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    ConfigLoader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
    yaml.SafeDumper.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))  # writes text that looks so in quotes
ConfigLoader.add_constructor(f"{_TAG}str", lambda loader, node: expand_home(loader.construct_scalar(node)))
ConfigLoader.add_constructor(f"{_TAG}int", lambda _, node: int(node.value, 16 if node.value.startswith("0x") else 10))


@dataclass(frozen=True)
class ConfigEntry:
    """One setting as written.

    Attributes:
        name: dotted, list items in brackets: `trainer.callbacks[0].class_path`.
        value: as YAML reads it.
        file: path of the file that it is in; empty for the command line.
        line: of that file.
        appends: it, or the list it is in, is written with `+`, and adds to the earlier list.
    """

    name: str
    value: Any
    file: str = ""
    line: int = 0
    appends: bool = False

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def place(self) -> str:
        """` (FILE, line N)`; empty for the command line."""
        return f" ({self.file}, line {self.line})" if self.file else ""

    def __str__(self) -> str:
        dumped = yaml.safe_dump(self.value, default_flow_style=True, width=10_000).removesuffix("...\n")
        value = self.value if isinstance(self.value, str) else dumped
        return f"{self.name}={one_line(value, limit=80)}{self.place}"


def read_arguments(args: Sequence[str], config_options: Collection[str]) -> Iterator[tuple[int, list[ConfigEntry]]]:
    """Read `--name=value`, `--name value` and the files that `config_options` name, in the order in which they count.

    Yields:
        The index of an argument, and what it gives.

    Raises:
        UsageError: as `read_file`.
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
            yield index, read_file(text) if equals else []
        elif equals:
            try:
                node = yaml.compose(text, Loader=ConfigLoader)
            except (yaml.YAMLError, UnicodeEncodeError):  # plain text
                node = None
            node = node or yaml.ScalarNode(f"{_TAG}str", text)
            yield (
                index,
                list(_walk(node, ConfigEntry(option.lstrip("-").rstrip("+"), None, appends=option.endswith("+")))),
            )


def read_file(path: str) -> list[ConfigEntry]:
    """Read the settings of a configuration file, in its order.

    Raises:
        UsageError: there is no such file, it is not YAML or JSON, not a mapping, or names a setting twice.
    """
    if path.lstrip().startswith("{"):  # jsonargparse takes a configuration in place of a path too
        return _read(path, "--config")
    file = Path(path)
    if not path:
        raise UsageError("--config has no value; write --config=FILE.yaml")
    if not file.exists():
        near = f"; {file.parent} does not exist either" if not file.parent.exists() else ""
        raise UsageError(f"--config {path}: there is no such file{near}")
    if file.is_dir():
        checkpoint = (file / "checkpoint.json").exists()
        remedy = "give a checkpoint to --ckpt_path" if checkpoint else "name a YAML file in it"
        raise UsageError(f"--config {path} is a folder, not a configuration; {remedy}")
    try:
        require_regular(file, "it is read more than once: save it as a YAML file")
    except ValueError as error:
        raise UsageError(f"--config {error}") from error
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} is not a text file; give a checkpoint to --ckpt_path") from error
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    return _read(text, path)


def _read(text: str, path: str) -> list[ConfigEntry]:
    try:
        root = yaml.compose(text, Loader=ConfigLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        tab = "; indent with blanks, not with tabs" if "\\t" in str(error.problem) or _tab_at(text, mark) else ""
        problem = f"{error.context or ''} {error.problem}" if str(error.problem).startswith("but ") else error.problem
        raise UsageError(f"{path}{place} is not YAML: {problem}{tab}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {one_line(str(error))}") from error
    if root is None:
        raise UsageError(f"{path} is empty; write settings such as `model:` and `trainer:` into it")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise UsageError(f"{path} holds {kind}, not settings; write `name: value` lines, such as `trainer:`")
    if _size(root, {}) > MAX_NODES:
        raise UsageError(f"{path} has more than {MAX_NODES:,} values, counting what its anchors repeat; write fewer")
    return list(_walk(root, ConfigEntry("", None, path)))


def _tab_at(text: str, mark: yaml.Mark | None) -> bool:
    lines = text.splitlines()
    return mark is not None and mark.line < len(lines) and lines[mark.line][mark.column : mark.column + 1] == "\t"


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the values that a node stands for, what its aliases repeat included; infinite for one that contains itself.

    Args:
        node: of YAML.
        known: sizes of the nodes that have been met, by their `id`; is added to.
    """
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is left: met again before, it contains itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def _walk(node: yaml.Node, entry: ConfigEntry) -> Iterator[ConfigEntry]:
    """Yield the entries that `node`, the value of `entry`, consists of."""
    if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
        raise UsageError(
            f"{entry.name}{entry.place}: {node.tag.removeprefix(_TAG)} is no value of a setting; write a list or a mapping"
        )
    if isinstance(node, yaml.MappingNode) and node.value:
        yield from _walk_mapping(node, entry)
    elif isinstance(node, yaml.SequenceNode) and any(isinstance(item, yaml.MappingNode) for item in node.value):
        for index, item in enumerate(node.value):
            yield from _walk(item, replace(entry, name=f"{entry.name}[{index}]", line=item.start_mark.line + 1))
    else:
        loader = ConfigLoader("")
        try:
            yield replace(entry, value=loader.construct_object(node, deep=True))
        except yaml.MarkedYAMLError as error:  # an unknown tag
            raise UsageError(f"{entry.name}{entry.place}: {error.problem}") from error
        finally:
            loader.dispose()


def _walk_mapping(node: yaml.MappingNode, entry: ConfigEntry) -> Iterator[ConfigEntry]:
    _check_names(node, entry)
    for key, value in node.value:
        if key.tag == _MERGE:
            for other in _merged(value):
                yield from _walk(other, entry)
            continue
        name = f"{entry.name}.{key.value}".removeprefix(".")
        appends = entry.appends or name.endswith("+")
        line = key.start_mark.line + 1
        yield from _walk(value, replace(entry, name=name.removesuffix("+"), line=line, appends=appends))


def _check_names(node: yaml.MappingNode, entry: ConfigEntry) -> None:
    """Check that no two names of a mapping stand for one setting, or for a setting and its section.

    jsonargparse takes one of them: the later of equal ones, `x+` in place of `x`, a section in place of `section.x` before it.
    The names in the value of a class's argument are its own, whatever dots they have.

    Raises:
        UsageError: two do; only the equal name of a merged mapping may stand again.
    """
    in_value = entry.name.rpartition("init_args")[2].startswith(".")
    settings: dict[str, tuple[str, int, bool]] = {}
    sections: dict[str, tuple[str, int, bool]] = {}  # those of dotted names
    for name, line, merged in _names(node, entry.file):
        setting = name if in_value else name.removesuffix("+")
        outer = [] if in_value else [setting[: dot.start()] for dot in re.finditer(r"\.", setting)]
        found = settings.get(setting) or sections.get(setting) or next(filter(None, map(settings.get, outer)), None)
        if found is not None and not (found[0] == name and (merged or found[2])):
            this, other = (f"{entry.name}.{one}".removeprefix(".") for one in (name, found[0]))
            why = f"beside {other} (line {found[1]}), and one of them would be lost; write them as one"
            if this == other:
                why = f"again, after line {found[1]}; remove one"
            raise UsageError(f"{entry.file}, line {line}: {this} stands here {why}")
        if not (merged and setting in settings):
            settings[setting] = name, line, merged
        sections |= dict.fromkeys(outer, (name, line, merged))


def _names(node: yaml.MappingNode, file: str, merged: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yield each name of a mapping, its line, and whether it is that of a merged one."""
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{file}, line {line}: a setting's name is plain text, not a list or a mapping")
        if key.tag != _MERGE:
            yield key.value, line, merged
            continue
        for other in _merged(value):
            if isinstance(other, yaml.MappingNode):
                yield from _names(other, file, merged=True)


def _merged(value: yaml.Node) -> list[yaml.Node]:
    """Return the mappings of `<<: *other` or `<<: [*one, *other]`."""
    return value.value if isinstance(value, yaml.SequenceNode) else [value]

"""What the user wrote: every setting of the command line and of its `--config` files, with the place where it stands.

jsonargparse reads the same files again. It forgets where a value came from and takes the last of two equal keys, so
that its messages cannot say which line to change; this reading is for the messages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nlgmoe.cli.errors import UsageError, one_line
from nlgmoe.files import require_regular

_MERGE = "tag:yaml.org,2002:merge"
MAX_NODES = 100_000  # of a file; it is walked several times
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OCTAL = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]+")  # one digit, such as in 07, means the same in base 10


@dataclass(frozen=True)
class Given:
    """One setting as written.

    Attributes:
        name: dotted, list items in brackets: `trainer.callbacks[0].class_path`.
        value: as YAML reads it.
        origin: `FILE, line N`, or empty for the command line.
        appends: it, or the list it lies in, is written with `+`: it adds to what is there.
        misread: a number in it as written, if YAML takes it for another one; empty if there is none.
    """

    name: str
    value: Any
    origin: str = ""
    appends: bool = False
    misread: str = ""

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def place(self) -> str:
        """The origin in parentheses, behind a blank; empty for the command line."""
        return f" ({self.origin})" if self.origin else ""

    def __str__(self) -> str:
        return f"{self.name}={shown(self.value)}{self.place}"


def shown(value: Any) -> str:
    """A value as it is written in YAML, shortened."""
    return one_line(yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n"), limit=80)


def from_argument(name: str, text: str) -> Given:
    """`--name=text` of the command line."""
    try:
        value, misread = yaml.safe_load(text), _misread(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError:
        value, misread = text, ""
    return Given(name, value, appends=name.endswith("+"), misread=misread)


def read_file(path: str) -> list[Given]:
    """The settings of a configuration file, in its order.

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


def _read(text: str, path: str) -> list[Given]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
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
    return list(_walk(root, "", path))


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Values that a node stands for, what its aliases repeat included; infinite for one that contains itself.

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


def _tab_at(text: str, mark: yaml.Mark | None) -> bool:
    lines = text.splitlines()
    return mark is not None and mark.line < len(lines) and lines[mark.line][mark.column : mark.column + 1] == "\t"


def _walk(node: yaml.MappingNode, prefix: str, path: str) -> Iterator[Given]:
    seen: dict[str, int] = {}
    for key, value in sorted(node.value, key=lambda pair: pair[0].value != "class_path"):  # it says what the rest means
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{path}, line {line}: a setting's name is plain text, not a list or a mapping")
        if key.tag == _MERGE:  # `<<: *other`
            others = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for other in others:
                yield from _walk(other, prefix, path)
            continue
        name = f"{prefix}.{key.value}" if prefix else str(key.value)
        if name in seen:
            raise UsageError(f"{path}, line {line}: {name} stands here again, after line {seen[name]}; remove one")
        seen[name] = line
        for given in _walk_value(value, name.removesuffix("+"), path, line):
            yield replace(given, appends=True) if name.endswith("+") else given


def _walk_value(value: yaml.Node, name: str, path: str, line: int) -> Iterator[Given]:
    if isinstance(value, yaml.MappingNode) and value.value:
        yield from _walk(value, name, path)
    elif isinstance(value, yaml.SequenceNode) and any(isinstance(item, yaml.MappingNode) for item in value.value):
        for index, item in enumerate(value.value):
            yield from _walk_value(item, f"{name}[{index}]", path, item.start_mark.line + 1)
    else:
        loader = yaml.SafeLoader("")
        try:
            found = loader.construct_object(value, deep=True)
            yield Given(name, found, f"{path}, line {line}", misread=_misread(value))
        except (yaml.MarkedYAMLError, ValueError) as error:  # an unknown tag, or an impossible date
            problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
            raise UsageError(f"{path}, line {line}: {name}: {problem}") from error
        finally:
            loader.dispose()


def _misread(node: yaml.Node | None) -> str:
    """A number in a value that YAML reads as octal (`0640` is 416) or in base 60 (`1:30` is 90); empty if there is none."""
    if isinstance(node, yaml.SequenceNode):
        return next(filter(None, map(_misread, node.value)), "")
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _NUMBERS:
        return ""
    return node.value if ":" in node.value or _OCTAL.fullmatch(node.value) else ""


def split_arguments(
    args: Sequence[str], flags: frozenset[str], config: tuple[str, ...]
) -> tuple[list[Given], list[str], list[str]]:
    """Read `--name=value` and `--name value`.

    Args:
        args: the arguments of one (sub)command.
        flags: options that take no value.
        config: names of the option whose value is a configuration file.

    Returns:
        The settings, in the order in which they count; the options without value; what is no option.
    """
    given: list[Given] = []
    bare: list[str] = []
    loose: list[str] = []
    rest = list(args)
    while rest:
        option = rest.pop(0)
        if not option.startswith("-") or option == "-":
            loose.append(option)
            continue
        option, equals, text = option.partition("=")
        if not equals:
            if option in flags or not rest or rest[0].startswith("--"):
                bare.append(option)
                continue
            text = rest.pop(0)
        given += read_file(text) if option in config else [from_argument(option.lstrip("-"), text)]
    return given, bare, loose

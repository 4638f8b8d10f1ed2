"""The arguments of an `nlgmoe` command: read as its function describes them, and checks that commands share.

Output files are written completely or not at all.
"""

from __future__ import annotations

import argparse
import inspect
import json
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring

from nlgmoe.cli.errors import did_you_mean, import_module
from nlgmoe.files import atomic_write, expand_home, yaml_beside
from nlgmoe.validation import RunError, SettingError, require


class CommandParser(argparse.ArgumentParser):
    """Reads the arguments of a function.

    A required parameter is a positional argument unless it is keyword-only; a list takes one word or more, a tuple any number.
    All others are options: an optional list may be repeated, `str | list[str]` takes one word or more, a bool has no value.
    """

    def __init__(self, name: str, function: Callable) -> None:
        described, hints = parse_docstring(function.__doc__ or ""), get_type_hints(function)
        texts = {entry.arg_name: entry.description or "" for entry in described.params}
        super().__init__(
            f"nlgmoe {name}",
            description="\n\n".join(filter(None, (described.short_description, described.long_description))),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.options = ["--help"]
        for key, parameter in inspect.signature(function).parameters.items():
            options = _options(hints[key]) | {"help": texts[key].replace("%", "%%")}
            required = parameter.default is parameter.empty
            if hints[key] == tuple[str, ...] or (required and parameter.kind is not parameter.KEYWORD_ONLY):
                self.add_argument(key, **options)
                continue
            if not required:
                options["default"] = parameter.default
            if options.get("default") is not None and options["default"] is not False:
                options["help"] += " (default: %(default)s)"
            option = f"--{key.replace('_', '-')}"
            self.options.append(option)
            self.add_argument(option, dest=key, required=required, **options)

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the arguments by name."""
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in self.options:
                if close := did_you_mean(option, self.options):
                    raise SettingError(f"unknown option {option}{close}")
                self.error(f"unknown option {option}")
        return vars(self.parse_intermixed_args(words))

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise SettingError(f"{message}; {self.prog} --help explains the arguments")


def _options(hint: Any) -> dict[str, Any]:
    is_union = get_origin(hint) in (Union, types.UnionType)
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if is_union else [hint]
    if get_origin(kinds[0]) is Literal:
        return {"choices": get_args(kinds[0])}
    if hint is bool:
        return {"action": "store_true"}
    if hint == tuple[str, ...]:
        return {"nargs": "*", "type": expand_home}
    if hint == list[str]:
        return {"nargs": "+", "type": expand_home}
    if kinds == [str, list[str]]:
        return {"nargs": "+", "action": "extend", "type": expand_home}
    if kinds == [list[str]]:
        return {"action": "append"}
    if kinds == [int, list[int]]:
        return {"type": number_or_list}
    return {"type": expand_home if kinds == [str] else kinds[0]}


def number_or_list(text: str) -> int | list[int]:
    """Read `8` or `[8, 16]`."""
    value: int | list[int] = json.loads(text)
    if not all(type(number) is int for number in (value if isinstance(value, list) else [value])):
        raise ValueError(f"{text} is neither a whole number nor a list of them")
    return value


def check_output(output: str) -> None:
    """Check that a new file can have this name."""
    path = Path(output)
    require(not path.is_dir(), f"output={output} is a folder; give the name of a file")
    require(not path.exists(), f"output={output} exists already; name another file, or delete it")
    require_folder(path)


def require_folder(output: Path) -> None:
    """Check that the folder of a file to write exists."""
    if not output.absolute().parent.is_dir():
        raise SettingError(f"output={output}: there is no folder {output.absolute().parent}; make it first")


def write_whole(output: str, text: str) -> None:
    """Write a new file under a temporary name, then rename it; an existing file stays if that fails."""
    try:
        with atomic_write(Path(output)) as temporary:
            temporary.write_text(text, encoding="utf-8")
            check_output(output)
    except OSError as error:
        raise RunError(f"output={output} cannot be written ({error.strerror}); make room, or name another") from error


def check_new_checkpoint(setting: str, checkpoint: str, overwrite: bool) -> None:
    """Check that a checkpoint and its `NAME.yaml` can be written, before anything is computed for them.

    `setting` is the name of the argument, `checkpoint` its value.
    """
    path = Path(checkpoint)
    require(path.suffix == ".ckpt", f"{setting}={checkpoint} does not end in .ckpt; name it {path.name}.ckpt")
    require(not path.is_file(), f"{setting}={checkpoint} is a file; a checkpoint is a folder: name another")
    if path.exists() and not overwrite:
        raise SettingError(f"{setting}={checkpoint} exists already; name another, or add --overwrite")
    if yaml_beside(path).exists() and not overwrite:
        problem = f"{setting}={checkpoint}: {yaml_beside(path)} beside it exists already"
        raise SettingError(f"{problem}; name another, or add --overwrite")


def check_device(device: str) -> None:
    """Check that tensors can be created on the device."""
    import torch

    try:
        torch.empty(1, device=device).tolist()  # raises for `meta`, which has no values
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise SettingError(f"device={device} cannot be used here ({reason}); set it to cpu") from error


def import_allowed(modules: Sequence[str] | None) -> None:
    """Import modules that the user trusts, for checkpoints that name their classes."""
    for module in modules or ():
        import_module(module, "start in its folder, or correct --allow-code")

"""The arguments that Megatron prints in its log, or saves in a checkpoint -> the flags that they come from.

All of Megatron's arguments are there, given or not. A value that is Megatron's default counts as not given.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from nlgmoe.tools.megatron.arguments import is_count
from nlgmoe.tools.megatron.flags import FLAGS, Flag
from nlgmoe.tools.megatron.launch import Launch
from nlgmoe.validation import SettingError

_BLOCK = re.compile(r"-{5,} arguments -{5,}\n(.*?)-{5,} end of arguments -{5,}", re.DOTALL)  # `_print_args`
_LINE = re.compile(r"\b(\w+) \.+ (.*?)\s*$", re.MULTILINE)  # a launcher may put the rank in front
_COLOUR = re.compile(r"\x1b\[[\d;]*m")  # of a launcher's prefix
# Megatron's defaults that the table of flags does not need.
_DEFAULTS = {
    "initial_loss_scale": "4294967296",
    "loss_scale_window": "1000",
    "zero_stage": "1.0",
    "num_experts_teacher": "[1]",
    "distributed_timeout_minutes": "10",
    "rotary_percent": "1.0",
}


def read_log(path: Path) -> Launch:
    """Read the last argument block of a log."""
    blocks = _BLOCK.findall(_COLOUR.sub("", path.read_text(encoding="utf-8", errors="replace")))
    if not blocks:
        raise SettingError(
            f"{path} has no argument block of Megatron's. If it is a launch script: --run-script runs it under bash and "
            "records what it launches. Otherwise give the log of a run, a checkpoint's folder, or the flags after --"
        )
    _require_whole_lines(blocks[-1], path)
    return _launch(dict(_LINE.findall(blocks[-1])), path.name, path.stem)


def _require_whole_lines(block: str, path: Path) -> None:
    """Check that the log was not wrapped, as by a terminal that it was copied from: a value would be cut."""
    lines = block.splitlines()
    width = max(map(len, lines), default=0)
    for before, line in pairwise(lines):
        rest = line.strip()
        is_rest = rest and not _LINE.search(line) and (" " not in rest or rest.endswith("]"))
        if len(before) == width and is_rest and _LINE.search(before):
            raise SettingError(
                f"{path}: its lines are wrapped at {width} characters, and {rest} is the rest of one; give the log as it was "
                "written"
            )


def read_checkpoint(path: Path) -> Launch:
    """Read the arguments of a Megatron-DeepSpeed checkpoint; nothing in its files is run."""
    from nlgmoe.tools.megatron.checkpoint.source import find_folder, read_dense  # need torch

    args = vars(read_dense(find_folder(path)).args)
    return _launch({name: str(value) for name, value in args.items()}, path.name, path.resolve().name)


def _launch(values: Mapping[str, str], source: str, name: str) -> Launch:
    flags, known = [], {"world_size"}
    for flag, row in FLAGS.values():
        argument = flag.name.lstrip("-").replace("-", "_")
        positive = re.sub("^(no|disable)_", "", argument)
        known |= {argument, positive, f"add_{positive}", f"apply_{positive}"}
        if flag.parse is None:
            opposites = (positive, f"add_{positive}", f"apply_{positive}") if positive != argument else ()
            if values.get(argument) == "True" or any(values.get(opposite) == "False" for opposite in opposites):
                flags.append(flag.name)
        elif row.kind != "ignored" or flag.allowed:
            flags += _valued(flag, argument, values)
    count = len(values.keys() - known)
    note = f"{count} other arguments of {source} are in no table and were passed over."
    return Launch(source, name, [], flags, {"world_size": values.get("world_size", "")}, notes=[note])


def _valued(flag: Flag, argument: str, values: Mapping[str, str]) -> list[str]:
    """Return the words of a flag with values; none if it has Megatron's default, or the value that Megatron derives for it."""
    value = values.get(argument, "None")
    if value in ("None", "", _DEFAULTS.get(argument), _derived(argument, values)):
        return []
    try:
        words = [str(item) for item in ast.literal_eval(value)] if value.startswith("[") else [value]
    except (SyntaxError, ValueError) as error:
        raise SettingError(
            f"{argument} {value} is no list; give the log as it was written, without wrapped lines"
        ) from error
    try:
        parsed = [flag.parse(word) for word in words] if flag.parse else []
    except ValueError:  # is reported with the other problems
        parsed = []
    return [] if parsed == (flag.default if flag.many else [flag.default]) else [flag.name, *words]


def _derived(argument: str, values: Mapping[str, str]) -> str | None:
    """Return the value that Megatron fills in where an argument is not given (`parse_args`, `validate_args`)."""
    heads, hidden = values.get("num_attention_heads", ""), values.get("hidden_size", "")
    if argument in ("start_weight_decay", "end_weight_decay"):
        return values.get("weight_decay")
    if argument == "num_key_value_heads":
        return heads
    if argument == "ffn_hidden_size" and is_count(hidden):
        return str(4 * int(hidden))
    if argument == "kv_channels" and is_count(hidden) and is_count(heads) and int(heads):
        return str(int(hidden) // int(heads))
    return None

"""`nlgmoe from-megatron`: translate a launch of Megatron-DeepSpeed into a configuration.

A launch is read from its words, from the arguments that Megatron prints in its log, or from those that it saves in a checkpoint.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from nlgmoe.cli.arguments import check_output, write_whole
from nlgmoe.tools.megatron.flags import FLAGS, IGNORED, ROWS, Arguments
from nlgmoe.validation import SettingError

_ENTRY_POINT = re.compile(r"(.*/)?pretrain_gpt\w*\.py")
_BLOCK = re.compile(r"-{5,} arguments -{5,}\n(.*?)-{5,} end of arguments -{5,}", re.DOTALL)  # `_print_args`
_LINE = re.compile(r"\b(\w+) \.+ (.*?)\s*$", re.MULTILINE)  # a launcher may put the rank in front
_COLOUR = re.compile(r"\x1b\[[\d;]*m")  # of a launcher's prefix


@dataclass
class Launch:
    """A launch of Megatron-DeepSpeed.

    Attributes:
        source: its origin, for messages and the header of the YAML.
        words: flags and their values, the launcher's before Megatron's.
        name: of the run folder where no flag gives one.
        notes: sentences for the header.
    """

    source: str
    words: list[str]
    name: str = "megatron"
    notes: list[str] = field(default_factory=list)


def from_megatron(
    source: tuple[str, ...] = (),
    flags: list[str] | None = None,
    output: str | None = None,
    skip_unknown: bool = False,
) -> None:
    """Translate a launch of Megatron-DeepSpeed into YAML for `train.py fit --config`.

    Each flag becomes a setting, is listed in the header with the reason why it needs none, or is refused. Megatron's defaults
    are written as settings. The GPUs are those of the launcher's flags; without them, add a file of configs/hardware.

        nlgmoe from-megatron -- deepspeed --num_gpus 8 pretrain_gpt.py --num-layers 24 ...
        nlgmoe from-megatron train.log
        nlgmoe from-megatron checkpoints/global_step1000

    Args:
        source: a log with the arguments that Megatron prints, or a checkpoint's folder.
        flags: Megatron's flags, or the whole command from deepspeed on; write them after a bare --, without --flags.
        output: file to write; default: standard output.
        skip_unknown: list unknown flags in the header instead of refusing them.
    """
    if output is not None:
        check_output(output)
    text = translated(read_launch(source, flags or []), skip_unknown)
    if output is None:
        print(text, end="")
    else:
        write_whole(output, text)
        print(f"{output}: read its comments, then train with python train.py fit --config {quote(output)}")


def translated(launch: Launch, skip_unknown: bool = False) -> str:
    """Translate a launch into YAML."""
    from nlgmoe.tools.megatron.translate import translate

    arguments = Arguments(launch.words, skip_unknown)
    text = translate(arguments, launch.source, launch.name, launch.notes)
    if arguments.problems:
        raise SettingError("\n".join(f"{launch.source}: {line}" for line in arguments.problems))
    return text


def read_launch(source: Sequence[str], words: Sequence[str]) -> Launch:
    """Read a launch from a log, a checkpoint's folder, or words."""
    if len(source) + bool(words) != 1:
        raise SettingError("give one of these: a log, a checkpoint's folder, flags after --")
    if words:
        return Launch("the command line", split_command(words))
    path = Path(source[0])
    if not path.exists():
        raise SettingError(f"{path} is not there; give a log, a checkpoint's folder, or flags after --")
    return read_checkpoint(path) if path.is_dir() else read_log(path)


def split_command(words: Sequence[str]) -> list[str]:
    """Return the flags of a command: those of its launcher that are in the table, and Megatron's."""
    at = [index for index, word in enumerate(words) if _ENTRY_POINT.fullmatch(word)]
    if not at:
        return list(words)
    launcher = Arguments([word for word in words[: at[0]] if word != "-m"], skip_unknown=True).given
    return [word for name, values in launcher.items() for word in (name, *values)] + list(words[at[0] + 1 :])


def read_log(path: Path) -> Launch:
    """Read the last argument block of a log."""
    blocks = _BLOCK.findall(_COLOUR.sub("", path.read_text(encoding="utf-8", errors="replace")))
    if not blocks:
        raise SettingError(
            f"{path} has no argument block of Megatron's; give the log of a run, a checkpoint's folder, or the flags after -- "
            "(docs/megatron_flags.md shows how a script prints them)"
        )
    return _from_arguments(dict(_LINE.findall(blocks[-1])), path.name, path.stem)


def read_checkpoint(path: Path) -> Launch:
    """Read the arguments of a Megatron-DeepSpeed checkpoint; nothing in its files is run."""
    from nlgmoe.tools.megatron.checkpoint.source import find_folder, read_dense  # need torch

    args = vars(read_dense(find_folder(path)).args)
    return _from_arguments({name: str(value) for name, value in args.items()}, path.name, path.resolve().name)


def _from_arguments(values: Mapping[str, str], source: str, name: str) -> Launch:
    known = {argument_name(flag) for flag in FLAGS} | {"world_size"}
    others = sorted(values.keys() - known)
    names = ", ".join(others[:20]) + (", ..." if len(others) > 20 else "")
    notes = [f"{len(others)} other arguments of {source} are in no table and were passed over: {names}."]
    if world := values.get("world_size"):
        notes.append(
            f"The run had {world} GPUs; add a file of configs/hardware, or trainer.devices and trainer.num_nodes."
        )
    flags = [flag for flag, row in ROWS.items() if row.section != IGNORED or "allowed" in FLAGS[flag]]
    return Launch(source, words_of(values, [*flags, "--deepspeed", "--no-bias-gelu-fusion"]), name, notes)


def words_of(values: Mapping[str, str], flags: Collection[str]) -> list[str]:
    """Return the flags, among `flags`, that a run was given; a value that is Megatron's default counts as not given.

    Args:
        values: argument -> its value as text; all of Megatron's arguments, given or not.
        flags: names of flags of the table.
    """
    words = []
    for flag in flags:
        keys, value = FLAGS[flag], values.get(argument_name(flag), "None")
        if "type" not in keys:
            words += [flag] if value == ("False" if "argument" in keys else "True") else []
        elif value not in ("None", "", keys.get("printed"), _filled_in(argument_name(flag), values)):
            given = _items(argument_name(flag), value)
            default = keys.get("default")
            if not _equal(given, default if isinstance(default, list) else [default]):
                words += [flag, *given]
    return words


def argument_name(flag: str) -> str:
    """Return the name of a flag among Megatron's arguments."""
    return str(FLAGS[flag].get("argument") or flag.lstrip("-").replace("-", "_"))


def _items(argument: str, value: str) -> list[str]:
    if not value.startswith("["):
        return [value]
    try:
        return [str(item) for item in ast.literal_eval(value)]
    except (SyntaxError, ValueError) as error:
        raise SettingError(
            f"{argument} {value} is no list; give the log as it was written, without wrapped lines"
        ) from error


def _equal(words: Sequence[str], default: Sequence[object]) -> bool:
    """Return True if the words are the default; numbers are compared as such."""
    try:
        return [type(value)(word) for word, value in zip(words, default, strict=True)] == list(default)  # type: ignore[call-arg]
    except (TypeError, ValueError):
        return False


def _filled_in(argument: str, values: Mapping[str, str]) -> str | None:
    """Return the value that Megatron fills in where an argument is not given (`parse_args`, `validate_args`)."""
    heads, hidden = values.get("num_attention_heads", ""), values.get("hidden_size", "")
    if argument in ("start_weight_decay", "end_weight_decay"):
        return values.get("weight_decay")
    if argument == "num_key_value_heads":
        return heads
    if argument == "ffn_hidden_size" and hidden.isdecimal():
        return str(4 * int(hidden))
    if argument == "kv_channels" and hidden.isdecimal() and heads.isdecimal() and int(heads):
        return str(int(hidden) // int(heads))
    return None

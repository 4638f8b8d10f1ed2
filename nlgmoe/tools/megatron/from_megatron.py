"""`nlgmoe from-megatron`: translate the words of a launch of Megatron-DeepSpeed into a configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from shlex import quote

from nlgmoe.cli.arguments import check_output, write_whole
from nlgmoe.tools.megatron.flags import Arguments
from nlgmoe.validation import SettingError

_ENTRY_POINT = re.compile(r"(.*/)?pretrain_gpt\w*\.py")


def from_megatron(flags: list[str] | None = None, output: str | None = None, skip_unknown: bool = False) -> None:
    """Translate a launch of Megatron-DeepSpeed into YAML for `train.py fit --config`.

    Each flag becomes a setting, is listed in the header with the reason why it needs none, or is refused. Megatron's defaults
    are written as settings. The GPUs are those of the launcher's flags; without them, add a file of configs/hardware.

        nlgmoe from-megatron -- deepspeed --num_gpus 8 pretrain_gpt.py --num-layers 24 ...

    Args:
        flags: Megatron's flags, or the whole command from deepspeed on; write them after a bare --, without --flags.
        output: file to write; default: standard output.
        skip_unknown: list unknown flags in the header instead of refusing them.
    """
    if not flags:
        raise SettingError("give the flags of the launch after --, or its whole command from deepspeed on")
    if output is not None:
        check_output(output)
    text = translated(flags, skip_unknown)
    if output is None:
        print(text, end="")
    else:
        write_whole(output, text)
        print(f"{output}: read its comments, then train with nlgmoe fit --config {quote(output)}")


def translated(words: Sequence[str], skip_unknown: bool = False) -> str:
    """Translate a launch into YAML."""
    from nlgmoe.tools.megatron.translate import translate

    arguments = Arguments(split_command(words), skip_unknown)
    text = translate(arguments)
    if arguments.problems:
        raise SettingError("\n".join(arguments.problems))
    return text


def split_command(words: Sequence[str]) -> list[str]:
    """Return the flags of a command: those of its launcher that are in the table, and Megatron's."""
    at = [index for index, word in enumerate(words) if _ENTRY_POINT.fullmatch(word)]
    if not at:
        return list(words)
    launcher = Arguments([word for word in words[: at[0]] if word != "-m"], skip_unknown=True).given
    return [word for name, values in launcher.items() for word in (name, *values)] + list(words[at[0] + 1 :])

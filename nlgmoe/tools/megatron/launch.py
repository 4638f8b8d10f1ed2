"""A launch of Megatron-DeepSpeed: the launcher's words, Megatron's flags, and what else is known of the run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from nlgmoe.validation import SettingError

_ENTRY_POINT = re.compile(r"(.*/)?pretrain_gpt\w*\.py")


@dataclass
class Launch:
    """A launch.

    Attributes:
        source: its origin, for messages and the YAML's header.
        name: of the run folder where no flag gives one.
        launcher: the words before the entry point, such as `deepspeed --num_gpus 8`; empty where they are not known.
        flags: the words after the entry point.
        variables: shell variables that count GPUs or hold the ZeRO stage in the tutorial's scripts; `world_size` of a log.
        deepspeed_config: text of DeepSpeed's configuration; None where it is not known.
        substitutions: `sed`'s, placeholder -> value, for a template of that configuration which is not there.
        notes: sentences for the YAML's header.
    """

    source: str
    name: str
    launcher: list[str]
    flags: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    deepspeed_config: str | None = None
    substitutions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read_deepspeed_config(self, folder: Path) -> None:
        """Read the file of `--deepspeed_config`, relative to a folder, if it is there and not empty."""
        words = [part for word in self.flags for part in word.split("=", 1)]
        for name, value in pairwise(words):
            if name == "--deepspeed_config" and (folder / value).is_file():
                try:
                    self.deepspeed_config = (folder / value).read_text(encoding="utf-8").strip() or None
                except UnicodeDecodeError as error:
                    raise SettingError(f"--deepspeed_config {value} is no text in UTF-8; convert it") from error


def split_command(words: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Cut a command at pretrain_gpt.py into the launcher's words and Megatron's flags; None if it launches nothing.

    The command may be one word of another, as in `srun bash -c "torchrun pretrain_gpt.py ..."`.
    """
    flat: list[str] = []
    for word in words:
        nested = " " in word and _ENTRY_POINT.search(word) and not _ENTRY_POINT.fullmatch(word)
        try:
            flat += shlex.split(word) if nested else [word]
        except ValueError as error:
            raise SettingError(f"the command in {word!r} is not one ({error}); correct its quotes") from error
    for index, word in enumerate(flat):
        if _ENTRY_POINT.fullmatch(word) and any(flag.startswith("--") for flag in flat[index + 1 :]):
            return flat[:index], flat[index + 1 :]
    return None

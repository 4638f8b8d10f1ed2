"""A translation in progress: the flags, the values that several settings need, and the settings so far."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from nlgmoe.tools.megatron.deepspeed_config import DeepSpeedConfig, read_deepspeed_config
from nlgmoe.tools.megatron.flags import ROWS, TABLE, Arguments

DEFAULT = "Megatron-DeepSpeed's default"


class Settings:
    """Nested settings with comments, filled from flags.

    Args:
        arguments: flags of the launch; what cannot be translated is added to their problems.

    Attributes:
        tree: nested settings, in the order of the YAML.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.tree: dict[str, Any] = {"model": {}, "data": {}, "trainer": {}}
        self._comments: dict[str, str] = {}

    @property
    def is_moe(self) -> bool:
        """True if there are MoE layers; `--num-experts 1` means none."""
        return max(self.arguments.value("--num-experts") or [1]) > 1

    def set(self, path: str, value: Any, comment: str = "") -> None:
        """Give a setting its value."""
        *sections, name = path.split(".")
        node = self.tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
        if comment:
            self._comments[path] = comment

    def copy(self, section: str, prefix: str) -> None:
        """Set the settings below `prefix` that take the value of one flag of a section of the table unchanged."""
        for name, keys in ((name, keys) for row in TABLE if row.section == section for name, keys in row.flags.items()):
            if keys.get("setting", "").startswith(prefix):
                has_none = "default" not in keys and not keys.get("optional")
                value = self.arguments.required(name) if has_none else self.arguments.value(name)
                if value is not None:
                    self.set(keys["setting"], value, self.default(name))

    def default(self, name: str) -> str:
        """Return the comment beside a value that is Megatron's default; empty if the flag is given."""
        return "" if name in self.arguments.given else DEFAULT


class Translation(Settings):
    """Settings, comments and notes of a launch.

    Args:
        arguments: flags of the launch; what cannot be translated is added to their problems.

    Attributes:
        notes: sentences for the header.
        deepspeed: DeepSpeed's configuration; None where it is not known.
        seq_len: tokens of a sequence; None where that is a problem.
        global_batch: sequences a step; None where that is a problem.
    """

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        self.notes: list[str] = []
        self.deepspeed: DeepSpeedConfig | None = read_deepspeed_config(arguments, self.notes)
        self.seq_len: int | None = arguments.required("--seq-length")
        self.global_batch: int | None = arguments.value("--global-batch-size")
        if not arguments.has("--global-batch-size"):
            self.arguments.add_problem(
                "--global-batch-size", "is not given: there it is micro-batch x GPUs, which is not known here; add it"
            )

    def tokens(self, samples: str, steps: str | None = None) -> int | None:
        """Return a length that is given in sequences or in steps, in tokens; None if it is not given, or a problem.

        Args:
            samples: the flag that gives it in sequences.
            steps: the flag that gives it in optimizer steps; None: there is none.
        """
        name = steps if steps is not None and self.arguments.has(steps) else samples
        length = self.arguments.value(name)
        if length is None or self.seq_len is None or self.global_batch is None:
            return None
        if length and name == steps and self.arguments.has("--rampup-batch-size"):
            self.arguments.refuse(
                name, "counts steps that --rampup-batch-size makes unequal; give the length in tokens"
            )
            return None
        return int(length) * self.seq_len * (self.global_batch if name == steps else 1)

    def note_flags_without_setting(self, ignored: str) -> None:
        """Add a note for flags that have no effect.

        Args:
            ignored: section of the table.
        """
        reasons: dict[str, list[str]] = {}
        for name in self.arguments.given:
            if ROWS[name].section == ignored:
                reasons.setdefault(ROWS[name].note, []).append(name)
            if ROWS[name].section == "Experts" and name != "--num-experts" and not self.is_moe:
                reasons.setdefault("no effect: the model is dense", []).append(name)
            if ROWS[name].section == "Distillation" and not self.arguments.has("--mos", "--kd"):
                reasons.setdefault("no effect without --mos or --kd", []).append(name)
        if self.arguments.has("--save") and self.arguments.has("--tensorboard-dir"):
            reasons["logs go into trainer.default_root_dir"] = ["--tensorboard-dir"]
        self.notes += [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]
        if self.arguments.unknown:
            self.notes.append(f"NOT TRANSLATED, unknown: {' '.join(self.arguments.unknown)}.")

    def text(self) -> str:
        """Return the YAML file."""
        lines = [
            "# A launch of Megatron-DeepSpeed, translated by `nlgmoe from-megatron`.",
            "#   python train.py fit --config THIS_FILE",
        ]
        for note in self.notes:
            lines += textwrap.wrap(note, 120, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
        for section, settings in self.tree.items():
            lines += [f"{section}:", *self._lines(settings, f"{section}.", "  "), ""]
        return "\n".join(lines)

    def _lines(self, settings: Mapping[str, Any], path: str, indent: str) -> list[str]:
        lines = []
        for name, value in settings.items():
            comment = f"  # {self._comments[path + name]}" if path + name in self._comments else ""
            if isinstance(value, dict):
                lines += [f"{indent}{name}:{comment}", *self._lines(value, f"{path}{name}.", f"{indent}  ")]
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                items = yaml.safe_dump(value, sort_keys=False, default_flow_style=False, width=1000).splitlines()
                lines += [f"{indent}{name}:{comment}", *(f"{indent}  {item}" for item in items)]
            else:
                lines.append(f"{indent}{name}: {_scalar(value)}{comment}")
        return lines


def _scalar(value: Any) -> str:
    """Format a value on one line, long whole numbers with digits in groups of three."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 100_000:
        return f"{value:_}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")

"""A translation in progress: the flags, the values that several settings need, and the settings so far."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from nlgmoe.tools.megatron.deepspeed_config import DeepSpeedConfig, read_deepspeed_config
from nlgmoe.tools.megatron.flags import IGNORED, ROWS, TABLE, Arguments


class Settings:
    """Nested settings, filled from flags.

    Args:
        arguments: flags of the launch; what cannot be translated is added to their problems.

    Attributes:
        tree: nested settings, in the order of the YAML.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.tree: dict[str, Any] = {"model": {}, "data": {}, "trainer": {}}

    @property
    def is_moe(self) -> bool:
        """True if there are MoE layers; `--num-experts 1` means none."""
        return max(self.arguments.value("--num-experts") or [1]) > 1

    def set(self, path: str, value: Any) -> None:
        """Give a setting its value."""
        *sections, name = path.split(".")
        node = self.tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value

    def copy(self, section: str, prefix: str) -> None:
        """Set the settings below `prefix` that take the value of one flag of a section of the table unchanged."""
        for name, keys in ((name, keys) for row in TABLE if row.section == section for name, keys in row.flags.items()):
            if keys.get("setting", "").startswith(prefix):
                has_none = "default" not in keys and not keys.get("optional")
                value = self.arguments.required(name) if has_none else self.arguments.value(name)
                if value is not None:
                    self.set(keys["setting"], value)


class Translation(Settings):
    """Settings and notes of a launch.

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
        self.global_batch: int | None = arguments.required("--global-batch-size")

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

    def _note_flags_without_setting(self) -> None:
        """Add notes for flags that have no effect, flags that are not given, and unknown flags."""
        reasons: dict[str, list[str]] = {}
        for name in self.arguments.given:
            if ROWS[name].section == IGNORED:
                reasons.setdefault(ROWS[name].note, []).append(name)
            if ROWS[name].section == "Experts" and name != "--num-experts" and not self.is_moe:
                reasons.setdefault("no effect: the model is dense", []).append(name)
            if ROWS[name].section == "Distillation" and not self.arguments.has("--mos", "--kd"):
                reasons.setdefault("no effect without --mos or --kd", []).append(name)
        if self.arguments.has("--save") and self.arguments.has("--tensorboard-dir"):
            reasons["logs go into trainer.default_root_dir"] = ["--tensorboard-dir"]
        self.notes += [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]
        defaults = [f"{name} {value}" for name, value in self.arguments.defaults.items()]
        self.notes.append(f"Not given, so Megatron-DeepSpeed's default: {'; '.join(defaults)}.")
        if self.arguments.unknown:
            self.notes.append(f"NOT TRANSLATED, unknown: {' '.join(self.arguments.unknown)}.")

    def text(self) -> str:
        """Return the YAML file, with the notes as comments."""
        self._note_flags_without_setting()
        lines = [
            "# A launch of Megatron-DeepSpeed, translated by `nlgmoe from-megatron`; docs/megatron_flags.md explains each flag.",
            "#   python train.py fit --config THIS_FILE",
        ]
        for note in self.notes:
            lines += textwrap.wrap(note, 120, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
        return "\n".join([*lines, yaml.safe_dump(self.tree, sort_keys=False)])

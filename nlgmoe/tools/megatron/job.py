"""One translation under way: the launch, what several settings need, and the settings found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nlgmoe.tools.megatron.arguments import Arguments
from nlgmoe.tools.megatron.cluster import machines, read_deepspeed_config
from nlgmoe.tools.megatron.flags import SECTIONS
from nlgmoe.tools.megatron.launch import Launch

DEFAULT = "Megatron-DeepSpeed's default"


@dataclass
class Translation:
    """The result.

    Attributes:
        settings: dotted path -> value, in the order of the YAML.
        comments: dotted path -> what stands beside it.
        notes: what else there is to know, one sentence each.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Job:
    """What the derivations share.

    Args:
        launch: the launch.
        arguments: its flags; what cannot be translated is added to their problems.
        name: what the run folder is called where the script does not say.

    Attributes:
        machines: devices and nodes; None where that is a problem.
        deepspeed: what is seen of DeepSpeed's configuration.
        experts: experts of each MoE layer, or one number for all; None where that is a problem.
        seq_len: tokens of a sequence; None where that is a problem.
        global_batch: sequences a step; None where that is a problem.
    """

    def __init__(self, launch: Launch, arguments: Arguments, name: str) -> None:
        self.launch, self.arguments, self.name = launch, arguments, name
        self.result = Translation()
        self.machines = machines(launch, arguments)
        self.deepspeed = read_deepspeed_config(launch, arguments)
        self.experts: list[int] | None = arguments.value("--num-experts")
        self.seq_len: int | None = arguments.required("--seq-length")
        self.global_batch = self._global_batch()

    @property
    def is_moe(self) -> bool:
        """Whether there are MoE layers; `--num-experts 1` means none."""
        return self.experts is not None and self.experts != [1]

    @property
    def distils(self) -> bool:
        """Whether there is a teacher."""
        return self.arguments.has("--mos") or self.arguments.has("--kd")

    def set(self, path: str, value: Any, comment: str = "") -> None:
        """Give a setting its value."""
        self.result.settings[path] = value
        if comment:
            self.result.comments[path] = comment

    def direct(self, section: str, prefix: str) -> None:
        """The settings of a section of the table that take one flag's value as it is."""
        for row in SECTIONS[section]:
            for flag in row.flags:
                if not flag.setting.startswith(prefix):
                    continue
                required = flag.default is None and not flag.optional
                value = self.arguments.required(flag.name) if required else self.arguments.value(flag.name)
                if value is not None:
                    self.set(flag.setting, value, self.default(flag.name))

    def default(self, name: str) -> str:
        """The comment beside a value that the script leaves to Megatron."""
        return "" if name in self.arguments.uses else DEFAULT

    def _global_batch(self) -> int | None:
        """Sequences a step; a multiple of what all ranks feed at a time."""
        given = self.arguments.value("--global-batch-size")
        micro_batch = self.arguments.required("--micro-batch-size")
        if self.machines is None or micro_batch is None:
            return None if given is None else int(given)
        one = int(micro_batch) * self.machines.world
        batch = int(given) if given is not None else one
        if batch % one:
            self.arguments.refuse(
                "--global-batch-size",
                f"is no multiple of {micro_batch} sequences x {self.machines.world} GPUs; change one of them",
            )
        return batch

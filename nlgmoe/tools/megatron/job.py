"""The state of a translation: the launch, values that several settings need, and the settings found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nlgmoe.tools.megatron.arguments import Arguments
from nlgmoe.tools.megatron.cluster import read_cluster
from nlgmoe.tools.megatron.deepspeed_config import SUBJECT, read_deepspeed_config
from nlgmoe.tools.megatron.flags import SECTIONS
from nlgmoe.tools.megatron.launch import Launch

DEFAULT = "Megatron-DeepSpeed's default"


@dataclass
class Translation:
    """Settings, comments and notes for the YAML.

    Attributes:
        settings: dotted path -> value, in the order of the YAML.
        comments: dotted path -> comment on its line.
        notes: sentences for the header.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Job:
    """A translation in progress.

    Args:
        launch: the launch.
        arguments: its flags; what cannot be translated is added to their problems.

    Attributes:
        cluster: devices and nodes; None where that is a problem.
        deepspeed: DeepSpeed's configuration, as far as it is known.
        experts: experts of each MoE layer, or one number for all; None where that is a problem.
        seq_len: tokens of a sequence; None where that is a problem.
        global_batch: sequences a step; None where that is a problem.
    """

    def __init__(self, launch: Launch, arguments: Arguments) -> None:
        self.launch, self.arguments = launch, arguments
        self.result = Translation(notes=list(launch.notes))
        self.cluster = read_cluster(launch, arguments)
        self.deepspeed = read_deepspeed_config(launch, arguments)
        if arguments.has("--deepspeed_config") and not self.deepspeed.source:
            self.result.notes.append(
                f"{arguments.uses['--deepspeed_config'].text} is not there, or empty: its clipping, offloading and curriculum, "
                "if any, are missing here."
            )
        self.experts: list[int] | None = arguments.value("--num-experts")
        self.seq_len: int | None = arguments.required("--seq-length")
        self.global_batch = self._global_batch()

    @property
    def is_moe(self) -> bool:
        """True if there are MoE layers; `--num-experts 1` means none."""
        return self.experts is not None and self.experts != [1]

    @property
    def has_teacher(self) -> bool:
        """True if a teacher is distilled."""
        return self.arguments.has("--mos") or self.arguments.has("--kd")

    def set(self, path: str, value: Any, comment: str = "") -> None:
        """Give a setting its value."""
        self.result.settings[path] = value
        if comment:
            self.result.comments[path] = comment

    def set_from_flags(self, section: str, prefix: str) -> None:
        """Set the settings of a section of the table that take one flag's value as it is."""
        for row in SECTIONS[section]:
            for flag in row.flags:
                if not flag.setting.startswith(prefix):
                    continue
                required = flag.default is None and not flag.optional
                value = self.arguments.required(flag.name) if required else self.arguments.value(flag.name)
                if value is not None:
                    self.set(flag.setting, value, self.default(flag.name))

    def default(self, name: str) -> str:
        """Return the comment beside a value that is Megatron's default; empty if the flag is given."""
        return "" if name in self.arguments.uses else DEFAULT

    def _global_batch(self) -> int | None:
        """Sequences of a step: a multiple of micro-batch size x ranks."""
        given = self.arguments.value("--global-batch-size")
        micro_batch = self.arguments.required("--micro-batch-size")
        if self.cluster is None or micro_batch is None:
            return None if given is None else int(given)
        one = int(micro_batch) * self.cluster.world_size
        batch = int(given) if given is not None else one
        for name, value in {"train_batch_size": batch, "train_micro_batch_size_per_gpu": int(micro_batch)}.items():
            configured = self.deepspeed.batch.get(name)
            if configured not in (None, value):
                self.arguments.problem(SUBJECT, f"has {name}={configured}, the flags {value}; make them agree")
        if batch % one:
            self.arguments.refuse(
                "--global-batch-size",
                f"is no multiple of {micro_batch} sequences x {self.cluster.world_size} GPUs; change one of them",
            )
        return batch

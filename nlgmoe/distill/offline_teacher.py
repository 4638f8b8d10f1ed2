"""Distillation from precomputed teacher logits, which `nlgmoe distill-logits` records."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.config import GPTConfig
from nlgmoe.data.training_data import length_of, training_data
from nlgmoe.device import to_device
from nlgmoe.differences import list_differences
from nlgmoe.distill.distiller import (
    Distiller,
    RunPosition,
    distillation_end,
    find_teacher,
    samples_before_end,
)
from nlgmoe.distill.teacher_logits import TeacherLogits
from nlgmoe.layers.losses import TeacherTargets, TopTargets
from nlgmoe.model.gpt import GPT
from nlgmoe.ranks import raise_on_all_ranks
from nlgmoe.validation import SettingError, error_type_like, require

_UNNUMBERED = (
    "the data module does not number its samples, so that nothing can be looked up; use nlgmoe.PileDataModule, or "
    "nlgmoe.MixtureOfStudents"
)


class OfflineTeacher(Distiller):
    """Recorded logits of a teacher and their distillation loss.

    Each rank reads the logits of its own samples. A curriculum's shorter sequences use the first of a sample's logits,
    which do not depend on later positions.

    Args:
        logits: folder written by `nlgmoe distill-logits`. Opened when training begins, unless distillation has ended.
        beta: weight of the distillation loss.
        temperature: temperature of both distributions, equal to the recorded one.
        teacher: checkpoint or run folder of the teacher; logits of other weights are refused. null: accept any.
    """

    def __init__(self, logits: str, beta: float = 1.0, temperature: float = 1.0, teacher: str | None = None) -> None:
        super().__init__(beta, temperature)
        require(logits != "", "model.distiller.logits is empty; give the folder that nlgmoe distill-logits has written")
        self.logits = logits
        self.teacher = teacher
        self._recording: TeacherLogits | None = None

    @override
    def start(self, student: GPT, trainer: Trainer) -> None:
        """Open the folder, and check that this run's data and teacher were recorded."""
        self.release()
        if self.loss_weight == 0:
            return
        with raise_on_all_ranks():
            try:
                recording = TeacherLogits(self.logits)
            except ValueError as error:
                raise error_type_like(error)(f"model.distiller.logits={self.logits}: {error}") from error
            self._check(recording.header, student.config, trainer)
            teacher = recording.header["teacher"]
            self.pin_teacher("logits", self.logits, teacher["checkpoint"], teacher["weights"])
        if self.teacher is not None:
            self._check_teacher(recording.header, self.teacher)
        self._recording = recording
        checkpoint = recording.header["teacher"]["checkpoint"]
        rank_zero_info(f"the teacher is {checkpoint}, as recorded in {self.logits}: {len(recording):,} samples")

    @override
    def release(self) -> bool:
        was_open, self._recording = self._recording is not None, None
        return was_open

    @override
    def read(self, batch: Batch, mask: Tensor | None) -> TeacherTargets | None:
        if self._recording is None:
            return None
        if "samples" not in batch:
            raise SettingError(f"model.distiller.logits={self.logits}: {_UNNUMBERED}")
        tokens = batch["tokens"]
        ids, log_probs = (
            to_device(torch.from_numpy(values), tokens.device).flatten(0, 1)
            for values in self._recording.read(batch["samples"], tokens.shape[1])
        )

        def top(positions: slice) -> tuple[Tensor, Tensor]:
            return ids[positions].long(), log_probs[positions]

        return TopTargets(top, self.beta * self.loss_weight, self.temperature)

    def _check(self, header: dict[str, Any], student: GPTConfig, trainer: Trainer) -> None:
        """Check that the logits are of this run's data, and cover every sample of its distillation."""
        setting, data = f"model.distiller.logits={self.logits}", training_data(trainer)
        if data is None:
            raise SettingError(f"{setting}: {_UNNUMBERED}")
        current = {
            **data.fingerprint(),
            "document_attention": data.document_attention,
            "vocab_size": student.vocab_size,
            "seq_len": length_of(data, student.seq_len),
        }
        recorded = header["data"] | {name: header[name] for name in ("document_attention", "vocab_size", "seq_len")}
        if changes := list_differences(recorded, current):
            raise SettingError(
                f"{setting} was recorded from other data; these differ: {', '.join(changes)}; set data as it was, or record the "
                "teacher's logits for this configuration"
            )
        if header["temperature"] != self.temperature:
            raise SettingError(
                f"{setting} was recorded at temperature={header['temperature']}, model.distiller.temperature is "
                f"{self.temperature}; use the recorded one, or record again: the tail's probability at another is not known"
            )
        module: Any = trainer.lightning_module
        begin = RunPosition(module.tokens_seen, trainer.global_step, data.samples_consumed)
        needed = samples_before_end(
            distillation_end(module.train_tokens, trainer),
            data.batch_size_after,
            header["seq_len"],
            module.curriculum,
            begin,
        )
        if needed is not None and needed > header["samples"]:
            raise SettingError(
                f"{setting} holds {header['samples']:,} samples, this run distils {needed:,}; record that many with --samples "
                f"{needed}, or end distillation earlier with nlgmoe.StagedDistillation"
            )

    def _check_teacher(self, header: dict[str, Any], teacher: str) -> None:
        """Check that the logits are of the weights of `teacher`. A collective: all ranks have to find the same checkpoint."""
        with raise_on_all_ranks():
            path, _, weights = find_teacher(teacher, "set it to the teacher whose logits these are, or to null")
            if weights != header["teacher"]["weights"]:
                raise SettingError(
                    f"model.distiller.teacher={path} is another teacher than that of model.distiller.logits={self.logits}, "
                    f"{header['teacher']['checkpoint']} (weights {weights} and {header['teacher']['weights']}); record its "
                    "logits, or set it to null"
                )

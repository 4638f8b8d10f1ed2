"""A teacher that has said everything beforehand: `nlgmoe distill-logits` wrote it down, and training needs none beside it."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from nlgmoe.batch import Batch, NumbersSamples
from nlgmoe.checkpoint.agreement import all_or_none
from nlgmoe.checkpoint.folder import read_document
from nlgmoe.checkpoint.newest import find
from nlgmoe.config import GPTConfig
from nlgmoe.data.description import differing
from nlgmoe.device import to_device
from nlgmoe.distill.distiller import Clocks, check_loss, last_of, samples_until
from nlgmoe.distill.teacher_logits import TeacherLogits, weights_of
from nlgmoe.layers.losses import Targets, TopTargets
from nlgmoe.model.gpt import GPT


class OfflineTeacher:
    """A teacher's logits on disk, and how much a student learns from them.

    Each rank reads those of its own samples. Shorter sequences of a curriculum read the beginning of a sample's: no position
    depends on later ones.

    Args:
        logits: folder that `nlgmoe distill-logits` has made. Looked for when training begins, and only if there is something
            left to learn.
        beta: weight of the distillation loss.
        temperature: of both distributions; the one that the logits were recorded at.
        teacher: a checkpoint, or a run's folder: refuse logits that are not of its weights; null: take those that are there.
    """

    def __init__(self, logits: str, beta: float = 1.0, temperature: float = 1.0, teacher: str | None = None) -> None:
        check_loss(beta, temperature)
        self.logits = logits
        self.beta = beta
        self.temperature = temperature
        self.teacher = teacher
        self.stage = 1.0  # of beta, from 1 to 0: `StagedDistillation` lowers it before a step
        self._found: TeacherLogits | None = None

    def start(self, student: GPT, trainer: Trainer) -> None:
        """Open the folder, unless the lesson is over. Where there are ranks, all have to call this.

        Args:
            student: the model that learns.
            trainer: its trainer, whose data the folder has to be of.

        Raises:
            ValueError: there is no such folder, it is not finished, it is damaged, or it does not suit the run. Every rank
                raises.
        """
        self.release()
        if self.stage == 0:
            return
        with all_or_none():
            try:
                found = TeacherLogits(self.logits)
            except ValueError as error:
                raise ValueError(f"model.distiller.logits={self.logits}: {error}") from error
            self._check(found.header, student.config)
            self._check_data(found.header, trainer)
        if self.teacher is not None:
            self._check_teacher(found.header, self.teacher)
        self._found = found
        checkpoint = found.header["teacher"]["checkpoint"]
        rank_zero_info(f"the teacher is {checkpoint}, as recorded in {self.logits}: {len(found):,} samples")

    def release(self) -> bool:
        """Close the folder; whether it was open."""
        was_open, self._found = self._found is not None, None
        return was_open

    def read(self, batch: Batch, mask: Tensor | None) -> Targets | None:
        """What the teacher has said of a batch; None if its lesson is over.

        Args:
            batch: as the student sees it.
            mask: its token mask, which the teacher has seen.

        Raises:
            ValueError: a sample is not there, or damaged.
        """
        if self._found is None:
            return None
        tokens = batch["tokens"]
        ids, log_probs = (
            to_device(torch.from_numpy(part), tokens.device).flatten(0, 1)
            for part in self._found.read(batch["samples"], tokens.shape[1])
        )

        def top(part: slice) -> tuple[Tensor, Tensor]:
            return ids[part].long(), log_probs[part]

        return TopTargets(top, self.beta * self.stage, self.temperature)

    def _check(self, header: dict[str, Any], student: GPTConfig) -> None:
        """Whether it was recorded for such a student, at this temperature."""
        where = f"model.distiller.logits={self.logits}"
        for name in ("vocab_size", "seq_len"):
            if header[name] != getattr(student, name):
                raise ValueError(
                    f"{where} has {name}={header[name]}, the student {getattr(student, name)}; record the teacher's logits for "
                    "this configuration"
                )
        if header["temperature"] != self.temperature:
            raise ValueError(
                f"{where} was recorded at temperature={header['temperature']}, model.distiller.temperature is "
                f"{self.temperature}; set it to that, or record at another: the tail's probability at another is not known"
            )

    def _check_data(self, header: dict[str, Any], trainer: Trainer) -> None:
        """Whether it is about the samples that this run trains on, and about all that it will distil."""
        where, data = f"model.distiller.logits={self.logits}", getattr(trainer, "datamodule", None)
        if not isinstance(data, NumbersSamples):
            raise ValueError(
                f"{where}: the data module does not number its samples, so that nothing can be looked up; use "
                "nlgmoe.PileDataModule, or nlgmoe.MixtureOfStudents"
            )
        here = {**data.fingerprint(), "document_attention": data.document_attention}
        there = {**header["data"], "document_attention": header["document_attention"]}
        if changes := differing(there, here, header.get("corpus"), getattr(data, "corpus_description", {})):
            raise ValueError(
                f"{where} was recorded from other data; these differ: {', '.join(changes)}; set data as it was, or record the "
                "teacher's logits for this configuration"
            )
        module: Any = trainer.lightning_module
        begin = Clocks(module.tokens_seen, trainer.global_step, data.samples_consumed)
        needed = samples_until(
            last_of(module.train_tokens, trainer), data.batch_size_after, header["seq_len"], module.curriculum, begin
        )
        if needed is not None and needed > header["samples"]:
            raise ValueError(
                f"{where} holds {header['samples']:,} samples, this run distils {needed:,}; record that many with --samples "
                f"{needed}, or end distillation earlier with nlgmoe.StagedDistillation"
            )

    def _check_teacher(self, header: dict[str, Any], teacher: str) -> None:
        """Whether it is of that teacher. Ranks look for the newest checkpoint of a run together."""
        with all_or_none():
            try:
                path = find(teacher)
                read_document(path)
                weights = weights_of(path)
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"model.distiller.teacher={teacher}: {error}; set it to the teacher whose logits these are, or to null"
                ) from error
            if weights != header["teacher"]["weights"]:
                raise ValueError(
                    f"model.distiller.teacher={path} is another teacher than that of model.distiller.logits={self.logits}, "
                    f"{header['teacher']['checkpoint']} (weights {weights} and {header['teacher']['weights']}); record its "
                    "logits, or set it to null"
                )

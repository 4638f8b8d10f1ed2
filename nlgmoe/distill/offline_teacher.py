"""Distillation from recorded logits: at each position the log-probabilities of the K likeliest tokens and of all others together.

    FOLDER/header.json    teacher, data and settings of the recording
    FOLDER/logits.bin     a record for each of the first training samples, in the order of the run
    FOLDER/position.json  until the folder is complete: its progress, and the position in the data

    record   ids             [T, K] uint16 (uint32 if there are more than 65,536 tokens), the likeliest first
             log_probs       [T, K + 1] float16; the last one is the tail's: the log of all other tokens' probability

T positions of a sample. A token takes K * (2 or 4) + 2 * (K + 1) bytes. A sample's number and the data's fingerprint determine
its tokens, so they are the key. `nlgmoe distill-logits` writes the folder (`record_logits.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.checkpoint.reading import read_json
from nlgmoe.config import GPTConfig
from nlgmoe.data.training_data import length_of, training_data
from nlgmoe.device import to_device
from nlgmoe.distill.distiller import Distiller, RunPosition, distillation_end, find_teacher, samples_before_end
from nlgmoe.layers.losses import TeacherTargets, TopTargets
from nlgmoe.model.gpt import GPT
from nlgmoe.ranks import raise_on_all_ranks
from nlgmoe.validation import RunError, SettingError, error_type_like, list_differences, require

FORMAT, VERSION = "nlgmoe-teacher-logits", 3
HEADER, RECORDS, POSITION = "header.json", "logits.bin", "position.json"
_UNNUMBERED = (
    "the data module does not number its samples, so that nothing can be looked up; use nlgmoe.PileDataModule, or "
    "nlgmoe.MixtureOfStudents"
)


class TeacherLogits:
    """A complete folder, memory-mapped; `header` is the content of `header.json`."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.header = read_header(self._folder)
        if (self._folder / POSITION).exists():
            raise RunError(f"{folder} is not finished; run the command that records it again")
        file, dtype = self._folder / RECORDS, record_type(self.header)
        size = len(self) * dtype.itemsize
        if not file.is_file() or file.stat().st_size != size:
            problem = f"has {file.stat().st_size:,} bytes, not {size:,}" if file.is_file() else "is missing"
            raise RunError(f"{file} {problem}: it is damaged; delete {folder} and record it again")
        self._records = np.memmap(file, dtype, "r")

    def __len__(self) -> int:
        return int(self.header["samples"])

    def read(self, samples: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first positions of some samples: ids `[B, length, K]`, log-probabilities `[B, length, K + 1]`."""
        if (last := max(samples)) >= len(self):
            raise RunError(
                f"{self._folder} holds {len(self):,} samples, training has come to sample {last:,}; record more, or end "
                "distillation earlier"
            )
        records = self._records[list(samples)]
        # contiguous copies: fields of records are strided, which the copy to a device would not take from pinned memory
        ids, log_probs = (np.ascontiguousarray(records[name][:, :length]) for name in ("ids", "log_probs"))
        return ids, log_probs


def read_header(folder: Path) -> dict[str, Any]:
    """Read the `header.json` of a folder."""
    file = folder / HEADER
    require(file.is_file(), f"no teacher's logits at {folder}; record them with nlgmoe distill-logits")
    header = read_json(file, f"delete {folder} and record it again")
    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise RunError(
            f"{folder} is {header.get('format')} version {header.get('version')}; this nlgmoe reads {FORMAT} version {VERSION}"
        )
    return header


def record_type(header: dict[str, Any]) -> np.dtype:
    """Return the dtype of a sample's record; `header` has `vocab_size`, `seq_len` and `top_k`."""
    length, top = header["seq_len"], header["top_k"]
    ids = "<u2" if header["vocab_size"] <= 1 << 16 else "<u4"
    return np.dtype([("ids", ids, (length, top)), ("log_probs", "<f2", (length, top + 1))], align=False)


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
        require("samples" in batch, f"model.distiller.logits={self.logits}: {_UNNUMBERED}")
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
            found, weights = find_teacher(teacher, "set it to the teacher whose logits these are, or to null")
            if weights != header["teacher"]["weights"]:
                raise SettingError(
                    f"model.distiller.teacher={found.path} is another teacher than that of model.distiller.logits={self.logits}, "
                    f"{header['teacher']['checkpoint']} (weights {weights} and {header['teacher']['weights']}); record its "
                    "logits, or set it to null"
                )

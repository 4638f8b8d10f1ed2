"""Record a teacher's logits for a run's training samples, atomically and resumable after a kill with the same bytes.

    FOLDER.building/FOLDER/        what becomes FOLDER, by renaming, when it is whole
    FOLDER.building/progress.json  up to where its records are whole, where the data stands, and what they are made from

Batches begin at multiples of the micro-batch wherever a process was killed, so each sample is computed among the same others.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from nlgmoe.batch import Batch, token_mask_or_none
from nlgmoe.checkpoint.folder import checksum_of_manifest
from nlgmoe.checkpoint.writing import flush
from nlgmoe.data import PileDataModule
from nlgmoe.data.description import differing
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.teacher_logits import (
    FORMAT,
    HEADER,
    RECORDS,
    VERSION,
    TeacherLogits,
    building,
    checksum,
    record_type,
)
from nlgmoe.files import atomic_write
from nlgmoe.layers.losses import SoftTargets
from nlgmoe.non_finite import require_finite_logits
from nlgmoe.validation import RunError, SettingError
from nlgmoe.versions import versions

RECORD_SECONDS = 30.0  # between two writes of the progress, which is what a killed process loses


@dataclass(frozen=True)
class Progress:
    """The progress of a recording.

    Attributes:
        samples: written.
        positions: of these samples, without padding.
        tail_mass: sum over positions of the probability outside the K likeliest tokens.
    """

    samples: int = 0
    positions: int = 0
    tail_mass: float = 0.0


def record_logits(
    teacher: MixtureOfStudents,
    data: PileDataModule,
    settings: dict[str, Any],
    folder: Path,
    report: Callable[[Progress], object],
) -> dict[str, Any]:
    """Write a folder for `TeacherLogits`, or resume writing it. Returns its header.

    Args:
        teacher: loaded.
        data: at its first sample; its batches are `settings["micro_batch_size"]` sequences.
        settings: everything that determines the bytes, for the header: `teacher` (`checkpoint`, `weights`, and more), `data` (the
            fingerprint), `corpus` (its description, to name a change), `vocab_size`, `seq_len`, `top_k`,
            `temperature`, `samples`, `micro_batch_size`, `loss_chunk_size` (positions whose logits exist at a time), and more.
        folder: the result.
        report: called with the progress at the start and after every batch.
    """
    work = building(folder)
    if folder.exists():
        if not (folder / HEADER).exists():
            raise SettingError(f"output={folder} exists already, and holds no teacher's logits; name another output")
        header = TeacherLogits(folder).header
        _check_same(header, settings, folder)
        shutil.rmtree(work, ignore_errors=True)  # an earlier process was killed before it removed it
        report(Progress(header["samples"]))
        return header
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"output={folder} is being recorded by another process: wait for it, or stop it") from None
    try:
        header = _record(teacher, data, settings, work, folder, report)
        (work / folder.name).rename(folder)
        flush(folder.parent)
    finally:
        lock.release()
    shutil.rmtree(work, ignore_errors=True)
    return header


def _record(
    teacher: MixtureOfStudents,
    data: PileDataModule,
    settings: dict[str, Any],
    work: Path,
    folder: Path,
    report: Callable[[Progress], object],
) -> dict[str, Any]:
    """Write the folder, under its name in `work`."""
    parts, note = work / folder.name, work / "progress.json"
    done, settings = _resume(note, settings, data)
    dtype, total = record_type(settings), settings["samples"]
    parts.mkdir(exist_ok=True)
    for stray in parts.iterdir():
        if stray.name != RECORDS:
            stray.unlink()
    _truncate(parts / RECORDS, done.samples * dtype.itemsize, (total - done.samples) * dtype.itemsize, work)
    report(done)
    with (parts / RECORDS).open("r+b") as file:
        file.seek(done.samples * dtype.itemsize)
        batches, noted = iter(data.train_dataloader()) if done.samples < total else iter(()), time.monotonic()
        while done.samples < total:
            batch = data.on_before_batch_transfer(next(batches), 0)
            assert batch["samples"][0] == done.samples
            records, reached = _records(teacher, batch, settings, done)
            file.write(records.tobytes())
            data.advance(len(batch["samples"]))
            report(done := reached)
            if done.samples == total or time.monotonic() - noted >= RECORD_SECONDS:
                file.flush()
                os.fsync(file.fileno())
                _write_json(note, {"settings": settings, "done": asdict(done), "data": data.state_dict()})
                noted = time.monotonic()
    header = {
        "format": FORMAT,
        "version": VERSION,
        **settings,
        "tail_mass": done.tail_mass / max(1, done.positions),
        "versions": versions(),
    }
    header["checksum"] = checksum_of_manifest(header)
    _write_json(parts / HEADER, header)
    flush(parts)
    return header


def _resume(note: Path, settings: dict[str, Any], data: PileDataModule) -> tuple[Progress, dict[str, Any]]:
    """Return the progress and settings of an earlier process, and set the data to its position."""
    if not note.exists():
        return Progress(), settings
    try:
        found = json.loads(note.read_text())
        done, earlier, state = Progress(**found["done"]), found["settings"], found["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{note} is damaged ({error!r}); delete {note.parent} to start again") from error
    _check_same(earlier, settings, note.parent)
    data.load_state_dict(state)
    return done, earlier


def _check_same(earlier: dict[str, Any], settings: dict[str, Any], where: Path) -> None:
    """Check that an earlier recording has the same settings; the path of the teacher may differ."""
    there, here = (
        one | one["data"] | {"teacher": one["teacher"]["weights"], "data": None} for one in (earlier, settings)
    )
    if changes := differing(there, here, earlier.get("corpus", {}), settings.get("corpus", {})):
        raise SettingError(
            f"{where} was recorded with other settings: {', '.join(changes)}; name another output, or delete it"
        )


def _truncate(file: Path, kept: int, needed: int, work: Path) -> None:
    """Truncate the records to the last progress, and check that the rest fits on the disk."""
    file.touch()
    if file.stat().st_size < kept:
        raise RunError(f"{file} is shorter than was recorded; delete {work} to start again")
    os.truncate(file, kept)
    if (free := shutil.disk_usage(work).free) < needed:
        raise RunError(
            f"output={work.parent / file.parent.name} takes {needed / 1e9:,.2f} GB more, there are {free / 1e9:,.2f} GB free; "
            "make room, or lower top_k or samples"
        )


def _records(
    teacher: MixtureOfStudents, batch: dict[str, Any], settings: dict[str, Any], done: Progress
) -> tuple[np.ndarray, Progress]:
    """Compute the records of a batch, up to the last sample wanted. Returns the progress too."""
    assert teacher.model is not None
    moved = cast(Batch, move_data_to_device(batch, teacher.model.token_embedding.weight.device))
    targets = teacher.read(moved, token_mask_or_none(moved))
    assert isinstance(targets, SoftTargets)
    (count, length), chunk = batch["tokens"].shape, settings["loss_chunk_size"]
    wanted = min(count, settings["samples"] - done.samples)
    parts = [
        likeliest(targets, slice(start, start + chunk), settings["top_k"], settings["temperature"])
        for start in range(0, count * length, chunk)
    ]
    require_finite_logits(teacher.model, torch.cat([log_probs[:, 0] for _, log_probs in parts]))
    ids, log_probs = (torch.cat(column).view(count, length, -1).cpu() for column in zip(*parts, strict=True))
    records = np.zeros(wanted, record_type(settings))
    records["ids"], records["log_probs"] = ids[:wanted].numpy(), log_probs[:wanted].half().numpy()
    whole = records.view(np.uint8).reshape(wanted, -1)
    for index in range(wanted):
        records["checksum"][index] = checksum(whole[index], done.samples + index)
    mask = batch["token_mask"][:wanted]
    tail = log_probs[:wanted, :, -1].double().exp()[mask].sum()
    return records, Progress(done.samples + wanted, done.positions + int(mask.sum()), done.tail_mass + float(tail))


@torch.no_grad()
def likeliest(targets: SoftTargets, part: slice, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Cut a teacher's distribution at C positions to its K likeliest tokens.

    Returns:
        int64 `[C, K]`, the likeliest tokens first; and in at least fp32 `[C, K + 1]`, their log-probabilities at the temperature
        and the log of the remaining probability, -inf if that is 0.
    """
    logits = targets.logits(part)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = (logits / temperature).log_softmax(dim=-1)  # [C, V]
    top, ids = log_probs.topk(top_k, dim=-1)
    tail = log_probs.exp_().scatter_(1, ids, 0).sum(dim=-1, keepdim=True).log()  # without the others: no cancellation
    return ids, torch.cat([top, tail], dim=1)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON atomically, and flush it to the disk."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        flush(temporary)

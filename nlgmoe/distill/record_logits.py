"""Record a teacher's logits for a run's training samples; see `offline_teacher.py`.

A process that is killed loses at most the last 1,000 samples; the same command records the rest, with the same bytes: it goes on
after a whole micro-batch, so that each sample is computed together with the same others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from nlgmoe.batch import Batch, token_mask_or_none
from nlgmoe.data import PileDataModule
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.offline_teacher import FORMAT, HEADER, POSITION, RECORDS, VERSION, read_header, record_type
from nlgmoe.files import flush, write_json
from nlgmoe.layers.losses import SoftTargets
from nlgmoe.non_finite import require_finite_logits
from nlgmoe.validation import RunError, SettingError, list_differences
from nlgmoe.versions import versions

SAMPLES_AT_RISK = 1000  # recorded before they are flushed to disk; rounded up to whole micro-batches


@dataclass(frozen=True)
class Progress:
    """The progress of a recording."""

    samples: int = 0  # samples recorded
    positions: int = 0  # positions of these samples, without padding
    tail_mass: float = 0.0  # sum over positions of the probability outside the K likeliest tokens


def record_logits(
    teacher: MixtureOfStudents,
    data: PileDataModule,
    settings: dict[str, Any],
    folder: Path,
    report: Callable[[Progress], object],
) -> Progress:
    """Write a folder for `TeacherLogits`, or complete one that an earlier process began; report at the start and every batch.

    Args:
        data: data module at its first sample; its batches are `settings["micro_batch_size"]` sequences.
        settings: everything that determines the bytes, for the header: `teacher` (`checkpoint`, `weights`, and more), `data` (the
            fingerprint), `vocab_size`, `seq_len`, `top_k`, `temperature`, `samples`, `micro_batch_size`, `loss_chunk_size`
            (positions whose logits exist at a time), and more.
    """
    header, position, total = folder / HEADER, folder / POSITION, settings["samples"]
    for unfinished in folder.glob(".*.writing-*"):  # of a killed process
        unfinished.unlink()
    if header.exists():
        settings = _check_same(read_header(folder), settings, folder)
        if not position.exists():
            report(done := Progress(total))
            return done
        done = _resume(position, data)
    elif folder.exists() and {path.name for path in folder.iterdir()} - {POSITION}:
        raise SettingError(f"output={folder} exists already, and holds no teacher's logits; name another output")
    else:
        done = Progress()
        folder.mkdir(parents=True, exist_ok=True)
        _write_position(position, done, data)
        write_json(header, {"format": FORMAT, "version": VERSION, **settings, "versions": versions()}, durable=True)
    report(done)
    with (folder / RECORDS).open("ab") as file:
        if file.tell() < (size := done.samples * record_type(settings).itemsize):
            raise RunError(f"{file.name} has lost records that {position} counts; delete {folder} to start again")
        file.truncate(size)
        batches = iter(data.train_dataloader()) if done.samples < total else iter(())
        flushed = done.samples
        while done.samples < total:
            batch = data.on_before_batch_transfer(next(batches), 0)
            assert batch["samples"][0] == done.samples
            records, done = _records(teacher, batch, settings, done)
            file.write(records.tobytes())
            data.advance(len(batch["samples"]))
            report(done)
            if done.samples == total or done.samples - flushed >= SAMPLES_AT_RISK:
                file.flush()
                os.fsync(file.fileno())
                _write_position(position, done, data)
                flushed = done.samples
    flush(folder)
    position.unlink()
    return done


def _resume(position: Path, data: PileDataModule) -> Progress:
    """Return the progress of an earlier process, and set the data to its position."""
    try:
        saved = json.loads(position.read_text())
        done, state = Progress(**saved["done"]), saved["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{position} is damaged ({error!r}); delete {position.parent} to start again") from error
    data.load_state_dict(state)
    return done


def _write_position(position: Path, done: Progress, data: PileDataModule) -> None:
    write_json(position, {"done": asdict(done), "data": data.state_dict()}, durable=True)


def _check_same(header: dict[str, Any], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Check that an earlier recording has the same settings, and return them; the path of the teacher may differ."""
    earlier: dict[str, Any] = {name: header.get(name) for name in settings}
    recorded, current = (
        values | values["data"] | {"teacher": values["teacher"]["weights"], "data": None}
        for values in (earlier, settings)
    )
    if changes := list_differences(recorded, current):
        raise SettingError(f"{folder} was recorded with other settings: {', '.join(changes)}; name another output")
    return earlier


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
    chunks = [
        likeliest(targets, slice(start, start + chunk), settings["top_k"], settings["temperature"])
        for start in range(0, count * length, chunk)
    ]
    require_finite_logits(teacher.model, torch.cat([log_probs[:, 0] for _, log_probs in chunks]))
    ids, log_probs = (torch.cat(column).view(count, length, -1).cpu() for column in zip(*chunks, strict=True))
    records = np.zeros(wanted, record_type(settings))
    records["ids"], records["log_probs"] = ids[:wanted].numpy(), log_probs[:wanted].half().numpy()
    mask = batch["token_mask"][:wanted]
    tail = log_probs[:wanted, :, -1].double().exp()[mask].sum()
    return records, Progress(done.samples + wanted, done.positions + int(mask.sum()), done.tail_mass + float(tail))


@torch.no_grad()
def likeliest(targets: SoftTargets, positions: slice, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Cut a teacher's distribution at C positions to its K likeliest tokens.

    Returns int64 `[C, K]`, the likeliest tokens first; and in at least fp32 `[C, K + 1]`, their log-probabilities at the
    temperature and the log of the remaining probability, -inf if that is 0.
    """
    logits = targets.logits(positions)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = (logits / temperature).log_softmax(dim=-1)  # [C, V]
    top, ids = log_probs.topk(top_k, dim=-1)
    tail = log_probs.exp_().scatter_(1, ids, 0).sum(dim=-1, keepdim=True).log()  # summed directly, without cancellation
    return ids, torch.cat([top, tail], dim=1)

"""What a teacher costs: a distilled training step beside a plain one, against the teacher's forward FLOPs.

    python -m benchmarks.distillation [--rounds 7]

"Offline" learns from the 64 likeliest tokens of each position, read from a folder as a run reads them.
The laptop twins: the student of configs/mos/laptop.yaml, the teacher of configs/pr_moe/laptop.yaml, untrained: time does not
depend on what it knows. A step is forward, loss, backward and AdamW on one micro-batch of 16 x 128 tokens.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import ROOT, command_line, interleaved, settings
from nlgmoe import load_config
from nlgmoe.batch import Batch
from nlgmoe.distill.distiller import Distiller
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.offline_teacher import OfflineTeacher
from nlgmoe.distill.record_logits import record_logits
from nlgmoe.distill.teacher_logits import TeacherLogits
from nlgmoe.layers.losses import cross_entropy, distilled_cross_entropy
from nlgmoe.model.counting import flops_per_token
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.param_groups import AdamWConfig, build_adamw
from tests.synthetic import NumberedData

SEQUENCES, CHUNK, TOP_K = 16, 1024, 64


def main() -> None:
    """Measure, print, write."""
    arguments = command_line(__doc__ or "", "distillation", 7, [])
    torch.manual_seed(0)
    student_config, teacher_config = (
        load_config(ROOT / f"configs/{family}/laptop.yaml").module.config for family in ("mos", "pr_moe")
    )
    student, distiller = GPT(student_config, 1), MixtureOfStudents("random")
    distiller.model = GPT(teacher_config, 2).requires_grad_(False).eval()
    optimizer = build_adamw(student, AdamWConfig())
    data = NumberedData(
        vocab_size=student_config.vocab_size, seq_len=student_config.seq_len, micro_batch_size=SEQUENCES
    )
    batch: Batch = next(iter(data.train_dataloader()))
    folder = Path(tempfile.mkdtemp()) / "logits"
    offline = OfflineTeacher(str(folder))
    record_logits(distiller, data, _recipe(data), folder, lambda progress: None)
    offline._recording = TeacherLogits(folder)

    def step(learns_from: Distiller | None) -> None:
        teacher = None if learns_from is None else learns_from.read(batch, None)
        hidden = student(batch["tokens"], noise_key=(0, 0, 0)).hidden.flatten(0, 1)
        rest = hidden, student.unembedding, student.config.vocab_size, batch["targets"].flatten(), None, CHUNK
        loss = cross_entropy(*rest) if teacher is None else distilled_cross_entropy(*rest, None, teacher).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    seconds = interleaved(
        {
            "plain step": lambda: step(None),
            "distilled step": lambda: step(distiller),
            "teacher's blocks": lambda: distiller.read(batch, None),
            "offline step": lambda: step(offline),
            "reading the record": lambda: offline.read(batch, None),
        },
        arguments.rounds,
    )
    plain = seconds["plain step"]
    floor = flops_per_token(teacher_config) / 3 / flops_per_token(student_config)
    size = sum(parameter.numel() * parameter.element_size() for parameter in distiller.model.parameters())
    for name, value in seconds.items():
        print(f"{name:<18} {value * 1e3:7.1f} ms  {value / plain:5.2f} of a plain step")
    print(f"floor: the teacher's forward FLOPs are {floor:.2f} of a plain step's; its weights are {size / 1e6:.1f} MB")
    result = {**settings(rounds=arguments.rounds), "seconds": seconds, "floor": floor, "teacher_bytes": size}
    shutil.rmtree(folder.parent)
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


def _recipe(data: NumberedData) -> dict[str, Any]:
    return {
        "teacher": {"checkpoint": "random", "weights": "random"},
        "data": data.fingerprint(),
        "document_attention": False,
        "vocab_size": data.vocab_size,
        "seq_len": data.seq_len,
        "top_k": TOP_K,
        "temperature": 1.0,
        "samples": SEQUENCES,
        "micro_batch_size": SEQUENCES,
        "loss_chunk_size": CHUNK,
    }


if __name__ == "__main__":
    main()

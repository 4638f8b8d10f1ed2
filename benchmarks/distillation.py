"""What a teacher costs: a distilled training step beside a plain one, against the teacher's forward FLOPs.

    python -m benchmarks.distillation [--rounds 7]

The laptop twins: the student of configs/mos/laptop.yaml, the teacher of configs/pr_moe/laptop.yaml, untrained: time does not
depend on what it knows. A step is forward, loss, backward and AdamW on one micro-batch of 16 x 128 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.timing import ROOT, command_line, interleaved, settings
from nlgmoe import load_config
from nlgmoe.batch import Batch
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.layers.losses import cross_entropy, distilled_cross_entropy
from nlgmoe.model.counting import flops_per_token
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.param_groups import AdamWConfig, build_adamw

SEQUENCES, CHUNK = 16, 1024


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
    tokens = torch.randint(student_config.vocab_size, (SEQUENCES, student_config.seq_len + 1))
    mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    domain = torch.zeros(SEQUENCES, dtype=torch.int64)
    batch: Batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "token_mask": mask, "domain": domain}

    def step(distilled: bool) -> None:
        teacher = distiller.read(batch, None) if distilled else None
        hidden = student(batch["tokens"], noise_key=(0, 0, 0)).hidden.flatten(0, 1)
        rest = hidden, student.unembedding, batch["targets"].flatten(), None, CHUNK
        loss = cross_entropy(*rest) if teacher is None else distilled_cross_entropy(*rest, None, teacher).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    seconds = interleaved(
        {
            "plain step": lambda: step(False),
            "distilled step": lambda: step(True),
            "teacher's blocks": lambda: distiller.read(batch, None),
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
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

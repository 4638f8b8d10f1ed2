"""A small teacher, its student, and the teacher's recorded logits."""

from pathlib import Path
from typing import Any

import torch

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import hash_of_weights
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.distill import record_logits as recording
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.record_logits import record_logits
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from tests.support.synthetic import NumberedData, SyntheticData
from tests.support.trainers import trainer

DROPS = MoEConfig([2, 4], mlp_type="residual", noise="jitter", eval_token_dropping=True)
TEACHER = GPTConfig(61, 16, 4, 48, 3, hidden_dropout=0.2, moe=DROPS)
STUDENT = GPTConfig(61, 16, 2, 32, 2, hidden_dropout=0.1, moe=MoEConfig(4, noise="jitter"))


def trained(config: GPTConfig, root: Path) -> Path:
    run = trainer(root, max_steps=2)
    run.fit(MoEGPTModule(config, AdamWConfig(lr=1e-2)), SyntheticData(config.vocab_size, config.seq_len))
    run.save_checkpoint(root / "teacher.ckpt")
    return root / "teacher.ckpt"


SAMPLES = 32  # of four steps


def record(teacher: Path, folder: Path, data: NumberedData | None = None, **changes: Any) -> recording.Progress:
    data = data or NumberedData()
    spoken = MixtureOfStudents(str(teacher))
    spoken.load(STUDENT, torch.empty(0), data)
    settings = {
        "teacher": {"checkpoint": str(teacher), "weights": hash_of_weights(Checkpoint(teacher))},
        "data": data.fingerprint(),
        "document_attention": data.document_attention,
        "vocab_size": 61,
        "seq_len": 16,
        "top_k": 61,
        "temperature": 2.0,
        "samples": SAMPLES,
        "micro_batch_size": 4,
        "loss_chunk_size": 24,
    }
    return record_logits(spoken, data, settings | changes, folder, lambda progress: None)

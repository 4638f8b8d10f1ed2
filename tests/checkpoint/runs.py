"""Small runs on synthetic data that save and resume."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from nlgmoe.checkpoint.portable import PortableCheckpointIO
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule
from tests.support.synthetic import SyntheticData
from tests.support.trainers import trainer

CONFIG = GPTConfig(61, 16, 4, 32, 2, hidden_dropout=0.1, moe=MoEConfig([2, 4], mlp_type="residual", noise="jitter"))
ACCUMULATE = 3
NEEDED = {"model_config": CONFIG.to_dict(), "global_step": 0, "tokens_seen": 0, "seed": 0}  # in every checkpoint.json


def small_checkpoint(value: float, **more: Any) -> dict[str, Any]:
    """A checkpoint, as Lightning makes it, of weights that all have this value."""
    weights = GPT(CONFIG).state_dict(prefix="model.")
    return NEEDED | {"state_dict": {name: torch.full_like(weight, value) for name, weight in weights.items()}} | more


def value_of(path: Path) -> float:
    return float(PortableCheckpointIO().load_checkpoint(path)["state_dict"]["model.final_norm.bias"][0])


def fit(root: Path, *callbacks: Callback, steps: int = 8, resume: Path | str | None = None) -> Trainer:
    schedule = LearningRateSchedule("cosine", min_lr=1e-4, warmup_tokens=400, decay_tokens=1500)
    run = trainer(
        root,
        *callbacks,
        max_steps=steps,
        accumulate_grad_batches=ACCUMULATE,
        val_check_interval=4 * ACCUMULATE,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0,
        gradient_clip_val=1.0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    run.fit(MoEGPTModule(CONFIG, AdamWConfig(lr=1e-2), schedule), SyntheticData(), ckpt_path=resume)
    return run

"""Training on the fake accelerator and on the CPU, watched: what a step computes, and what the host waits for."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from nlgmoe import GPTConfig, MoEConfig, MoEGPTModule, SigmoidRouterConfig
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import SequenceCurriculum
from tests.accelerator import fake
from tests.support.synthetic import NumberedData
from tests.support.trainers import QUIET

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs/examples"))
from hash_router import HashRouterConfig  # noqa: E402
from swiglu_expert import SwiGLUExpert  # noqa: E402

CPU, FAKE = torch.device("cpu"), torch.device("privateuseone", 0)  # the name before `fake.install`
VARIANTS: dict[str, dict[str, Any]] = {  # settings of MoEConfig; None: a dense model
    "dense": {"moe": None},
    "top-1, capacity, random selection": {"moe": {"min_capacity": 0}},
    "top-1, jitter": {"moe": {"noise": "jitter"}},
    "top-2, sampled, z-loss, documents, padding": {
        "moe": {"top_k": 2, "min_capacity": 0, "z_loss_coeff": 0.001},
        "data": {"padded": True, "documents": True},
    },
    "residual pyramid, rsample, padding, drops in evaluation": {
        "moe": {"num_experts": [4, 8], "mlp_type": "residual", "noise": "rsample", "eval_token_dropping": True},
        "data": {"padded": True},
    },
    "activation checkpointing": {"moe": {"noise": "jitter"}, "module": {"activation_checkpointing": True}},
    "Qwen3-MoE's block, layer map, padding": {
        "moe": {"num_experts": [0, 4, 8, 0], "expert_interval": 1, "top_k": 3}
        | {"token_dropping": False, "expert_ffn_size": 48},
        "model": {"norm": "rmsnorm", "rope_theta": 100.0, "bias": False, "tied_embeddings": False}
        | {"ffn_network": "swiglu", "qk_norm": "head", "num_kv_heads": 1, "head_dim": 8},
        "data": {"padded": True},
    },
    "router that looks up, SwiGLU": {"moe": {"router": HashRouterConfig(1), "expert": SwiGLUExpert(8)}},
    "router that learns from steps, curriculum, accumulated": {
        "moe": {"top_k": 2, "router": SigmoidRouterConfig(0.01, sequence_loss_coeff=0.1), "token_dropping": False},
        "module": {"activation_checkpointing": True, "curriculum": SequenceCurriculum(200, 8, 4)},
        "trainer": {"accumulate_grad_batches": 2},
    },
}
HALF = ("bf16-true", "bf16-mixed")
ALSO_IN_HALF = (  # variants that compute in types of their own
    "top-1, capacity, random selection",
    "top-1, jitter",
    "residual pyramid, rsample, padding, drops in evaluation",
    "activation checkpointing",
    "router that learns from steps, curriculum, accumulated",
)


def config(moe: dict[str, Any] | None, **settings: Any) -> GPTConfig:
    experts = None if moe is None else MoEConfig(**({"num_experts": 4} | moe))
    return GPTConfig(61, 16, 4, 32, 2, init_std=0.05, moe=experts, **settings)


class Watched(SingleDeviceStrategy):
    """All is on the device, and the host does not read it in model, loss and backward."""

    def training_step(self, *args: Any) -> Any:
        return self._watch(super().training_step, *args)

    def validation_step(self, *args: Any) -> Any:
        return self._watch(super().validation_step, *args)

    def predict_step(self, *args: Any) -> Any:
        return self._watch(super().predict_step, *args)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        with fake.no_reads():
            return super().backward(*args, **kwargs)

    def _watch(self, step: Callable[..., Any], *args: Any) -> Any:
        values = [*self.model.parameters(), *self.model.buffers(), *args[0].values()]
        if self.model.training:
            values += [value for state in self.optimizers[0].state.values() for value in state.values()]
        for value in values:
            assert not isinstance(value, Tensor) or value.device == self.root_device, value.device
        with fake.no_reads():
            return step(*args)


class Steps(Callback):
    """The first callback: losses by micro-batch, and the host's reads of the device from one optimizer step to the next.

    Reads of validations and saves are not counted.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.reads: list[list[str]] = []
        self._before_save: list[str] | None = None
        self._validated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fake.take_reads()
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._validated:
            fake.take_reads()
        self._validated = False
        self._end_step(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True
        if trainer.global_step:
            self._end_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_step(trainer)

    def state_dict(self) -> dict[str, Any]:
        self._before_save = fake.take_reads()
        return {}

    def _end_step(self, trainer: Trainer) -> None:
        if trainer.global_step > self._step:  # else within an accumulation window
            self._step = trainer.global_step
            reads = fake.take_reads()
            self.reads.append(reads if self._before_save is None else self._before_save)
            self._before_save = None


def make_trainer(device: torch.device, precision: str, root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    place: dict[str, Any] = (
        {"accelerator": "cpu"} if device == CPU else {"strategy": Watched(device, fake.FakeAccelerator())}
    )
    if precision.endswith("mixed"):  # Lightning would name another accelerator in its autocast
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10) if precision == "16-mixed" else None
        place["plugins"] = [MixedPrecision(precision, device.type, scaler)]
    else:
        place["precision"] = precision
    defaults = QUIET | {"max_steps": 3, "gradient_clip_val": 1.0, "devices": 1}
    return Trainer(default_root_dir=root, callbacks=list(callbacks), **defaults | place | settings)


def train(
    device: torch.device,
    precision: str,
    root: Path,
    model: GPTConfig,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    *callbacks: Callback,
    **module: Any,
) -> tuple[dict[str, Any], Trainer, MoEGPTModule]:
    """`fit` with its validation, then `predict`: losses, and what was read."""
    steps, settings = Steps(), {"val_check_interval": 3, "check_val_every_n_epoch": None} | (trainer or {})
    run = make_trainer(device, precision, root, steps, *callbacks, **settings)
    made = MoEGPTModule(model, AdamWConfig(lr=1e-3), loss_chunk_size=24, **module)
    feed = NumberedData(**(data or {}))
    run.fit(made, feed)
    found = {
        "losses": torch.stack(steps.losses).tolist(),
        "validation": float(run.callback_metrics["val/loss"]),
        "reads": steps.reads,
    }
    batches = run.predict(made, feed)
    assert batches is not None
    return found | {"predicted": torch.cat(batches).mean(dim=1).tolist()}, run, made


def on_both(precision: str, root: Path, model: GPTConfig, *args: Any, **module: Any) -> dict[str, Any]:
    found, *_ = train(FAKE, precision, root / "fake", model, *args, **module)
    return found | {"expected": train(CPU, precision, root / "cpu", model, *args, **module)[0]}


def variant(name: str, precision: str, root: Path) -> dict[str, Any]:
    settings = VARIANTS[name]
    model = config(settings["moe"], **settings.get("model", {}))
    return on_both(precision, root, model, settings.get("data"), settings.get("trainer"), **settings.get("module", {}))


VARIANT_CELLS = {
    **{f"{name} in 32-true": partial(variant, name, "32-true") for name in VARIANTS},
    **{f"{name} in {precision}": partial(variant, name, precision) for precision in HALF for name in ALSO_IN_HALF},
    "fp16": partial(variant, "residual pyramid, rsample, padding, drops in evaluation", "16-mixed"),
}

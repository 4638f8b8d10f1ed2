"""What is recorded of the code, and compared with the record: runs, initial weights, batches and noise."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nlgmoe import load_config
from nlgmoe.callbacks import StagedDistillation
from nlgmoe.checkpoint.entries import split_experts
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data import Blend, MegatronIndexed, PileDataModule
from nlgmoe.data.blend import BlendPart
from nlgmoe.distill.distiller import Distiller
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.offline_teacher import OfflineTeacher
from nlgmoe.layers.router import TopKRouter
from nlgmoe.layers.routing import RoutingContext
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from tests.support.trainers import Recorder, trainer

GOLDEN = Path("tests/golden")  # from the repository's root: the run's configuration names its corpus so
CONFIG, CORPUS, TEACHER_LOGITS = (GOLDEN / name for name in ("config.yaml", "corpus", "logits"))
CHECKPOINTS = {"1 process": GOLDEN / "one_process.ckpt", "2 ranks": GOLDEN / "two_ranks.ckpt"}
TEACHER = CHECKPOINTS["1 process"]
STEPS, OFFLINE_STEPS, TAUGHT_STEPS = 20, 6, 14
NOISE_KEY = (1234, 3, 1)

_SHAPE: dict[str, Any] = {"vocab_size": 300, "seq_len": 16, "hidden_size": 16, "num_heads": 2, "init_std": 0.05}
FAMILIES = {
    "dense": GPTConfig(**_SHAPE, num_layers=2, hidden_dropout=0.1, attention_dropout=0.1),
    "moe": GPTConfig(**_SHAPE, num_layers=4, moe=MoEConfig(4, noise="rsample")),
    "pr_moe": GPTConfig(
        **_SHAPE, num_layers=4, hidden_dropout=0.1, moe=MoEConfig([2, 4], mlp_type="residual", noise="jitter")
    ),
    "top_2": GPTConfig(**_SHAPE, num_layers=2, moe=MoEConfig(4, top_k=2, z_loss_coeff=0.001)),
    "mos": GPTConfig(**_SHAPE, num_layers=3, moe=MoEConfig(4, mlp_type="residual")),
}


def family_losses(name: str, config: GPTConfig, folder: Path) -> list[float]:
    """Losses of 20 steps; a student learns from the teacher for 14 of them."""
    if name != "mos":
        return train(config, folder, STEPS)
    distiller = MixtureOfStudents(str(TEACHER), beta=0.5, temperature=2.0)
    return train(config, folder, STEPS, StagedDistillation(step=TAUGHT_STEPS), distiller=distiller)


def offline_losses(config: GPTConfig, folder: Path) -> list[float]:
    distiller = OfflineTeacher(str(TEACHER_LOGITS), temperature=2.0, teacher=str(TEACHER))
    return train(config, folder, OFFLINE_STEPS, distiller=distiller)


def train(
    config: GPTConfig, folder: Path, steps: int, *callbacks: Callback, distiller: Distiller | None = None
) -> list[float]:
    recorder = Recorder()
    run = trainer(folder, recorder, *callbacks, max_steps=steps, gradient_clip_val=1.0)
    run.fit(MoEGPTModule(config, AdamWConfig(lr=3e-3), distiller=distiller), blend(folder))
    return recorder.losses


def resumed_losses(checkpoint: Path, folder: Path) -> list[float]:
    """Losses of the run's other 6 steps, of two micro-batches each, by one process, as the saved configuration says."""
    experiment = load_config(CONFIG, trainer__default_root_dir=str(folder), data__data_dir=str(folder))
    recorder = Recorder()
    experiment.trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
    experiment.trainer.fit(experiment.module, experiment.data, ckpt_path=checkpoint)
    return recorder.losses


def blend(folder: Path) -> PileDataModule:
    """Both parts of the corpus, three samples of prose for one of verse."""
    parts = [BlendPart(weight, name, part_of_corpus(name)) for name, weight in {"prose": 3, "verse": 1}.items()]
    return data(folder, Blend(parts))


def part_of_corpus(name: str) -> MegatronIndexed:
    return MegatronIndexed(str(CORPUS / name), [80, 20, 0])


def data(folder: Path, corpus: Any, **settings: Any) -> PileDataModule:
    """A data module of the golden corpus; `folder` may be written to."""
    return PileDataModule(str(folder), str(CORPUS / "tokenizer"), corpus, micro_batch_size=8, seq_len=16, **settings)


def batches(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Hashes of the first four training batches: of the blend, and of a part of it with its documents' borders."""
    marks = {"document_attention": True, "mask_eod_loss": True, "seed": 7}
    modules = {"blend": blend(folder), "documents": data(folder, part_of_corpus("prose"), **marks)}
    found: dict[str, list[dict[str, str]]] = {}
    for name, module in modules.items():
        module.prepare_data()
        module.setup()
        loader = iter(module.train_dataloader())
        found[name] = [
            {key: digest(value) for key, value in next(loader).items() if isinstance(value, Tensor)} for _ in range(4)
        ]
    return found


def initial_weights(config: GPTConfig) -> dict[str, dict[str, Any]]:
    """Hash and sum of every entry of a new model.

    Torch draws normal values by other instructions on CPUs without AVX2: there the last bits differ.
    """
    entries = split_experts(GPT(config, seed=1234).state_dict())
    return {name: {"digest": digest(value), "sum": float(value.double().sum())} for name, value in entries.items()}


def noise() -> dict[str, str]:
    """Hashes of what routers draw: seen through gates whose weights are 0, or the identity."""

    def route(width: int, experts: int, **settings: Any) -> Any:
        router = TopKRouter(MoEConfig(experts, **settings), width, experts, block=5)
        torch.nn.init.zeros_(router.weight)
        if settings.get("noise") == "jitter":
            torch.nn.init.eye_(router.weight)
        with torch.no_grad():
            return router(torch.ones(64, width), RoutingContext(noise_key=NOISE_KEY))

    return {
        "jitter": digest(route(8, 8, noise="jitter", token_dropping=False).logits),
        "rsample": digest(route(8, 4, noise="rsample", token_dropping=False).expert),
        "random_token_selection": digest(route(8, 4, train_capacity_factor=2.0).kept),
        "second_expert": digest(route(8, 4, top_k=2, token_dropping=False).expert),
    }


def digest(value: Tensor) -> str:
    """Of shape, type and bits."""
    array = value.detach().cpu().contiguous().numpy()
    return hashlib.blake2b(f"{array.dtype}{array.shape}".encode() + array.tobytes(), digest_size=8).hexdigest()


def record(folder: Path) -> Mapping[str, Any]:
    """All that a JSON file holds."""
    return {
        "families": {
            name: {
                "config": config.to_dict(),
                "initial_weights": initial_weights(config),
                "losses": family_losses(name, config, folder),
            }
            for name, config in FAMILIES.items()
        },
        "resumed": {name: resumed_losses(path, folder / name) for name, path in CHECKPOINTS.items()},
        "offline": offline_losses(FAMILIES["mos"], folder),
        "batches": batches(folder),
        "noise": noise(),
    }

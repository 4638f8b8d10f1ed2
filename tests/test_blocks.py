"""Every block of configs/block/ with every mixture, router and a student: six steps of a tiny model, from YAML files."""

from dataclasses import fields
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from nlgmoe import MoEGPTModule, load_config
from nlgmoe.callbacks import StagedDistillation
from nlgmoe.config import MoEConfig
from nlgmoe.layers import routers
from nlgmoe.parts import ROUTER_FIELDS
from tests.support.synthetic import SyntheticData
from tests.support.trainers import Recorder, SaveAt, trainer

BLOCKS = {file.stem: file for file in sorted((Path(__file__).parents[1] / "configs/block").glob("*.yaml"))}
TINY = {
    **{"vocab_size": 61, "seq_len": 16, "num_layers": 4, "hidden_size": 64, "num_heads": 2, "init_std": 0.05},
    "moe": {"num_experts": 8, "top_k": 2},
}


def routed_by(name: str) -> dict[str, Any]:
    """The settings of a router, whatever the block's is."""
    reads = getattr(routers, name).reads_fields
    unread = {field.name: field.default for field in fields(MoEConfig) if field.name in ROUTER_FIELDS - reads}
    return unread | {"router": {"class_path": f"nlgmoe.{name}"}, "top_k": 2 if "normalize_weights" in reads else 1}


PARTNERS: dict[str, dict[str, Any]] = {
    "a residual pyramid": {"num_experts": [8, 16], "mlp_type": "residual", "residual_mix": "learned"},
    "the paper's router": {"router": None},
    **{name: routed_by(name) for name in routers.__all__},
    "a student": {},
    "a sigmoid mix": {"mlp_type": "residual", "residual_mix": "sigmoid"},
}


class Reached(Callback):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        self.names |= {name for name, p in pl_module.gpt.named_parameters() if p.grad is not None and p.grad.any()}


def module_of(root: Path, block: str, mixture: dict[str, Any], **overrides: Any) -> MoEGPTModule:
    """The module of three files: a tiny model, the block, and a mixture."""
    for name, config in {"tiny": TINY, "mixture": {"moe": mixture}}.items():
        settings = {"model": {"config": config, "optimizer": {"lr": 1e-2}}, "data": {"tokenizer": "gpt2"}}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return load_config(root / "tiny.yaml", BLOCKS[block], root / "mixture.yaml", **overrides).module


def train(root: Path, block: str, partner: str) -> None:
    mixture, overrides, callbacks = PARTNERS[partner], dict[str, Any](), list[Callback]()
    if partner == "a student":  # of a teacher with a block more
        teacher = root / "teacher.ckpt"
        trainer(root, SaveAt(1, teacher), max_steps=1).fit(module_of(root, block, mixture), SyntheticData())
        distiller = {"class_path": "nlgmoe.MixtureOfStudents", "init_args": {"teacher": str(teacher)}}
        overrides = {"model__config__num_layers": 3, "model__distiller": distiller}
        callbacks = [StagedDistillation(step=6)]
    module = module_of(root, block, mixture, **overrides)
    recorder, reached = Recorder(), Reached()
    trainer(root, recorder, reached, *callbacks, max_steps=6).fit(module, SyntheticData())
    assert recorder.losses[-1] < recorder.losses[0]
    assert reached.names == {name for name, parameter in module.gpt.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("block", "partner"), zip(BLOCKS, cycle(PARTNERS), strict=False))
def test_a_block_trains_with_a_mixture(block: str, partner: str, tmp_path: Path) -> None:
    """Each block with another one; all pairs are nightly."""
    train(tmp_path, block, partner)


@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_all_train_with_all_mixtures(block: str, partner: str, tmp_path: Path) -> None:
    train(tmp_path, block, partner)

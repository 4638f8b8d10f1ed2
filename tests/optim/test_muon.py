"""Muon against `torch.optim.Muon`, the weights that are its own, and its runs: exact resume, ranks, a switch that is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from swiglu_expert import SwiGLUExpert
from torch import Tensor, nn

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.mla import MLAConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.muon import Muon, MuonConfig
from nlgmoe.optim.optimizer import AdamWConfig, build_optimizer
from tests.support.cells import DROPLESS
from tests.support.ranks import SAMPLES, Cell, Outcome, on_ranks, train
from tests.support.spawn import spawn
from tests.support.synthetic import SyntheticData
from tests.support.trainers import SaveAt, trainer

WIDE, TALL, SQUARE = (8, 24), (24, 8), (16, 16)
Rule = Literal["match_rms_adamw", "original"]
CONFIG = GPTConfig(61, 16, 4, 32, 2, hidden_dropout=0.1, moe=MoEConfig(4, mlp_type="residual", noise="jitter"))
LATENT = replace(
    CONFIG,
    norm="rmsnorm",
    rope_theta=100.0,
    attention=MLAConfig(10, 6, 4, 8, q_lora_rank=12),
    moe=MoEConfig(4, top_k=2, mlp_type="residual", expert=SwiGLUExpert(8)),
)


def ours(parameter: nn.Parameter, config: MuonConfig) -> torch.optim.Optimizer:
    group = {"params": [("weight", parameter)], "muon": True}
    return Muon(torch.optim.AdamW([group], lr=0.1, weight_decay=0.3), config)


def torchs(parameter: nn.Parameter, config: MuonConfig) -> torch.optim.Optimizer:
    settings = {"momentum": config.momentum, "nesterov": config.nesterov, "ns_steps": config.ns_steps}
    return torch.optim.Muon([parameter], 0.1, 0.3, adjust_lr_fn=config.adjust_lr, **settings)


def steps(build: Callable[..., torch.optim.Optimizer], weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = build(parameter, config)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("rule", ["match_rms_adamw", "original"])
@pytest.mark.parametrize(("nesterov", "ns_steps"), [(True, 5), (False, 3)])
def test_muon_steps_a_matrix_as_torchs_muon(shape: tuple[int, int], rule: Rule, nesterov: bool, ns_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = torch.randn(5, *shape, generator=generator)
    config = MuonConfig(0.9, nesterov, ns_steps, rule)
    found, expected = (steps(build, weight, gradients, config) for build in (ours, torchs))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("rule", ["match_rms_adamw", "original"])
def test_muon_steps_each_expert_as_a_linear_layer_with_its_matrix_transposed(
    shape: tuple[int, int], rule: Rule
) -> None:
    """Experts of other sizes: a norm of the whole stack would be that of the largest one. The last one has no gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 1e-3, 30.0, 0.0]).view(4, 1, 1)
    weight, *gradients = torch.randn(5, 4, *shape, generator=generator)  # [E, in, out]
    gradients = [gradient * sizes for gradient in gradients]
    config = MuonConfig(adjust_lr=rule)
    found = steps(ours, weight, gradients, config)
    for expert in range(4):
        mine = [gradient[expert].T.contiguous() for gradient in gradients]
        expected = steps(torchs, weight[expert].T.contiguous(), mine, config).T
        moved = (expected - weight[expert] * (1 - 0.1 * 0.3) ** 4).norm()  # by more than decay
        error = (found[expert] - expected).norm()
        assert error <= 0.02 * moved + 1e-6  # bf16; a transposed product is rounded otherwise
    assert torch.allclose(found[3], weight[3] * (1 - 0.1 * 0.3) ** 4)


@pytest.mark.parametrize("config", [CONFIG, LATENT, replace(CONFIG, tied_embeddings=False, ffn_network="swiglu")])
def test_muon_takes_matrices_of_hidden_layers_and_adamw_all_else(config: GPTConfig) -> None:
    model = GPT(config)
    optimizer = build_optimizer(model, AdamWConfig(muon=MuonConfig(), lr_scale={"experts": 0.5, "router": 2.0}))
    groups: dict[str, set[str]] = {group["name"]: set(group["param_names"]) for group in optimizer.param_groups}
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices -= {"head.weight", *(f"blocks.{block}.moe.coefficient.weight" for block in (1, 3))}
    stacks = {name for name, weight in model.named_parameters() if weight.dim() == 3}
    assert len(stacks) == 2 * (3 if config.moe.expert or config.ffn_network == "swiglu" else 2)  # type: ignore[union-attr]
    assert (groups.pop("muon"), groups.pop("muon, lr x 0.5")) == (matrices, stacks)
    assert groups.pop("decay, lr x 2") == {"blocks.1.moe.router.weight", "blocks.3.moe.router.weight"}
    embeddings = {name for name, _ in model.named_parameters() if "embedding" in name or name == "head.weight"}
    assert groups.pop("decay") == embeddings | {f"blocks.{block}.moe.coefficient.weight" for block in (1, 3)}
    others = {name for name, _ in model.named_parameters() if name.endswith("bias") or "norm" in name}
    assert set().union(*groups.values()) == others


PARTS: dict[str, Any] = {"frozen": ("attention", "embeddings"), "lr_scale": {"experts": 0.5}}


@pytest.mark.parametrize(
    ("config", "settings", "accumulated"),
    [(LATENT, {}, 2), (CONFIG, PARTS, 1)],
    ids=["latent attention, an expert of one's own", "frozen, fp16"],
)
def test_muon_resumes_exactly_from_one_entry_per_expert(
    config: GPTConfig, settings: dict[str, Any], accumulated: int, tmp_path: Path
) -> None:
    def fit(path: Path | None = None) -> MoEGPTModule:
        module = MoEGPTModule(config, AdamWConfig(lr=1e-2, muon=MuonConfig(), **settings))
        half = {"gradient_clip_val": 0.5, "plugins": [MixedPrecision("16-mixed", "cpu")]} if settings else {}
        callbacks = [] if path else [SaveAt(2 * accumulated, tmp_path / "two.ckpt")]
        run = trainer(tmp_path, *callbacks, max_steps=4, accumulate_grad_batches=accumulated, **half)
        run.fit(module, SyntheticData(), ckpt_path=path)
        return module

    whole, resumed = fit(), fit(tmp_path / "two.ckpt")
    assert all(torch.equal(value, whole.gpt.state_dict()[name]) for name, value in resumed.gpt.state_dict().items())
    assert list(find_problems(Checkpoint(tmp_path / "two.ckpt"))) == []
    stored = Checkpoint(tmp_path / "two.ckpt").tensors("optimizer").shapes
    weights = Checkpoint(tmp_path / "two.ckpt").tensors("model").shapes
    moments = {key: shape for key, shape in stored.items() if key.startswith(("momentum_buffer/", "exp_avg/"))}
    assert all(shape == weights[key.partition("/")[2]] for key, shape in moments.items())
    expert = "blocks.3.moe.experts.2.down_weight"
    assert f"momentum_buffer/{expert}" in stored and not {f"exp_avg/{expert}", f"step/{expert}"} & stored.keys()
    assert ("exp_avg/token_embedding.weight" in stored) == (not settings)


CELL = Cell("ddp, Muon", strategy="ddp", moe=DROPLESS, optimizer={"muon": MuonConfig()})
# Resumed alone and on 4 ranks; Newton-Schulz in fp32, whose rounding is the same for any division.
ZERO = Cell("ZeRO, Muon", 2, 2, moe=DROPLESS, optimizer={"muon": MuonConfig(ns_precision="fp32")})


def resumed(alone: Path, folder: Path) -> list[Outcome]:
    """Resume a checkpoint of one process; then train from the start, and resume that from its third step."""
    runs = [on_ranks(CELL, 2, folder / "other", checkpoint=alone)]
    runs.append(on_ranks(CELL, 2, folder / "whole", SaveAt(3, folder / "three.ckpt")))
    return [*runs, on_ranks(CELL, 2, folder / "resumed", checkpoint=folder / "three.ckpt")]


def test_muon_on_ranks_resumes_a_run_of_one_process_and_its_own_exactly(tmp_path: Path) -> None:
    whole = train(CELL, 1, tmp_path, SAMPLES, 1, SaveAt(3, tmp_path / "alone.ckpt"))
    by_rank = spawn(2, resumed, tmp_path / "alone.ckpt", tmp_path, folder=tmp_path)
    for of_one_process, undisturbed, again in by_rank:
        assert of_one_process.losses[0] == pytest.approx(whole.losses[3], rel=1e-6)
        assert of_one_process.losses == pytest.approx(whole.losses[3:], rel=5e-5)  # orthogonalised in bf16
        assert undisturbed.losses == pytest.approx(whole.losses, rel=5e-5)
        assert again.losses == undisturbed.losses[3:] and again.validation == undisturbed.validation
    ends = [
        Checkpoint(tmp_path / run / f"{CELL.name} at the end.ckpt").tensors("model") for run in ("whole", "resumed")
    ]
    assert all(torch.equal(ends[0].read(name), ends[1].read(name)) for name in ends[0].shapes)


def saved_and_resumed(folder: Path) -> list[Outcome]:
    """Train on 2 ranks, and go on from the third step."""
    whole = on_ranks(ZERO, 2, folder / "whole", SaveAt(3, folder / "three.ckpt"))
    return [whole, on_ranks(ZERO, 2, folder / "resumed", checkpoint=folder / "three.ckpt")]


def test_muon_of_two_ranks_under_zero_resumes_on_two_on_one_and_on_four(tmp_path: Path) -> None:
    (whole, again), _ = spawn(2, saved_and_resumed, tmp_path, folder=tmp_path / "2")
    assert again.losses == whole.losses[3:] and again.validation == whole.validation
    ends = [
        Checkpoint(tmp_path / run / f"{ZERO.name} at the end.ckpt").tensors("model") for run in ("whole", "resumed")
    ]
    assert all(torch.equal(ends[0].read(name), ends[1].read(name)) for name in ends[0].shapes)
    alone = train(ZERO, 1, tmp_path, SAMPLES, 1, checkpoint=tmp_path / "three.ckpt")
    assert alone.losses == pytest.approx(whole.losses[3:], rel=1e-5)
    wider = replace(ZERO, stage=1, degree=4)
    for outcome in spawn(4, on_ranks_from, wider, 4, tmp_path, folder=tmp_path / "4"):
        assert outcome.losses == pytest.approx(whole.losses[3:], rel=1e-5)
    assert list(find_problems(Checkpoint(tmp_path / "three.ckpt"))) == []


def on_ranks_from(cell: Cell, ranks: int, folder: Path) -> Outcome:
    return on_ranks(cell, ranks, folder / str(ranks), checkpoint=folder / "three.ckpt")


@pytest.mark.parametrize("muon", [None, MuonConfig()])
def test_muon_and_adamw_refuse_each_others_checkpoints(muon: MuonConfig | None, tmp_path: Path) -> None:
    other = MuonConfig() if muon is None else None
    run = trainer(tmp_path, SaveAt(1, tmp_path / "one.ckpt"), max_steps=1)
    run.fit(MoEGPTModule(CONFIG, AdamWConfig(muon=other)), SyntheticData())
    module, name = MoEGPTModule(CONFIG, AdamWConfig(muon=muon)), "null" if muon is None else r"\{\}"
    message = rf"^model.optimizer.muon={name}: the checkpoint's run had .*; set it as it was, or"
    with pytest.raises(ValueError, match=message) as e:
        trainer(tmp_path, max_steps=2).fit(module, SyntheticData(), ckpt_path=tmp_path / "one.ckpt")
    assert "\n" not in str(e.value)

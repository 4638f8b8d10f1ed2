"""NaN and infinity in a step: named, and either the end of the run or a step that never was."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from nlgmoe.callbacks import ExpertLoad, RunSummary, Throughput
from nlgmoe.config import MoEConfig
from nlgmoe.layers.routers import SigmoidRouterConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule
from nlgmoe.non_finite import NonFinite, NonFiniteError, total_norm
from nlgmoe.optim.muon import MuonConfig
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from tests.support.non_finite import Spoils, Undo, output_of
from tests.support.synthetic import SyntheticData
from tests.support.trainers import CONFIG, SaveAt, trainer


def gradient_of(part: str, value: float) -> Callable[[GPT, Tensor], Undo]:
    def put(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1)[3] = value
        return changed

    return lambda gpt, tokens: gpt.get_parameter(part).register_hook(put).remove


def with_a_gradient_of_nan(output: Tensor) -> Tensor:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * torch.nan)
    return output


def first_micro_batch_only(gpt: GPT, tokens: Tensor) -> Undo:
    def look(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.inf if torch.equal(inputs[0], tokens) else output

    return gpt.token_embedding.register_forward_hook(look).remove


SOURCES: dict[str, tuple[Callable[[GPT, Tensor], Undo], str]] = {
    "a micro-batch": (first_micro_batch_only, "loss is nan; first not finite: the loss on rank 0;"),
    "the backward pass": (
        output_of("blocks.2.attention", with_a_gradient_of_nan),
        "gradient norm is nan; first not finite: the gradient of blocks.2.attention.output.bias on rank 0;",
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_first_bad_value_is_named_before_anything_changes(source: str, tmp_path: Path) -> None:
    spoil, words = SOURCES[source]
    spoils, module = Spoils({2}, spoil), MoEGPTModule(CONFIG)
    run = trainer(tmp_path, spoils, max_steps=5, accumulate_grad_batches=3, gradient_clip_val=1.0)
    with pytest.raises(NonFiniteError) as error:
        run.fit(module, SyntheticData(padded=True))
    assert str(error.value).startswith("step 2: the ") and words in str(error.value)
    assert "model.non_finite.action set to skip" in str(error.value)
    for before, parameter in zip(spoils.before, module.parameters(), strict=True):
        assert torch.equal(before.nan_to_num(), parameter.detach().nan_to_num())
    assert module.tokens_seen == 2 * 3 * 64


@pytest.mark.parametrize("steps", [1, 2], ids=["at the end", "in the next step"])
def test_weights_that_a_finite_step_has_spoilt_end_the_run(steps: int, tmp_path: Path) -> None:
    module = MoEGPTModule(CONFIG, AdamWConfig(lr=1e39), non_finite=NonFinite("skip"))
    run = trainer(tmp_path, RunSummary(), max_steps=steps)
    with pytest.raises(NonFiniteError) as error:
        run.fit(module, SyntheticData())
    what = "the weight" if steps == 1 else "the loss is nan; first not finite: the weight"
    assert str(error.value).startswith(f"step 1: {what} token_embedding.weight on rank 0")
    assert "an earlier step wrote it, which skipping steps cannot undo" in str(error.value)
    assert module.skipped_steps == 0 and not (tmp_path / "summary.json").exists()


class TakesBack(Spoils):
    """Lets the step happen, and puts weights and moments back as they were."""

    def __init__(self, step: int) -> None:
        super().__init__({step}, self.keep)
        self.run: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.run = trainer

    def keep(self, gpt: GPT, tokens: Tensor) -> Undo:
        moments = [value for state in self.run.optimizers[0].state.values() for value in state.values()]
        kept = [(value, value.detach().clone()) for value in (*gpt.parameters(), *moments)]
        return lambda: [value.data.copy_(before) for value, before in kept]


@pytest.mark.filterwarnings("ignore:step 3")
@pytest.mark.parametrize("muon", [None, MuonConfig()])
def test_skipped_step_equals_one_without_its_update(muon: MuonConfig | None, tmp_path: Path) -> None:
    schedule = LearningRateSchedule("cosine", warmup_tokens=128, decay_tokens=2000)
    runs = []
    for spoils in (Spoils({3}, gradient_of("blocks.1.moe.experts.up_weight", torch.nan)), TakesBack(3)):
        module = MoEGPTModule(CONFIG, AdamWConfig(lr=1e-2, muon=muon), schedule, non_finite=NonFinite("skip"))
        run = trainer(tmp_path, spoils, max_steps=8, gradient_clip_val=0.5)
        run.fit(module, SyntheticData())
        runs.append((module, spoils, run))
    (module, spoils, run), (other, expected, other_run) = runs
    assert spoils.losses == expected.losses
    assert (module.tokens_seen, run.global_step) == (other.tokens_seen, other_run.global_step)
    assert [seen["train/lr"] for seen in spoils.logged] == [seen["train/lr"] for seen in expected.logged]
    assert [seen["train/skipped_steps"] for seen in spoils.logged] == [0, 0, 0, *[1] * 5]
    norms = [[seen["train/grad_norm"] for seen in one.logged] for one in (spoils, expected)]
    assert norms[0][:3] + norms[0][4:] == norms[1][:3] + norms[1][4:]
    for parameter, same in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same)
        state, expected_state = run.optimizers[0].state[parameter], other_run.optimizers[0].state[same]
        names = {"step", "exp_avg", "exp_avg_sq"} if "step" in state else {"momentum_buffer"}
        assert state.keys() == expected_state.keys() == names
        assert all(torch.equal(state[name], expected_state[name]) for name in names)


class Clipped(MoEGPTModule):
    def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
        super().configure_gradient_clipping(*args, **options)
        self.gradients = [parameter.grad.double().flatten() for parameter in self.parameters()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_norm_and_clipping_are_not_in_bf16(precision: str, tmp_path: Path) -> None:
    before: list[Tensor] = []
    looks = LambdaCallback(
        on_before_optimizer_step=lambda _, module, __: before.extend(p.grad.double() for p in module.parameters())
    )
    module = Clipped(CONFIG)
    run = trainer(tmp_path, looks, max_steps=1, gradient_clip_val=0.5, precision=precision)
    run.fit(module, SyntheticData())
    norm = torch.cat([gradient.flatten() for gradient in before]).norm()
    assert float(run.callback_metrics["train/grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert float(torch.cat(module.gradients).norm()) == pytest.approx(0.5, rel=3e-4)  # 0.499 with a factor in bf16


def test_a_router_learns_nothing_from_a_step_that_is_skipped(tmp_path: Path) -> None:
    biases: list[Tensor] = []
    spoils = Spoils({1}, gradient_of("token_embedding.weight", torch.nan))
    keeps = LambdaCallback(
        on_train_batch_end=lambda run, module, *_: biases.append(module.gpt.blocks[1].moe.router.bias.clone())
    )
    config = replace(CONFIG, moe=MoEConfig([2, 4], router=SigmoidRouterConfig(0.01)))
    run = trainer(tmp_path, spoils, keeps, max_steps=3)
    run.fit(MoEGPTModule(config, non_finite=NonFinite("skip")), SyntheticData())
    assert torch.equal(biases[0], biases[1]) and not torch.equal(biases[1], biases[2])


def test_counts_of_skipped_steps_survive_a_restart_and_stand_in_the_summary(tmp_path: Path) -> None:
    def fit(steps: int, *callbacks: Callback, checkpoint: Path | None = None) -> MoEGPTModule:
        module = MoEGPTModule(CONFIG, non_finite=NonFinite("skip", limit=2))
        spoils = Spoils({1, 2, 3}, output_of("blocks.0.ffn", lambda out: out * torch.nan))
        run = trainer(tmp_path, spoils, *callbacks, max_steps=steps)
        run.fit(module, SyntheticData(), ckpt_path=checkpoint)
        return module

    path = tmp_path / "a.ckpt"
    assert fit(3, RunSummary(), SaveAt(3, path)).guard.state_dict() == {"skipped": 2, "in_a_row": 2}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["skipped_steps"] == 2
    assert 0 < summary["train_loss"] < 10
    with pytest.raises(NonFiniteError, match=r"^step 3: .*; 2 steps in a row"):
        fit(5, checkpoint=path)


def fit_fp16(tmp_path: Path, spoils: Spoils, steps: int, *callbacks: Callback, **settings: Any) -> tuple[Any, ...]:
    """Train in fp16, which Lightning alone would not do on a CPU; the run, its module and the scaler's state."""
    plugin, module = MixedPrecision("16-mixed", "cpu"), MoEGPTModule(CONFIG, schedule=WARM_UP, **settings)
    checkpoint = tmp_path / "fp16.ckpt"
    run = trainer(tmp_path, spoils, *callbacks, max_steps=steps, gradient_clip_val=1.0, plugins=[plugin])
    run.fit(module, SyntheticData(), ckpt_path=checkpoint if checkpoint.exists() else None)
    return run, module, plugin.state_dict()


WARM_UP = LearningRateSchedule("cosine", warmup_tokens=192, decay_tokens=2000)


def test_fp16_overflow_skips_the_update_and_the_scale_survives_a_restart(tmp_path: Path) -> None:
    spoils = Spoils({2}, gradient_of("blocks.0.ffn.up.weight", torch.inf))
    run, module, state = fit_fp16(tmp_path, spoils, 6)
    assert (state["scale"], state["_growth_tracker"]) == (2.0**15, 3)
    assert module.guard.state_dict() == {"skipped": 1, "in_a_row": 0}
    assert [seen["train/skipped_steps"] for seen in spoils.logged] == [0, 0, 1, 1, 1, 1]
    assert {float(state["step"]) for state in run.optimizers[0].state.values()} == {5.0}
    assert module.tokens_seen == 6 * 64  # the data were consumed, so the clock goes on

    again = [Spoils({2}, gradient_of("blocks.0.ffn.up.weight", torch.inf)) for _ in range(2)]
    fit_fp16(tmp_path, again[0], 4, SaveAt(4, tmp_path / "fp16.ckpt"))
    _, resumed, resumed_state = fit_fp16(tmp_path, again[1], 6)
    assert resumed_state == state and resumed.skipped_steps == 1
    assert again[0].losses + again[1].losses == spoils.losses


@pytest.mark.filterwarnings("error:Detected call of")
def test_a_run_in_fp16_that_finds_no_scale_ends(tmp_path: Path) -> None:
    always = Spoils(set(range(40)), gradient_of("blocks.0.ffn.up.weight", torch.inf))
    message = r"^step 16: the gradient norm is inf; first not finite: the gradient of "
    with pytest.raises(NonFiniteError, match=message) as error:
        fit_fp16(tmp_path, always, 40)
    assert "trainer.precision=bf16-mixed" in str(error.value) and "\n" not in str(error.value)
    assert [seen["train/skipped_steps"] for seen in always.logged] == list(range(1, 17))


def test_a_loss_that_is_not_finite_is_no_overflow(tmp_path: Path) -> None:
    message = r"^step 2: the loss is nan; first not finite: the loss on rank 0;"
    with pytest.raises(NonFiniteError, match=message):
        fit_fp16(tmp_path, Spoils({2}, output_of("blocks.0.ffn", lambda out: out * torch.nan)), 5)


def test_a_validation_loss_that_is_not_finite_is_a_warning(tmp_path: Path) -> None:
    module = MoEGPTModule(CONFIG)
    module.gpt.final_norm.register_forward_hook(lambda m, i, out: out if m.training else out * torch.nan)
    validation = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    run = trainer(tmp_path, max_steps=3, **validation)
    with pytest.warns(UserWarning, match="^step 2: val/loss is nan$"):
        run.fit(module, SyntheticData())
    assert run.global_step == 3


def test_logged_metrics_are_the_documented_ones(tmp_path: Path) -> None:
    documented = set(re.findall(r"`([\w/]+)`", (Path(__file__).parents[1] / "docs/report.md").read_text()))
    validation = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    for moe in (MoEConfig([2, 4]), MoEConfig([2, 4], router=SigmoidRouterConfig(sequence_loss_coeff=0.01))):
        module = MoEGPTModule(replace(CONFIG, moe=moe), curriculum=SequenceCurriculum(tokens=64, start=8))
        run = trainer(tmp_path, ExpertLoad(), Throughput(), max_steps=2, log_every_n_steps=1, **validation)
        run.fit(module, SyntheticData())
        logged = (*run.callback_metrics, "epoch", "step")
        names = {re.sub(r"^experts/\d+/", "experts/MOE_LAYER/", name) for name in logged}
        assert {re.sub(r"/(even|odd)$", "/DOMAIN", name) for name in names} <= documented


def test_norm_of_a_large_gradient_is_exact_on_a_cpu() -> None:
    gradient = torch.randn(2**24, generator=torch.Generator().manual_seed(0))
    assert float(total_norm([gradient])) == pytest.approx(float(gradient.double().norm()), rel=1e-5)

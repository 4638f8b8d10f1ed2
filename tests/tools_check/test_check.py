"""`nlgmoe check`: it finds each seeded defect, and passes our own layers."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from nlgmoe import (
    FrozenRouterConfig,
    GPTConfig,
    HashedRouterConfig,
    HashRouterConfig,
    MoEConfig,
    QuantileRouterConfig,
    Router,
    RouterConfig,
    SigmoidRouterConfig,
    UnitWeightRouterConfig,
)
from nlgmoe.commands.main import main as nlgmoe
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.routing import RoutingContext
from nlgmoe.tools.check.inputs import unusual_sizes_work
from nlgmoe.tools.check.layer import Layer
from nlgmoe.tools.check.own import own_layer
from nlgmoe.tools.check.properties import PROPERTIES, check_layer
from nlgmoe.tools.check.targets import ForeignLayer, find_layers
from nlgmoe.validation import SettingError
from tests.support.checkpoints import write
from tests.support.processes import ROOT
from tests.tools_check import defects
from tests.tools_check.defects import CAPACITY, DEFECTS, DROPLESS, TWO, broken, clean, own_loss
from tests.tools_check.own_routers import OwnCapacityConfig

RANKS, CAPACITY_RULE = "ranks equal one process", "capacity is the formula"
HOST, TYPES = "the host reads no device", "types are kept"
NEIGHBOURS, SIZES = "evaluation does not see neighbours", "unusual sizes work"
QUICK = set(PROPERTIES) - {RANKS}


def verdicts(layer: Layer, only: set[str]) -> dict[str, str]:
    return {result.property: f"{result.verdict}: {result.reason}" for result in check_layer(layer, only)}


@pytest.mark.parametrize("defect", DEFECTS)
def test_check_finds_each_planted_defect(defect: str) -> None:
    name, (moe, spoil) = DEFECTS[defect]
    found = verdicts(broken(moe, spoil), {name})[name]
    assert found.startswith("fail"), found
    refused = {"even widths only", "weights in half precision"}  # by an exception
    assert "Error: " not in found or defect in refused, found  # not by accident


OPEN = GPTConfig(
    61, norm="rmsnorm", rope_theta=1e4, num_kv_heads=2, head_dim=12, rotary_dim=6, qk_norm="head", bias=False,
    ffn_network="swiglu", moe=MoEConfig(8, top_k=2, token_dropping=False, second_expert="argmax", normalize_weights=False),
)  # fmt: skip
SIGMOID = MoEConfig(8, top_k=2, token_dropping=False, router=SigmoidRouterConfig(0.01))
OURS = {
    "top-1": CAPACITY,
    "rsample, residual": MoEConfig(8, mlp_type="residual", noise="rsample", z_loss_coeff=0.01),
    "top-3, residual": MoEConfig(4, top_k=3, mlp_type="residual", residual_mix="sum", aux_scope="rank"),
    "dropless": DROPLESS,
    "one expert": MoEConfig(1),
    "sigmoid": replace(SIGMOID, gate_scale=2.5, router=SigmoidRouterConfig(0.01, 0.1)),
    "an open model": OPEN,
    "top-1, groups, gated": MoEConfig(8, groups=[4, 2], mlp_type="residual", residual_mix="sigmoid", noise="rsample"),
    "top-3, groups, gated": MoEConfig(12, top_k=3, groups=[3, 2], residual_mix="sigmoid", mlp_type="residual"),
    "sigmoid, groups": replace(SIGMOID, groups=[2, 1]),
    "hash": MoEConfig(8, router=HashRouterConfig()),
    "frozen": MoEConfig(8, router=FrozenRouterConfig()),
    "smooth": replace(SIGMOID, router=SigmoidRouterConfig(0.01, scores="sqrtsoftplus", smooth=2.0)),
    "quantile": replace(SIGMOID, router=QuantileRouterConfig()),
    "quantile of logits": MoEConfig(8, router=QuantileRouterConfig("logits")),
    "hashed": replace(SIGMOID, router=HashedRouterConfig()),
    "weight 1": MoEConfig(8, router=UnitWeightRouterConfig("ratio")),
}


@pytest.mark.parametrize("name", OURS)
def test_check_passes_our_layers(name: str) -> None:
    ours = OURS[name]
    found = verdicts(own_layer(ours, "ours") if isinstance(ours, GPTConfig) else clean(ours), QUICK)
    assert not [f"{name}: {text}" for name, text in found.items() if text.startswith("fail")]
    asked = {"top-1": 18, "one expert": 11, "hash": 14, "hashed": 16, "weight 1": 16}.get(name, 17)
    assert sum(text.startswith("pass") for text in found.values()) >= asked


class Plain(nn.Module):
    """A module of the user's own, with a capacity that it does not declare."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = MoELayer(GPTConfig(61, hidden_size=16, num_heads=2, moe=MoEConfig(8, expert_interval=1)), 0)
        self.router = self.layer.router

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        y, routing = self.layer(x, RoutingContext(mask=mask))
        return y, routing


def test_check_passes_a_capacity_that_is_not_declared() -> None:
    layer = ForeignLayer("plain", num_experts=8, top_k=1, takes_mask=True, factory=Plain)
    found = verdicts(layer, QUICK)
    assert not [text for text in found.values() if text.startswith("fail")], found
    assert "tokens are not declared" in found[CAPACITY_RULE]
    for name in ("the declared tokens are dropped", "micro-batches add up"):
        assert found[name].startswith("not applicable"), found


def test_check_passes_a_router_with_a_capacity_and_a_learned_temperature() -> None:
    moe = MoEConfig(8, top_k=2, router=OwnCapacityConfig())
    found = verdicts(own_layer(GPTConfig(61, moe=moe), "a user's"), set(PROPERTIES))
    assert not [text for text in found.values() if text.startswith("fail")], found
    assert sum(text.startswith("pass") for text in found.values()) >= 16


def test_check_page_has_the_number_of_defects_that_are_planted() -> None:
    assert (
        f"add {len(DEFECTS) + 2} defects to our layer" in (ROOT / "docs/extending.md").read_text()
    )  # and the next two


def test_check_on_ranks_finds_a_wrong_gradient_of_the_gate() -> None:
    found = verdicts(broken(CAPACITY, defects.gate_of_ranks), {RANKS})[RANKS]
    assert found.startswith("fail: 2 ranks, rank") and "gradient of router.weight" in found


def test_check_on_ranks_finds_outputs_of_other_slots() -> None:
    """Few slots may stay empty, so that ranks send them padded, as in training."""
    found = verdicts(broken(replace(CAPACITY, min_capacity=1), defects.outputs_of_other_slots), {RANKS})[RANKS]
    assert found.startswith("fail: 2 ranks, rank") and "output" in found


def test_check_passes_idioms_of_routers() -> None:
    collapse = "the balance loss sees a collapse"  # which a z-loss of the router's own does not
    found = verdicts(broken(TWO, own_loss("logits.logsumexp(-1).square().mean()")), {collapse})
    assert found[collapse].startswith("pass"), found


@pytest.mark.parametrize(
    "target",
    [
        "cosine_router.CosineRouterConfig",  # normalises its input
        "dense_mixer.DenseMixerConfig",  # has a straight-through estimate
        "extending.TokenRouterConfig",  # the first code of the page of this name
        "tutorial.MyRouterConfig",
    ],
)
def test_check_passes_routers_of_the_documents(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (page := ROOT / f"docs/{target.partition('.')[0]}.md").exists():
        (tmp_path / f"{page.stem}.py").write_text(page.read_text().split("```python\n")[1].partition("```")[0])
        monkeypatch.syspath_prepend(tmp_path)
    for layer in find_layers([target]):
        found = verdicts(layer, QUICK)
        assert not [text for text in found.values() if text.startswith("fail")], found
        assert found[HOST].startswith("pass")


def test_check_tests_each_router_of_a_model(tmp_path: Path) -> None:
    moe = replace(DROPLESS, top_k=2, expert_interval=2, router=HashedRouterConfig(hash_blocks=1))
    layers = find_layers([str(write(tmp_path / "a.ckpt", GPTConfig(64, 16, 4, 16, 2, moe=moe)))])
    assert [layer.name.rpartition(", ")[2] for layer in layers] == ["HashedRouter", "SigmoidRouter"]
    for layer in layers:
        assert type(layer.make().router).__name__ == layer.name.rpartition(", ")[2]


class NoRole(Router):
    def __init__(self) -> None:
        super().__init__(8)
        self.scale = nn.Parameter(torch.ones(3))


class NoRoleConfig(RouterConfig):
    def build(self, config: GPTConfig, block: int) -> nn.Module:
        return NoRole()


def test_check_names_a_parameter_without_a_role() -> None:
    with pytest.raises(SettingError, match=r"router\.scale: NoRole does not declare its parameter scale; add roles = "):
        find_layers([f"{__name__}.NoRoleConfig"])


def test_check_excuses_the_gate_alone_for_a_declared_gradient_estimate() -> None:
    name, (layer,) = "gradients equal finite differences", find_layers(["dense_mixer.DenseMixerConfig"])
    assert verdicts(replace(layer, estimated_gradient=False), {name})[name].startswith("fail: gradient of")
    wrong = broken(*DEFECTS["no gradient of an expert"][1])
    found = verdicts(replace(wrong, estimated_gradient=True), {name})[name]
    assert found.startswith("fail: gradient of experts."), found


def test_check_command_prints_json_and_ends_with_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in set(PROPERTIES) - {NEIGHBOURS, "50 steps balance the load"}:
        monkeypatch.delitem(PROPERTIES, name)
    nlgmoe(["check", "nlgmoe.SigmoidRouterConfig", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == 0
    assert [one["layer"] for one in found["layers"]] == [
        f"nlgmoe.SigmoidRouterConfig, top_k {end}" for end in ("1", "2", "2, dropless")
    ]
    (tmp_path / "laptop.json").write_text(json.dumps(yaml.safe_load(Path("configs/moe/laptop.yaml").read_text())))
    nlgmoe(["check", str(tmp_path / "laptop.json")])
    nlgmoe(["check", "swiglu_expert.SwiGLUExpert"])
    assert "pass            evaluation does not see neighbours" in capsys.readouterr().out

    write(tmp_path / "good.ckpt", GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(4)))
    nlgmoe(["check", str(tmp_path / "good.ckpt")])
    assert "good.ckpt: 4 experts, top_k 1, width 16" in capsys.readouterr().out
    monkeypatch.setitem(PROPERTIES, SIZES, (unusual_sizes_work,))
    with pytest.raises(SystemExit) as end:
        nlgmoe(["check", f"{__name__}.NotANumber"])
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: 2 of 3 properties fail; docs/extending.md explains each\n"


def test_check_takes_a_layer_that_does_not_use_nlgmoe() -> None:
    (good,), (bad,) = (
        find_layers([f"tests.tools_check.plain_moe.{name}"]) for name in ("PlainMoE", "detached_plain_moe")
    )
    found = verdicts(good, QUICK)
    failed = {one: text for one, text in found.items() if text.startswith("fail")}
    assert set(failed) == {TYPES, SIZES} and "bfloat16" in failed[TYPES] and "0 sequences" in failed[SIZES]
    assert sum(text.startswith("pass") for text in found.values()) >= 9
    aux = "the losses reach the gate"
    assert verdicts(bad, {aux})[aux].startswith("fail")
    (module := nn.Module()).gate = nn.Parameter(torch.empty(good.num_experts, good.hidden_size))
    assert good.gate_weight(module) is module.gate


class NotANumber(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 4, bias=False)
        self.hidden_size, self.num_experts, self.top_k, self.gate = 16, 4, 1, nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sum(-1, keepdim=True) * x * float("nan")


def test_check_fails_a_comparison_with_nan() -> None:
    (layer,) = find_layers([f"{__name__}.NotANumber"])
    for name in ("gradients equal finite differences", "the losses reach the gate"):
        assert verdicts(layer, {name})[name].startswith("fail"), name


def test_documented_failures_are_those_of_the_libraries() -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "docs/examples/layers_of_others.py"))

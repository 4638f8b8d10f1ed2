"""Removed experts, against models that are changed in the same way by hand, and pruned checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nlgmoe import (
    GPT,
    GPTConfig,
    HashedRouterConfig,
    MoEConfig,
    QuantileRouterConfig,
    SigmoidRouterConfig,
)
from nlgmoe.batch import Batch
from nlgmoe.eval.causes import exact_changes, first_order
from nlgmoe.eval.interventions import parse_experts, remove_experts
from nlgmoe.eval.perplexity import CHUNK, batch_losses
from nlgmoe.eval.trace import Trace
from nlgmoe.layers.moe import moe_layers
from nlgmoe.layers.router import Router
from nlgmoe.parts import RouterConfig
from nlgmoe.surgery.prune import pruned_config
from nlgmoe.validation import SettingError

EOD = 60


def model_of(moe: MoEConfig, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(GPTConfig(61, 16, 4, 16, 2, init_std=0.3, moe=moe), seed=3).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for layer in moe_layers(model):
        if isinstance(bias := getattr(layer.router, "bias", None), Tensor):
            bias.copy_(torch.rand(bias.shape, generator=generator) - 0.5)
    return model


def batches_of(sequences: int = 4, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(61, (sequences, 17), generator=generator)
    mask = torch.ones(sequences, 16, dtype=torch.bool)
    mask[-1, 9:] = False
    batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], token_mask=mask, domain=torch.arange(sequences) % 2)
    half = sequences // 2
    return [Batch(**{name: value[rows] for name, value in batch.items()}) for rows in (slice(half), slice(half, None))]  # type: ignore[index, typeddict-item]


@torch.no_grad()
def losses(model: GPT) -> Tensor:
    return torch.cat([batch_losses(model, batch, CHUNK)[0][batch["token_mask"]] for batch in batches_of()])


def pruned(model: GPT, layer: int, expert: int) -> GPT:
    """Return the model without an expert, its rows copied by hand."""
    config = model.config
    kept = [number for number in range(4) if number != expert]
    numbers = [3 if index == layer else 4 for index in range(2)]
    small = GPT(pruned_config(config, numbers)).eval()
    block = f"blocks.{2 * layer + 1}.moe."
    per_expert = {name for name, _ in small.named_parameters()} | {name for name, _ in small.named_buffers()}
    state = {
        name: value[kept] if name.startswith((f"{block}router", f"{block}experts")) else value
        for name, value in model.state_dict().items()
        if name in per_expert
    }
    small.load_state_dict(state)
    return small


def moe(router: RouterConfig | None = None, **changes: object) -> MoEConfig:
    return MoEConfig(4, **{"token_dropping": False, "router": router, **changes})  # type: ignore[arg-type]


MOES = {
    "top-1": moe(),
    "top-2": moe(top_k=2),
    "sigmoid": moe(SigmoidRouterConfig(), top_k=2),
    "quantile": moe(QuantileRouterConfig(), top_k=2),
    "scaled": moe(top_k=2, normalize_weights=False, gate_scale=2.5),
}


@pytest.mark.parametrize("name", MOES)
def test_routing_around_an_expert_equals_the_pruned_model(name: str) -> None:
    model, before = model_of(MOES[name]), losses(model_of(MOES[name]))
    with remove_experts(model, {1: [2]}):
        around = losses(model)
    assert torch.equal(losses(model), before), "the removal has not ended"
    torch.testing.assert_close(around, losses(pruned(model, 1, 2)), rtol=1e-5, atol=1e-5)
    assert (around - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["top-1", "top-2"])
def test_without_its_contribution_an_expert_returns_zero(name: str) -> None:
    model = model_of(MOES[name])
    with remove_experts(model, {1: [2]}, "contribution"):
        off = losses(model)
    experts = model.blocks[3].moe.experts
    with torch.no_grad():
        experts.down_weight[2], experts.down_bias[2] = 0, 0
    torch.testing.assert_close(off, losses(model), rtol=1e-5, atol=1e-5)


def test_removals_add_up_and_end_in_any_order() -> None:
    model = model_of(MOES["top-1"])
    both = remove_experts(model, {0: [1, 2]})
    expected = losses(model)
    both.close()
    with remove_experts(model, {0: [1]}), remove_experts(model, {0: [2]}):
        assert torch.equal(losses(model), expected)
    assert all(layer.router.left_out is None for layer in moe_layers(model))


def test_an_expert_that_no_token_chose_changes_nothing() -> None:
    model = model_of(MOES["top-2"])
    with remove_experts(model, {0: [3], 1: [3]}):
        before = losses(model)
        with remove_experts(model, {0: [3], 1: [3]}, "contribution"):
            assert torch.equal(losses(model), before)
        changes = exact_changes(model, batches_of(), {0: [3]})
        assert all((change.sums == 0).all() for change in changes.values())
        assert (first_order(model, batches_of()).layers[1].sums[:, 3] == 0).all()


def change_by_hand(model: GPT, layer: int, expert: int, factor: float) -> Tensor:
    """Return the losses where the expert's weights are multiplied by a factor."""

    def scale(router: object, inputs: object, routing: object) -> object:
        from dataclasses import replace

        weight = torch.where(routing.expert == expert, routing.weight * factor, routing.weight)  # type: ignore[attr-defined]
        return replace(routing, weight=weight)  # type: ignore[type-var]

    handle = moe_layers(model)[layer].router.register_forward_hook(scale)
    changed = torch.stack([(_summed(model, batch)) for batch in batches_of()])
    handle.remove()
    return changed.flatten()


@torch.no_grad()
def _summed(model: GPT, batch: Batch) -> Tensor:
    values, _ = batch_losses(model, batch, CHUNK)
    return (values * batch["token_mask"]).sum(dim=1)


@pytest.mark.parametrize("name", MOES)
def test_first_order_is_the_finite_difference(name: str) -> None:
    model, step = model_of(MOES[name], torch.float64), 1e-5
    layers = first_order(model, batches_of()).layers
    for layer in (0, 1):
        for expert in range(4):
            up, down = (change_by_hand(model, layer, expert, 1 + sign * step) for sign in (1, -1))
            expected = (down - up) / (2 * step)  # weight 1 -> 0: minus the derivative
            torch.testing.assert_close(torch.from_numpy(layers[layer].sums[:, expert]), expected, rtol=1e-5, atol=1e-7)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_exact_changes_are_differences_of_whole_passes() -> None:
    model = model_of(MOES["top-2"])
    before = torch.cat([_summed(model, batch) for batch in batches_of()])
    changes = exact_changes(model, batches_of(), {0: [1], 1: [0, 3]})
    assert set(changes) == {
        (layer, e, r) for layer, e in ((0, 1), (1, 0), (1, 3)) for r in ("contribution", "route_around")
    }
    for (layer, expert, removal), change in changes.items():
        with remove_experts(model, {layer: [expert]}, removal):
            after = torch.cat([_summed(model, batch) for batch in batches_of()])
        torch.testing.assert_close(torch.from_numpy(change.sums).float(), after - before, rtol=1e-4, atol=1e-4)


def mistakes(tmp_path: Path) -> Iterator[tuple[object, str]]:
    top2, hashed = model_of(MOES["top-2"]), model_of(moe(HashedRouterConfig(), top_k=2))
    config = top2.config
    yield lambda: remove_experts(top2, {0: [0, 1, 2]}), "without: 1 of 4 experts are left .* top_k=2; remove fewer"
    yield lambda: remove_experts(hashed, {0: [1]}), "HashedRouter cannot route around .* removal=contribution"
    yield lambda: parse_experts("0:4", config, "without"), "without=0:4: MoE layer 0 has no expert 4; it has 4"
    yield lambda: parse_experts(["2:0"], config, "exact"), "exact=2:0: there is no MoE layer 2; the model has 2"
    yield lambda: parse_experts("three", config, "exact"), "exact=three is not LAYER:EXPERT"
    yield lambda: Trace(tmp_path / "none"), "cannot be read"
    yield lambda: Router(4).leave_out([1]), "Router cannot route around experts; use removal=contribution"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for call, message in mistakes(tmp_path):
        with pytest.raises(SettingError, match=message) as error:
            call()  # type: ignore[operator]
        assert "\n" not in str(error.value)


def test_experts_are_named_by_layer() -> None:
    config = model_of(MOES["top-2"]).config
    assert parse_experts(["1:3,0", "1:2"], config, "exact") == {1: [0, 2, 3]}
    assert parse_experts("all", config, "exact") == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    assert parse_experts("0:all", config, "exact") == {0: [0, 1, 2, 3]}

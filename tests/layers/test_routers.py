"""The routers of `nlgmoe/layers/routers/`: routings worked out by hand, and what holds for each of them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from nlgmoe import (
    FrozenRouterConfig,
    GPTConfig,
    HashedRouterConfig,
    HashRouterConfig,
    MoEConfig,
    MoEGPTModule,
    QuantileRouterConfig,
    RoutingContext,
    SigmoidRouterConfig,
    UniformRouterConfig,
    UnitWeightRouterConfig,
    generate,
)
from nlgmoe.commands.main import main as nlgmoe
from nlgmoe.layers.router import Router
from nlgmoe.layers.routers.fixed import balanced_table
from nlgmoe.layers.routers.sigmoid import sequence_balance
from nlgmoe.loss import training_loss
from nlgmoe.model.counting import count_parameters, flops_per_token, parameters_of
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.hugging_face.export import export
from tests.support.synthetic import SyntheticData
from tests.support.trainers import trainer

MOES = {
    "softmax": MoEConfig(4, gate_scale=2.0, gate_init_std=0.5),
    "sigmoid": MoEConfig(4, top_k=2, router=SigmoidRouterConfig(0.01, sequence_loss_coeff=0.1)),
    "hash": MoEConfig(4, router=HashRouterConfig(seed=1)),
    "uniform": MoEConfig(4, mlp_type="residual", router=UniformRouterConfig(seed=1)),
    "frozen": MoEConfig(4, gate_init_std=0.5, router=FrozenRouterConfig()),
    "smooth": MoEConfig(4, router=SigmoidRouterConfig(0.01, smooth=2.0)),
    "quantile": MoEConfig(4, top_k=2, router=QuantileRouterConfig()),
    "quantile of logits": MoEConfig(4, gate_init_std=0.5, router=QuantileRouterConfig("logits")),
    "hashed": MoEConfig(4, top_k=2, router=HashedRouterConfig()),
    "weight 1": MoEConfig(4, gate_init_std=0.5, router=UnitWeightRouterConfig()),
}
BUFFERS = {"sigmoid": "bias", "hash": "table", "uniform": "seed", "frozen": "weight", "smooth": "momentum"}
BUFFERS |= {"quantile": "bias", "quantile of logits": "bias", "hashed": "table"}
each = pytest.mark.parametrize("name", MOES)


def model(moe: MoEConfig, **settings: Any) -> GPTConfig:
    shape = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "init_std": 0.05}
    return GPTConfig(61, 16, moe=moe, **shape | settings)


def router_of(moe: MoEConfig, **settings: Any) -> Any:
    return GPT(model(moe, **settings)).blocks[1].moe.router


def expect(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-6, atol=1e-6)


def test_a_router_s_modules_move_with_it_and_its_buffers_keep_their_dtype() -> None:
    class Nested(Router):
        def __init__(self) -> None:
            super().__init__(2)
            self.inner = torch.nn.BatchNorm1d(4)
            self.register_buffer("bias", torch.tensor(1.001))

    router = Nested().to(torch.bfloat16)
    assert router.inner.weight.dtype == router.inner.running_mean.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32 and router.bias == torch.tensor(1.001)


@torch.no_grad()
def test_losses_of_routers_are_those_of_the_tokens_if_the_input_is_embedded() -> None:
    """The sequence loss of the sigmoid router is of each sequence, also without token ids."""
    moe = MoEConfig(4, top_k=2, token_dropping=False, router=SigmoidRouterConfig(sequence_loss_coeff=1.0))
    model, tokens = GPT(GPTConfig(64, 16, 2, 16, 2, init_std=0.3, moe=moe)), torch.arange(128).view(8, 16) % 61
    (by_ids,), (embedded,) = (model(tokens, embedded=x).routings for x in (None, model.token_embedding(tokens)))
    assert by_ids.losses["sequence_balance_loss"] == embedded.losses["sequence_balance_loss"]


# ---- by hand


def test_sigmoid_router_chooses_by_biased_scores_and_weighs_by_scores() -> None:
    moe = MoEConfig(3, top_k=2, gate_scale=2.5, token_dropping=False, router=SigmoidRouterConfig())
    router = router_of(moe, hidden_size=3, num_heads=1).double()
    torch.nn.init.eye_(router.weight)
    router.bias.copy_(torch.tensor([-0.5, 0.1, 0.0]))
    routing = router(torch.tensor([[0.9, 0.6, 0.5]], dtype=torch.float64).logit())  # biased: 0.4, 0.7, 0.5
    assert routing.expert.tolist() == [[1, 2]]
    expect(routing.weight, [[2.5 * 0.6 / 1.1, 2.5 * 0.5 / 1.1]])
    expect(routing.probs, [[0.9 / 2, 0.6 / 2, 0.5 / 2]])
    torch.testing.assert_close(routing.logits.softmax(-1), routing.probs)  # what entropy is computed from
    router.bias.zero_()
    router.after_step(torch.tensor([5, 3, 4]))  # the mean is 4
    expect(router.bias, [-1e-3, 1e-3, 0.0])


def test_sequence_balance_is_computed_for_each_sequence_without_padding() -> None:
    p = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    # Sequence 1: both choose 0: 2 * (1 * 0.65). Sequence 2: one each: 2 * (0.5 * 0.55 + 0.5 * 0.45).
    expect(sequence_balance(p, 1, 2, None), (1.3 + 1.0) / 2)
    # Without the last token sequence 2 has chosen 1 alone: 2 * 0.8.
    loss = sequence_balance(p, 1, 2, torch.tensor([True, True, True, False]))
    expect(loss, (1.3 + 1.6) / 2)
    loss.backward()
    expect(p.grad, [[0.5, 0.0], [0.5, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert sequence_balance(p, 1, 2, torch.tensor([False] * 4)) == 0


def test_balance_loss_does_not_reach_a_router_that_balances_itself() -> None:
    """`loss_coeff` stands at its default, 0.01, where a router does not read it. Its own loss is added, and so is the z-loss."""
    batch = next(iter(SyntheticData().train_dataloader()))
    for router, coefficients in (
        (None, {"balance_loss": 0.01, "z_loss": 0.1}),
        (SigmoidRouterConfig(sequence_loss_coeff=0.1), {"sequence_balance_loss": 1}),
    ):
        moe = MoEConfig(4, router=router, z_loss_coeff=coefficients.get("z_loss", 0.0))
        loss, parts, _ = training_loss(GPT(model(moe)), batch, (0, 0, 0), 64)
        added = {name: coefficient * parts[f"train/{name}"].item() for name, coefficient in coefficients.items()}
        expect(loss - parts["train/loss"], sum(added.values()))
        assert min(added.values()) > 0


def test_hash_router_gives_ids_to_the_expert_with_the_fewest_tokens(tmp_path: Path) -> None:
    # Plus one each: 7, 4, 3, 1, 1. The first is alone until the others have 7; then one more for either.
    table = balanced_table([6, 3, 2, 0, 0], 2, seed=0)
    assert table[1] == table[2] != table[0] and table[3] != table[4]
    assert {tuple(expert for (expert,) in balanced_table([6, 3, 2, 0, 0], 2, seed)) for seed in range(20)} == {
        (a, 1 - a, 1 - a, b, 1 - b) for a in (0, 1) for b in (0, 1)
    }
    assert sorted(Counter(expert for (expert,) in balanced_table([1] * 61, 4, 3)).values()) == [15, 15, 15, 16]

    counts = [1000 // (rank + 1) for rank in range(61)]
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    moe = MoEConfig(4, router=HashRouterConfig(counts=str(tmp_path / "counts.json")))
    router = router_of(moe)
    load = torch.zeros(4).index_add_(0, router.table, torch.tensor(counts).float())
    assert load.max() / load.mean() < 1.05
    assert torch.equal(router.table, router_of(moe).table)
    assert not torch.equal(router.table, router_of(replace(moe, router=replace(moe.router, seed=1))).table)
    layers = [block.moe.router.table for block in GPT(model(replace(moe, expert_interval=1))).blocks]
    assert not torch.equal(*layers)

    context = RoutingContext(torch.tensor([[3, 9], [60, 3]]), torch.tensor([[True, True], [True, False]]))
    routing = router(torch.zeros(4, 16), context)
    assert routing.expert.flatten().tolist() == router.table[[3, 9, 60, 3]].tolist()
    assert routing.weight.flatten().tolist() == [1, 1, 1, 0] and routing.probs is None


def test_uniform_router_draws_independently_of_token_position_and_layer() -> None:
    experts = 7
    tokens = torch.arange(4096).repeat_interleave(64).view(1, -1)
    context = RoutingContext(tokens, positions=torch.arange(64).repeat(4096).view(1, -1))
    moe = MoEConfig(experts, expert_interval=1, router=UniformRouterConfig())
    routers = [block.moe.router for block in GPT(model(moe)).blocks]
    first, second = (router(torch.zeros(tokens.numel(), 1), context).expert.view(4096, 64) for router in routers)

    def chi_square(counts: Tensor) -> float:  # over its degrees of freedom: 1 in the mean
        expected = counts.double().sum() / counts.numel()
        return float((counts - expected).square().sum() / expected / (counts.numel() - 1))

    assert 0.05 < chi_square(first.flatten().bincount(minlength=experts)) < 3.5
    for other in (
        first.roll(1, 0),  # the next token
        first.roll(1, 1),  # the next position
        second,
        torch.arange(64).expand_as(first),
        torch.arange(4096).unsqueeze(1).expand_as(first),
    ):
        kinds = int(other.max()) + 1
        pairs = (first * kinds + other).flatten().bincount(minlength=experts * kinds)
        assert 0.3 < chi_square(pairs) < 2.3


@each
def test_a_router_in_another_block_routes_by_its_entries_alone(name: str) -> None:
    """`model.warm_start.layers`, which `nlgmoe student` writes, renumbers blocks."""
    tokens = torch.arange(60).view(4, 15)
    context = RoutingContext(tokens, positions=torch.arange(15).view(1, -1))
    first, second = (block.moe.router.eval() for block in GPT(model(replace(MOES[name], expert_interval=1))).blocks)
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(first(x, context).expert, second(x, context).expert)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x, context).expert, second(x, context).expert)


# ---- each of them


@torch.no_grad()
@each
def test_routers_in_evaluation_do_not_depend_on_a_cache_other_sequences_or_documents(name: str) -> None:
    gpt = GPT(model(MOES[name], init_std=0.3)).eval()
    tokens = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(0))
    prompts = [tokens[0].tolist(), tokens[1, :3].tolist()]  # the second is padded on the left
    for prompt, ids in zip(prompts, generate(gpt, prompts, 4, temperature=0), strict=True):
        whole = gpt.logits(gpt(torch.tensor([ids])).hidden)[0, len(prompt) - 1 : -1]
        assert ids[len(prompt) :] == whole.argmax(-1).tolist()
    after = torch.cat([torch.zeros_like(tokens[:, :4]), tokens], dim=1)
    documents = torch.arange(12).ge(4).long().expand(2, -1)
    found = gpt(after, documents=documents).hidden[:, 4:]
    torch.testing.assert_close(found, gpt(tokens).hidden, rtol=1e-4, atol=1e-5)


def run(name: str, folder: Path, steps: int, checkpoint: Path | None = None) -> Trainer:
    made = trainer(folder, max_steps=steps)
    made.fit(MoEGPTModule(model(MOES[name])), SyntheticData(), ckpt_path=checkpoint)
    return made


@each
def test_routers_learn_resume_exactly_and_are_counted(name: str, tmp_path: Path) -> None:
    start = GPT(model(MOES[name]), seed=MoEGPTModule(model(MOES[name])).seed).state_dict()
    whole = run(name, tmp_path, 4).lightning_module
    run(name, tmp_path, 2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = run(name, tmp_path, 4, tmp_path / "half.ckpt").lightning_module
    end = whole.gpt.state_dict()
    assert all(torch.equal(value, resumed.gpt.state_dict()[key]) for key, value in end.items())
    assert name not in BUFFERS or f"blocks.1.moe.router.{BUFFERS[name]}" in end
    for state in ("weight", BUFFERS.get(name)):
        if (key := f"blocks.1.moe.router.{state}") in end:
            learns = name not in ("hash", "uniform", "frozen") and state != "table"
            assert torch.equal(end[key], start[key]) != learns and end[key].any()

    counted = count_parameters(whole.config)
    assert (counted.total, counted.active) == parameters_of(whole.gpt) and flops_per_token(whole.config) > 0
    nlgmoe(["inspect", str(tmp_path / "half.ckpt"), "--hardware=h100"])
    nlgmoe(["verify", str(tmp_path / "half.ckpt")])
    if MOES[name].router is None:
        return
    router = type(MOES[name].router)
    with pytest.raises(ValueError, match=f"holds only the paper's router, not {router.__name__}"):
        export(tmp_path / "half.ckpt", tmp_path / "export")


def test_hash_router_refuses_a_wrong_file_of_counts_and_needs_none_in_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    config = model(MoEConfig(4, router=HashRouterConfig(counts=str(file))))
    for content, message in ((None, "cannot be read"), ("[1, 2, 3]", "has 3 numbers, vocab_size is 61")):
        if content is not None:
            file.write_text(content)
        with pytest.raises(ValueError, match=f"router.init_args.counts={file} {message}"):
            GPT(config)
    with torch.device("meta"):
        assert GPT(config).blocks[1].moe.router.table.shape == (61,)

"""No field of the configuration is decoration: each changes exactly what it says it does; each wrong value is named."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hash_router import HashRouterConfig
from swiglu_expert import SwiGLUExpert
from torch import Tensor, nn

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import balance
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.mla import MLAConfig
from nlgmoe.layers.rotary import Llama3, Yarn
from nlgmoe.layers.routers import SigmoidRouterConfig
from nlgmoe.loss import training_loss
from nlgmoe.model.gpt import GPT
from nlgmoe.parts import part_to_dict
from nlgmoe.seeding import derive_seed
from tests.support.synthetic import SyntheticData

MOE = MoEConfig(4, min_capacity=0)
BASE = GPTConfig(40, 8, 2, 16, 2, vocab_size_multiple=16, moe=MOE)
EVERYWHERE = {"shapes", "training", "evaluation"}

# field: (fields that make it matter, another value, what must change: nothing else may)
GPT_CASES: dict[str, tuple[dict[str, Any], Any, set[str]]] = {
    "vocab_size": ({}, 45, {"evaluation"}),  # the logits' width; the table has 48 rows either way
    "seq_len": ({}, 12, {"shapes"}),
    "num_layers": ({}, 4, EVERYWHERE | {"start"}),  # output projections start smaller in a deeper model
    "hidden_size": ({}, 32, EVERYWHERE),
    "num_heads": ({}, 4, {"training", "evaluation"}),
    "ffn_hidden_size": ({}, 48, EVERYWHERE),
    "ffn_network": ({}, "swiglu", EVERYWHERE),
    "hidden_dropout": ({}, 0.1, {"training"}),
    "attention_dropout": ({}, 0.1, {"training"}),
    "init_std": ({}, 0.1, {"start"}),
    "layer_norm_eps": ({}, 0.1, {"training", "evaluation"}),
    "vocab_size_multiple": ({}, 64, {"shapes"}),
    "norm": ({}, "rmsnorm", EVERYWHERE),
    "rope_theta": ({}, 100.0, EVERYWHERE),
    "num_kv_heads": ({}, 1, EVERYWHERE),
    "head_dim": ({}, 4, EVERYWHERE),
    "qk_norm": ({}, "head", EVERYWHERE),
    "rotary_dim": ({"rope_theta": 100.0}, 4, {"training", "evaluation"}),
    "rotary_scaling": ({"rope_theta": 100.0}, Llama3(4.0, 4), {"training", "evaluation"}),
    "attention": ({"rope_theta": 100.0}, MLAConfig(8, 4, 4, 8), EVERYWHERE),
    "attention_scale": ({}, 2.0, {"training", "evaluation"}),
    "bias": ({}, False, EVERYWHERE),
    "qkv_bias": ({}, False, EVERYWHERE),
    "embedding_scale": ({}, 2.0, {"training", "evaluation"}),
    "residual_scale": ({}, 2.0, {"training", "evaluation"}),
    "logit_scale": ({}, 2.0, {"training", "evaluation"}),
    "tied_embeddings": ({}, False, {"shapes", "evaluation"}),
    "moe": ({}, None, EVERYWHERE),
}
MOE_CASES: dict[str, tuple[dict[str, Any], Any, set[str]]] = {
    "num_experts": ({}, [6], EVERYWHERE),
    "expert_interval": ({}, 1, EVERYWHERE),
    "top_k": ({}, 2, {"training", "evaluation"}),
    "expert_ffn_size": ({}, 48, EVERYWHERE),
    "shared_ffn_size": ({"mlp_type": "residual"}, 48, EVERYWHERE),
    "mlp_type": ({}, "residual", EVERYWHERE),
    "residual_mix": ({"mlp_type": "residual"}, "sum", EVERYWHERE),
    "train_capacity_factor": ({}, 0.5, {"training"}),
    "eval_capacity_factor": ({"eval_token_dropping": True}, 0.5, {"evaluation"}),
    "min_capacity": ({"train_capacity_factor": 0.1}, 8, {"training"}),
    "token_dropping": ({}, False, {"training"}),
    "eval_token_dropping": ({"eval_capacity_factor": 0.5}, True, {"evaluation"}),
    "random_token_selection": ({}, False, {"training"}),
    "noise": ({}, "jitter", {"training"}),
    "second_expert": ({"top_k": 2}, "argmax", {"training"}),
    "groups": ({"top_k": 2, "second_expert": "argmax"}, [2, 1], {"training", "evaluation"}),
    "normalize_weights": ({"top_k": 2}, False, {"training", "evaluation"}),
    "gate_scale": ({}, 2.0, {"training", "evaluation"}),
    "gate_init_std": ({}, 0.1, {"start"}),
    "aux_scope": ({}, "global", {"training"}),
    "loss_coeff": ({}, 1.0, {"loss"}),
    "z_loss_coeff": ({}, 1.0, {"loss"}),
    "router": ({"min_capacity": 4}, HashRouterConfig(), EVERYWHERE),
    "expert": ({}, SwiGLUExpert(), EVERYWHERE),
}
CASES = [("gpt", field.name) for field in fields(GPTConfig)] + [("moe", field.name) for field in fields(MoEConfig)]


@pytest.mark.parametrize(("where", "name"), CASES)
def test_config_field_changes_what_it_says_and_nothing_else(
    where: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, value, expected = (GPT_CASES if where == "gpt" else MOE_CASES)[name]  # a new field needs a case
    if where == "gpt":
        before, after = replace(BASE, **context), replace(BASE, **context | {name: value})
    else:
        before, after = (replace(BASE, moe=replace(MOE, **change)) for change in (context, context | {name: value}))
    with monkeypatch.context() as patched:
        patched.setattr(balance, "distributed", TWO_RANKS)
        first, second = observe(before), observe(after)
    if expected == {"loss"}:
        first["loss"], second["loss"] = loss_of(before), loss_of(after)
    assert {aspect for aspect in first if not same(first[aspect], second[aspect])} == expected


def _add_the_other_rank(loads: Tensor) -> None:
    loads += torch.tensor([9.0, 3, 2, 2, 16]) if len(loads) == 5 else torch.ones(len(loads))


TWO_RANKS = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=_add_the_other_rank)


def observe(config: GPTConfig) -> dict[str, Any]:
    """What can be seen of a model: its parameters' shapes and initial values, and its output in both modes."""
    model = GPT(config)
    start = {f"{name} {tuple(p.shape)}": p.detach().clone() for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():  # large, and of name and shape alone
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(derive_seed(name)))
    tokens = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    output = model(tokens, noise_key=(0, 0, 0))
    losses = [router_losses([routing], config.moe.aux_scope if config.moe else "rank") for routing in output.routings]
    evaluation = model.eval()(tokens)
    seen = {"training": (output.hidden, losses), "evaluation": model.logits(evaluation.hidden)}
    return seen | {"shapes": shapes, "start": start}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        if isinstance(next(iter(a.values())), Tensor):
            return all(same(a[key], b[key]) for key in a.keys() & b.keys())
        return a == b
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def loss_of(config: GPTConfig) -> Tensor:
    batch = next(iter(SyntheticData(40, 8).train_dataloader()))
    return training_loss(GPT(config), batch, (0, 0, 0), 16)[0]


@dataclass(frozen=True)
class ScaledConfig(SigmoidRouterConfig):
    scales: object = (1.0, 2.0)


def test_settings_of_a_part_are_what_json_reads_again() -> None:
    """Otherwise a run could not be resumed: a list that is read would differ from a tuple."""
    assert part_to_dict(ScaledConfig())["init_args"]["scales"] == [1.0, 2.0]
    with pytest.raises(
        ValueError, match=r"ScaledConfig: .*Path is not JSON serializable; make settings of numbers, text"
    ):
        part_to_dict(ScaledConfig(scales=Path("table.json")))


MLA = part_to_dict(MLAConfig(8, 4, 4, 8))
SIGMOID = {"class_path": "nlgmoe.SigmoidRouterConfig"}
COUNTS = ("vocab_size", "seq_len", "num_layers", "hidden_size", "num_heads", "vocab_size_multiple")
COUNTS += ("ffn_hidden_size", "num_kv_heads", "head_dim", "expert_ffn_size", "expert_interval")
POSITIVE = ("init_std", "layer_norm_eps", "rope_theta", "logit_scale", "gate_scale", "gate_init_std")
POSITIVE += ("train_capacity_factor", "eval_capacity_factor")
GROUPS = ([], [2], [2, 1, 1], [2, 0], [2, 3], [0, 0], [-2, -1], [2, 1.0], 2)
WRONG: list[dict[str, Any]] = [  # of GPTConfig and MoEConfig; the first field is the one that the message begins with
    *({name: 0} for name in COUNTS),
    *({name: 0.0} for name in POSITIVE),
    *({name: 1.0} for name in ("hidden_dropout", "attention_dropout")),
    *({name: -1} for name in ("min_capacity", "loss_coeff", "z_loss_coeff")),
    *({"groups": groups} for groups in GROUPS),
    {"num_heads": 2.0},
    {"num_heads": np.int64(2)},  # no checkpoint's JSON takes it
    {"num_experts": [np.int64(2)]},
    {"hidden_dropout": np.float32(0.5)},
    {"token_dropping": "false"},
    {"init_std": float("inf")},
    {"hidden_size": 16, "num_heads": 3},
    {"num_heads": 2, "num_kv_heads": 3},
    {"rope_theta": 1e4, "head_dim": 3},
    {"rope_theta": 1e4, "rotary_dim": 3},
    {"rotary_dim": 10, "rope_theta": 1e4},
    {"rope_theta": None, "attention": MLA},
    {"expert_interval": 3},
    {"num_experts": [2, 4]},
    {"num_experts": []},
    {"num_experts": [4, -1]},
    {"groups": [4, 2], "num_experts": [4, 6], "num_layers": 4},
    {"top_k": 3, "num_experts": [4, 2]},
    {"groups": [2, 1], "top_k": 3, "num_experts": 4},
    {"noise": "rsample", "top_k": 2},
    {"normalize_weights": True},
    {"groups": [4, 2], "router": SIGMOID, "num_experts": [8, 4], "num_layers": 4},
]


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_config_field_with_a_wrong_value_is_refused_by_name(values: dict[str, Any]) -> None:
    of_gpt = {name: value for name, value in values.items() if name in GPT_CASES}
    of_moe = {name: value for name, value in values.items() if name in MOE_CASES}
    with pytest.raises(ValueError, match=rf"^{next(iter(values))}\b"):
        GPTConfig.from_dict(BASE.to_dict() | of_gpt | {"moe": of_moe})


def test_a_config_survives_its_dictionary() -> None:
    latent = replace(BASE, rope_theta=1e4, attention=MLAConfig(8, 4, 4, 8), rotary_scaling=Yarn(2.0, 16))
    jitter = replace(BASE, num_layers=4, moe=MoEConfig([2, 4], noise="jitter"))
    for config in (BASE, replace(BASE, moe=None), jitter, latent):
        assert GPTConfig.from_dict(config.to_dict()) == config

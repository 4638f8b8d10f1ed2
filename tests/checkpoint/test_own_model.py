"""The class of exported folders takes what `transformers`' own models take, or refuses it by name and value."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.moe import moe_layers
from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig
from nlgmoe.tools.hugging_face.modeling_nlgmoe import NlgmoeForCausalLM

MOE = {"num_experts": [2, 4], "mlp_type": "residual", "expert_interval": 1, "loss_coeff": 0.1, "z_loss_coeff": 0.2}
SMALL = {"vocab_size": 99, "seq_len": 12, "num_layers": 2, "hidden_size": 16, "num_heads": 2, "moe": MOE}
IDS = torch.randint(99, (2, 10), generator=torch.Generator().manual_seed(0))
LENGTHS = (3, 5, 2)  # documents of a row
PACKED = torch.cat([torch.arange(length) for length in LENGTHS])[None]  # [1, 10]


def build(**settings: Any) -> NlgmoeForCausalLM:
    torch.manual_seed(0)
    model = NlgmoeForCausalLM(NlgmoeConfig(**SMALL | settings)).eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"rope_theta": 1e4, "num_kv_heads": 1, "qk_norm": "head"}], ids=["learned", "rotary"]
)
def test_own_model_computes_packed_documents_as_if_alone(settings: dict[str, Any]) -> None:
    model = build(**settings)
    expected = torch.cat([torch.cat([model(part[None]).logits for part in row.split(LENGTHS)], dim=1) for row in IDS])
    packed = model(IDS, position_ids=PACKED)
    torch.testing.assert_close(packed.logits, expected)
    assert packed.cache is None and not torch.allclose(model(IDS).logits, expected, atol=1e-2)
    # In one row, longer than a sequence may be; and with padding on the left, which a row may give any position.
    long = model(IDS.view(1, 20), position_ids=PACKED.repeat(1, 2))
    torch.testing.assert_close(long.logits, expected.view(1, 20, -1))
    padded, mask = torch.cat([IDS[:, :2], IDS], dim=1), torch.ones(2, 12).index_fill(1, torch.tensor([0, 1]), 0)
    positions = torch.cat([torch.tensor([[7, 0]]), PACKED], dim=1).expand(2, 12)
    torch.testing.assert_close(model(padded, mask, positions).logits[:, 2:], expected)


def test_own_model_refuses_other_positions_by_value() -> None:
    model = build()
    own = torch.arange(10)[None]
    assert torch.equal(model(IDS, position_ids=own).logits, model(IDS).logits)
    for wrong, place in ((own + 1, r"\[0, 0\]=1"), (own * 2, r"\[0, 1\]=2"), (PACKED.flip(1), r"\[0, 0\]=1")):
        with pytest.raises(ValueError, match=rf"position_ids{place} is not supported"):
            model(IDS, position_ids=wrong)
    with pytest.raises(ValueError, match=r"position_ids is \[1, 9\], not \[1 or 2, 10\]"):
        model(IDS, position_ids=own[:, 1:])
    cache = model(IDS[:, :4]).cache
    with pytest.raises(ValueError, match=r"position_ids\[0, 0\]=0 is not supported"):
        model(IDS[:, 4:], position_ids=torch.arange(6)[None], cache=cache)
    model(IDS[:, 4:], position_ids=own[:, 4:], cache=cache)
    with pytest.raises(ValueError, match="a cache does not go with several documents"):
        model(IDS, position_ids=PACKED, cache=type(cache)())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5, 20])}, "cu_seq_lens_q is not supported: pass position_ids"),
        ({"is_causal": False}, "is_causal=False is not supported"),
        ({"inputs_embeds": torch.zeros(2, 10, 16)}, "pass either input_ids or inputs_embeds"),
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask is \[2, 9\], not .* \[2, 10\]"),
    ],
)
def test_own_model_refuses_arguments_that_would_change_the_result(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(IDS, **given)


def test_own_model_takes_arguments_that_change_nothing() -> None:
    model = build()
    same = {"inputs_embeds": None, "cache_position": torch.arange(10), "is_causal": True, "output_attentions": False}
    assert torch.equal(model(IDS, **same, max_length_q=None).logits, model(IDS).logits)
    borders = torch.tensor([0, *torch.tensor(LENGTHS).repeat(2).cumsum(0)])
    numbers = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)).expand(2, 10)
    described = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 5, "seq_idx": numbers}
    assert torch.equal(model(IDS, position_ids=PACKED, **described).logits, model(IDS, position_ids=PACKED).logits)


def test_own_model_gives_trainers_settings_of_the_balance_loss_or_the_reason() -> None:
    config = NlgmoeConfig(**SMALL | {"moe": {"num_experts": 4, "top_k": 2}})
    assert (config.num_experts, config.num_experts_per_tok, config.router_aux_loss_coef) == (4, 2, 0.01)
    assert config.output_router_logits is False
    with pytest.raises(
        AttributeError, match=r"no num_experts: the layers have \[2, 4\]; .* set router_aux_loss_coef=0"
    ):
        NlgmoeConfig(**SMALL).num_experts  # noqa: B018


def test_own_model_adds_the_balance_loss_in_training_and_with_router_logits() -> None:
    model, labels = build(), IDS.masked_fill(IDS < 20, -100)
    plain = model(IDS, labels=labels)
    balance, z = router_losses(model.model.gpt(IDS).routings)
    asked = model(IDS, labels=labels, output_router_logits=True)
    assert plain.aux_loss is None and plain.router_logits is None and float(asked.aux_loss) > 0.1
    torch.testing.assert_close(asked.aux_loss, balance + 0.2 / 0.1 * z)
    torch.testing.assert_close(asked.loss, plain.loss + 0.1 * asked.aux_loss)
    configured = build(output_router_logits=True, router_aux_loss_coef=0.5)
    torch.testing.assert_close(configured(IDS, labels=labels).loss, plain.loss + 0.5 * asked.aux_loss)
    assert float(configured.model(IDS).aux_loss) == pytest.approx(float(asked.aux_loss))  # for a loss of one's own
    trained = model.train()(IDS, labels=labels)
    assert trained.router_logits is None
    weight = moe_layers(model)[0].router.weight
    assert bool(torch.autograd.grad(trained.aux_loss, weight)[0].ne(0).any())


def test_own_model_losses_of_micro_batches_add_up_to_that_of_the_step() -> None:
    model, labels = build(output_router_logits=True), IDS.masked_fill(IDS < 30, -100)
    items = (labels[:, 1:] != -100).sum(dim=1)
    assert items[0] != items[1]
    for ids, targets, counted in zip(IDS.split(1), labels.split(1), items, strict=True):
        scaled = model(ids, labels=targets, num_items_in_batch=items.sum())
        torch.testing.assert_close(scaled.loss, model(ids, labels=targets).loss * counted / items.sum())


class Adapted(nn.Module):
    """A low-rank adapter, as PEFT puts it in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_own_model_gives_adapters_of_every_linear_layer_a_gradient() -> None:
    model = build().requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert "model.gpt.blocks.0.moe.coefficient" in names and "lm_head" in names
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Adapted(model.get_submodule(name)))
    model(IDS, labels=IDS).loss.backward()
    for name in names:
        adapter = model.get_submodule(name)
        for part in (adapter.up, adapter.down):
            assert part.weight.grad is not None and bool(part.weight.grad.ne(0).any()), name

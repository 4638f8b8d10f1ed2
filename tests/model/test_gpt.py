"""The whole model: how it starts, which blocks are MoE, and that recomputing activations changes nothing."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nlgmoe import MLAConfig, MoEGPTModule
from nlgmoe.checkpoint.entries import entry_shapes, local_entries
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.attention import AttentionContext, KVCache, attend
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.gpt import GPT, GPTOutput, initialise
from nlgmoe.optim.optimizer import AdamWConfig, build_optimizer

# Wide enough for a standard deviation to be measured to a few percent.
WIDE = GPTConfig(512, 64, 4, 64, 4, init_std=0.05, moe=MoEConfig([2, 3], 2, mlp_type="residual"))
SMALL = GPTConfig(50, 16, 4, 16, 2, vocab_size_multiple=16, moe=MoEConfig(4, min_capacity=0, train_capacity_factor=0.5))


def test_weights_start_normal_projections_smaller_biases_zero_and_norms_one() -> None:
    for name, parameter in GPT(WIDE).named_parameters():
        if "norm.weight" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            std = 0.05 / math.sqrt(2 * 4) if ".output." in name or ".down" in name else 0.05
            noise = std / math.sqrt(parameter.numel())
            assert parameter.mean().abs().item() < 5 * noise, name
            assert abs(parameter.std().item() - std) < 5 * noise, name


def test_weights_depend_on_the_seed_and_their_names_alone() -> None:
    reference = GPT(WIDE, seed=3).state_dict()
    torch.manual_seed(99)  # the global generator plays no part
    again = GPT(WIDE, seed=3)
    initialise(again, WIDE, 4)
    other_seed = {name: value.clone() for name, value in again.state_dict().items()}
    initialise(again, WIDE, 3)
    for name, value in again.state_dict().items():
        assert torch.equal(value, reference[name]), name
        assert torch.equal(value, other_seed[name]) == (value.unique().numel() == 1), name
    weights = [value for value in reference.values() if value.unique().numel() > 1]
    starts = {tuple(value.flatten()[:8].tolist()) for value in weights}
    assert len(starts) == len(weights), "two tensors start alike"


def test_weights_do_not_depend_on_the_default_device_or_dtype() -> None:
    reference = GPT(WIDE, seed=3).state_dict()
    model = GPT(WIDE, seed=4)
    with torch.device("meta"):  # the run's device, around everything that Lightning lets a module build
        initialise(model, WIDE, 3)
    assert all(torch.equal(value, reference[name]) for name, value in model.state_dict().items())
    torch.set_default_dtype(torch.bfloat16)  # as `bf16-true` does
    try:
        half = GPT(WIDE, seed=3).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, reference[name].bfloat16()) for name, value in half.items())


@pytest.mark.parametrize("moe", [None, MoEConfig([6, 5]), MoEConfig(4, expert_interval=3)], ids=str)
def test_dense_weights_do_not_depend_on_the_experts(moe: MoEConfig | None) -> None:
    reference, other = GPT(WIDE).state_dict(), GPT(replace(WIDE, moe=moe)).state_dict()
    shared = {name for name in reference.keys() & other.keys() if ".moe." not in name}
    assert len(shared) >= 4 + 8 * 4  # embeddings, final norm; norms and attention of each block
    for name in shared:
        assert torch.equal(reference[name], other[name]), name


@pytest.mark.parametrize("noise_key", [None, (0, 3, 1)], ids=["keyless", "keyed"])
@pytest.mark.parametrize("moe", [SMALL.moe, replace(SMALL.moe, top_k=2, noise="jitter")], ids=["random", "sampled"])
def test_activation_checkpointing_gives_the_same_loss_and_gradients_to_the_bit(
    moe: MoEConfig, noise_key: tuple[int, ...] | None
) -> None:
    config = replace(SMALL, moe=moe, hidden_dropout=0.1, attention_dropout=0.1, init_std=0.3)
    tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) < 0.8

    def train(recompute: bool, seed: int = 0) -> tuple[GPTOutput, list[Tensor]]:
        model = GPT(config, activation_checkpointing=recompute)
        torch.manual_seed(seed)
        output = model(tokens, token_mask=mask, noise_key=noise_key)
        loss = cross_entropy(output.hidden.flatten(0, 1), model.unembedding, 50, tokens.flatten(), mask.flatten(), 8)
        loss = loss + 0.1 * sum(router_losses(output.routings))
        torch.rand(5)  # the global generator moves on between forward and backward, as it does in a real step
        loss.backward()
        return output, [loss.detach(), *(p.grad for p in model.parameters())]

    output, expected = train(recompute=False)
    recomputed, values = train(recompute=True)
    for value, reference in zip(values, expected, strict=True):
        assert torch.equal(value, reference)
    assert not torch.equal(output.hidden, train(recompute=False, seed=1)[0].hidden), "nothing is random"
    for routing, reference in zip(recomputed.routings, output.routings, strict=True):
        assert torch.equal(routing.kept, reference.kept)
        assert not routing.kept[mask.flatten()].all(), "nothing was dropped"


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((16,), 7.0))


@pytest.mark.parametrize(
    ("norm", "use", "message"),
    [
        (Scale(), lambda model: initialise(model, SMALL, 0), "gain: Scale does not declare its parameter gain; add roles = "),
        (Scale(), lambda model: build_optimizer(model, AdamWConfig()), "gain: Scale does not declare its parameter gain; "),
        (nn.ModuleDict({"project": nn.Linear(8, 8)}), lambda model: initialise(model, SMALL, 0), "project.weight: rename this"),
        (nn.BatchNorm1d(16, affine=False), entry_shapes, "running_mean: checkpoints hold persistent buffers of a Router"),
        (nn.BatchNorm1d(16, affine=False), lambda model: list(local_entries(model)), "running_mean: checkpoints hold "),
    ],
)  # fmt: skip
def test_undeclared_parameter_or_buffer_is_refused_by_name(norm: nn.Module, use: Any, message: str) -> None:
    model = GPT(SMALL)
    model.blocks[0].ffn_norm = norm
    with pytest.raises(ValueError, match=f"^blocks.0.ffn_norm.{message}"):
        use(model)


class TableConfig(MLAConfig):
    def build(self, config: GPTConfig, block: int) -> nn.Module:
        attention = super().build(config, block)
        attention.register_buffer("table", torch.zeros(1))
        return attention


def test_module_refuses_before_training_a_buffer_that_no_checkpoint_holds() -> None:
    module = MoEGPTModule(replace(SMALL, rope_theta=1e4, attention=TableConfig(8, 4, 4, 8)))
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attention\.table: checkpoints hold persistent buffers of a Router"
    ):
        module.configure_model()


def test_a_sequence_longer_than_seq_len_is_refused_by_name_with_the_cache_counted() -> None:
    model = GPT(SMALL)
    model(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="17 tokens is longer than seq_len=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = KVCache(10)
    with torch.no_grad():
        model(torch.zeros(1, 10, dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="17 tokens is longer than seq_len=16"):
            model(torch.zeros(1, 7, dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="the cache holds 10 positions, 11 are needed"):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


class AttentionCall(TorchFunctionMode):
    """Notes how PyTorch's attention is called, and computes nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.heads, self.shares = args[1].shape[1], kwargs["enable_gqa"]
        return args[0]


@pytest.mark.parametrize(
    ("device", "dtype", "shares"),
    [("cpu", torch.float32, True), ("cuda", torch.float32, False), ("cuda", torch.bfloat16, True)],
)
def test_shared_keys_are_repeated_where_no_fused_kernel_takes_them(
    device: str, dtype: torch.dtype, shares: bool
) -> None:
    with FakeTensorMode(), AttentionCall() as call:
        q, k, v = (torch.empty(2, heads, 8, 16, device=device, dtype=dtype) for heads in (4, 2, 2))
        attend(q, k, v, AttentionContext(torch.arange(8)))
    assert (call.shares, call.heads) == (shares, 2 if shares else 4)

"""Reproduce each failure that docs/results/layers_of_others.md explains, by its number, with the library alone.

python docs/examples/layers_of_others.py
"""

import torch
from deepspeed.moe.layer import MoE
from torch import nn
from transformers import DeepseekV3Config, OlmoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock


def deepspeed(k: int) -> MoE:
    """Return DeepSpeed's layer of width 16, with 8 experts."""
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    return MoE(16, expert, num_experts=8, k=k, top2_2nd_expert_sampling=False)


torch.manual_seed(0)
x = torch.randn(4, 12, 16)
used = (torch.arange(48) >= 9).long()  # 9 tokens of padding

# 1. With `used_token` the balance loss's mean probability includes padding.
layer, other = deepspeed(1), x.clone()
other.view(48, 16)[:9] *= 3
assert abs(layer(x, used)[1] - layer(other, used)[1]) > 1e-3

# 2. With k = 2 `used_token` is ignored.
assert deepspeed(2)(x, used)[2].sum() == 2 * 48  # assignments; 39 tokens are used

# 3. Evaluation drops tokens: an output depends on the batch, and on later tokens.
layer = deepspeed(1).eval()
assert (layer(x)[0][:1] - layer(x[:1])[0]).abs().max() > 1e-3
one, other = x.view(1, 48, 16), x.view(1, 48, 16).clone()
other[:, 24:] = x[0, 0]
outputs = []
for tokens in (one, other):
    torch.manual_seed(0)  # it draws which tokens stay
    outputs.append(layer(tokens)[0][:, :24])
assert (outputs[0] - outputs[1]).abs().max() > 1e-3

# 4. Top-1 refuses fewer tokens than `min_capacity`, 4; the loss of an empty batch is NaN.
try:
    deepspeed(1)(x[:1, :1])
    raise RuntimeError
except AssertionError as error:
    assert "min_capacity" in str(error)
assert deepspeed(2)(x[:0])[1].isnan()

# 5. Under autocast the gate's product is in bf16.
with torch.autocast("cpu", torch.bfloat16):
    gates = deepspeed(1).deepspeed_moe.gate(x.view(48, 16), None, True)[5]
assert gates.dtype == torch.bfloat16

# 6. The balance loss of an empty batch is NaN.
assert load_balancing_loss_func((torch.empty(0, 8),), 8, 2).isnan()

# 7. `eager` experts, the default outside a model, read the results of `nonzero`.
config = OlmoeConfig(hidden_size=16, intermediate_size=16, num_experts=8, num_experts_per_tok=2)
config._experts_implementation = "eager"
block = OlmoeSparseMoeBlock(config).bfloat16()
nn.init.normal_(block.gate.weight)
try:
    block.to("meta")(x.bfloat16().to("meta"))
    raise AssertionError
except NotImplementedError as error:
    assert "nonzero" in str(error)

# 8. Weights are rounded to the model's type.
weights = OlmoeSparseMoeBlock(config).bfloat16().gate(x.bfloat16())[1]
assert weights.dtype == torch.bfloat16

# 9. Under autocast the router's product is in bf16.
settings = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
router = DeepseekV3TopkRouter(DeepseekV3Config(hidden_size=16, **settings))
with torch.autocast("cpu", torch.bfloat16):
    logits, weights, _ = router(x)
assert logits.dtype == weights.dtype == torch.bfloat16

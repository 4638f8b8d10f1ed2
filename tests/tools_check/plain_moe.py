"""A layer that knows nothing of this project."""

from torch import Tensor, nn


class PlainMoE(nn.Module):
    """Dropless top-1, with the balance loss of Switch Transformers."""

    hidden_size, num_experts, top_k = 16, 8, 1

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        self.gate = nn.Linear(16, 8, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = self.gate(x).softmax(-1)
        weight, chosen = probs.max(-1, keepdim=True)
        y = sum(expert(x) * weight * (chosen == e) for e, expert in enumerate(self.experts))
        share = nn.functional.one_hot(chosen.flatten(), 8).to(probs.dtype).mean(0)
        aux = 8 * (probs.flatten(0, 1).mean(0) * share).sum()
        return y, aux.detach() if self.detached else aux


def detached_plain_moe() -> nn.Module:
    return PlainMoE(detached=True)

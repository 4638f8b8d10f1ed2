"""The dense feed-forward layer, and the networks that it and the experts apply (`experts.py`).

gelu     y = gelu(x W_up + b) W_down + b                              the paper's
swiglu   y = (silu(x W_gate + b) * (x W_up + b)) W_down + b           arXiv 2002.05202, with biases
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.config import GPTConfig
from nlgmoe.layers.precision import cast_by_autocast
from nlgmoe.parts import ExpertConfig, Linear, Stack


@dataclass(frozen=True)
class GELUNetwork(ExpertConfig):
    """Two matrices with a GELU between them."""

    def weights(self, hidden_size: int, ffn_size: int) -> dict[str, Stack]:
        """Declare the two matrices."""
        return {"up": (hidden_size, ffn_size, "weight"), "down": (ffn_size, hidden_size, "output")}

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply the network, `[M, H] -> [M, H]`."""
        return linear("down", gelu(linear("up", x)))


@dataclass(frozen=True)
class SwiGLUNetwork(ExpertConfig):
    """Three matrices; the SiLU of one product multiplies another."""

    def weights(self, hidden_size: int, ffn_size: int) -> dict[str, Stack]:
        """Declare the three matrices."""
        into: Stack = (hidden_size, ffn_size, "weight")
        return {"gate": into, "up": into, "down": (ffn_size, hidden_size, "output")}

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply the network, `[M, H] -> [M, H]`."""
        return linear("down", F.silu(linear("gate", x)) * linear("up", x))


NETWORKS: dict[str, ExpertConfig] = {"gelu": GELUNetwork(), "swiglu": SwiGLUNetwork()}  # by `GPTConfig.ffn_network`


def expert_network(config: GPTConfig) -> ExpertConfig:
    """Return the network of the experts: a user's own, or that of the dense blocks."""
    own = config.moe.expert if config.moe is not None else None
    return own or NETWORKS[config.ffn_network]


def gelu(x: Tensor) -> Tensor:
    """Compute GELU in its tanh form, as GPT-2 and the paper's models do: `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`."""
    return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """A network applied to every position, `[..., H] -> [..., F] -> [..., H]`; one `nn.Linear` for each of its matrices."""

    def __init__(self, config: GPTConfig, ffn_size: int) -> None:
        super().__init__()
        self.network = NETWORKS[config.ffn_network]
        for name, (inputs, outputs, _) in self.network.weights(config.hidden_size, ffn_size).items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=config.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to each position."""
        return self.network.forward(cast_by_autocast(x), self._linear)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(name)(x)
        return y

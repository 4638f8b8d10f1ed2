"""The dense feed-forward layer; an expert has the same body (`experts.py`)."""

from torch import Tensor, nn
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    """Compute GELU in its tanh form, as GPT-2 and the paper's models do: `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`."""
    return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """`x -> project(gelu(expand(x)))`, `[..., H] -> [..., F] -> [..., H]`."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.expand = nn.Linear(hidden_size, ffn_size)
        self.project = nn.Linear(ffn_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to each position."""
        return self.project(gelu(self.expand(x)))

"""An expert with a gate: `down(silu(gate(x)) * up(x))` (GLU Variants Improve Transformer, arXiv 2002.05202)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from nlgmoe import ExpertConfig


@dataclass(frozen=True)
class SwiGLUExpert(ExpertConfig):
    """A SwiGLU expert.

    Attributes:
        multiple: the inner width is two thirds of the FFN's, for the FLOPs of two matrices, rounded up to a multiple of this.
    """

    multiple: int = 16

    def weights(self, hidden_size: int, ffn_size: int) -> dict[str, tuple[int, int, str]]:
        """See `ExpertConfig`."""
        inner = -(-ffn_size * 2 // 3 // self.multiple) * self.multiple
        into, back = (hidden_size, inner, "weight"), (inner, hidden_size, "output")
        return {"gate": into, "up": into, "down": back}

    def forward(self, x: Tensor, linear) -> Tensor:
        """See `ExpertConfig`."""
        return linear("down", F.silu(linear("gate", x)) * linear("up", x))

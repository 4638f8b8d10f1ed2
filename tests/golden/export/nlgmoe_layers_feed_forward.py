# nlgmoe/layers/feed_forward.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""The dense feed-forward layer; an expert has the same body (`experts.py`)."""

from torch import Tensor, nn

from .nlgmoe_layers_activation import gelu


class FeedForward(nn.Module):
    """`x -> project(gelu(expand(x)))`, `[..., H] -> [..., F] -> [..., H]`."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.expand = nn.Linear(hidden_size, ffn_size)
        self.project = nn.Linear(ffn_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to each position alone."""
        return self.project(gelu(self.expand(x)))

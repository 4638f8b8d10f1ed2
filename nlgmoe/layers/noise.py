"""Random numbers of a router that depend on the noise key only: the same on any rank, and in a recomputed block."""

from __future__ import annotations

import torch
from torch import Tensor

from nlgmoe.seeding import derive_seed


class RoutingNoise:
    """Uniform and Gumbel draws in fp32, from a generator seeded by the key.

    The dtype is explicit: under `bf16-true` Lightning sets another default in the forward pass, but not in the recomputation.

    Args:
        key: `RoutingContext.noise_key`; None: draw from torch's global generator.
        block: block number, so that blocks draw different numbers.
        device: device of the draws.
    """

    def __init__(self, key: tuple[int, ...] | None, block: int, device: torch.device) -> None:
        self.device = device
        self.generator: torch.Generator | None = None
        self._names: tuple[int | str, ...] | None = None if key is None else ("routing", *key, block)

    def __call__(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """Draw from U(0, 1)."""
        if self._names is not None and self.generator is None:
            self.generator = torch.Generator(self.device).manual_seed(derive_seed(*self._names))
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=torch.float32)

    def gumbel(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """Draw standard Gumbel noise, `-log(-log(u))`."""
        uniform = self(shape).clamp_(torch.finfo(torch.float32).tiny, 1 - 2**-24)
        return -torch.log(-torch.log(uniform))

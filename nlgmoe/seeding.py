"""Seeds and random numbers from names, so that random tensors, batches and routings do not depend on rank or process."""

import hashlib
import re

import torch
from torch import Tensor

_OLD_NAMES = {"up": "expand", "down": "project", "output": "project", "shared_expert": "mlp"}


def derive_seed(*parts: int | str) -> int:
    """Map `parts` to a 63-bit seed.

    The result depends on the parts only, not on a global generator, `PYTHONHASHSEED` or the rank. A weight drawn from
    `derive_seed(seed, name, expert)` is therefore the same at every expert-parallel degree.

    Args:
        parts: integers and strings; their order matters, and `1` differs from `"1"`.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_normal(shape: torch.Size, *parts: int | str) -> Tensor:
    """Draw from N(0, 1) by `derive_seed(*parts)`, in fp32 on the CPU: the numbers depend on no device and no default."""
    generator = torch.Generator("cpu").manual_seed(derive_seed(*parts))
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def key_of_draws(name: str) -> str:
    """Return the part for `draw_normal` of a parameter's name: the name that it had when the runs of docs/results were trained.

    With other parts the initial weights, and so every recorded number, would change.
    """
    for new, old in _OLD_NAMES.items():
        name = re.sub(rf"(?<=\.){new}(?=[._])", old, name)
    return name


class RoutingNoise:
    """Uniform and Gumbel draws of a router: the same on any rank, and in a recomputed block.

    They are in fp32: under `bf16-true` Lightning sets another default in the forward pass, but not in the recomputation.

    Args:
        key: `RoutingContext.noise_key`, from which the generator is seeded; None: draw from torch's global generator.
        block: block number, so that blocks draw different numbers.
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

"""Routers other than the paper's (`layers/router.py`), one per file, for `model.config.moe.router` (docs/laboratory.md)."""

from nlgmoe.layers.routers.frozen import FrozenTopK
from nlgmoe.layers.routers.hash import HashRouterConfig
from nlgmoe.layers.routers.sigmoid import SigmoidTopK
from nlgmoe.layers.routers.uniform import UniformRouterConfig

__all__ = ["FrozenTopK", "HashRouterConfig", "SigmoidTopK", "UniformRouterConfig"]

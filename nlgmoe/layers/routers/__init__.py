"""Routers other than the paper's (`layers/router.py`), one per file, for `model.config.moe.router` (docs/laboratory.md)."""

from nlgmoe.layers.routers.frozen import FrozenRouterConfig
from nlgmoe.layers.routers.hash import HashRouterConfig
from nlgmoe.layers.routers.sigmoid import SigmoidRouterConfig
from nlgmoe.layers.routers.uniform import UniformRouterConfig

__all__ = ["FrozenRouterConfig", "HashRouterConfig", "SigmoidRouterConfig", "UniformRouterConfig"]

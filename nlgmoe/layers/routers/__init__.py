"""Routers other than the paper's (`layers/router.py`), for `model.config.moe.router` (docs/laboratory.md)."""

from nlgmoe.layers.routers.fixed import FrozenRouterConfig, HashRouterConfig, UniformRouterConfig
from nlgmoe.layers.routers.sigmoid import SigmoidRouterConfig

__all__ = ["FrozenRouterConfig", "HashRouterConfig", "SigmoidRouterConfig", "UniformRouterConfig"]

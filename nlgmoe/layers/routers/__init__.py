"""Routers other than the paper's (`layers/router.py`), for `model.config.moe.router` (docs/laboratory.md)."""

from nlgmoe.layers.routers.fixed import FrozenRouterConfig, HashRouterConfig, UniformRouterConfig
from nlgmoe.layers.routers.hashed import HashedRouterConfig
from nlgmoe.layers.routers.quantile import QuantileRouterConfig
from nlgmoe.layers.routers.sigmoid import SigmoidRouterConfig
from nlgmoe.layers.routers.unit_weight import UnitWeightRouterConfig

__all__ = [
    "FrozenRouterConfig",
    "HashRouterConfig",
    "HashedRouterConfig",
    "QuantileRouterConfig",
    "SigmoidRouterConfig",
    "UniformRouterConfig",
    "UnitWeightRouterConfig",
]

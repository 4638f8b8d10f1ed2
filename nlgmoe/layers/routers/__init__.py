"""Routers beside the paper's (`layers/router.py`), a file each; `model.config.moe.router` names them."""

from nlgmoe.layers.routers.hash import HashRouterConfig
from nlgmoe.layers.routers.sigmoid import SigmoidTopK
from nlgmoe.layers.routers.softmax import SoftmaxTopK

__all__ = ["HashRouterConfig", "SigmoidTopK", "SoftmaxTopK"]

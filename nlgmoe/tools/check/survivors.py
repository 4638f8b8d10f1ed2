"""Experts of a checkpoint: all there, finite, and no two alike, as after a converter that loses some."""

from __future__ import annotations

import torch

from nlgmoe.layers.moe import MoELayer
from nlgmoe.tools.check.layer import Failed, Layer, NotApplicable
from nlgmoe.tools.check.own import OwnLayer


def experts_survived(layer: Layer) -> str:
    """Read the weights of every expert of a checkpoint."""
    if not isinstance(layer, OwnLayer) or layer.checkpoint is None:
        raise NotApplicable("the target is no checkpoint")
    from nlgmoe.checkpoint.portable import load_model  # its imports take seconds

    experts = layers = 0
    for name, module in load_model(layer.checkpoint).named_modules():
        if not isinstance(module, MoELayer):
            continue
        for stack, values in module.experts.named_parameters():
            if not stack.endswith("_weight"):
                continue
            rows = values.detach().flatten(1).float()  # [E, in * out]
            if not bool(rows.isfinite().all()):
                raise Failed(f"{name}.experts.{stack} is not finite")
            if empty := (rows.abs().amax(dim=1) == 0).nonzero().flatten().tolist():
                raise Failed(f"{name}.experts.{stack}: experts {empty[:8]} are zero")
            if len(rows) > 1 and len(different := torch.unique(rows, dim=0)) < len(rows):
                raise Failed(f"{name}.experts.{stack}: {len(rows)} experts, of which {len(different)} are different")
        experts, layers = experts + module.experts.count, layers + 1
    return f"{experts} experts of {layers} layers, all different"

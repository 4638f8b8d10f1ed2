"""Accelerators: the host must not wait for the device, and a GPU must agree with the CPU."""

from __future__ import annotations

import traceback
from contextlib import nullcontext
from unittest.mock import patch

import torch

from nlgmoe.device import default_device
from nlgmoe.tools.check.layer import Batch, Failed, Layer, NotApplicable, require_close

# How PyTorch refuses to tell values of tensors that have none.
READS = (
    "item()",
    "_local_scalar_dense",
    "nonzero",
    "tolist",
    "masked_select",
    "unique",
    "repeat_interleave",
    "bincount",
)


def host_reads_nothing(layer: Layer) -> str:
    """Run forward and backward on the `meta` device, whose tensors have no values: to read one is an error.

    `meta` is no CPU, so that the layer takes the way of an accelerator.
    """
    # A distribution checks its arguments on the host where it is made: once is enough, so that the first pass may.
    for training, checked in ((True, False), (True, True), (False, True)):
        module = layer.make(torch.bfloat16, training).to("meta")
        batch = Batch.random(layer, 2, 16, dtype=torch.bfloat16)
        batch = Batch(batch.x.to("meta").requires_grad_(), batch.tokens.to("meta"))
        try:
            # PyTorch knows no autocast for `meta`, and raises where a layer asks for it.
            with (
                patch("torch.is_autocast_enabled", return_value=False),
                patch("torch.autocast", lambda *args, **settings: nullcontext()),
                patch.object(torch.distributions.Distribution, "_validate_args", checked),
            ):
                output = layer.run(module, batch)
                loss = output.y.square().sum() + (0 if output.aux is None else output.aux)
                loss.backward()
                layer.after_step(module, [] if output.routing is None else [output.routing])
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            frames = [one for one in traceback.extract_tb(error.__traceback__) if "/torch/" not in one.filename]
            where = f"{frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno}: {frames[-1].line}"
            text = f"{error} {where}"
            if any(sign in text for sign in READS):
                raise Failed(f"the host reads the device ({where})") from None
            reason = " ".join(str(error).split())[:100]
            raise NotApplicable(f"the layer does not run without values ({where}: {reason})") from None
    return "forward and backward, on tensors without values"


def gpu_agrees_with_cpu(layer: Layer) -> str:
    """Compare output and gradient of the input with those of the CPU, in fp32."""
    device = default_device()
    if device == "cpu":
        raise NotApplicable("no GPU")
    found = []
    for target in ("cpu", device):
        module = layer.make(torch.float32, training=False).to(target)
        batch = Batch.random(layer, 4, 16, dtype=torch.float32)
        batch = Batch(batch.x.to(target).requires_grad_(), batch.tokens.to(target))
        output = layer.run(module, batch)
        output.y.square().sum().backward()
        assert batch.x.grad is not None
        found.append((output.y, batch.x.grad))
    for name, actual, expected in zip(("output", "gradient of the input"), found[1], found[0], strict=True):
        require_close(f"{name} on {device}", actual, expected, 1e-2)
    return f"{device} in fp32"

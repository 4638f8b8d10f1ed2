"""The setting `device` of commands that use a trained model."""

from __future__ import annotations

from nlgmoe.cli.errors import UsageError


def check_device(device: str) -> None:
    """Whether tensors can be put there.

    Raises:
        UsageError: they cannot.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UsageError(f"device={device} cannot be used here ({reason}); set it to cpu") from error

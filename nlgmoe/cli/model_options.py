"""Options that commands with a trained model share: `device`, `allow_code`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from nlgmoe.cli.errors import one_line
from nlgmoe.validation import SettingError


def check_device(device: str) -> None:
    """Check that tensors can be created on the device."""
    import torch

    try:
        torch.empty(1, device=device).tolist()  # raises for `meta`, which has no values
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise SettingError(f"device={device} cannot be used here ({reason}); set it to cpu") from error


def import_allowed(modules: Sequence[str] | None) -> None:
    """Import modules that the user trusts, for checkpoints that name their classes."""
    for module in modules or ():
        try:
            importlib.import_module(module)
        except Exception as error:  # the module's code may raise any exception
            reason = f"{type(error).__name__}: {one_line(str(error))}"
            raise SettingError(
                f"allow_code={module} cannot be imported ({reason}); start the command in its folder"
            ) from error

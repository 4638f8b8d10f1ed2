"""Arguments that commands share, checked before the work begins: output files, `device`, `allow_code`.

Output files are written completely or not at all.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from nlgmoe.cli.errors import one_line
from nlgmoe.files import atomic_write, yaml_beside
from nlgmoe.validation import RunError, SettingError


def check_output(output: str) -> None:
    """Check that a new file can have this name."""
    path = Path(output)
    if path.is_dir():
        raise SettingError(f"output={output} is a folder; give the name of a file")
    if path.exists():
        raise SettingError(f"output={output} exists already; name another file, or delete it")
    require_folder(path)


def require_folder(output: Path) -> None:
    """Check that the folder of a file to write exists."""
    if not output.absolute().parent.is_dir():
        raise SettingError(f"output={output}: there is no folder {output.absolute().parent}; make it first")


def write_whole(output: str, text: str) -> None:
    """Write a new file under a temporary name, then rename it; an existing file stays if that fails."""
    try:
        with atomic_write(Path(output)) as temporary:
            temporary.write_text(text, encoding="utf-8")
            check_output(output)
    except OSError as error:
        raise RunError(f"output={output} cannot be written ({error.strerror}); make room, or name another") from error


def check_new_checkpoint(setting: str, checkpoint: str, overwrite: bool, settings: bool = True) -> None:
    """Check that a checkpoint can be written under this name, before anything is computed for it.

    Args:
        setting: name of the argument.
        checkpoint: its value.
        overwrite: a checkpoint of that name may be replaced.
        settings: `NAME.yaml` is written beside it.
    """
    path = Path(checkpoint)
    if path.suffix != ".ckpt":
        raise SettingError(f"{setting}={checkpoint} does not end in .ckpt; name it {path.name}.ckpt")
    if path.is_file():
        raise SettingError(f"{setting}={checkpoint} is a file; a checkpoint is a folder: name another")
    if path.exists() and not overwrite:
        raise SettingError(f"{setting}={checkpoint} exists already; name another, or add --overwrite")
    if settings and yaml_beside(path).exists() and not overwrite:
        raise SettingError(
            f"{setting}={checkpoint}: {yaml_beside(path)} beside it exists already; name another, or add --overwrite"
        )


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

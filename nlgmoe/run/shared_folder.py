"""Whether all ranks see the run folder that rank 0 has locked, with the checkpoint that it resumes."""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path

from torch import distributed

from nlgmoe.checkpoint.run_checkpoints import checkpoint_path, saved_steps
from nlgmoe.ranks import of_rank_zero, raise_on_all_ranks
from nlgmoe.validation import SettingError

PATIENCE = 10.0  # seconds after which a shared file system shows a new file on all nodes


def require_shared_folder(folder: Path) -> None:
    """Check that every rank sees a new file of rank 0 in the run folder, and its newest checkpoint there. A collective."""
    wanted: list[Path] = []  # in the folder
    with raise_on_all_ranks():
        if distributed.get_rank() == 0:
            with tempfile.NamedTemporaryFile(prefix=".shared.writing-", dir=folder, delete=False) as file:
                newest = (checkpoint_path(Path(), step) for step in saved_steps(folder)[-1:])
                wanted = [Path(Path(file.name).name), *newest]
    wanted = of_rank_zero(wanted)
    try:
        with raise_on_all_ranks():
            deadline = time.monotonic() + PATIENCE
            while missing := [path for path in wanted if not (folder / path).exists()]:
                if time.monotonic() > deadline:
                    raise SettingError(
                        f"trainer.default_root_dir={folder} on {socket.gethostname()} lacks {missing[-1]}, which rank 0 has "
                        "there: all ranks must share the run folder; choose one on a file system of all nodes"
                    )
                time.sleep(0.1)
    finally:
        if distributed.get_rank() == 0:
            (folder / wanted[0]).unlink()

"""Jobs on several gloo ranks of this machine."""

import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def spawn(ranks: int, job: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """Run `job(*args)` on every rank; what each returned.

    Raises:
        AssertionError: a rank raised; the message has its traceback.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    processes = multiprocessing.start_processes(
        _rank, (ranks, port, job, args, folder), nprocs=ranks, start_method="forkserver", join=False
    )
    assert processes is not None
    try:
        while not processes.join():
            pass
    except Exception as error:
        errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
        raise AssertionError("\n".join(errors) or str(error)) from None
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, job: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> None:
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"  # Lightning then takes the processes as they are
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        result = job(*args)
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))

"""Requeueing of Slurm jobs."""

from __future__ import annotations

import os
import signal
import subprocess

from lightning import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


def requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """Return the signal after which the job is requeued; None without Slurm or `auto_requeue`."""
    environment = trainer._accelerator_connector.cluster_environment
    return (
        environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
    )


def requeue() -> None:
    """Requeue the job with `scontrol`, as Lightning does. Warns if that fails, because the run is saved."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error.strerror
        rank_zero_warn(f"scontrol requeue {job} failed ({reason}); submit the job again")
    else:
        rank_zero_info(f"Slurm job {job} is requeued")
